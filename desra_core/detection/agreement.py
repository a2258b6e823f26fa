"""Whether two results can be a pair: what lies behind the masks is checked on the numbers of the first images.

`measure_agreement` measures one pair, `find_doubts` judges many. Judged are only photos with some contrast, since flat
ones say nothing. docs/method.md has the numbers of real pairs and of wrong ones; `tests/benchmarks/run.py agreement`
makes them again.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.errors import DesraError, UsageError
from desra_core.images.codec import LUMINANCE, Pixels
from desra_core.images.parts import Rectangle

Levels = npt.NDArray[np.float32]
Columns = Mapping[str, npt.NDArray[np.float64]]
Flags = npt.NDArray[np.bool_]

# So many photos with contrast are needed for a doubt, and so many at the beginning of a run for its first judgement.
LEAST, FIRST = 8, 16
# In levels of 255: a photo whose means of blocks have a smaller standard deviation than this is flat.
CONTRAST = 4.0
# The least correlation of two results of one photo, and the most that they may differ, in units of the contrast.
CORRELATION, DIFFERENCE = 0.8, 0.2
SHIFT = 0.6  # in pixels of the results
SHARE = 0.75  # of photos with one and the same fault, which makes it a fault of the model
# A result with less than this share of the contrast has practically one colour.
FAINT = 0.1
# Without the photos, the GAN results of an exchanged pair have this much less texture, as a power of two.
TEXTURE = 0.25

# Side of the part that is looked at, and about that of a block, in pixels of the results.
_SIDE, _BLOCK = 384, 16
# Added to what is divided by, in levels.
_FLOOR, _TEXTURE_FLOOR = 2.0, 0.25
# Standard deviations of the blurs before a shift is measured, at half the size, and above which texture lies.
_SMOOTH, _FINE = 1.0, 1.0
# A shift is measured where the squared slopes of the results are at least this in every direction, in levels per pixel.
_LEAST_SLOPE = 0.02
_LEAST_SIDE = 32  # of a part in which anything is measured
_NOT_ZERO = 1e-4


class PairAgreement(NamedTuple):
    """How two results of one photo agree in their middle, each in 0..255; None where it could not be measured.

    Attributes:
        contrast: Standard deviation of the block means of the photo; without it, the larger one of both results.
        mse_contrast, gan_contrast: That of each result.
        difference: Mean difference of the block means of both results, as a share of the contrast. It is 0 only for
            equal results.
        correlation: Correlation of the block means of both results.
        mse_off, gan_off: Mean difference of a result's block means from the photo's, as a share of the contrast. It is
            0 only where the result repeats the pixels of the photo.
        texture: How much more fine texture the GAN result has than the MSE result, as a power of two.
        shift_x, shift_y: By how many pixels the GAN result lies to the right of the MSE result, and below it.
    """

    contrast: float
    mse_contrast: float
    gan_contrast: float
    difference: float
    correlation: float
    mse_off: float | None
    gan_off: float | None
    texture: float
    shift_x: float | None
    shift_y: float | None


def measure_agreement(mse_sr: Pixels, gan_sr: Pixels, lr: Pixels | None = None) -> PairAgreement | None:
    """Measure how two results of a photo agree, in the middle of the image.

    Args:
        mse_sr, gan_sr: ``(H, W, 1 or 3)`` uint8 or uint16.
        lr: The photo, ``(h, w, 1 or 3)``; ignored where the results are no multiple of its size.

    Returns:
        None for images under 32 px a side.
    """
    height, width = gan_sr.shape[:2]
    scale = 1
    if lr is not None:
        scale = height // lr.shape[0]
        if scale < 1 or (height, width) != (lr.shape[0] * scale, lr.shape[1] * scale):
            lr, scale = None, 1
    block = max(1, round(_BLOCK / scale)) * scale
    sides = [min(side, _SIDE) // block * block for side in (height, width)]
    if min(sides) < _LEAST_SIDE:
        return None
    top, left = ((side - part) // 2 // scale * scale for side, part in zip((height, width), sides, strict=True))
    part = Rectangle(top, left, *sides)
    mse_part, gan_part = mse_sr[part.slices], gan_sr[part.slices]
    mse, gan = _levels(mse_part), _levels(gan_part)
    mse_means, gan_means = _means(mse, block), _means(gan, block)
    contrasts = [_contrast(mse_means), _contrast(gan_means)]
    contrast = max(contrasts)
    offs: list[float | None] = [None, None]
    if lr is not None:
        lr_part = lr[Rectangle(*(value // scale for value in part)).slices]
        lr_means = _means(_levels(lr_part), block // scale)
        contrast = _contrast(lr_means)
        for index, (means, pixels) in enumerate(((mse_means, mse_part), (gan_means, gan_part))):
            is_back = pixels.dtype == lr.dtype and _repeats(pixels, lr_part, scale)
            offs[index] = _difference(means, lr_means, contrast, is_zero=is_back)
    difference = _difference(mse_means, gan_means, contrast, is_zero=np.array_equal(mse_part, gan_part))
    mse_grey, gan_grey = _luminance(mse), _luminance(gan)
    fine = [_texture(grey) for grey in (mse_grey, gan_grey)]
    shift_x, shift_y = _shift(mse_grey, gan_grey)
    return PairAgreement(
        contrast=_rounded(contrast),
        mse_contrast=_rounded(contrasts[0]),
        gan_contrast=_rounded(contrasts[1]),
        difference=difference,
        correlation=_rounded(_correlation(mse_means, gan_means)),
        mse_off=offs[0],
        gan_off=offs[1],
        texture=_rounded(math.log2((fine[1] + _TEXTURE_FLOOR) / (fine[0] + _TEXTURE_FLOOR))),
        shift_x=shift_x,
        shift_y=shift_y,
    )


def strangers(columns: Columns) -> Flags:
    """Flag the images whose two results do not show the same photo.

    Args:
        columns: The fields of `PairAgreement`, NaN where there is no value; one value per image.
    """
    least = np.minimum(columns["contrast"], np.minimum(columns["mse_contrast"], columns["gan_contrast"]))
    flags: Flags = (least >= CONTRAST) & (columns["correlation"] < CORRELATION)
    return flags


def find_doubts(columns: Columns, mse: str, gan: str) -> list[DesraError]:
    """Judge the agreement of many pairs.

    Args:
        columns: The fields of `PairAgreement`, NaN where there is no value; one value per image.
        mse, gan: The models, or the folders of the results, in the words for people.

    Returns:
        Nothing for fewer than `LEAST` photos with contrast. A `UsageError` alone where no real pair can be like this,
        so that a run would be in vain.
    """
    told = columns["contrast"] >= CONTRAST
    count = int(told.sum())
    if count < LEAST:
        return []
    seen = {name: values[told] for name, values in columns.items()}
    return _impossible(seen, mse, gan, count) or _unlikely(seen, mse, gan, count)


def _impossible(seen: Columns, mse: str, gan: str, count: int) -> list[DesraError]:
    """Find what no pair of results can be like."""
    again = "copy or train it again, and check the range of its values and the order of its colours"
    for subject, name in ((gan, "gan"), (mse, "mse")):
        if (flat := _share(seen[f"{name}_contrast"] < FAINT * seen["contrast"])) >= SHARE:
            return [UsageError(subject, f"has practically one colour in {_part(flat, count)}", again)]
    if (equal := _share(seen["difference"] == 0)) >= SHARE:
        reason = f"has the very results of {mse} in {_part(equal, count)}"
        return [UsageError(gan, reason, "give the GAN model and its MSE twin, or the results of both")]
    if (back := _share(seen["gan_off"] == 0)) >= SHARE:
        return [UsageError(gan, f"gives back the pixels of the photo in {_part(back, count)}", again)]
    correlation = _median(seen["correlation"])
    if correlation < CORRELATION:
        wrong = [subject for subject, off in _off(seen, mse, gan).items() if off > DIFFERENCE]
        if len(wrong) == 1:
            reason = f"does not show what is in the photos (correlation with the other result {correlation:.2f})"
            return [UsageError(wrong[0], reason, again)]
        reason = f"does not show what {mse} shows (correlation {correlation:.2f} in {count} images)"
        return [UsageError(gan, reason, "give two results of the same photos")]
    return []


def _unlikely(seen: Columns, mse: str, gan: str, count: int) -> list[DesraError]:
    """Find what is unlike all real pairs that were measured, but not impossible."""
    doubts = []
    if (back := _share(seen["mse_off"] == 0)) >= SHARE:
        reason = f"gives back the pixels of the photo in {_part(back, count)}"
        doubts.append(DesraError(mse, reason, "give the MSE twin, or --mse-model bicubic"))
    colours = "check the order of its colours, its range of values and its gamma"
    wrong = {subject: off for subject, off in _off(seen, mse, gan).items() if off > DIFFERENCE}
    for subject, off in wrong.items():
        reason = f"has other colours than the photos (they differ by {off:.0%} of the contrast)"
        doubts.append(DesraError(subject, reason, colours))
    if not wrong and (difference := _median(seen["difference"])) > DIFFERENCE:
        reason = f"has other colours than {mse} (they differ by {difference:.0%} of the contrast)"
        doubts.append(DesraError(gan, reason, colours))
    x, y = _median(seen["shift_x"]), _median(seen["shift_y"])
    if math.hypot(x, y) > SHIFT:
        across, down = "right" if x > 0 else "left", "below" if y > 0 else "above"
        reason = f"lies {abs(x):.1f} px to the {across} of {mse} and {abs(y):.1f} px {down}"
        doubts.append(DesraError(gan, reason, "give results that lie on each other: a shift is marked as an artifact"))
    texture, closer = _median(seen["texture"]), seen["gan_off"] - seen["mse_off"]
    # The twin is the smoother one, and closer to the photo. A reference that keeps noise is closer, but not smoother.
    is_swapped = _median(closer) < 0 if np.isfinite(closer).any() else texture < -TEXTURE
    if texture < 0 and is_swapped:
        more = _part(_share(seen["texture"] < 0), count)
        reason = f"has more fine texture than {gan} in {more}, as if the two were exchanged"
        remedy = "exchange them, unless this reference is meant to keep more than the GAN model"
        doubts.append(DesraError(mse, reason, remedy))
    return doubts


def _off(seen: Columns, mse: str, gan: str) -> dict[str, float]:
    """Take the medians of how far both results are from the photo."""
    return {gan: _median(seen["gan_off"]), mse: _median(seen["mse_off"])}


def _share(flags: Flags) -> float:
    return float(flags.mean())


def _part(share: float, count: int) -> str:
    return f"{round(share * count)} of {count} images"


def _median(values: npt.NDArray[np.float64]) -> float:
    """Take the median of the values that were measured; NaN, which no comparison holds for, if most were not."""
    found = values[np.isfinite(values)]
    return float(np.median(found)) if 2 * len(found) >= len(values) and len(found) else math.nan


def _rounded(value: float) -> float:
    return round(float(value), 4)


def _levels(pixels: Pixels) -> Levels:
    return np.divide(pixels, 257, dtype=np.float32) if pixels.dtype == np.uint16 else pixels.astype(np.float32)


def _luminance(levels: Levels) -> Levels:
    return levels[:, :, 0] if levels.shape[2] == 1 else cv2.transform(levels, np.float32([LUMINANCE]))  # type: ignore


def _means(levels: Levels, block: int) -> Levels:
    """Take the means of square blocks, ``(rows, columns, channels)``."""
    height, width, channels = levels.shape
    size = width // block, height // block
    return cv2.resize(levels, size, interpolation=cv2.INTER_AREA).reshape(*size[::-1], channels).astype(np.float32)


def _centred(means: Levels) -> Levels:
    centred: Levels = means - means.mean((0, 1))
    return centred


def _contrast(means: Levels) -> float:
    return float(_centred(means).std())


def _difference(one: Levels, other: Levels, contrast: float, *, is_zero: bool) -> float:
    share = float(np.abs(one - other).mean()) / (contrast + _FLOOR)
    return 0.0 if is_zero else max(_rounded(share), _NOT_ZERO)


def _correlation(one: Levels, other: Levels) -> float:
    # Gray is compared with each colour.
    one, other = np.broadcast_arrays(_centred(one), _centred(other))
    norm = math.sqrt(float((one * one).sum()) * float((other * other).sum()))
    return float((one * other).sum()) / norm if norm else 0.0


def _repeats(pixels: Pixels, lr: Pixels, scale: int) -> bool:
    """Check whether a result repeats each pixel of the photo."""
    return np.array_equal(pixels[::scale, ::scale], lr) and np.array_equal(
        pixels, lr.repeat(scale, axis=0).repeat(scale, axis=1)
    )


def _texture(grey: Levels) -> float:
    return float((grey - cv2.GaussianBlur(grey, (5, 5), _FINE)).std())


def _shift(mse: Levels, gan: Levels) -> tuple[float | None, float | None]:
    """Measure how far the GAN result lies from the MSE result by the slopes of both (Lucas and Kanade), as x and y."""
    size = mse.shape[1] // 2, mse.shape[0] // 2
    halves = [cv2.resize(grey, size, interpolation=cv2.INTER_AREA) for grey in (mse, gan)]
    one, other = (cv2.GaussianBlur(half, (7, 7), _SMOOTH) for half in halves)
    middle, change = one + other, one - other
    across = (middle[1:-1, 2:] - middle[1:-1, :-2]) / 4
    down = (middle[2:, 1:-1] - middle[:-2, 1:-1]) / 4
    change = change[1:-1, 1:-1] - change.mean()
    slopes = np.array([[np.vdot(a, b) for b in (across, down)] for a in (across, down)], np.float64) / change.size
    if np.linalg.eigvalsh(slopes)[0] < _LEAST_SLOPE:
        return None, None
    x, y = np.linalg.solve(slopes, [np.vdot(across, change) / change.size, np.vdot(down, change) / change.size])
    return _rounded(2 * x), _rounded(2 * y)
