"""Train the MSE twin of a GAN model: freeze crops of sharp photos, draw degraded patches, judge the result.

::

    TWIN.training/run/      see `desra_core.training.plan`
      data/training.npy     crops of sharp photos, (N, S, S, 3) uint8
      data/held_out.npy     the same of other photos: they stop the training and judge the twin
"""

import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core import __version__
from desra_core.detection import variance_similarity
from desra_core.errors import ImageError, UsageError
from desra_core.evaluation.fidelity import psnr, squared_error, structural_similarity
from desra_core.files import content_key, digest, fingerprint, read_bytes, read_json, replace_file, write_json
from desra_core.images.codec import Pixels, bgr8, decode
from desra_core.images.scanning import image_files, no_images
from desra_core.networks import load_model, super_resolve
from desra_core.networks.checkpoints import read_kinds, save_torch
from desra_core.settings.models import Training, Twinning
from desra_core.training.degradation import degrade
from desra_core.training.patches import Batch
from desra_core.training.plan import RunFolder

Crops = npt.NDArray[np.uint8]

# One of this many photos is held out, at least one.
HELD_OUT = 8
LEAST_PHOTOS = 4
_CROPS, _HELD_OUT_CROPS = 2000, 32
# A crop is larger than a patch by this on each side, so that patches lie away from the borders of a degradation.
_MARGIN = 32
# A photo that differs less than this from itself, halved and enlarged again, has no fine detail. In dB.
_BLURRED = 48.0
# The models that a verdict compares.
MODELS = ("twin", "gan", "bicubic")
_PACKAGES = ("torch", "spandrel", "basicsr", "numpy", "opencv-python")


class TwinPlan(NamedTuple):
    """A training of a twin that may begin or go on. ``ended`` says that nothing is left to do but to judge it."""

    run: RunFolder
    gan_model: Path
    training: Training
    twinning: Twinning
    ended: bool


class Verdict(NamedTuple):
    """Scores of a twin on held-out patches, with those of the GAN model and of bicubic enlargement."""

    psnr: dict[str, float]  # by model: twin, gan, bicubic; in dB
    ssim: dict[str, float]
    similarity: float  # the mean D between the twin's result and the sharp photo: the texture that it keeps

    @property
    def passed(self) -> bool:
        """Whether the twin is better than the GAN model in PSNR, as an MSE-trained network must be."""
        return self.psnr["twin"] > self.psnr["gan"]


def plan_twin(twinning: Twinning) -> TwinPlan:
    """Find the run of a twin beside its output (raises `UsageError` where that run has other settings)."""
    run = RunFolder(twinning.output.with_suffix(".training") / "run")
    document = read_json(run.document)
    if document is not None:
        for name, value in _identity(twinning).items():
            if document.get(name) != value:
                reason = f"holds the training of another twin ({name} differs)"
                raise UsageError(run.root, reason, "name another --output, or delete that folder")
    ended = document is not None and run.reached(twinning.iterations, twinning.patience)
    return TwinPlan(run, twinning.gan_model, twinning.training, twinning, ended)


