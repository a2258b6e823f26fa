"""One page about a benchmark: the paper's table, curves, times, and the worst images with all methods side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from desra_core.benchmarking.benchmark import Benchmark
from desra_core.benchmarking.labelled import ImageRecord, LabelledJob, read_ground_truth
from desra_core.benchmarking.labelled_tables import (
    PUBLISHED_TITLE,
    Curve,
    LabelledResults,
    MethodRow,
    paper_cells,
    published_cells,
    row_cells,
    times_note,
)
from desra_core.benchmarking.methods import OperatingPoint
from desra_core.errors import ImageError, printable
from desra_core.evaluation.mask_files import FRAME, on_valid_region, read_mask
from desra_core.images.codec import Mask
from desra_core.images.crops import RGB, encode_webp, fitted, rgb8
from desra_core.report.charts import bar_chart, line_chart
from desra_core.report.document import render_page
from desra_core.report.gallery import Cell, as_uri
from desra_core.report.maps import MAX_PIXELS
from desra_core.report.overlays import FALSE, LARGEST, MISSED, RIGHT, drawn_agreement
from desra_core.report.plots import inline
from desra_core.stages.sources import read_photo
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File, ImageRef

WORST = 6
# Of the page's 20 MB.
PICTURE_CHARACTERS = 16_000_000

_CURVES, _FAILURES = 8, 100
_THREADS = 2


class Picture(NamedTuple):
    """An image of the data set: GAN result, MSE result, and each method's mask against the ground truth."""

    name: str
    facts: str
    cells: list[Cell]


def render(benchmark: Benchmark[LabelledJob], results: LabelledResults) -> str:
    """The page as text: one HTML file that needs no other file and no network; the same for the same results."""
    return render_page("benchmark.html.j2", **_content(benchmark, results))


def worst_records(
    benchmark: Benchmark[LabelledJob], records: Sequence[ImageRecord], count: int = WORST
) -> list[ImageRecord]:
    """The images on which the first method's IoU is lowest, of equal ones those with the larger masks first.

    Images that it has not judged, and those where neither mask marks anything, are none of them.
    """
    method = benchmark.methods[0]
    point = method.points[0].name
    found = [
        (agreement.iou, -agreement.union, record.title, record)
        for record in records
        if method.name in record.runs
        and (agreement := record.runs[method.name].agreements[point]).iou is not None
        and agreement.iou < 1
    ]
    return [record for *_, record in sorted(found, key=lambda row: row[:3])[:count]]


def _content(benchmark: Benchmark[LabelledJob], results: LabelledResults) -> dict[str, Any]:
    settings = benchmark.settings
    summed = [row for row in results.rows if row.part == results.rows[-1].part]
    return {
        "name": Path(settings.dataset).name,
        "dataset": settings.dataset,
        "images": len(results.records),
        "methods": len(benchmark.methods),
        "min_area": settings.min_area,
        "table": row_cells(results.rows),
        "best": max(summed, key=lambda row: row.scores.iou or 0, default=None),
        "labels": times_note(results),
        "desra_masks": published_cells(results.published),
        "paper_title": PUBLISHED_TITLE,
        "paper": paper_cells(),
        "curves": _curves(results.curves, summed),
        "bars": [_iou_bars(summed), _time_bars(summed)] if summed else [],
        "worst": _pictures(benchmark, worst_records(benchmark, results.records)),
        "first": benchmark.methods[0].points[0].name,
        "colours": {name: "#" + bytes(colour).hex()
                    for name, colour in (("right", RIGHT), ("false", FALSE), ("missed", MISSED))},
        "unjudged": len(benchmark.unjudged),
        "lossy": len(benchmark.lossy),
        "failures": results.failures[:_FAILURES],
        "all_failures": len(results.failures),
    }  # fmt: skip


