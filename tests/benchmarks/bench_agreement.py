"""How far real pairs of results are from pairs that are none, by the numbers of desra_core/detection/agreement.py.

Run it with ``python tests/benchmarks/run.py agreement``. It reads ../shared/data, and makes the table of docs/method.md
("Wrong pairs").
"""

import time
from pathlib import Path

import cv2
import numpy as np
from markdown import Cell, print_table

from desra_core import load_pair, read_image, super_resolve, variance_similarity
from desra_core.detection.agreement import CONTRAST, PairAgreement, find_doubts, measure_agreement
from desra_core.images.codec import Pixels

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
# The middle of each photo; of sharp photos, once as they are and once at a quarter of their size.
SIDE = 96
PAIRS = (
    ("realesr-general-x4v3-l1-twin.safetensors", "realesr-general-x4v3.pth"),
    ("bicubic", "realesr-general-x4v3.pth"),
    ("bicubic", "realesr-animevideov3.pth"),
    ("rlfn-ntire2022-x4.pth", "realesr-general-wdn-x4v3.pth"),
)
HEADINGS = ("pair", "results", "photos", "correlation, least", "difference, median", "shift, px", "texture", "doubts")

Pair = tuple[Pixels, Pixels, Pixels]


def run() -> None:
    if not (DATA / "weights").is_dir():
        print("Not measured: there is no ../shared/data beside the checkout.")
        return
    photos = real_photos()
    rows: list[list[Cell]] = []
    for mse, gan in PAIRS:
        models = load_pair(mse if mse == "bicubic" else DATA / "weights" / mse, DATA / "weights" / gan)
        found = [(lr, *(super_resolve(model, lr).pixels for model in models)) for lr in photos]
        pairs: list[Pair] = [(lr, one, other) for lr, one, other in found]
        for name, changed in ways(pairs).items():
            rows.append([f"{gan}, {mse}", name, *judged(changed)])
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
    doubts = [" ".join(doubt.reason.split()[:4]) for doubt in find_doubts(columns, "the MSE", "the GAN")]
    return [
        len(told["contrast"]),
        f"{told['correlation'].min():.2f}",
        f"{np.median(told['difference']):.2f}",
        f"{shift:.2f}",
        f"{np.median(told['texture']):+.2f}",
        ", ".join(doubts) or "none",
    ]


def _seconds(function: object, *arguments: Pixels) -> float:
    assert callable(function)
    started = time.process_time()
    function(*arguments)
    return time.process_time() - started
