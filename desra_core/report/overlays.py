"""A mask and its ground truth in one picture: what is right, what is false, what was missed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from desra_core.errors import ImageError
from desra_core.evaluation.image_agreement import ImageAgreement
from desra_core.evaluation.mask_files import FRAME, on_valid_region, read_mask
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import Mask, decode
from desra_core.images.crops import RGB, fitted, rgb8
from desra_core.report.maps import MAX_PIXELS

# Of Okabe and Ito, apart in brightness too.
RIGHT, FALSE, MISSED = (86, 180, 233), (213, 94, 0), (240, 228, 66)
LARGEST = 480

_GROUND = 70
_OPACITY = 0.72


def agreement_picture(image: ImageAgreement, gan_sr: RGB | None) -> RGB:
    """Draw what two masks have in common.

    Parameters
    ----------
    image
        What was found of them; their files are read again.
    gan_sr
        ``(H, W, 3)``, the picture below, in gray; without one it is plain.

    Returns
    -------
    ``(h, w, 3)`` uint8, the longer side `LARGEST` at most.

    Raises
    ------
    ImageError
        A mask cannot be read any more.
    """
    mask, truth = (
        np.pad(on_valid_region(read_mask(path), image.shape, path), FRAME)
        for path in (image.pair.mask, image.pair.ground_truth)
    )
    shapes = {mask.shape, truth.shape, image.shape if gan_sr is None else gan_sr.shape[:2]}
    if shapes != {image.shape}:
        raise ImageError(image.pair.mask, "is of another size now", "evaluate again")
    return drawn_agreement(mask, truth, gan_sr)


def drawn_agreement(mask: Mask, ground_truth: Mask, gan_sr: RGB | None) -> RGB:
    """The same for masks of ``(H, W)``."""
    ground = np.full((*mask.shape, 3), _GROUND, np.uint8) if gan_sr is None else gan_sr
    ground = fitted(ground, LARGEST)
    picture = (ground if gan_sr is None else _gray(ground)).astype(np.float64)
    parts = ((mask & ground_truth, RIGHT), (mask & ~ground_truth, FALSE), (ground_truth & ~mask, MISSED))
    for part, colour in parts:
        opacity = _OPACITY if gan_sr is not None else 1.0
        picture += opacity * _share(part)[..., np.newaxis] * (np.array(colour) - picture)
    return np.rint(picture).astype(np.uint8)


def gan_sr_of(image: ImageAgreement) -> RGB | None:
    """The GAN result of an image, whole; None where its file is not known, cannot be read or has another size."""
    if image.pair.gan_sr is None:
        return None
    try:
        pixels = decode(read_bytes(image.pair.gan_sr), image.pair.gan_sr, max_pixels=MAX_PIXELS).pixels
    except ImageError:
        return None
    return rgb8(pixels) if pixels.shape[:2] == image.shape else None


def _share(part: Mask) -> npt.NDArray[np.float64]:
    """``(h, w)``, the share of each shown pixel that is set."""
    return np.asarray(fitted(part.astype(np.float32), LARGEST), np.float64)


def _gray(pixels: RGB) -> RGB:
    luminance = pixels.mean(axis=2, keepdims=True) * 0.75
    return np.repeat(np.rint(luminance).astype(np.uint8), 3, axis=2)
