"""How fast are similarity and fidelity, beside the same formulas with OpenCV and scikit-image in float64?

Run it with ``python tests/benchmarks/bench_similarity.py``.
"""

import time
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
from skimage.metrics import structural_similarity

from desra_core.detection.similarity import variance_similarity
from desra_core.evaluation.fidelity import Fidelity, measure_fidelity
from desra_core.images.codec import LUMINANCE

SIDES = (1024, 2048, 4096)
REPEATS = 3

Pixels = npt.NDArray[np.uint8]


def opencv_similarity(x: Pixels, y: Pixels) -> npt.NDArray[np.float64]:
    """The authors' way: whole images in float64, four 11x11 filters per channel."""
    line = cv2.getGaussianKernel(11, 1.5)
    window = line @ line.T

    def filtered(image: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return cv2.filter2D(image, -1, window)[5:-5, 5:-5]

    total = 0.0
    for c in range(3):
        p, q = x[:, :, c].astype(np.float64), y[:, :, c].astype(np.float64)
        var_p, var_q = filtered(p**2) - filtered(p) ** 2, filtered(q**2) - filtered(q) ** 2
        stabiliser = (0.03 * 255) ** 2
        numerator = 2 * np.sqrt(var_p + 1e-8) * np.sqrt(var_q + 1e-8) + stabiliser
        total = total + numerator / (var_p + var_q + stabiliser)
    return total / 3


def scikit_fidelity(before: Pixels, after: Pixels, outside: npt.NDArray[np.bool_]) -> Fidelity:
    """The measures one by one, each on whole images."""
    error = np.square(before[outside].astype(np.float64) - after[outside]).sum() / 3
    x, y = (image.astype(np.float64) @ np.array(LUMINANCE) for image in (before, after))
    _, ssim = structural_similarity(
        x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, full=True
    )
    difference, mean = np.array([1.0, 0.0, -1.0]), np.full(3, 1 / 3)
    g, h = (
        np.hypot(*(cv2.sepFilter2D(image, cv2.CV_64F, *each, borderType=cv2.BORDER_REPLICATE)
                   for each in ((difference, mean), (mean, difference))))
        for image in (x, y)
    )  # fmt: skip
    gradient_similarity = ((2 * g * h + 170) / (g * g + h * h + 170))[outside].mean()
    return Fidelity(error, ssim[outside].mean(), gradient_similarity, g.mean() / 2, h.mean() / 2)


def seconds(function: Callable[[], object]) -> float:
    """The quickest of a few runs, since other programs only ever add time."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def run() -> None:
    rng = np.random.default_rng(0)
    black = np.zeros((11, 11), np.uint8)
    first = time.perf_counter()
    variance_similarity(black, black)
    print(f"first call (compiles, or loads the compiled code): {time.perf_counter() - first:.2f} s")
    print(f"OpenCV {cv2.__version__} with {cv2.getNumThreads()} threads; ratios are to OpenCV; H x W x 3, uint8")
    print("   side  OpenCV s  1 thread s  ratio  2 threads s  ratio  max diff")
    for side in SIDES:
        x, y = rng.integers(0, 256, (2, side, side, 3), np.uint8)
        x[: side // 4] = 255
        difference = np.abs(variance_similarity(x, y) - opencv_similarity(x, y)).max()
        opencv = seconds(lambda x=x, y=y: opencv_similarity(x, y))
        one = seconds(lambda x=x, y=y: variance_similarity(x, y))
        two = seconds(lambda x=x, y=y: variance_similarity(x, y, threads=2))
        print(f"{side:>7} {opencv:>9.3f} {one:>11.4f} {opencv / one:>6.1f}", end="")
        print(f"{two:>13.4f} {opencv / two:>6.1f} {difference:>9.1e}")

    print("\nfidelity, one thread\n   side  scikit-image s  here s  ratio  max diff, relative")
    for side in SIDES[:2]:
        before, after = rng.integers(0, 256, (2, side, side, 3), np.uint8)
        outside = rng.random((side, side)) < 0.9
        expected, measured = scikit_fidelity(before, after, outside), measure_fidelity(before, after, outside)
        difference = max(abs(new / old - 1) for new, old in zip(measured, expected, strict=True))
        plain = seconds(lambda x=before, y=after, z=outside: scikit_fidelity(x, y, z))
        here = seconds(lambda x=before, y=after, z=outside: measure_fidelity(x, y, z))
        print(f"{side:>7} {plain:>15.3f} {here:>7.4f} {plain / here:>6.1f} {difference:>9.1e}")


if __name__ == "__main__":
    run()
