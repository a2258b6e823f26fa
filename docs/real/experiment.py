"""The experiment on real models: twin, mining, finetune and gate of three published GAN models.

For each model: trains its twin on sharp photos, mines the photos of ``photos.py``, fixes the list of held-out images,
finetunes, and judges by these images, by the commands a user would type (but for the finetune on whole MSE results).
Needs ``../shared/data`` and, on two cores, some hours. What is done is not repeated. Writes ``held_out.txt``,
``results.md`` and ``regions.png`` of each model beside this file, and ``FOLDER/MODEL/crops.png``.

    python -m docs.real.experiment FOLDER [MODEL]
"""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import TypeAdapter

from desra_core.detection import find_regions
from desra_core.detection.detectors import DetectorInputs, applied
from desra_core.detection.mask import WINDOW, score_mask
from desra_core.detection.similarity import TILE, variance_similarity
from desra_core.evaluation.fidelity import psnr, squared_error
from desra_core.evaluation.metrics import compare_masks, pooled
from desra_core.evaluation.table import as_markdown
from desra_core.gate.criteria import Verdict, score_rows
from desra_core.images.codec import Pixels, decode, decode_mask
from desra_core.images.parts import window_around
from desra_core.networks import load_model, super_resolve
from desra_core.planning.plan import load_settings
from desra_core.settings import Mining
from desra_core.settings.models import Finetuning
from desra_core.training.degradation import degrade
from desra_core.training.patches import freeze
from desra_core.training.plan import begin, plan_finetune
from desra_core.training.pools import Pools
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import find_array
from docs.real.photos import DATA, SCALE, make_photos
from docs.references import THRESHOLD, row
from tasks.logs import say

HERE = Path(__file__).parent
MIN_AREA = 2000
SELF = "twin by --self"
WHOLE = ", without rounds"  # the same verdict by all candidates on all images, and the further seconds that it takes


class Study(NamedTuple):
    """A GAN model, the number format of its networks, its steps and how often they are saved, and what else is set."""

    checkpoint: str
    precision: str
    iterations: int
    checkpoint_every: int
    finetunes: dict[str, dict[str, Any]]


SEED, MSE_TARGETS = "seed 0", "targets are the MSE results"  # `_freeze_mse_results` prepares the last one
# RRDBNet loses much detail at the usual rate. The usual average of the weights covers more steps than there are.
SLOW = {"learning_rate": 2e-5, "ema": 0.98, "warmup": 72}
LARGE = {
    SEED: SLOW,
    "120 steps": SLOW | {"iterations": 120, "checkpoint_every": 30},
    "L1 only": SLOW | {"gan_weight": 0},
    "usual rate and average": {},
}
SMALL: dict[str, dict[str, Any]] = {
    **{f"seed {seed}": {"seed": seed} for seed in range(3)},
    "average of 50 steps": {"ema": 0.98},
    "L1 only": {"gan_weight": 0},
    MSE_TARGETS: {},
    **{f"mask share {share}": {"mask_share": share} for share in (0, 0.3, 1)},
    "keep weight 1": {"keep_weight": 1},
    **{f"{count} images": {"images": count} for count in (5, 10)},
}
# On a CPU with AMX, inference in bfloat16 takes a quarter of the time.
STUDIES = {
    "RealESRGAN_x4plus": Study("RealESRGAN_x4plus.safetensors", "bfloat16", 60, 10, LARGE),
    "RealSR_DF2K": Study("RealSR_DF2K_x4.safetensors", "bfloat16", 60, 10, LARGE),
    "realesr-general-x4v3": Study("realesr-general-x4v3.pth", "float32", 300, 75, SMALL),
}
ROWS, LARGEST, CROPS = 5, 220, 30
LARGEST_JUDGED = 512  # the largest side of a sharp photo that judges twins
KINDS = {"lr": "photo, x4", "before": "GAN-SR before", "mask": "mask", "after": "GAN-SR after"}


class Place(NamedTuple):
    """Where a study works: the folder of all of them, its own, and its workspace."""

    shared: Path
    own: Path

    @property
    def workspace(self) -> Path:
        """The workspace."""
        return self.own / "workspace"

    @property
    def self_twin(self) -> Path:
        """The twin that was trained on the photos to mine."""
        return self.own / "twin-self.pth"

    @property
    def results(self) -> Path:
        """The verdicts, a JSON file each."""
        return self.own / "results"


