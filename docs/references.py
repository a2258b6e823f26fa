"""Make the tables of references.md: how masks with other references agree with those of the GAN model's own MSE twin.

Two GAN models on the photos of ``../shared/data/pairs``: the one whose results are there, finetuned from an L1 network
whose results are there too, and realesr-general-x4v3 with its twin. Masks by the twin are the standard. Results are
kept in FOLDER and not computed again. The first time takes some ten minutes on two cores.

    python -m docs.references FOLDER
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from desra_core import artifact_mask, read_image, super_resolve, variance_similarity
from desra_core.detection.class_weights import load_weights
from desra_core.detection.mask import SimilarityMap
from desra_core.evaluation.metrics import Agreement, compare_masks, pooled, ratio
from desra_core.evaluation.table import as_markdown, counted, fixed, in_percent
from desra_core.files import read_bytes, replace_file
from desra_core.images.codec import Labels, Mask, Pixels, decode_labels, encode_png
from desra_core.networks.checkpoints import load_reference

PAIRS, WEIGHTS = (Path(__file__).parents[2] / "shared" / "data" / part for part in ("pairs", "weights"))
SCALE = 4
MODELS = {
    "realesr-general-x4v3": str(WEIGHTS / "realesr-general-x4v3.pth"),
    "twin of realesr-general-x4v3": str(WEIGHTS / "realesr-general-x4v3-l1-twin.safetensors"),
    "RLFN": str(WEIGHTS / "rlfn-ntire2022-x4.pth"),
    "bicubic": "bicubic",
}
THRESHOLD = 0.7
THRESHOLDS = [round(0.05 * step, 2) for step in range(4, 20)]  # 0.2 to 0.95


class Study(NamedTuple):
    """Names of results: of a GAN model, of its twin and of other references. Each weighting and area gives a table."""

    gan: str
    standard: str
    references: tuple[str, ...]
    weightings: tuple[str, ...]
    min_areas: tuple[int, ...] = (4000, 400)


STUDIES = {
    "The pairs": Study(
        "gan_sr",
        "mse_sr",
        ("RLFN", "twin of realesr-general-x4v3", "bicubic"),
        ("none", "published"),
    ),
    "realesr-general-x4v3 on the same photos": Study(
        "realesr-general-x4v3",
        "twin of realesr-general-x4v3",
        ("RLFN", "mse_sr", "bicubic"),
        ("none",),
    ),
}


def main(folder: Path) -> None:
    """Print the tables as Markdown."""
    names = sorted(path.name for path in (PAIRS / "lr").iterdir())
    labels = [decode_labels(read_bytes(PAIRS / "labels" / name), PAIRS / "labels" / name) for name in names]
    for heading, study in STUDIES.items():
        print(f"## {heading}\n")  # noqa: T201
        gan = [result(name, study.gan, folder) for name in names]

        def similarities(title: str, gan: list[Pixels] = gan) -> list[SimilarityMap]:
            results = [result(name, title, folder) for name in names]
            return [variance_similarity(mse_sr, gan_sr) for mse_sr, gan_sr in zip(results, gan, strict=True)]

        standard = similarities(study.standard)
        compared = {title: similarities(title) for title in study.references}
        for weighting in study.weightings:
            for min_area in study.min_areas:
                masks = partial(marked, labels=labels, weighting=weighting, min_area=min_area)
                truth = masks(standard, THRESHOLD)
                words = "semantic weights" if weighting == "published" else "weight 1"
                regions = counted(sum(compare_masks(mask, mask).marked for mask in truth), "region")
                share = in_percent(float(np.mean([mask.mean() for mask in truth])))
                print(f"{words.capitalize()}, minimal area {min_area} px; the standard marks {regions}, {share}:\n")  # noqa: T201
                rows = [row for title, maps in compared.items() for row in rows_of(title, maps, masks, truth)]
                print(as_markdown(rows), end="\n\n", flush=True)  # noqa: T201


def result(name: str, title: str, folder: Path) -> Pixels:
    """Return a result: one of the pairs, or of a model, which is stored."""
    if title not in MODELS:
        return read_image(PAIRS / title / name)
    path = folder / title / name
    if not path.exists():
        model = load_reference(MODELS[title], SCALE)
        replace_file(path, encode_png(super_resolve(model, read_image(PAIRS / "lr" / name)).pixels))
    return read_image(path)


def marked(
    maps: list[SimilarityMap], threshold: float, *, labels: list[Labels], weighting: str, min_area: int
) -> list[Mask]:
    """Mark the artifacts of each photo."""
    weights = load_weights(weighting).values
    return [
        artifact_mask(values, threshold=threshold, min_area=min_area, labels=classes, weights=weights)
        for values, classes in zip(maps, labels, strict=True)
    ]


def rows_of(
    title: str, maps: list[SimilarityMap], masks: partial[list[Mask]], truth: list[Mask]
) -> list[dict[str, str]]:
    """Write the lines of a reference: at the usual threshold, and at the one with the highest IoU."""
    agreements = {
        threshold: pooled(compare_masks(*pair) for pair in zip(masks(maps, threshold), truth, strict=True))
        for threshold in THRESHOLDS
    }
    best = max(THRESHOLDS, key=lambda threshold: agreements[threshold].iou or 0.0)
    return [agreement_row(title, threshold, agreements[threshold]) for threshold in dict.fromkeys((THRESHOLD, best))]


def agreement_row(title: str, threshold: float, counts: Agreement) -> dict[str, str]:
    """Write a line of a table; precision and recall are those of pixels."""
    return {
        "reference": title,
        "threshold": f"{threshold:g}",
        "IoU": fixed(counts.iou),
        "precision": fixed(ratio(counts.intersection, counts.mask_pixels)),
        "recall": fixed(ratio(counts.intersection, counts.ground_truth_pixels)),
        "regions found": f"{counts.found} of {counts.marked}",
        "regions right": f"{counts.right} of {counts.detected}",
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
