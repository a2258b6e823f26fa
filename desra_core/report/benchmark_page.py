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
from desra_core.benchmarking.benchmark_files import Results, told_labels
from desra_core.benchmarking.benchmark_table import (
    PUBLISHED_TITLE,
    Point,
    Row,
    told_paper,
    told_published_rows,
    told_rows,
)
from desra_core.benchmarking.entries import Entry
from desra_core.benchmarking.judged import Record
from desra_core.benchmarking.stage import Judging, mask_path, read_ground_truth
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


def render(benchmark: Benchmark, results: Results) -> str:
    """The page as text: one HTML file that needs no other file and no network; the same for the same results."""
    return render_page("benchmark.html.j2", **_content(benchmark, results))


def worst_records(benchmark: Benchmark, records: Sequence[Record], count: int = WORST) -> list[Record]:
    """The images on which the first contender's IoU is lowest, of equal ones those with the larger masks first.

    Images that it has not judged, and those where neither mask marks anything, are none of them.
    """
    contender = benchmark.contenders[0]
    entry = contender.entries[0].name
    found = [
        (agreement.iou, -agreement.union, record.title, record)
        for record in records
        if contender.name in record.runs
        and (agreement := record.runs[contender.name].agreements[entry]).iou is not None
        and agreement.iou < 1
    ]
    return [record for *_, record in sorted(found, key=lambda row: row[:3])[:count]]


def _content(benchmark: Benchmark, results: Results) -> dict[str, Any]:
    settings = benchmark.settings
    summed = [row for row in results.rows if row.part == results.rows[-1].part]
    return {
        "name": Path(settings.dataset).name,
        "dataset": settings.dataset,
        "images": len(results.records),
        "methods": len(benchmark.contenders),
        "min_area": settings.min_area,
        "table": told_rows(results.rows),
        "best": max(summed, key=lambda row: row.scores.iou or 0, default=None),
        "labels": told_labels(results),
        "desra_masks": told_published_rows(results.published),
        "paper_title": PUBLISHED_TITLE,
        "paper": told_paper(),
        "curves": _curves(results.curves, summed),
        "bars": [_iou_bars(summed), _time_bars(summed)] if summed else [],
        "worst": _pictures(benchmark, worst_records(benchmark, results.records)),
        "first": benchmark.contenders[0].entries[0].name,
        "colours": {name: "#" + bytes(colour).hex()
                    for name, colour in (("right", RIGHT), ("false", FALSE), ("missed", MISSED))},
        "unjudged": len(benchmark.unjudged),
        "lossy": len(benchmark.lossy),
        "failures": results.failures[:_FAILURES],
        "all_failures": len(results.failures),
    }  # fmt: skip


def _curves(curves: dict[str, list[Point]], rows: Sequence[Row]) -> Markup | None:
    """Precision over recall, and the points at which methods stand in the table; None without any curve."""
    drawn = {
        name: [(recall, precision) for _, agreement in points
               if (recall := agreement.recall) is not None and (precision := agreement.precision) is not None]
        for name, points in list(curves.items())[:_CURVES]
    }  # fmt: skip
    if not any(drawn.values()):
        return None
    marks = {
        row.entry.name: (row.scores.recall, row.scores.precision)
        for row in rows
        if row.contender.name in drawn and row.scores.recall is not None and row.scores.precision is not None
    }
    return inline(line_chart(drawn, xlabel="recall", ylabel="precision", marks=marks), "Precision by recall")


def _iou_bars(rows: Sequence[Row]) -> Markup:
    values = {row.entry.name: np.nan if row.scores.iou is None else row.scores.iou for row in rows}
    intervals = {row.entry.name: interval for row in rows if (interval := row.scores.intervals["iou"])}
    return inline(bar_chart(values, xlabel="IoU, and its 95 % interval", intervals=intervals), "IoU by method")


def _time_bars(rows: Sequence[Row]) -> Markup:
    values = {row.entry.name: row.seconds for row in rows}
    return inline(
        bar_chart(values, xlabel="computing time in one thread, seconds per megapixel"),
        "Seconds per megapixel by method",
    )


def _pictures(benchmark: Benchmark, records: Sequence[Record]) -> list[Picture]:
    """As many images as fit into the page."""
    work = {judging[:2]: (image, judging) for image, judging in benchmark.work}
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


def _picture(benchmark: Benchmark, record: Record, image: ImageRef, judging: Judging) -> Picture:
    drawn = _Drawn(benchmark.workspace, record, image, judging)
    cells = [_cell("GAN-SR", partial(drawn.result, "gan_sr")), _cell("MSE-SR", partial(drawn.result, "mse_sr"))]
    ious = []
    for contender in benchmark.contenders:
        for entry in contender.entries if contender.name in record.runs else ():
            cells.append(_cell(entry.name, partial(drawn.against, entry)))
            iou = record.runs[contender.name].agreements[entry.name].iou
            ious.append(f"{entry.name}: {'–' if iou is None else f'{iou:.3f}'}")
    return Picture(record.title, f"IoU {' · '.join(ious)}", cells)


class _Drawn:
    """The pictures of an image; where a file has gone or changed they raise an `ImageError`."""

    def __init__(self, workspace: Workspace, record: Record, image: ImageRef, judging: Judging) -> None:
        self._workspace = workspace
        self._record = record
        self._image = image
        self._judging = judging
        self._shape = record.height, record.width

    def result(self, role: str) -> RGB:
        """A result, small."""
        return fitted(self._gan_sr if role == "gan_sr" else self._read(self._image.mse_sr), LARGEST)

    def against(self, entry: Entry) -> RGB:
        """The mask of an entry against the ground truth."""
        path = mask_path(self._workspace, entry, self._record.part, self._record.name)
        mask = on_valid_region(read_mask(path), self._shape, path)
        return drawn_agreement(np.pad(mask, FRAME), self._truth, self._gan_sr)

    @cached_property
    def _gan_sr(self) -> RGB:
        return self._read(self._image.gan_sr)

    @cached_property
    def _truth(self) -> Mask:
        return np.pad(read_ground_truth(self._judging.ground_truth, self._shape, self._image.path), FRAME)

    def _read(self, file: File | None) -> RGB:
        assert file is not None
        return rgb8(read_photo(file, MAX_PIXELS).pixels)


def _cell(kind: str, draw: Callable[[], RGB]) -> Cell:
    try:
        drawn = draw()
    except ImageError as error:
        return Cell(kind, None, reason=printable(error.reason))
    return Cell(kind, as_uri(encode_webp(drawn)), drawn.shape[1], drawn.shape[0])
