"""The difference of colours, CIEDE2000, between small neighbourhoods of the pair: what D cannot see."""

from typing import ClassVar

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.images.codec import Labels, Pixels, rgb_levels
from desra_core.images.parts import strips_with_halo

_SIDE = 11
_HALO = _SIDE // 2
_STRIP = 2**18


class Colour:
    """CIEDE2000 of the mean CIELAB colours in windows of 11x11 px, so that texture of the same mean scores nothing.

    Results are taken as sRGB, with D65 white; the window ends at the image's border, where it is reflected.
    """

    # No threshold is published. On the pairs of docs/benchmarks.md this one marks as much as DeSRA does at weight 1.
    threshold: ClassVar[float] = 6.5
    smallest: ClassVar[int] = _HALO + 1
    inputs: ClassVar[tuple[str, ...]] = ()

    def __call__(
        self, mse_sr: Pixels, gan_sr: Pixels, _lr: Pixels | None = None, _labels: Labels | None = None, /
    ) -> npt.NDArray[np.float32]:
        """Score a pair, from 0 upwards; there is no frame."""
        from skimage.color import deltaE_ciede2000

        scores = np.empty(gan_sr.shape[:2], np.float32)
        for rows, source, kept in strips_with_halo(scores.shape, _HALO, _STRIP):
            colours = [_mean_lab(image[source]) for image in (mse_sr, gan_sr)]
            scores[rows] = deltaE_ciede2000(*(colour[kept] for colour in colours))  # type: ignore[no-untyped-call]
        return scores


def _mean_lab(pixels: Pixels) -> npt.NDArray[np.float64]:
    from skimage.color import rgb2lab

    return np.asarray(cv2.blur(rgb2lab(rgb_levels(pixels) / 255), (_SIDE, _SIDE), borderType=cv2.BORDER_REFLECT_101))


detector = Colour()
