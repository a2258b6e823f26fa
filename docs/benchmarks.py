"""Make benchmarks.md and its pictures: the tables on real pairs and on artifacts of known place and strength.

By the commands a user would type. Needs ``../shared/data/pairs`` and some ten minutes on two cores; what is done is
not repeated.

    python docs/benchmarks.py FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from desra_core.benchmarking.annotated_results import THRESHOLD
from desra_core.report.charts import line_chart, save, small_charts

HERE = Path(__file__).parent
PAIRS = HERE.parents[1] / "shared" / "data" / "pairs"
SYNTHETIC = {"as they are": (), "without known artifacts": ("--exclude", str(PAIRS / "gt_mask"))}
INTRODUCTION = """\
# Benchmarks

*Made by `python docs/benchmarks.py FOLDER`. Only these paragraphs are written by hand.*

The pairs are results of eight real photos, by a real x4 network that was trained with L1 and finetuned with a GAN loss.
**Their ground truth stands in for human masks**: the first two sections show the tables, and that the numbers are
computed as published; they do not rank methods. The third section shows which artifacts each method finds: artifacts of
known place, kind and strength are injected.
"""
RECALL = """\
*A method that marks most of a clean image, as LDL does here, is measured only at the few places that it does not
mark.*"""


def main(folder: Path) -> None:
    """Run everything and write the page."""
    (HERE / "benchmarks").mkdir(exist_ok=True)
    parts = [INTRODUCTION, evaluation(), pairs(folder), synthetic(folder)]
    told = "\n".join(parts).replace(str(folder), "FOLDER")
    (HERE / "benchmarks.md").write_text(told, "utf-8")


def evaluation() -> str:
    """The published scripts' numbers and those of desra evaluate."""
    masks = PAIRS / "reference_mask" / "plain_t0.7_a400"
    command = ["evaluate", "--masks", str(masks), "--gt", str(PAIRS / "gt_mask")]
    told = desra(*command)
    ours = json.loads(desra(*command, "--json"))
    theirs = json.loads((PAIRS / "metrics.json").read_text())["published_scripts"]
    rows = [f"| {name} | {theirs[name]!r} | {ours[name]!r} |" for name in ("iou", "precision", "recall")]
    return "\n".join([
        "## The published scripts and `desra evaluate`", "", "```", shown(command), told.rstrip(), "```", "",
        "| | the authors' scripts | desra evaluate |", "| --- | --- | --- |", *rows, "",
    ])  # fmt: skip


def pairs(folder: Path) -> str:
    """All methods on the pairs."""
    output = folder / "pairs"
    command = ["benchmark", str(PAIRS), "--output", str(output), "--min-area", "400"]
    desra(*command)
    document = json.loads((output / "benchmark.json").read_text())
    drawn = {
        name: [(point["recall"], point["precision"]) for point in points if None not in point.values()]
        for name, points in document["curves"].items()
    }
    save(line_chart(drawn, xlabel="recall", ylabel="precision"), HERE / "benchmarks" / "precision.png")
    ranking = small_charts(document["sensitivity"], ylabel="mean rank", log_x=[THRESHOLD])
    save(ranking, HERE / "benchmarks" / "sensitivity.png")
    return "\n".join([
        "## All methods on the pairs", "", "```", shown(command), "```", "", demoted(output / "benchmark.md"), "",
        "![Precision over recall, by threshold](benchmarks/precision.png)", "",
        "![Mean rank by overlap, dilation and threshold](benchmarks/sensitivity.png)", "",
    ])  # fmt: skip


def synthetic(folder: Path) -> str:
    """All methods on injected artifacts."""
    told = ["## Injected artifacts", ""]
    for number, (title, options) in enumerate(SYNTHETIC.items()):
        output = folder / f"synthetic-{number}"
        command = ["benchmark", "synthetic", "--mse-sr", str(PAIRS / "mse_sr"), "--gan-sr", str(PAIRS / "gan_sr"),
                   "--labels", str(PAIRS / "labels"), "--output", str(output), *options]  # fmt: skip
        desra(*command)
        told += [f"### The pairs {title}", "", "```", shown(command), "```", ""]
        told += [demoted(output / "synthetic.md", by=2), ""]
        if not options:
            told += [RECALL, ""]
    return "\n".join(told)


def desra(*command: str) -> str:
    """Run a command; return what it prints."""
    run = subprocess.run(
        [sys.executable, "-m", "deployments.cli", *command], stdout=subprocess.PIPE, text=True, check=True
    )
    return run.stdout


def shown(command: list[str]) -> str:
    """A command as it is shown: paths as from the checkout."""
    return "$ desra " + " ".join(command).replace(str(PAIRS), "../shared/data/pairs")


def demoted(path: Path, by: int = 1) -> str:
    """A Markdown file without its title, its headings one or more levels lower."""
    lines = path.read_text("utf-8").splitlines()[2:]
    return "\n".join("#" * by + line if line.startswith("#") else line for line in lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
