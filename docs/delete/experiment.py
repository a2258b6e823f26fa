"""The Delete experiment: does a finetune on a few pseudo ground truths delete artifacts on unseen photos.

Mines the photos of ``photos.py`` with the demo's model pair, finetunes, and judges by the images of ``held_out.txt``,
all by the commands a user would type. Needs ``../shared/data`` and, on two cores, an hour. What is done is not
repeated.
Writes ``results.json``, ``results.md`` and ``regions.png``.

    python docs/delete/experiment.py FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from photos import make_photos
from PIL import Image, ImageDraw, ImageFont
from pydantic import TypeAdapter

from desra_core.evaluation.table import as_markdown
from desra_core.gate.criteria import Verdict, score_rows

HERE = Path(__file__).parent
MODELS = HERE.parents[1] / "tests" / "models"
SEEDS = (0, 1, 2)
# Chosen by tuning.py, on the training pool.
RECIPE = ["--gan-weight", "0.1", "--mask-share", "0.3", "--keep-weight", "1", "--iterations", "600",
          "--checkpoint-every", "150", "--discriminator", str(MODELS / "discriminator.pth")]  # fmt: skip
PLAIN = ["--gan-weight", "0", "--iterations", "600", "--checkpoint-every", "150"]
# Seed 0 of the recipe is what the cycle itself trains.
FINETUNES = {
    "DeSRA, seed 1": [*RECIPE, "--seed", "1"],
    "DeSRA, seed 2": [*RECIPE, "--seed", "2"],
    "L1 only": PLAIN,
    "MSE only": [*PLAIN, "--pixel", "l2"],
}
# Rows of the picture, and the largest side of a region in it.
ROWS, LARGEST = 5, 220
KINDS = {"lr": "LR, x4", "mse_sr": "MSE-SR", "before": "GAN-SR before", "after": "GAN-SR after"}


def main(folder: Path) -> None:
    """Run what has not been run, and write the results."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "photos").exists():
        make_photos(folder / "photos")
    workspace = folder / "workspace"
    results = folder / "results"
    results.mkdir(exist_ok=True)
    _once(results / "cycle.json", ["cycle", folder / "photos", "--mse-model", MODELS / "mse.pth", "--gan-model",
          MODELS / "gan.pth", *_common(workspace), "--preset", "cpu", "--no-promote", "--no-rounds", *RECIPE],
          workspace)  # fmt: skip
    _check_held_out(workspace)
    for name, flags in FINETUNES.items():
        run = folder / name.replace(", ", "-").replace(" ", "-")
        finetune = ["finetune", *_common(workspace), "--output", run, "--preset", "cpu", *flags]
        _once(results / f"{name}.trained", finetune, workspace)
        _once(results / f"{name}.json", ["compare", *_common(workspace), "--no-rounds", "--after", run], workspace)
    twin = ["compare", *_common(workspace), "--after", MODELS / "mse.pth"]
    _once(results / "MSE twin.json", twin, workspace)
    _write(results)


def _common(workspace: Path) -> list[Any]:
    return ["--workspace", workspace, "--group-by", "folder"]


def _once(result: Path, arguments: list[Any], workspace: Path) -> None:
    """Run a command unless its result is there; the result is the verdict, and the seconds that it took."""
    if result.exists():
        return
    started = time.monotonic()
    command = [sys.executable, "-m", "deployments.cli", *map(str, arguments)]
    code = subprocess.run(command, cwd=HERE.parents[1], check=False).returncode
    if code not in (0, 3):
        sys.exit(code)
    document = {"seconds": round(time.monotonic() - started)}
    if arguments[0] != "finetune":
        document |= json.loads((workspace / "gate" / "verdict.json").read_text())
    result.write_text(json.dumps(document))


def _check_held_out(workspace: Path) -> None:
    """See that the judges are the images that were fixed before the first finetune."""
    lines = [line for line in (HERE / "held_out.txt").read_text().splitlines() if not line.startswith("#")]
    fixed = {line.split(maxsplit=1)[1] for line in lines}
    judges = set(json.loads((workspace / "gate" / "verdict.json").read_text())["images"])
    assert judges == fixed, sorted(judges ^ fixed)


def _write(results: Path) -> None:
    cycle = json.loads((results / "cycle.json").read_text())
    documents = {"DeSRA, seed 0": cycle}
    for name in (*FINETUNES, "MSE twin"):
        documents[name] = json.loads((results / f"{name}.json").read_text())
    verdicts = {name: TypeAdapter(Verdict).validate_python(document["verdict"]) for name, document in documents.items()}
    summary = [_summary(name, verdict) for name, verdict in verdicts.items()]
    tables = [f"### {name}\n\n{as_markdown(score_rows(verdict))}\n" for name, verdict in verdicts.items()]
    text = f"`desra cycle` took {cycle['seconds']} s.\n\n{as_markdown(summary)}\n\n" + "\n".join(tables)
    (HERE / "results.md").write_text(text)
    gate = results.parent / "workspace" / "gate"
    _draw(_shown(cycle["pictures"][0]["crops"], gate), gate).quantize(256).save(HERE / "regions.png")


def _summary(name: str, verdict: Verdict) -> dict[str, str]:
    row = next(row for row in score_rows(verdict) if row["candidate"] == verdict.best)
    gate = "passed" if verdict.passed else "failed: " + " ".join(verdict.reasons)
    return {"finetune": name, "best": row.pop("candidate"), **row, "gate": gate}


def _shown(crops: dict[str, str], gate: Path) -> list[dict[str, Any]]:
    """The most severe regions that can be shown pixel by pixel, one of an image; ``crops`` are those of any region."""
    folders = {kind: Path(path).parent for kind, path in crops.items()}
    found = []
    for path in (gate / folders["after"]).glob("*.json"):
        document = json.loads(path.read_text())
        worst = sorted(document["regions"], key=lambda region: -region["severity"])[:2]
        shown = [rank for rank, region in enumerate(worst) if max(region["width"], region["height"]) <= LARGEST]
        for rank in shown[:1]:
            names = {kind: folder / f"{path.stem}-{rank}-{kind}.webp" for kind, folder in folders.items()}
            found.append({"image": document["image"], "severity": worst[rank]["severity"], "crops": names})
    return sorted(found, key=lambda picture: -picture["severity"])[:ROWS]


def _draw(pictures: list[dict[str, Any]], gate: Path) -> Image.Image:
    """A row per region: LR, MSE-SR, and GAN-SR before and after."""
    side, margin, caption = 240, 6, 20
    size = (len(KINDS) * (side + margin) + margin, len(pictures) * (side + caption + margin) + margin)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for row, picture in enumerate(pictures):
        for column, (kind, title) in enumerate(KINDS.items()):
            crop = Image.open(gate / picture["crops"][kind])
            crop = crop.resize((side, side), Image.Resampling.LANCZOS)
            corner = margin + column * (side + margin), margin + row * (side + caption + margin)
            pen.text(corner, f"{picture['image']}: {title}" if column == 0 else title, fill="black", font=font)
            canvas.paste(Image.fromarray(np.asarray(crop)), (corner[0], corner[1] + caption))
    return canvas


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
