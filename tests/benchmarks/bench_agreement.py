"""How far real pairs of results are from pairs that are none, by the numbers of desra_core/detection/agreement.py.

Run it with ``python tests/benchmarks/run.py agreement``. It reads ../shared/data, and makes the numbers of
docs/method.md ("Wrong pairs"), in some minutes.
"""

import time
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from markdown import Cell, print_table

from desra_core import load_pair, read_image, super_resolve, variance_similarity
from desra_core.detection.agreement import (
    CONTRAST,
    FIRST,
    LEAST,
    Columns,
    PairAgreement,
    find_doubts,
    measure_agreement,
)
from desra_core.images.codec import Pixels

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
WEIGHTS, SMALL = DATA / "weights", Path(__file__).resolve().parents[1] / "models"
# The middle of each photo; of sharp photos, once as they are and once at a quarter of their size.
SIDE = 96
PAIRS = (
    (WEIGHTS / "realesr-general-x4v3-l1-twin.safetensors", WEIGHTS / "realesr-general-x4v3.pth"),
    ("bicubic", WEIGHTS / "realesr-general-x4v3.pth"),
    ("bicubic", WEIGHTS / "realesr-animevideov3.pth"),
    (WEIGHTS / "rlfn-ntire2022-x4.pth", WEIGHTS / "realesr-general-wdn-x4v3.pth"),
    (SMALL / "mse.pth", SMALL / "gan.pth"),
)
HEADINGS = (
    "pair", "results", "photos", "correlation, median", "least", "difference, median", "from the photo, median",
    "contrast, least", "shift, px", "texture", "doubts", "draws of 8 with doubts", "of 16",
)  # fmt: skip
DRAWS = 300

Pair = tuple[Pixels, Pixels, Pixels]


def run() -> None:
    if not WEIGHTS.is_dir():
        print("Not measured: there is no ../shared/data beside the checkout.")
        return
    photos = real_photos()
    rows: list[list[Cell]] = []
    for mse, gan in PAIRS:
        models = load_pair(mse, gan)
        found = [(lr, *(super_resolve(model, lr).pixels for model in models)) for lr in photos]
        pairs: list[Pair] = [(lr, one, other) for lr, one, other in found]
        for name, changed in ways(pairs).items():
            rows.append([f"{gan.name}, {Path(mse).name}", name, *judged(changed)])
    print_table(HEADINGS, rows)
    mse_sr, gan_sr = (np.tile(pixels, (3, 3, 1)) for pixels in pairs[0][1:])
    print("\nCPU seconds of a pair of 1152x1152 px, as a share of those of the similarity map: ", end="")
    variance_similarity(mse_sr, gan_sr)
    shares = [
        _seconds(measure_agreement, mse_sr, gan_sr) / _seconds(variance_similarity, mse_sr, gan_sr) for _ in "0123"
    ]
    print(f"{np.median(shares):.1%}")


def real_photos() -> list[Pixels]:
    photos = [read_image(path) for path in sorted((DATA / "lr").glob("*/*"))]
    for path in sorted((DATA / "hr").glob("*/*.png")):
        photo = read_image(path)
        photos += [photo, cv2.resize(photo, (0, 0), fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)]
    return [middle(photo) for photo in photos]


def middle(photo: Pixels) -> Pixels:
    top, left = (max(0, (side - SIDE) // 2) for side in photo.shape[:2])
    return np.ascontiguousarray(photo[top : top + SIDE, left : left + SIDE])


def ways(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """The real pairs, and what can go wrong with them."""
    alike = [
        other for other in zip(pairs, pairs[1:] + pairs[:1], strict=True) if other[0][1].shape == other[1][2].shape
    ]
    return {
        "as they are": pairs,
        "exchanged": [(lr, gan_sr, mse_sr) for lr, mse_sr, gan_sr in pairs],
        "one pixel aside": [(lr, mse_sr, np.roll(gan_sr, 1, 1)) for lr, mse_sr, gan_sr in pairs],
        "red and blue exchanged": [(lr, mse_sr, gan_sr[:, :, ::-1]) for lr, mse_sr, gan_sr in pairs],
        "a tenth too dark": [(lr, mse_sr, (gan_sr * 0.9).astype(gan_sr.dtype)) for lr, mse_sr, gan_sr in pairs],
        "too small by 255": [(lr, mse_sr, (gan_sr / 255).astype(gan_sr.dtype)) for lr, mse_sr, gan_sr in pairs],
        "of another photo": [(one[0], one[1], other[2]) for one, other in alike],
    }


def judged(pairs: list[Pair]) -> list[Cell]:
    """Summarise the agreement of some pairs."""
    found = [measure_agreement(mse_sr, gan_sr, lr) for lr, mse_sr, gan_sr in pairs]
    columns = {
        name: np.array([getattr(each, name) for each in found if each], np.float64) for name in PairAgreement._fields
    }
    told = {name: values[columns["contrast"] >= CONTRAST] for name, values in columns.items()}
    shift = np.hypot(np.nanmedian(told["shift_x"]), np.nanmedian(told["shift_y"]))
    contrast = np.minimum(told["mse_contrast"], told["gan_contrast"]) / told["contrast"]
    doubts = [" ".join(doubt.reason.split()[:4]) for doubt in find_doubts(columns, "the MSE", "the GAN")]
    rng = np.random.default_rng(0)
    draws = [[rng.permutation(len(told["contrast"]))[:size] for _ in range(DRAWS)] for size in (LEAST, FIRST)]
    doubted = [sum(bool(find_doubts(_of(told, rows), "the MSE", "the GAN")) for rows in drawn) for drawn in draws]
    return [
        len(told["contrast"]),
        f"{np.median(told['correlation']):.2f}",
        f"{told['correlation'].min():.2f}",
        f"{np.median(told['difference']):.2f}",
        f"{max(np.nanmedian(told['mse_off']), np.nanmedian(told['gan_off'])):.2f}",
        f"{contrast.min():.3f}",
        f"{shift:.2f}",
        f"{np.median(told['texture']):+.2f}",
        ", ".join(doubts) or "none",
        *(f"{count} of {DRAWS}" for count in doubted),
    ]


def _of(columns: Columns, rows: npt.NDArray[np.intp]) -> Columns:
    return {name: values[rows] for name, values in columns.items()}


def _seconds(function: object, *arguments: Pixels) -> float:
    assert callable(function)
    started = time.process_time()
    function(*arguments)
    return time.process_time() - started
