"""Make benchmarks.md and its pictures: the tables on real pairs and on artifacts of known place and strength.

By the commands a user would type. Needs ``../shared/data/pairs`` and some twenty minutes on two cores; what is done is
not repeated.

    python docs/benchmarks.py FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from desra_core.benchmarking.annotated_results import THRESHOLD
from desra_core.benchmarking.injection import KINDS
from desra_core.benchmarking.synthetic import BUDGETS
from desra_core.report.charts import line_chart, save, small_charts

HERE = Path(__file__).parent
FOLDS = 4
PAIRS = HERE.parents[1] / "shared" / "data" / "pairs"
SYNTHETIC = {"as they are": (), "without known artifacts": ("--exclude", str(PAIRS / "gt_mask"))}
INTRODUCTION = """\
# Benchmarks

*Made by `python docs/benchmarks.py FOLDER`. Only these paragraphs are written by hand.*

The pairs are results of eight real photos, by a real x4 network that was trained with L1 and finetuned with a GAN loss.
**Their ground truth stands in for human masks**: the first two sections show the tables, and that the numbers are
computed as published; they do not rank methods. The third section shows which artifacts each method finds: artifacts of
known place, kind and strength are injected. The last section is about a detector that was learned.
"""
RECALL = """\
*A method that marks most of a clean image, as LDL does here, is measured only at the few places that it does not
mark.*"""


def main(folder: Path) -> None:
    """Run everything and write the page."""
    (HERE / "benchmarks").mkdir(exist_ok=True)
    parts = [INTRODUCTION, evaluation(), pairs(folder), synthetic(folder), learned(folder)]
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


def learned(folder: Path) -> str:
    """A detector that was learned on three quarters of the pairs, judged on the others, four times."""
    names = sorted(path.name for path in (PAIRS / "gan_sr").iterdir())
    found = []
    for fold in range(FOLDS):
        part = folder / f"learned-{fold}"
        for number, name in enumerate(names):
            kind = "judge" if number % FOLDS == fold else "learn"
            for role in ("mse_sr", "gan_sr", "labels", "gt_mask"):
                link = part / kind / role / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(PAIRS / role / name)
        detector = part / "learned.json"
        # Another seed than the benchmark's: neither scenes nor patterns of artifacts are those that are judged.
        pairs_of = [f"--{role.replace('_', '-')}={part}/{{}}/{role}" for role in ("mse_sr", "gan_sr")]
        if not detector.exists():
            desra("train-detector", *(text.format("learn") for text in pairs_of), "--seed=1", f"--output={detector}")
        desra("benchmark", "synthetic", *(text.format("judge") for text in pairs_of), f"--labels={part}/judge/labels",
              f"--exclude={part}/judge/gt_mask", f"--methods=desra,{detector}", f"--output={part}/bench")  # fmt: skip
        text = (part / "bench" / "synthetic.json").read_text()
        found.append(json.loads(text.replace(json.dumps(str(detector)), '"learned"')))
    methods = [row["method"] for row in found[0]["methods"]]
    rows = []
    for method in methods:
        own = pooled(found, [row for document in found for row in document["methods"] if row["method"] == method])
        cells = [f"{own.recall:.0%}", f"{own.marked:.3%}"]
        for kind in KINDS:
            some = [row for document in found for row in document["recall"]
                    if (row["method"], row["kind"]) == (method, kind)]  # fmt: skip
            cells.append(f"{sum(row['found'] for row in some) / sum(row['counted'] for row in some):.0%}")
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    prices = [f"| {method} | " + " | ".join(f"{price(found, method, limit):.1%}" for limit in BUDGETS) + " |"
              for method in methods]  # fmt: skip
    kinds = [kind.replace("_", " ") for kind in KINDS]
    return "\n".join([
        "## A detector that was learned", "",
        f"`desra train-detector` on clean pairs: into {len(names) * (FOLDS - 1) // FOLDS} of the scenes artifacts are "
        f"injected, and it is judged by `desra benchmark synthetic` on the other {len(names) // FOLDS}. "
        f"{FOLDS} times, so that each scene is judged once by a detector that has not seen it. Known artifacts are "
        "left out.", "",
        f"| at its own threshold | recall | clean pixels marked | {' | '.join(kinds)} |",
        "| --- " * (3 + len(kinds)) + "|", *rows, "",
        f"| recall where at most so much is marked | {' | '.join(f'{limit:.1%}' for limit in BUDGETS)} |",
        "| --- " * (1 + len(BUDGETS)) + "|", *prices, "",
    ])  # fmt: skip


class Pooled(NamedTuple):
    """Recall and share of clean pixels marked over several benchmarks."""

    recall: float
    marked: float


def pooled(documents: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Pooled:
    """Pool a row of each of several benchmarks."""
    found, counted, marked = (sum(row[name] for row in rows) for name in ("found", "counted", "false_pixels"))
    most = [max(document["curve"], key=lambda row: row["false_pixels"]) for document in documents]
    clean = sum(row["false_pixels"] / row["false_pixel_share"] for row in most)
    return Pooled(found / counted, marked / clean)


def price(documents: list[dict[str, Any]], method: str, limit: float) -> float:
    """Find the highest recall at one multiple of the threshold and one least area that marks at most so much."""
    curves = [[row for row in document["curve"] if row["method"] == method] for document in documents]
    points = [pooled(documents, list(rows)) for rows in zip(*curves, strict=True)]
    return max((point.recall for point in points if point.marked <= limit), default=0.0)


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
