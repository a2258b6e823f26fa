"""Make the table of references.md: how masks with other references agree with those of the GAN model's own MSE twin.

The GAN model of ``../shared/data/pairs`` was finetuned from an L1 network, whose results are there too: its masks are
the standard. Results of the references are kept in FOLDER and not computed again.

    python docs/references.py FOLDER
"""

from __future__ import annotations

import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from desra_core.detection import artifact_mask, variance_similarity
from desra_core.detection.class_weights import load_weights
from desra_core.detection.mask import SimilarityMap
from desra_core.evaluation.metrics import Agreement, compare_masks, pooled, ratio
from desra_core.evaluation.table import as_markdown, fixed
from desra_core.files import read_bytes, replace_file
from desra_core.images.codec import Labels, Mask, Pixels, decode, decode_labels, encode_png
from desra_core.networks import super_resolve
from desra_core.networks.checkpoints import load_reference

PAIRS, WEIGHTS = (Path(__file__).parents[2] / "shared" / "data" / part for part in ("pairs", "weights"))
SCALE = 4
REFERENCES = {
    "twin of realesr-general-x4v3": str(WEIGHTS / "realesr-general-x4v3-l1-twin.safetensors"),
    "twin of RealESRGAN_x4plus": str(WEIGHTS / "RealESRGAN_x4plus-l1-twin.safetensors"),
    "RLFN": str(WEIGHTS / "rlfn-ntire2022-x4.pth"),
    "bicubic": "bicubic",
}
THRESHOLD, MIN_AREAS = 0.7, (4000, 400)
THRESHOLDS = [round(0.05 * step, 2) for step in range(4, 20)]  # 0.2 to 0.95


def main(folder: Path) -> None:
    """Print the tables as Markdown, one for each minimal area and weighting."""
    names = sorted(path.name for path in (PAIRS / "lr").iterdir())
    labels = [decode_labels(read_bytes(PAIRS / "labels" / name), PAIRS / "labels" / name) for name in names]
    standard = similarities(names, "mse_sr", folder)
    compared = {title: similarities(names, title, folder) for title in REFERENCES}
    for min_area, weighting in product(MIN_AREAS, ("published", "none")):
        masks = partial(marked, labels=labels, min_area=min_area, weighting=weighting)
        truth = masks(standard, THRESHOLD)
        rows = []
        for title, maps in compared.items():
            by_threshold = {threshold: agreement(masks(maps, threshold), truth) for threshold in THRESHOLDS}
            best = max(THRESHOLDS, key=lambda threshold: by_threshold[threshold].iou or 0.0)
            mean = float(np.mean([values.mean() for values in maps]))
            rows += [row(title, mean, threshold, by_threshold[threshold]) for threshold in (THRESHOLD, best)]
        words = "semantic weights" if weighting == "published" else "weight 1"
        regions = sum(compare_masks(mask, mask).marked for mask in truth)
        share = np.mean([mask.mean() for mask in truth])
        print(f"### {words.capitalize()}, minimal area {min_area} px\n")  # noqa: T201
        print(f"The standard has {regions} regions, on {share:.1%} of the pixels.\n")  # noqa: T201
        print(as_markdown(rows), end="\n\n")  # noqa: T201
        sys.stdout.flush()


def similarities(names: list[str], title: str, folder: Path) -> list[SimilarityMap]:
    """Compare the results of a reference, or those that are there, with the GAN results."""
    return [variance_similarity(result(name, title, folder), photo(PAIRS / "gan_sr" / name)) for name in names]


def result(name: str, title: str, folder: Path) -> Pixels:
    """Return a result of a reference: a stored one, or a new one, which is stored."""
    if title == "mse_sr":
        return photo(PAIRS / title / name)
    path = folder / title / name
    if not path.exists():
        model = load_reference(REFERENCES[title], SCALE)
        replace_file(path, encode_png(super_resolve(model, photo(PAIRS / "lr" / name)).pixels))
    return photo(path)


def photo(path: Path) -> Pixels:
    """Read the pixels of a file."""
    return decode(read_bytes(path), path).pixels


def marked(
    maps: list[SimilarityMap], threshold: float, *, labels: list[Labels], min_area: int, weighting: str
) -> list[Mask]:
    """Mark the artifacts of each pair."""
    weights: npt.NDArray[np.float64] = load_weights(weighting).values
    return [
        artifact_mask(values, threshold=threshold, min_area=min_area, labels=classes, weights=weights)
        for values, classes in zip(maps, labels, strict=True)
    ]


def agreement(masks: list[Mask], truth: list[Mask]) -> Agreement:
    """Count how far masks agree with the standard, over all pairs."""
    return pooled(compare_masks(mask, standard) for mask, standard in zip(masks, truth, strict=True))


def row(title: str, mean: float, threshold: float, counts: Agreement) -> dict[str, str]:
    """Write a line of the table."""
    return {
        "reference": title,
        "mean D": fixed(mean),
        "threshold": f"{threshold:g}",
        "IoU": fixed(counts.iou),
        "precision": fixed(ratio(counts.intersection, counts.mask_pixels)),
        "recall": fixed(ratio(counts.intersection, counts.ground_truth_pixels)),
        "regions found": f"{counts.found} of {counts.marked}",
        "regions right": f"{counts.right} of {counts.detected}",
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
