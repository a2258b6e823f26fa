"""Train the MSE twin of a GAN model: freeze crops of sharp photos, draw degraded patches, judge the result.

::

    TWIN.training/run/      see `desra_core.training.plan`
      data/training.npy     crops of sharp photos, (N, S, S, 3) uint8; training_lr.npy, with --lr, is of their LR photos
      data/held_out.npy     the same of other photos: they stop the training and judge the twin
      verdict.json          the scores of the twin at the end
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.detection.similarity import variance_similarity
from desra_core.errors import ImageError, UsageError
from desra_core.evaluation.fidelity import measure_fidelity
from desra_core.evaluation.metrics import psnr
from desra_core.evaluation.table import counted
from desra_core.files import (
    content_key,
    digest,
    fingerprint,
    read_bytes,
    read_document,
    read_json,
    replace_file,
    write_json,
)
from desra_core.images.codec import Pixels, decode, read_image
from desra_core.images.parts import rgb8
from desra_core.images.scanning import Found, image_files, no_images, paths_of
from desra_core.networks.checkpoints import load_model, read_kinds, save_torch
from desra_core.networks.super_resolution import super_resolve
from desra_core.planning.plan import lacks_twin, no_twin, versions
from desra_core.settings.models import Cycling, Training, Twinning
from desra_core.training.degradation import degrade
from desra_core.training.patches import Batch, open_array, seal_frozen
from desra_core.training.plan import RunFolder, check_same
from desra_core.training.pools import nearest_group, signature
from desra_core.workspace.matching import Sources

Crops = npt.NDArray[np.uint8]

# One of this many photos is held out, at least one.
HELD_OUT = 8
LEAST_PHOTOS = 4
# At most so many photos are read, and so many crops cut.
_PHOTOS, _CROPS, _HELD_OUT_CROPS = 1000, 2000, 32
# A crop is larger than a patch by this on each side, so that patches lie away from the borders of a degradation.
_MARGIN = 32
# A photo that differs less than this from itself, halved and enlarged again, has no fine detail. In dB.
_BLURRED = 48.0
# With --self, photos are shrunk by one of these to be sharp, and this share of them is taken, the sharpest.
_SHRINKING, _SHARPEST = (2, 3, 4), 0.5
# The models that a verdict compares.
MODELS = ("twin", "gan", "bicubic")
# Settings that may change when a training goes on.
_MAY_DIFFER = {"preset", "patience", "accumulate"}
_PACKAGES = ("torch", "spandrel", "basicsr", "numpy", "opencv-python")


class TwinPlan(NamedTuple):
    """A training of a twin that may begin or go on."""

    run: RunFolder
    gan_model: Path
    training: Training
    twinning: Twinning

    @property
    def verdict(self) -> "TwinVerdict | None":
        """The verdict, if the training has ended and all that it publishes is there."""
        found = read_document(self.run.root / "verdict.json")
        verdict = TwinVerdict(**found) if found.keys() == set(TwinVerdict._fields) else None
        return verdict if verdict and (self.twinning.output.exists() or not verdict.passed) else None


class Sharp(NamedTuple):
    """Crops of a sharp photo, each with that of the LR photo where one was given."""

    path: Path
    key: str
    group: str  # the key of the photo that it is a copy of, or its own
    detail: float  # see `_detail`
    crops: list[tuple[Crops, Crops | None]]


class TwinVerdict(NamedTuple):
    """Scores of a twin on held-out patches, with those of the GAN model and of bicubic enlargement."""

    psnr: dict[str, float]  # by model: twin, gan, bicubic; in dB
    ssim: dict[str, float]
    similarity: float  # the mean D between the twin's result and the sharp photo: the texture that it keeps

    @property
    def passed(self) -> bool:
        """Whether the twin is better than the GAN model in PSNR, as an MSE-trained network must be."""
        return self.psnr["twin"] > self.psnr["gan"]


def twinning_of(cycling: Cycling) -> Twinning | None:
    """Make the settings of the twin that a cycle must train first; None where the MSE model is there.

    Raises:
        UsageError: There is no MSE model, and no photos to train one on are named; or the workspace has the twin of
            another GAN model.
    """
    if not lacks_twin(cycling):
        return None
    if not (cycling.twin_photos or cycling.self):
        raise no_twin(cycling)
    usual, of_twins = (
        {name: field.default for name, field in model.model_fields.items()}
        | (model.cpu_preset if cycling.preset == "cpu" else {})
        for model in (Cycling, Twinning)
    )
    shared = {name: getattr(cycling, name) for name in ("patch", "batch", "accumulate", "amp")}
    batch = of_twins["batch"] if shared["batch"] == usual["batch"] else shared["batch"]
    if batch % shared["accumulate"]:
        shared["accumulate"] = usual["accumulate"]  # a twin's usual batch cannot be computed in as many parts
    return Twinning(
        photos=cycling.twin_photos or cycling.photos,
        self=cycling.self,
        exclude=cycling.exclude if cycling.self else (),
        gan_model=cycling.gan_model,
        output=Path(cycling.mse_model),
        preset=cycling.preset,
        seed=cycling.seed,
        **{name: value for name, value in shared.items() if value != usual[name]},
    )


def plan_twin(twinning: Twinning) -> TwinPlan:
    """Find the run of a twin beside its output.

    Raises:
        UsageError: That run has other settings, a folder has no photos, or the output is there and of another run.
    """
    run = RunFolder(twinning.output.with_suffix(".training") / "run")
    document = read_json(run.document)
    if document is not None:
        check_same(run, document, _identity(twinning), _MAY_DIFFER)
        return TwinPlan(run, twinning.gan_model, twinning.training, twinning)
    for path in (twinning.output, twinning.output.with_suffix(".json")):
        if path.exists():
            raise UsageError(path, "exists, and no training of it is beside it", "name another --output")
    for folder in filter(None, (twinning.photos, twinning.lr)):
        _photos_in(folder, twinning)
    return TwinPlan(run, twinning.gan_model, twinning.training, twinning)


def freeze_photos(
    plan: TwinPlan, scale: int, on_photo: Callable[[int, int], None] = lambda _, __: None
) -> tuple[int, list[ImageError]]:
    """Cut crops out of the photos, and write them and the document of the run.

    Args:
        plan: The training.
        scale: That of the GAN model.
        on_photo: Called before each photo with the number of photos read and of those to read.

    Returns:
        The number of photos to train on, and why others are left out.

    Raises:
        UsageError: The folder has too few photos that can be used.
        TransientError: The disk is full or failed.
    """
    twinning = plan.twinning
    photos, errors = _sharp_photos(plan, scale, on_photo)
    groups = sorted({photo.group for photo in photos})
    if len(groups) < LEAST_PHOTOS:
        others = f", and {len(errors)} cannot be used, the first: {errors[0]}" if errors else ""
        reason = f"has {counted(len(groups), 'different photo')} to train on{others}"
        raise UsageError(twinning.photos, reason, f"give at least {LEAST_PHOTOS} sharp photos, better a hundred")
    chosen = set(groups[: max(1, len(groups) // HELD_OUT)])  # by content, which is as good as random
    pools = {"training": [photo for photo in photos if photo.group not in chosen],
             "held_out": [photo for photo in photos if photo.group in chosen]}  # fmt: skip
    most = {"training": _CROPS, "held_out": _HELD_OUT_CROPS}
    # What an earlier run has left. The document is written last, so it tells that all crops are there.
    plan.run.document.unlink(missing_ok=True)
    shutil.rmtree(plan.run.data, ignore_errors=True)
    for pool, of_pool in pools.items():
        each = max(1, most[pool] // len(of_pool))
        cut = [crops for photo in of_pool for crops in photo.crops[:each]][: most[pool]]
        _write_crops(plan.run.data / f"{pool}.npy", [sharp for sharp, _ in cut])
        if twinning.lr:
            _write_crops(plan.run.data / f"{pool}_lr.npy", [lr for _, lr in cut if lr is not None])
    seal_frozen(plan.run.data)
    document = _identity(twinning) | {
        "photos": [
            {"path": str(photo.path), "key": photo.key, "pool": pool} for pool in pools for photo in pools[pool]
        ],
        "data": fingerprint([photo.key for photo in photos]),
        "versions": versions(_PACKAGES),
    }
    write_json(plan.run.document, document, durable=True)
    return len(pools["training"]), errors


def _sharp_photos(
    plan: TwinPlan, scale: int, on_photo: Callable[[int, int], None]
) -> tuple[list[Sharp], list[ImageError]]:
    """Read the photos that can be used, each once, in the order of their content keys; list why others are left out."""
    twinning = plan.twinning
    found = _photos_in(twinning.photos, twinning)
    errors = list(found.problems)
    files = found.files.sort_by("path")
    order = np.random.default_rng(twinning.seed).permutation(files.num_rows)[:_PHOTOS]
    lr_files: dict[str, list[Path]] = {}
    if twinning.lr:
        lr_found = _photos_in(twinning.lr, twinning)
        errors += lr_found.problems
        names = lr_found.files["name"].to_pylist()
        for name, path in zip(names, paths_of(twinning.lr, lr_found.files), strict=True):
            lr_files.setdefault(name, []).append(path)
    least = patch_side(twinning, scale)
    window = (least + 2 * _margin(scale)) // scale
    photos: dict[str, Sharp] = {}
    signatures, groups = bytearray(), list[str]()
    chosen = files.take(np.sort(order))
    named = zip(chosen["name"].to_pylist(), paths_of(twinning.photos, chosen), strict=True)
    for number, (name, path) in enumerate(named):
        on_photo(number, len(order))
        try:
            data = read_bytes(path)
            photo = np.ascontiguousarray(rgb8(decode(data, path).pixels))
            seen = signature(photo)
            if twinning.self:
                photo = _shrunk(photo, least)
            detail = _checked_detail(photo, path, least, shrunk=twinning.self)
            lr = _lr_of(photo, lr_files.get(name, []), path, twinning.lr, scale) if twinning.lr else None
        except ImageError as error:
            errors.append(error)
            continue
        key = digest(data)
        group = nearest_group(signatures, groups, seen) or key
        signatures += seen
        groups.append(group)
        crops = _cut(photo, lr, scale, window, max(1, _CROPS // len(order)), (twinning.seed, int(key[:8], 16)))
        photos[key] = Sharp(path, key, group, detail, crops)
    if twinning.self:
        count = max(LEAST_PHOTOS, round(_SHARPEST * len(photos)))
        photos = {sharp.key: sharp for sharp in sorted(photos.values(), key=lambda sharp: sharp.detail)[:count]}
    return [photos[key] for key in sorted(photos)], errors


def _photos_in(folder: Path, twinning: Twinning) -> Found:
    """List the photos of a folder; raise `UsageError` where there is none."""
    found = image_files(folder, **Sources(lr=folder, exclude=twinning.exclude, include=twinning.include).globs())
    if not found.files.num_rows:
        raise no_images(folder, "name a folder of photos", found.passed_over)
    return found


def _margin(scale: int) -> int:
    return -(-_MARGIN // scale) * scale


def patch_side(twinning: Twinning, scale: int) -> int:
    """Compute the side of a patch in SR pixels: a multiple of 8 and of the scale."""
    step = math.lcm(8, scale)
    return max(1, twinning.patch // step) * step


def draw_degraded(crops: Crops, lr_crops: Crops | None, twinning: Twinning, scale: int, seed: Sequence[int]) -> Batch:
    """Cut the patches of a step out of crops and their LR photos, and mirror them left to right or not.

    Args:
        crops: ``(N, S, S, 3)`` uint8 RGB, each drawn with the same probability.
        lr_crops: ``(N, S / scale, S / scale, 3)`` uint8 RGB, their LR photos; None to degrade the crops.
        twinning: ``batch`` is the number of patches, ``patch`` their side in SR pixels.
        scale: The side of an LR pixel in SR pixels.
        seed: The same seed gives the same patches.
    """
    rng = np.random.default_rng(list(seed))
    side = patch_side(twinning, scale)
    lr, sharp = [], []
    for number, index in enumerate(rng.integers(len(crops), size=twinning.batch)):
        crop = np.asarray(crops[index], np.float32) / np.float32(255)
        if lr_crops is None:
            photo = degrade(crop, scale, twinning.degradation, (*seed, 1 + number))
        else:
            photo = np.asarray(lr_crops[index], np.float32) / np.float32(255)
        top, left = (int(rng.integers((crop.shape[0] - side) // scale + 1)) for _ in range(2))
        step = -1 if rng.random() < 0.5 else 1
        lr.append(photo[top : top + side // scale, left : left + side // scale][:, ::step])
        rows, columns = slice(top * scale, top * scale + side), slice(left * scale, left * scale + side)
        sharp.append(crop[rows, columns][:, ::step])
    stacked = [np.ascontiguousarray(np.stack(part).transpose(0, 3, 1, 2)) for part in (lr, sharp)]
    return Batch(stacked[0], stacked[1], np.zeros((twinning.batch, 1, side, side), np.float32))


def open_crops(plan_data: Path, pool: str) -> tuple[Crops, Crops | None]:
    """Open the crops of a pool, ``training`` or ``held_out``, and those of their LR photos where they have some."""
    lr = plan_data / f"{pool}_lr.npy"
    return open_array(plan_data / f"{pool}.npy"), open_array(lr) if lr.exists() else None


def _resized(photo: Crops, width: int, height: int, interpolation: int) -> Crops:
    return np.asarray(cv2.resize(photo, (width, height), interpolation=interpolation), np.uint8)


def _shrunk(photo: Crops, least: int) -> Crops:
    """Shrink a photo by the factor of `_SHRINKING` that leaves the most detail and at least a patch."""
    height, width = photo.shape[:2]
    factors = [factor for factor in _SHRINKING if min(height, width) // factor >= least] or _SHRINKING[:1]
    shrunk = [_resized(photo, width // f or 1, height // f or 1, cv2.INTER_AREA) for f in factors]
    return min(shrunk, key=_detail)


def _lr_of(photo: Crops, files: list[Path], path: Path, folder: Path, scale: int) -> Crops:
    """Read the LR photo of a photo; raise `ImageError` where there is none, or several, or one of another size."""
    if len(files) != 1:
        reason = f"has {len(files) or 'no'} LR photos of its name in {folder}"
        raise ImageError(path, reason, "give one, or leave this photo out")
    (lr,) = files
    pixels = np.ascontiguousarray(rgb8(read_image(lr)))
    if pixels.shape[:2] != (photo.shape[0] // scale, photo.shape[1] // scale):
        sizes = f"is {pixels.shape[1]}x{pixels.shape[0]}, and its sharp photo {photo.shape[1]}x{photo.shape[0]}"
        raise ImageError(lr, sizes, f"give pairs of the scale {scale}")
    return pixels


def _detail(photo: Crops) -> float:
    """Measure how close a photo is to itself, halved and enlarged again: the PSNR in dB, less for sharper photos."""
    height, width = photo.shape[:2]
    half = _resized(photo, width // 2 or 1, height // 2 or 1, cv2.INTER_AREA)
    again = _resized(half, width, height, cv2.INTER_CUBIC)
    error = cv2.norm(photo, again, cv2.NORM_L2SQR) / photo.size
    return 10 * math.log10(255**2 / error) if error else math.inf


def _checked_detail(photo: Crops, path: Path, side: int, *, shrunk: bool) -> float:
    """Return `_detail`; raise `ImageError` for a photo that is smaller than a patch, or blurred."""
    height, width = photo.shape[:2]
    if min(height, width) < side:
        reason = f"is {width}x{height}{', shrunk,' if shrunk else ','} smaller than a patch of {side} px"
        raise ImageError(path, reason, "give larger photos, or a smaller --patch")
    detail = _detail(photo)
    if detail > _BLURRED:
        raise ImageError(path, "is blurred: halved and enlarged again it stays the same", "give sharp photos")
    return detail


def _cut(
    photo: Crops, lr: Crops | None, scale: int, window: int, count: int, seed: tuple[int, ...]
) -> list[tuple[Crops, Crops | None]]:
    """Cut random crops out of a photo and out of its LR photo, both extended by mirroring where they are smaller.

    Crops begin at whole LR pixels; ``window`` is their side in LR pixels.
    """
    rng = np.random.default_rng(list(seed))
    height, width = (extent // scale for extent in photo.shape[:2])
    missing = [max(0, window - extent) for extent in (height, width)]

    def part(pixels: Crops, unit: int, top: int, left: int) -> Crops:
        return pixels[top * unit : (top + window) * unit, left * unit : (left + window) * unit].copy()

    def extended(pixels: Crops, unit: int) -> Crops:
        rows, columns = missing
        inner = pixels[: height * unit, : width * unit]
        return np.pad(inner, ((0, rows * unit), (0, columns * unit), (0, 0)), mode="symmetric")

    photo, lr = extended(photo, scale), None if lr is None else extended(lr, 1)
    crops: list[tuple[Crops, Crops | None]] = []
    for _ in range(min(count, max(1, 4 * height * width // window**2))):
        top, left = (int(rng.integers(max(0, extent - window) + 1)) for extent in (height, width))
        crops.append((part(photo, scale, top, left), None if lr is None else part(lr, 1, top, left)))
    return crops


def _write_crops(path: Path, crops: Sequence[Crops]) -> None:
    """Write crops as one array, without a second copy of them in memory."""

    def write(file: IO[bytes]) -> None:
        shape = (len(crops), *crops[0].shape)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for crop in crops:
            file.write(crop.tobytes())

    replace_file(path, write)


def _identity(twinning: Twinning) -> dict[str, Any]:
    """Describe what a run may not change."""
    return {
        "parent": {"path": str(twinning.gan_model), "key": content_key(twinning.gan_model)},
        "training": twinning.model_dump(mode="json", exclude={"output", "gan_model"}) | {"lr": str(twinning.lr)},
        "seed": twinning.seed,
    }


def publish_twin(plan: TwinPlan) -> TwinVerdict:
    """Judge the checkpoint of the least held-out loss, and write it with its origin and scores where it passes.

    Raises:
        TransientError: The disk is full or failed.
    """
    best = _best(plan)
    verdict = judge_twin(plan, best)
    document = read_document(best.with_suffix(".json")) | {"verdict": verdict._asdict()}
    if verdict.passed:
        weights = list(read_kinds(best).values())[-1]
        write_json(plan.twinning.output.with_suffix(".json"), document, durable=True)
        save_torch(plan.twinning.output, {"params": weights, "params_ema": weights})
    write_json(plan.run.root / "verdict.json", verdict._asdict(), durable=True)
    delete_training(plan, verdict)
    return verdict


def delete_training(plan: TwinPlan, verdict: TwinVerdict) -> None:
    """Delete the crops, the state and the checkpoints of a training that has ended, but for a twin that has not passed.

    What is left shows how the training went. A killed run may have left all of it.
    """
    shutil.rmtree(plan.run.data, ignore_errors=True)
    kept = None if verdict.passed or not plan.run.models() else _best(plan)
    for path in (plan.run.state, *plan.run.models()):
        if path != kept:
            path.unlink(missing_ok=True)


def _best(plan: TwinPlan) -> Path:
    """Find the checkpoint with the least held-out loss."""
    return min(plan.run.models(), key=lambda path: float(read_document(path.with_suffix(".json")).get("loss", np.inf)))


def judge_twin(plan: TwinPlan, checkpoint: Path) -> TwinVerdict:
    """Compare a twin with the GAN model and with bicubic enlargement, on LR photos of held-out photos."""
    twin, gan = load_model(checkpoint), load_model(plan.gan_model)
    crops, lr_crops = open_crops(plan.run.data, "held_out")
    margin = _margin(twin.scale)
    inner = (slice(margin, -margin), slice(margin, -margin))
    judged = np.zeros(crops.shape[1:3], np.bool_)
    judged[inner] = True
    errors = dict.fromkeys(MODELS, 0.0)
    ssim = dict.fromkeys(MODELS, 0.0)
    similarity = 0.0
    for index, crop in enumerate(crops):
        if lr_crops is None:
            sharp = np.asarray(crop, np.float32) / np.float32(255)
            lr = np.rint(degrade(sharp, twin.scale, plan.twinning.degradation, (index,)) * 255).astype(np.uint8)
        else:
            lr = np.asarray(lr_crops[index])
        results: dict[str, Pixels] = {
            "twin": super_resolve(twin, lr).pixels,
            "gan": super_resolve(gan, lr).pixels,
            "bicubic": _resized(lr, crop.shape[1], crop.shape[0], cv2.INTER_CUBIC),
        }
        for model, sr in results.items():
            fidelity = measure_fidelity(crop, sr, judged)
            errors[model] += fidelity.squared_error
            ssim[model] += fidelity.ssim / len(crops)
        similarity += float(variance_similarity(results["twin"][inner], crop[inner]).mean()) / len(crops)
    pixels = len(crops) * int(judged.sum())
    return TwinVerdict({model: psnr(error, pixels) for model, error in errors.items()}, ssim, similarity)