def main(folder: Path, only: str | None = None) -> None:
    """Run what has not been run, and write the results."""
    if not (folder / "photos").exists():
        make_photos(folder / "sharp", folder / "unfinished")
        (folder / "unfinished").rename(folder / "photos")
    for name in [only] if only else list(STUDIES):
        _study(name, Place(folder, folder / name))


def _study(name: str, place: Place) -> None:
    study = STUDIES[name]
    place.results.mkdir(parents=True, exist_ok=True)
    gan, twin = DATA / "weights" / study.checkpoint, place.own / "twin.pth"
    _once(place, "twin", "twin", place.shared / "sharp", gan_model=gan, output=twin, preset="cpu",
          amp=study.precision)  # fmt: skip
    _once(place, "mined", "mine", place.shared / "photos", mse_model=twin, gan_model=gan, workspace=place.workspace,
          min_area=MIN_AREA, keep_mse=True, precision=study.precision)  # fmt: skip
    held_out = _held_out(place)
    recipe = {"preset": "cpu", "iterations": study.iterations, "checkpoint_every": study.checkpoint_every,
              "warmup": study.iterations * 3 // 5, "amp": study.precision}  # fmt: skip
    common = {"workspace": place.workspace, "group_by": "folder"}
    titles = []
    for title, changes in study.finetunes.items():
        run = place.own / title.replace(" ", "-")
        settings = common | {"output": run} | recipe | changes
        if title == MSE_TARGETS:
            _freeze_mse_results(Finetuning(**settings))
        _once(place, f"{title}.trained", "finetune", **settings)
        _once(place, title, "compare", **common, after=run)
        titles.append(title)
        if study.finetunes is SMALL and title.startswith("seed"):
            _once(place, f"{title}{WHOLE}", "compare", **common, after=run, no_rounds=True)
            titles.append(f"{title}{WHOLE}")
    titles.append("MSE twin")
    _once(place, titles[-1], "compare", **common, after=twin)
    if study.finetunes is SMALL:
        photos = place.shared / "photos"
        _once(place, SELF, "twin", photos, self=True, gan_model=gan, output=place.self_twin, preset="cpu")
        _once(place, f"mined, {SELF}", "mine", photos, mse_model=place.self_twin, gan_model=gan,
              workspace=place.own / "workspace-self", min_area=MIN_AREA)  # fmt: skip
        titles.append(f"MSE {SELF}")
        _once(place, titles[-1], "compare", **common, after=place.self_twin)
    judges = set(_verdict(place, SEED)[0]["images"])
    assert judges <= held_out.keys(), sorted(judges - held_out.keys())
    _write(name, place, titles)


def _once(place: Place, title: str, verb: str, *arguments: Path, **flags: Any) -> None:
    """Run a command unless its result is there: the seconds and the peak memory, and the verdict where it judges."""
    result = place.results / f"{title}.json"
    if result.exists():
        return
    say(f"{place.own.name}: {title}")
    command = [sys.executable, "-m", "deployments.cli", verb, *map(str, arguments)]
    for key, value in flags.items():
        command += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=HERE.parents[1])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in ((0, 3) if verb == "compare" else (0,)):
        sys.exit(process.returncode)
    document: dict[str, Any] = {"seconds": round(time.monotonic() - started), "peak MB": usage.ru_maxrss // 1024}
    if verb == "compare":
        document |= json.loads(Workspace(place.workspace).verdict.read_bytes())
    result.write_text(json.dumps(document))


def _held_out(place: Place) -> dict[str, str]:
    """Fix the held-out images before the first finetune, in a file that is checked afterwards; return ids by name."""
    workspace = Workspace(place.workspace)
    fixed = HERE / place.own.name / "held_out.txt"
    if not fixed.exists():
        with workspace.locked():
            pools = Pools(workspace, *load_settings(workspace), "folder")
            images = [entry.image for entry in pools.with_artifacts("held_out")] + pools.clean("held_out", 1000)
        fixed.parent.mkdir(exist_ok=True)
        fixed.write_text("".join(f"{image.id} {image.names[0]}\n" for image in images))
    return {name: key for key, name in (line.split(maxsplit=1) for line in fixed.read_text().splitlines())}


def _freeze_mse_results(settings: Finetuning) -> None:
    """Begin a finetune on whole MSE results, in place of pseudo-GTs by mask."""
    workspace = Workspace(settings.workspace)
    with workspace.locked():
        plan = plan_finetune(settings)
        if plan.run.models():
            return
        begin(plan, SCALE)
    for number, image in enumerate(json.loads(plan.run.document.read_text())["images"]):
        lr, mse_sr, mask = (
            decode(path.read_bytes(), path).pixels
            for path in (workspace.dataset(kind, image["name"]) for kind in ("lr", "mse_sr", "mask"))
        )
        freeze(plan.run.data / f"{number:04d}", (lr, mse_sr, mask[:, :, 0] > 0))


def _verdict(place: Place, title: str) -> tuple[dict[str, Any], Verdict]:
    document = json.loads((place.results / f"{title}.json").read_text())
    return document, TypeAdapter(Verdict).validate_python(document["verdict"])


def _write(name: str, place: Place, titles: list[str]) -> None:
    documents = {title: _verdict(place, title) for title in titles}
    summary = []
    for title, (document, verdict) in documents.items():
        row = next(row for row in score_rows(verdict) if row["candidate"] == verdict.best)
        row.pop("judged on", None)
        trained = place.results / f"{title}.trained.json"
        seconds = json.loads(trained.read_text())["seconds"] if trained.exists() else ""
        gate = "passed" if verdict.passed else "failed: " + " ".join(verdict.reasons)
        times = {"seconds to train": seconds, "seconds to judge": document["seconds"]}
        summary.append({"finetune": title, "best": row.pop("candidate"), **row, "gate": gate} | times)
    others = ["twin", "mined", *([SELF, f"mined, {SELF}"] if f"MSE {SELF}" in titles else [])]
    costs = [{"command": title} | json.loads((place.results / f"{title}.json").read_text()) for title in others]
    tables = [f"### {title}\n\n{as_markdown(score_rows(verdict))}\n" for title, (_, verdict) in documents.items()]
    parts = [as_markdown(costs), as_markdown(summary), as_markdown(_other_detectors(place)), *tables]
    if f"MSE {SELF}" in titles:
        parts += [as_markdown(_judged_twins(place)), as_markdown([_agreement(place)])]
    (HERE / name / "results.md").write_text("\n\n".join(parts))
    picture = _draw(place, 1, 240, largest=LARGEST, rows=ROWS)
    picture.quantize(256).save(HERE / name / "regions.png")
    _draw(place, 2, 160).save(place.own / "crops.png")


def _other_detectors(place: Place) -> list[dict[str, Any]]:
    """Count what other detectors mark on the held-out images, before and after the best finetune of seed 0."""
    result_file = place.results / "other detectors.json"
    if result_file.exists():
        return list(json.loads(result_file.read_text()))
    document, _ = _verdict(place, SEED)
    workspace = Workspace(place.workspace)
    mining, target = load_settings(workspace)
    assert isinstance(mining, Mining)
    found: dict[tuple[str, str], list[int]] = {}
    for name in document["images"]:
        path = next(path for path in (place.shared / "photos").glob(f"{glob.escape(name)}.*"))
        lr = decode(path.read_bytes(), path).pixels[:, :, :3]

        def result(model: Path, role: str = "", key: str | None = None, name: str = name, lr: Pixels = lr) -> Pixels:
            stored = find_array(workspace, _held_out(place)[name], role, key=key) if key else None
            return super_resolve(load_model(model, precision=mining.precision), lr).pixels if stored is None else stored

        mse_sr = result(Path(mining.mse_model), "mse_sr", target.mse_sr_key)
        before = result(mining.gan_model, "gan_sr", target.gan_sr_key)
        for state, gan_sr in (("before", before), ("after", result(Path(document["best"]["file"])))):
            inputs = DetectorInputs(mse_sr, gan_sr, lr)
            for method in ("desra", "ldl", "ssim"):
                detector = applied(method)
                scores = detector.score(name, inputs, WINDOW, TILE, 1)
                mask = score_mask(scores, mse_sr.shape[:2], threshold=detector.score_threshold, min_area=MIN_AREA)
                counts = found.setdefault((method, state), [0, 0, 0])
                regions = len(find_regions(mask, -scores))
                counts[:] = [counts[0] + regions, counts[1] + (regions > 0), counts[2] + int(mask.sum())]
    rows = [
        {"detector": method, "finetune": state, "regions": regions, "images": images, "pixels": pixels}
        for (method, state), (regions, images, pixels) in found.items()
    ]
    result_file.write_text(json.dumps(rows))
    return rows


def _judged_twins(place: Place) -> list[dict[str, str]]:
    """Score both twins and the GAN model on the photos that the twin from sharp photos held out."""
    document = json.loads((place.own / "twin.json").read_text())
    models = {"GAN model": Path(document["parent"]["path"]), "twin": place.own / "twin.pth", SELF: place.self_twin}
    errors, similarities, pixels = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0), 0
    held_out = [Path(photo["path"]) for photo in document["photos"] if photo["pool"] == "held_out"]
    for seed, path in enumerate(held_out):
        photo = decode(path.read_bytes(), path).pixels
        height, width = (min(LARGEST_JUDGED, side) // SCALE * SCALE for side in photo.shape[:2])
        sharp = np.ascontiguousarray(photo[:height, :width, :3])
        degraded = degrade(sharp.astype(np.float32) / np.float32(255), SCALE, "real", (seed,))
        lr = np.rint(degraded * 255).astype(np.uint8)
        pixels += height * width
        for title, model in models.items():
            sr = super_resolve(load_model(model), lr).pixels
            errors[title] += squared_error(sharp, sr, np.ones((height, width), np.bool_))
            similarities[title] += float(variance_similarity(sr, sharp).mean()) / len(held_out)
    return [
        {
            "model": title,
            "photos": str(len(held_out)),
            "PSNR dB": f"{psnr(errors[title], pixels):.2f}",
            "mean similarity of result and sharp photo": f"{similarities[title]:.3f}",
        }
        for title in models
    ]


def _agreement(place: Place) -> dict[str, str]:
    """Hold the masks by the --self twin against those by the twin from sharp photos."""
    truth = Workspace(place.workspace).masks
    masks = Workspace(place.own / "workspace-self").masks
    pairs = [
        [decode_mask(path.read_bytes(), path) for path in (masks / path.relative_to(truth), path)]
        for path in sorted(truth.rglob("*.png"))
    ]
    return row(SELF, THRESHOLD, pooled(compare_masks(*pair) for pair in pairs))


def _draw(place: Place, per_image: int, side: int, *, largest: float = np.inf, rows: int = CROPS) -> Image.Image:
    """Draw the most severe held-out regions of up to ``largest`` px a side: photo, result, mask and result after."""
    document, _ = _verdict(place, SEED)
    workspace = Workspace(place.workspace)
    folders = {kind: workspace.gate / Path(path).parent for kind, path in document["pictures"][0]["crops"].items()}
    found = []
    for path in folders["after"].glob("*.json"):
        judgement = json.loads(path.read_text())
        severe = [region for region in judgement["regions"] if region["severity"] >= 0]  # others have no crops
        worst = sorted(severe, key=lambda region: -region["severity"])[:2]
        shown = [rank for rank, region in enumerate(worst) if max(region["width"], region["height"]) <= largest]
        found += [(worst[rank], judgement["image"], path.stem, rank) for rank in shown[:per_image]]
    found = sorted(found, key=lambda each: -each[0]["severity"])[:rows]
    margin, caption = 6, 20
    size = (len(KINDS) * (side + margin) + margin, len(found) * (side + caption + margin) + margin)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for number, (region, name, key, rank) in enumerate(found):
        path = workspace.masks / f"{name}.png"
        mask = decode_mask(path.read_bytes(), path)
        window = window_around(*(region[each] for each in ("x", "y", "width", "height")), mask.shape)
        for column, (kind, title) in enumerate(KINDS.items()):
            file = folders.get(kind, Path()) / f"{key}-{rank}-{kind}.webp"
            crop = Image.fromarray(mask[window.slices]) if kind == "mask" else Image.open(file)
            crop = crop.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            corner = margin + column * (side + margin), margin + number * (side + caption + margin)
            pen.text(corner, f"{name[-20:]}: {title}" if column == 0 else title, fill="black", font=font)
            canvas.paste(crop, (corner[0], corner[1] + caption))
    return canvas


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), *sys.argv[2:])