def freeze_photos(plan: TwinPlan, scale: int) -> tuple[int, list[ImageError]]:
    """Cut crops out of the photos, and write them and the document of the run.

    Returns:
        The number of photos that are used, and why others are left out.

    Raises:
        UsageError: The folder has too few photos that can be used.
        TransientError: The disk is full or failed.
    """
    found = image_files(plan.twinning.photos, plan.run.root)
    if not found.files.num_rows:
        raise no_images(plan.twinning.photos, "name a folder of sharp photos", found.passed_over)
    paths = [plan.twinning.photos / path for path in found.files["path"].to_pylist()]
    side, least = patch_side(plan.twinning, scale) + 2 * _MARGIN, patch_side(plan.twinning, scale)
    errors = list(found.problems)
    used: list[dict[str, str]] = []
    crops: dict[str, list[Crops]] = {}
    each = max(1, _CROPS // len(paths))
    for path in paths:
        try:
            data = read_bytes(path)
            photo = _checked(decode(data, path).pixels, path, least)
        except ImageError as error:
            errors.append(error)
            continue
        key = digest(data)
        used.append({"path": str(path), "key": key})
        if key not in crops:
            crops[key] = [crop.copy() for crop in _cut(photo, side, each, (plan.twinning.seed, int(key[:8], 16)))]
    if len(crops) < LEAST_PHOTOS:
        others = f", and {len(errors)} cannot be used, the first: {errors[0]}" if errors else ""
        reason = f"has {len(crops)} different photos to train on{others}"
        raise UsageError(plan.twinning.photos, reason, f"give at least {LEAST_PHOTOS} sharp photos, better a hundred")
    keys = sorted(crops)  # by content, which is as good as random
    held_out = keys[: max(1, len(keys) // HELD_OUT)]
    few = max(1, _HELD_OUT_CROPS // len(held_out))
    pools = {"held_out": [crop for key in held_out for crop in crops[key][:few]],
             "training": [crop for key in keys[len(held_out) :] for crop in crops[key]]}  # fmt: skip
    for pool, cut in pools.items():
        array = np.stack(cut)
        replace_file(plan.run.data / f"{pool}.npy", lambda file, array=array: np.save(file, array))  # type: ignore[misc]
    versions = {"desra": __version__, "python": platform.python_version()}
    document = _identity(plan.twinning) | {
        "photos": [row | {"pool": "held_out" if row["key"] in held_out else "training"} for row in used],
        "data": fingerprint([row["key"] for row in used]),
        "seed": plan.twinning.seed,
        "versions": versions | {name: version(name) for name in _PACKAGES},
    }
    write_json(plan.run.document, document, durable=True)
    return len(keys), errors


def patch_side(twinning: Twinning, scale: int) -> int:
    """Compute the side of a patch in SR pixels: a multiple of 8 and of the scale."""
    step = math.lcm(8, scale)
    return max(1, twinning.patch // step) * step


def draw_degraded(crops: Crops, twinning: Twinning, scale: int, seed: Sequence[int]) -> Batch:
    """Cut patches of a step out of crops, degrade the crops, and mirror the patches left to right or not.

    Args:
        crops: ``(N, S, S, 3)`` uint8 RGB, each drawn with the same probability.
        twinning: ``batch`` is the number of patches, ``patch`` their side in SR pixels.
        scale: The side of an LR pixel in SR pixels.
        seed: The same seed gives the same patches.
    """
    rng = np.random.default_rng(list(seed))
    side = patch_side(twinning, scale)
    lr, sharp = [], []
    for number, index in enumerate(rng.integers(len(crops), size=twinning.batch)):
        crop = np.asarray(crops[index], np.float32) / np.float32(255)
        photo = degrade(crop, scale, twinning.degradation, (*seed, number))
        top, left = (int(rng.integers((crop.shape[0] - side) // scale + 1)) for _ in range(2))
        step = -1 if rng.random() < 0.5 else 1
        lr.append(photo[top : top + side // scale, left : left + side // scale][:, ::step])
        rows, columns = slice(top * scale, top * scale + side), slice(left * scale, left * scale + side)
        sharp.append(crop[rows, columns][:, ::step])
    stacked = [np.ascontiguousarray(np.stack(part).transpose(0, 3, 1, 2)) for part in (lr, sharp)]
    return Batch(stacked[0], stacked[1], np.zeros((twinning.batch, 1, side, side), np.float32))


def _checked(pixels: Pixels, path: Path, side: int) -> Crops:
    """Return a photo as ``(H, W, 3)`` RGB; raise `ImageError` where it is smaller than a patch, or blurred."""
    rgb = np.ascontiguousarray(bgr8(pixels)[:, :, ::-1])
    height, width = rgb.shape[:2]
    if min(height, width) < side:
        reason = f"is {width}x{height}, smaller than a patch of {side} px"
        raise ImageError(path, reason, "give larger photos, or a smaller --patch")
    half = cv2.resize(rgb, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    again = cv2.resize(half, (width, height), interpolation=cv2.INTER_CUBIC)
    error = float(np.square(rgb.astype(np.float32) - again).mean())
    if error == 0 or 10 * math.log10(255**2 / error) > _BLURRED:
        raise ImageError(path, "is blurred: halved and enlarged again it stays the same", "give sharp photos")
    return rgb


def _cut(photo: Crops, side: int, count: int, seed: Sequence[int]) -> list[Crops]:
    """Cut random crops out of a photo; a smaller photo is extended by reflection."""
    rng = np.random.default_rng(list(seed))
    missing = [max(0, side - extent) for extent in photo.shape[:2]]
    if any(missing):
        photo = np.pad(photo, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="reflect")
    height, width = photo.shape[:2]
    most = max(1, 4 * height * width // side**2)
    places = [
        (int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))) for _ in range(min(count, most))
    ]
    return [photo[top : top + side, left : left + side] for top, left in places]


def _identity(twinning: Twinning) -> dict[str, Any]:
    """Describe what a run may not change."""
    settings = twinning.model_dump(mode="json", exclude={"preset", "patience", "accumulate", "output", "gan_model"})
    return {
        "parent": {"path": str(twinning.gan_model), "key": content_key(twinning.gan_model)},
        "training": json.loads(json.dumps(settings)),
    }


def publish_twin(plan: TwinPlan) -> Verdict:
    """Judge the trained twin on the held-out photos, and write it with a JSON file of its origin and its scores.

    Raises:
        TransientError: The disk is full or failed.
    """
    latest = plan.run.models()[-1]
    weights = read_kinds(latest)["ema"]
    verdict = judge_twin(plan, latest)
    save_torch(plan.twinning.output, {"params": weights, "params_ema": weights})
    document = read_json(plan.run.document) | {
        "iterations": int(latest.stem.rpartition("_")[2]),
        "verdict": verdict._asdict(),
    }
    write_json(plan.twinning.output.with_suffix(".json"), document, durable=True)
    return verdict


def judge_twin(plan: TwinPlan, checkpoint: Path) -> Verdict:
    """Compare a twin with the GAN model and with bicubic enlargement, on degraded held-out photos."""
    twin, gan = load_model(checkpoint), load_model(plan.twinning.gan_model)
    crops = np.load(plan.run.data / "held_out.npy", mmap_mode="r")
    outside = np.zeros(crops.shape[1:3], np.bool_)
    outside[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = True
    errors = dict.fromkeys(MODELS, 0.0)
    ssim = dict.fromkeys(MODELS, 0.0)
    similarity = 0.0
    for index, crop in enumerate(crops):
        values = degrade(
            np.asarray(crop, np.float32) / np.float32(255), twin.scale, plan.twinning.degradation, (index,)
        )
        lr = np.rint(values * 255).astype(np.uint8)
        results: dict[str, Pixels] = {
            "twin": super_resolve(twin, lr).pixels,
            "gan": super_resolve(gan, lr).pixels,
            "bicubic": np.asarray(cv2.resize(lr, crop.shape[1::-1], interpolation=cv2.INTER_CUBIC), np.uint8),
        }
        for model, sr in results.items():
            errors[model] += squared_error(crop, sr, outside)
            ssim[model] += structural_similarity(crop, sr, outside) / len(crops)
        inner = (slice(_MARGIN, -_MARGIN), slice(_MARGIN, -_MARGIN))
        similarity += float(variance_similarity(results["twin"][inner], crop[inner]).mean()) / len(crops)
    pixels = len(crops) * int(outside.sum())
    return Verdict({model: psnr(error, pixels) for model, error in errors.items()}, ssim, similarity)
