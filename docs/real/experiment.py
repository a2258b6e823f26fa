"""The experiment on real models: twin, mining, finetune and gate of three published GAN models.

For each model: trains its twin on sharp photos, mines the photos of ``photos.py``, fixes the list of held-out images,
finetunes, and judges by these images, by the commands a user would type (but for the finetune on whole MSE results).
Needs ``../shared/data``, which is not published, and on two cores some three hours. What is done is not repeated, and
what the images judge is checked against the list. Writes ``held_out.txt``, ``results.md`` and ``regions.webp`` of each
model beside this file, and ``FOLDER/MODEL/crops.png``.

    python -m docs.real.experiment FOLDER [MODEL]
"""

from __future__ import annotations

import functools
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

from desra_core import find_regions, load_model, read_image, super_resolve
from desra_core.detection.detectors import DetectorInputs, applied
from desra_core.detection.mask import WINDOW, score_mask
from desra_core.detection.similarity import TILE, variance_similarity
from desra_core.evaluation.fidelity import measure_fidelity
from desra_core.evaluation.metrics import compare_masks, pooled, psnr
from desra_core.evaluation.table import as_markdown
from desra_core.files import write_json
from desra_core.gate.criteria import Verdict, score_rows
from desra_core.images.codec import Pixels, decode_mask
from desra_core.images.parts import rgb8
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
from docs.references import THRESHOLD, agreement_row
from tasks.logs import say

HERE = Path(__file__).parent
MIN_AREA = 2000
SELF = "twin by --self"
WHOLE = ", without rounds"  # the same verdict by all candidates on all images, and the further seconds that it takes


class Study(NamedTuple):
    """A GAN model, number formats, steps and how often they are saved, and what else is set in each finetune."""

    checkpoint: str
    twin_precision: str
    precision: str
    iterations: int
    checkpoint_every: int
    finetunes: dict[str, dict[str, Any]]


FIRST, MSE_TARGETS = "seed 0", "targets are the MSE results"
# RRDBNet loses much detail at the usual rate. The usual average of the weights covers more steps than there are.
SLOW = {"learning_rate": 2e-5, "ema": 0.98, "warmup": 72}
LARGE = {FIRST: SLOW, "L1 only": SLOW | {"gan_weight": 0}}
SMALL: dict[str, dict[str, Any]] = {
    **{f"seed {seed}": {"seed": seed} for seed in range(3)},
    "L1 only": {"gan_weight": 0},
    MSE_TARGETS: {},  # see `_freeze_mse_results`
    **{f"{count} images": {"images": count} for count in (5, 10)},
    **{f"mask share {share}": {"mask_share": share} for share in (0, 0.3, 1)},
    "keep weight 1": {"keep_weight": 1},
    "average of 50 steps": {"ema": 0.98},
}
# On a CPU with AMX, inference in bfloat16 takes a quarter of the time.
STUDIES = {
    "RealESRGAN_x4plus": Study("RealESRGAN_x4plus.safetensors", "float32", "bfloat16", 60, 10, LARGE),
    "RealSR_DF2K": Study("RealSR_DF2K_x4.safetensors", "bfloat16", "bfloat16", 60, 10, LARGE),
    "realesr-general-x4v3": Study("realesr-general-x4v3.pth", "float32", "float32", 300, 75, SMALL),
}
ABLATED = "realesr-general-x4v3"
# The picture of the worst regions: rows, pixels of a crop, and the longest side of a region that it shows.
ROWS, CROP, LARGEST = 5, 240, 220
CROPS = 30
LARGEST_JUDGED = 512  # the largest side of a sharp photo that judges twins


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
        """What each command took, and the verdicts: a JSON file each."""
        return self.own / "results"

    @property
    def published(self) -> Path:
        """What is kept in the repository."""
        return HERE / self.own.name


def main(folder: Path, only: str | None = None) -> None:
    """Run what has not been run, and write the results."""
    if not (folder / "photos").exists():
        make_photos(folder / "sharp", folder / "unfinished")
        (folder / "unfinished").rename(folder / "photos")
    for name in [only] if only else list(STUDIES):
        _study(STUDIES[name], Place(folder, folder / name))