def _curves(curves: dict[str, Curve], rows: Sequence[MethodRow]) -> Markup | None:
    """Precision over recall, and the points at which methods stand in the table; None without any curve."""
    drawn = {
        name: [(recall, precision) for _, agreement in points
               if (recall := agreement.recall) is not None and (precision := agreement.precision) is not None]
        for name, points in list(curves.items())[:_CURVES]
    }  # fmt: skip
    if not any(drawn.values()):
        return None
    marks = {
        row.point.name: (row.scores.recall, row.scores.precision)
        for row in rows
        if row.method.name in drawn and row.scores.recall is not None and row.scores.precision is not None
    }
    return inline(line_chart(drawn, xlabel="recall", ylabel="precision", marks=marks), "Precision by recall")


def _iou_bars(rows: Sequence[MethodRow]) -> Markup:
    values = {row.point.name: np.nan if row.scores.iou is None else row.scores.iou for row in rows}
    intervals = {row.point.name: interval for row in rows if (interval := row.scores.intervals["iou"])}
    return inline(bar_chart(values, xlabel="IoU, and its 95 % interval", intervals=intervals), "IoU by method")


def _time_bars(rows: Sequence[MethodRow]) -> Markup:
    values = {row.point.name: row.seconds for row in rows}
    return inline(
        bar_chart(values, xlabel="computing time in one thread, seconds per megapixel"),
        "Seconds per megapixel by method",
    )


def _pictures(benchmark: Benchmark[LabelledJob], records: Sequence[ImageRecord]) -> list[Picture]:
    """As many images as fit into the page."""
    work = {(job.part, job.name): (image, job) for image, job in benchmark.work}
    budget, pictures = PICTURE_CHARACTERS, []
    with ThreadPoolExecutor(_THREADS) as pool:
        drawn = pool.map(lambda record: _picture(benchmark, record, *work[record.part, record.name]), records)
        for picture in drawn:
            budget -= sum(len(cell.uri or "") for cell in picture.cells)
            if budget < 0:
                pool.shutdown(wait=False, cancel_futures=True)
                break
            pictures.append(picture)
    return pictures


def _picture(benchmark: Benchmark[LabelledJob], record: ImageRecord, image: ImageRef, job: LabelledJob) -> Picture:
    drawn = _Drawn(benchmark.workspace, record, image, job)
    cells = [_cell("GAN-SR", partial(drawn.result, "gan_sr")), _cell("MSE-SR", partial(drawn.result, "mse_sr"))]
    ious = []
    for method in benchmark.methods:
        for point in method.points if method.name in record.runs else ():
            cells.append(_cell(point.name, partial(drawn.against, point)))
            iou = record.runs[method.name].agreements[point.name].iou
            ious.append(f"{point.name}: {'–' if iou is None else f'{iou:.3f}'}")
    return Picture(record.title, f"IoU {' · '.join(ious)}", cells)


class _Drawn:
    """The pictures of an image; where a file has gone or changed they raise an `ImageError`."""

    def __init__(self, workspace: Workspace, record: ImageRecord, image: ImageRef, job: LabelledJob) -> None:
        self._workspace = workspace
        self._record = record
        self._image = image
        self._job = job
        self._shape = record.height, record.width

    def result(self, role: str) -> RGB:
        """A result, small."""
        return fitted(self._gan_sr if role == "gan_sr" else self._read(self._image.mse_sr), LARGEST)

    def against(self, point: OperatingPoint) -> RGB:
        """The mask at an operating point against the ground truth."""
        path = self._job.mask_path(self._workspace, point)
        mask = on_valid_region(read_mask(path), self._shape, path)
        return drawn_agreement(np.pad(mask, FRAME), self._truth, self._gan_sr)

    @cached_property
    def _gan_sr(self) -> RGB:
        return self._read(self._image.gan_sr)

    @cached_property
    def _truth(self) -> Mask:
        return np.pad(read_ground_truth(self._job.ground_truth, self._shape, self._image.path), FRAME)

    def _read(self, file: File | None) -> RGB:
        assert file is not None
        return rgb8(read_photo(file, MAX_PIXELS).pixels)


def _cell(kind: str, draw: Callable[[], RGB]) -> Cell:
    try:
        drawn = draw()
    except ImageError as error:
        return Cell(kind, None, reason=printable(error.reason))
    return Cell(kind, as_uri(encode_webp(drawn)), drawn.shape[1], drawn.shape[0])
