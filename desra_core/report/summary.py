"""The numbers of the report, computed from columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.report.results import Results
from desra_core.workspace.products import PRODUCTS

# Stages in the order in which an image meets them; others follow. A part is also counted in the stage before it.
_STAGES = ("super_resolution", "inference", *(product.name for product in PRODUCTS[1:]))
_PARTS = frozenset({"inference"})


@dataclass(frozen=True)
class Summary:
    """The corpus in numbers.

    Attributes
    ----------
    images, done, failed, pending
        Image names, as ``desra status`` counts them.
    marked
        Images with artifacts among those done.
    outdated
        Images with artifacts whose mask was made under other settings than those of the latest run.
    pixels, artifact_pixels
        Of all images done.
    regions
        Artifact regions.
    seconds
        Computing time of all stages.
    """

    images: int
    done: int
    failed: int
    pending: int
    marked: int
    outdated: int
    pixels: int
    artifact_pixels: int
    regions: int
    seconds: float

    @property
    def marked_share(self) -> float | None:
        """Of the images done, the share with artifacts."""
        return self.marked / self.done if self.done else None

    @property
    def pixel_share(self) -> float | None:
        """Of the pixels of all images done, the share in masks."""
        return self.artifact_pixels / self.pixels if self.pixels else None


class StageTime(NamedTuple):
    """Computing time of one stage, in seconds; a ``part`` is contained in the stage before it."""

    stage: str
    part: bool
    images: int
    total: float
    median: float
    mean: float

    @property
    def rate(self) -> float | None:
        """Images per second and worker."""
        return 1 / self.mean if self.mean > 0 else None


class ClassCount(NamedTuple):
    """Artifact regions of one class; ``name`` is None where there are no labels, ``share`` is of all regions."""

    name: str | None
    regions: int
    share: float
    images: int
    pixels: int
    mean_similarity: float


def summarize(results: Results) -> Summary:
    """Count images, regions and pixels."""
    images = results.images
    failed = images["failed_stage"].is_valid()
    done = images.filter(pc.and_(images["mask_key"].is_valid(), pc.invert(failed)))
    marked = done.filter(pc.fill_null(pc.greater(done["artifact_pixels"], 0), False))
    failures = _total(failed)
    wanted = (results.document.get("target") or {}).get("mask_key")
    outdated = _total(pc.not_equal(marked["mask_key"], wanted)) if isinstance(wanted, str) else 0
    areas = pc.multiply(pc.cast(done["height"], pa.int64()), pc.cast(done["width"], pa.int64()))
    return Summary(
        images=images.num_rows + results.unscanned,
        done=done.num_rows,
        failed=failures + results.unscanned,
        pending=images.num_rows - done.num_rows - failures,
        marked=marked.num_rows,
        outdated=outdated,
        pixels=_total(areas),
        artifact_pixels=_total(done["artifact_pixels"]),
        regions=results.regions.num_rows,
        seconds=sum(time.total for time in stage_times(results.seconds) if not time.part),
    )


def stage_times(seconds: pa.Table) -> list[StageTime]:
    """Computing times by stage, from the columns ``stage`` and ``seconds``."""
    stages = seconds["stage"].unique().to_pylist()
    stages.sort(key=lambda stage: (_STAGES.index(stage) if stage in _STAGES else len(_STAGES), stage))
    times = []
    for stage in stages:
        values = numbers(seconds.filter(pc.equal(seconds["stage"], stage))["seconds"])
        total, median = float(values.sum()), float(np.median(values))
        times.append(StageTime(stage, stage in _PARTS, values.size, total, median, total / values.size))
    return times


def class_counts(regions: pa.Table) -> list[ClassCount]:
    """Regions by class, the most frequent first."""
    grouped = regions.group_by("class_name", use_threads=False).aggregate(
        [([], "count_all"), ("image", "count_distinct"), ("area", "sum"), ("mean_similarity", "mean")]
    )
    counts = [
        ClassCount(
            name=row["class_name"],
            regions=row["count_all"],
            share=row["count_all"] / regions.num_rows,
            images=row["image_count_distinct"],
            pixels=row["area_sum"],
            mean_similarity=row["mean_similarity_mean"],
        )
        for row in grouped.to_pylist()
    ]
    return sorted(counts, key=lambda count: (-count.regions, count.name or ""))


def masked_shares(results: Results) -> npt.NDArray[np.float64]:
    """The share of each image with artifacts that is masked."""
    marked = results.images.filter(pc.fill_null(pc.greater(results.images["artifact_pixels"], 0), False))
    areas = numbers(marked["height"]) * numbers(marked["width"])
    return numbers(marked["artifact_pixels"]) / np.maximum(areas, 1)


def numbers(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """A column as float64."""
    return np.asarray(pc.cast(column, pa.float64()).to_numpy(), np.float64)


def _total(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)