def _study(study: Study, place: Place) -> None:
    place.results.mkdir(parents=True, exist_ok=True)
    gan, twin, photos = DATA / "weights" / study.checkpoint, place.own / "twin.pth", place.shared / "photos"
    _once(place, "twin", "twin", place.shared / "sharp", gan_model=gan, output=twin, preset="cpu",
          amp=study.twin_precision)  # fmt: skip
    _once(place, "mined", "mine", photos, mse_model=twin, gan_model=gan, workspace=place.workspace,
          min_area=MIN_AREA, keep_mse=True, precision=study.precision)  # fmt: skip
    _held_out(place)  # before the first finetune
    recipe = {"preset": "cpu", "iterations": study.iterations, "checkpoint_every": study.checkpoint_every,
              "warmup": study.iterations * 3 // 5, "amp": study.precision}  # fmt: skip
    common = {"workspace": place.workspace, "group_by": "folder"}
    for title, changes in study.finetunes.items():
        run = place.own / title.replace(" ", "-")
        settings = common | {"output": run} | recipe | changes
        if title == MSE_TARGETS:
            _freeze_mse_results(Finetuning(**settings))
        _once(place, f"{title}.trained", "finetune", **settings)
        _once(place, title, "compare", **common, after=run)
        if place.own.name == ABLATED and title.startswith("seed"):
            _once(place, f"{title}{WHOLE}", "compare", **common, after=run, no_rounds=True)
        if title == FIRST:
            _look(place)
    _once(place, "MSE twin", "compare", **common, after=twin)
    if place.own.name == ABLATED:
        _once(place, SELF, "twin", photos, self=True, gan_model=gan, output=place.self_twin, preset="cpu")
        _once(place, f"mined, {SELF}", "mine", photos, mse_model=place.self_twin, gan_model=gan,
              workspace=place.own / "workspace-self", min_area=MIN_AREA)  # fmt: skip
        _once(place, f"MSE {SELF}", "compare", **common, after=place.self_twin)
        _compare_twins(place)


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
        judges = _held_out(place).keys()
        assert judges == set(document["images"]), judges ^ set(document["images"])
    write_json(result, document)
    _write(place)


def _held_out(place: Place) -> dict[str, str]:
    """Fix the held-out images before the first finetune, in a file that is checked afterwards; return ids by name."""
    workspace = Workspace(place.workspace)
    fixed = place.published / "held_out.txt"
    if not fixed.exists():
        with workspace.locked():
            pools = Pools(workspace, *load_settings(workspace), "folder")
            images = [entry.image for entry in pools.with_artifacts("held_out")] + pools.clean("held_out", 1000)
        fixed.parent.mkdir(exist_ok=True)
        fixed.write_text("".join(f"{image.id} {image.names[0]}\n" for image in images))
    return {name: key for key, name in (line.split(maxsplit=1) for line in fixed.read_text().splitlines())}


def _freeze_mse_results(settings: Finetuning) -> None:
    """Begin a finetune on whole MSE results, in place of pseudo-GTs by mask, unless it was begun."""
    workspace = Workspace(settings.workspace)
    with workspace.locked():
        plan = plan_finetune(settings)
        if (plan.run.root / "frozen").exists():
            return
        if not plan.begun:
            begin(plan, SCALE)
    for number, image in enumerate(json.loads(plan.run.document.read_text())["images"]):
        lr, mse_sr, mask = (
            read_image(path) for path in (workspace.dataset(kind, image["name"]) for kind in ("lr", "mse_sr", "mask"))
        )
        freeze(plan.run.data / f"{number:04d}", (lr, mse_sr, mask[:, :, 0] > 0))
    (plan.run.root / "frozen").touch()


def _verdict(place: Place, title: str) -> tuple[dict[str, Any], Verdict]:
    document = json.loads((place.results / f"{title}.json").read_text())
    return document, TypeAdapter(Verdict).validate_python(document["verdict"])


def _write(place: Place) -> None:
    """Write all results that there are."""
    summary, tables, costs = [], [], []
    for path in sorted(place.results.glob("*.json"), key=lambda path: path.stat().st_mtime):
        document = json.loads(path.read_text())
        costs.append({"command": path.stem} | {name: document[name] for name in ("seconds", "peak MB")})
        if "verdict" not in document:
            continue
        _, verdict = _verdict(place, path.stem)
        rows = score_rows(verdict)
        best = next((row for row in rows if row["candidate"] == verdict.best), {"candidate": "none"})
        gate = "passed" if verdict.passed else "failed: " + " ".join(verdict.reasons)
        summary.append(
            {"finetune": path.stem}
            | {name: best.get(name, "") for name in rows[-1] if name != "judged on"}
            | {"gate": gate}
        )
        tables.append(f"### {path.stem}\n\n{as_markdown(rows)}")
    others = [path.read_text() for path in sorted(place.results.glob("*.md"))]
    place.published.mkdir(exist_ok=True)
    parts = ["# Results", as_markdown(summary) if summary else "", *others, as_markdown(costs), *tables]
    (place.published / "results.md").write_text("\n\n".join(filter(None, parts)) + "\n")


class Results:
    """Results of held-out photos by the MSE twin, the GAN model, and the best finetuned model of the first verdict."""

    def __init__(self, place: Place) -> None:
        self._photos, self._ids = place.shared / "photos", _held_out(place)
        self._workspace = Workspace(place.workspace)
        mining, target = load_settings(self._workspace)
        assert isinstance(mining, Mining)
        self._precision = mining.precision
        self._models = {
            "mse_sr": (Path(mining.mse_model), target.mse_sr_key),
            "gan_sr": (mining.gan_model, target.gan_sr_key),
            "after": (Path(_verdict(place, FIRST)[0]["best"]["file"]), None),
        }

    def photo(self, name: str) -> Pixels:
        """Read a photo, without its alpha channel."""
        path = next(path for path in self._photos.glob(f"{glob.escape(name)}.*"))
        return read_image(path)[:, :, :3]

    @functools.cache  # noqa: B019, there is one object
    def of(self, name: str, which: str) -> Pixels:
        """Read a result if it is stored, else compute it: ``mse_sr``, ``gan_sr`` or ``after``."""
        model, key = self._models[which]
        stored = find_array(self._workspace, self._ids[name], which, key=key) if key else None
        if stored is not None:
            return np.asarray(stored)
        return super_resolve(load_model(model, engine=self._precision), self.photo(name)).pixels


def _look(place: Place) -> None:
    """Draw the worst regions, and count what other detectors mark, before and after the first finetune."""
    table = place.results / "other detectors.md"
    if table.exists():
        return
    say(f"{place.own.name}: what other detectors mark")
    results = Results(place)
    picture = _draw(place, results, per_image=1, rows=ROWS)
    picture.save(place.published / "regions.webp", quality=92, method=6)
    _draw(place, results, per_image=3, rows=CROPS).save(place.own / "crops.png")
    rows = []
    for method in ("desra", "ldl", "ssim"):
        detector = applied(method)
        for state, which in (("before", "gan_sr"), ("after", "after")):
            regions = images = pixels = 0
            for name in _held_out(place):
                mse_sr = results.of(name, "mse_sr")
                inputs = DetectorInputs(mse_sr, results.of(name, which), results.photo(name))
                scores = detector.score(name, inputs, WINDOW, TILE, 1)
                mask = score_mask(scores, mse_sr.shape[:2], threshold=detector.score_threshold, min_area=MIN_AREA)
                found = len(find_regions(mask, -scores))
                regions, images, pixels = regions + found, images + (found > 0), pixels + int(mask.sum())
            counts = {"regions": regions, "images": images, "megapixels": f"{pixels / 1e6:.2f}"}
            rows.append({"detector": method, "finetune": state} | counts)
    table.write_text(f"## What detectors mark on the held-out images\n\n{as_markdown(rows)}")
    _write(place)


def _draw(place: Place, results: Results, *, per_image: int, rows: int) -> Image.Image:
    """Draw the most severe held-out regions of up to `LARGEST` px a side: photo, result, mask and result after."""
    workspace = Workspace(place.workspace)
    judged = workspace.gate / Path(_verdict(place, FIRST)[0]["pictures"][0]["crops"]["after"]).parent
    found: list[tuple[dict[str, Any], str]] = []
    for path in judged.glob("*.json"):
        judgement = json.loads(path.read_text())
        small = [region for region in judgement["regions"] if max(region["width"], region["height"]) <= LARGEST]
        worst = sorted(small, key=lambda region: -region["severity"])[:per_image]
        found += [(region, judgement["image"]) for region in worst]
    found = sorted(found, key=lambda each: -each[0]["severity"])[:rows]
    margin, caption = 6, 20
    canvas = Image.new("RGB", (4 * (CROP + margin) + margin, len(found) * (CROP + caption + margin) + margin), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for number, (region, name) in enumerate(found):
        path = workspace.masks / f"{name}.png"
        mask = decode_mask(path.read_bytes(), path)
        top, left = (
            min(max(region[start] + region[size] // 2 - CROP // 2, 0), max(side - CROP, 0))
            for start, size, side in zip("yx", ("height", "width"), mask.shape, strict=True)
        )
        photo = results.photo(name).repeat(SCALE, 0).repeat(SCALE, 1)
        cells = {
            " ".join(dict.fromkeys(name.split("/")))[-22:] + ", enlarged": photo,
            "GAN result": results.of(name, "gan_sr"),
            "mask": np.where(mask, np.uint8(255), np.uint8(0))[:, :, np.newaxis],
            "after the finetune: " + ("gone" if region["gone"] else "still marked"): results.of(name, "after"),
        }
        y = margin + number * (CROP + caption + margin)
        for column, (title, pixels) in enumerate(cells.items()):
            x = margin + column * (CROP + margin)
            pen.text((x, y), title, fill="black", font=font)
            canvas.paste(Image.fromarray(rgb8(pixels[top : top + CROP, left : left + CROP]).copy()), (x, y + caption))
        x, y = margin + 2 * (CROP + margin) + region["x"] - left, y + caption + region["y"] - top
        pen.rectangle((x, y, x + region["width"], y + region["height"]), outline="red")
    return canvas


def _compare_twins(place: Place) -> None:
    """Score both twins and the GAN model on sharp photos, and hold the masks by one twin against those by the other."""
    document = json.loads((place.own / "twin.json").read_text())
    models = {"GAN model": Path(document["parent"]["path"]), "twin": place.own / "twin.pth", SELF: place.self_twin}
    errors, similarities, pixels = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0), 0
    held_out = [Path(photo["path"]) for photo in document["photos"] if photo["pool"] == "held_out"]
    for seed, path in enumerate(held_out):
        photo = read_image(path)
        height, width = (min(LARGEST_JUDGED, side) // SCALE * SCALE for side in photo.shape[:2])
        sharp = np.ascontiguousarray(photo[:height, :width, :3])
        degraded = degrade(sharp.astype(np.float32) / np.float32(255), SCALE, "real", (seed,))
        lr = np.rint(degraded * 255).astype(np.uint8)
        pixels += height * width
        for title, model in models.items():
            sr = super_resolve(load_model(model), lr).pixels
            errors[title] += measure_fidelity(sharp, sr, np.ones((height, width), np.bool_)).squared_error
            similarities[title] += float(variance_similarity(sr, sharp).mean()) / len(held_out)
    scores = [
        {
            "model": title,
            "photos": str(len(held_out)),
            "PSNR dB": f"{psnr(errors[title], pixels):.2f}",
            "mean similarity of result and sharp photo": f"{similarities[title]:.3f}",
        }
        for title in models
    ]
    truth, masks = Workspace(place.workspace).masks, Workspace(place.own / "workspace-self").masks
    pairs = [
        [decode_mask(path.read_bytes(), path) for path in (masks / path.relative_to(truth), path)]
        for path in sorted(truth.rglob("*.png"))
    ]
    agreement = agreement_row(SELF, THRESHOLD, pooled(compare_masks(*pair) for pair in pairs))
    text = f"## The twin from sharp photos and the one by --self\n\n{as_markdown(scores)}\n\n"
    text += f"The masks by the second twin, held against those by the first:\n\n{as_markdown([agreement])}"
    (place.results / "twins.md").write_text(text)
    _write(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), *sys.argv[2:])
