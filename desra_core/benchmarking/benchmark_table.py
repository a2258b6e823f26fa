"""What a benchmark found, added up: the paper's table with times, curves, and the agreement with published masks."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from desra_core.benchmarking.entries import Contender, Entry
from desra_core.benchmarking.judged import Record, Sameness
from desra_core.evaluation.metrics import Agreement, Interval, MaskScores, pooled, score_masks

ALL = "all parts"

# From the DeSRA paper: IoU, precision and recall, of the others no more than IoU; see docs/design.md.
PUBLISHED: dict[str, tuple[float, float | None, float | None]] = {
    "DeSRA": (0.511, 0.7055, 0.6081),
    "NIQE": (0.029, None, None),
    "PAL4Inpainting": (0.084, None, None),
    "LDL, 0.01": (0.299, None, None),
    "LDL, 0.005": (0.362, None, None),
    "LDL, 0.001": (0.353, None, None),
}
PUBLISHED_TITLE = "Published, on the authors' data (their Real-ESRGAN set; not measured here)"


class Row(NamedTuple):
    """An entry over the images of a part.

    ``seconds`` per megapixel are the median over images, for score map and mask in one thread.
    """

    part: str
    contender: Contender
    entry: Entry
    scores: MaskScores
    seconds: float


class PublishedRow(NamedTuple):
    """How far the masks of an entry are those that came with the data set.

    ``iou`` is the mean over the images, of which two empty masks have 1; ``same`` counts the images whose masks are
    equal, ``equal`` is the share of equal pixels.
    """

    part: str
    entry: str
    images: int
    same: int
    iou: float
    equal: float


class Point(NamedTuple):
    """A threshold of a curve, with the sums over all images."""

    threshold: float
    agreement: Agreement


def table_rows(contenders: Iterable[Contender], records: Sequence[Record]) -> list[Row]:
    """A row per part and entry, those over all parts last; parts that an entry has no image of have none."""
    rows = []
    for part, chosen in _parts(records).items():
        for contender in contenders:
            runs = [(record, record.runs[contender.name]) for record in chosen if contender.name in record.runs]
            for entry in contender.entries if runs else ():
                scores = score_masks([run.agreements[entry.name] for _, run in runs])
                seconds = statistics.median(run.seconds[entry.name] / record.megapixels for record, run in runs)
                rows.append(Row(part, contender, entry, scores, seconds))
    return rows


def published_rows(contenders: Iterable[Contender], records: Sequence[Record]) -> list[PublishedRow]:
    """A row per part and entry of DeSRA where the data set came with masks."""
    rows = []
    for part, chosen in _parts(records).items():
        for contender in contenders:
            for entry in contender.entries:
                runs = [record.runs[contender.name] for record in chosen if contender.name in record.runs]
                found = [run.published[entry.name] for run in runs if entry.name in run.published]
                if found:
                    rows.append(_published_row(part, entry.name, found))
    return rows


def curves(contenders: Iterable[Contender], records: Sequence[Record]) -> dict[str, list[Point]]:
    """The curve of each contender that has one, over all images, by ascending threshold."""
    found = {}
    for contender in contenders:
        runs = [record.runs[contender.name].curve for record in records if contender.name in record.runs]
        if runs and contender.thresholds:
            found[contender.name] = [
                Point(points[0][0], pooled(agreement for _, agreement in points)) for points in zip(*runs, strict=True)
            ]
    return found


def labels_seconds(records: Iterable[Record]) -> float | None:
    """Seconds per megapixel that class labels took, the median over the images for which they were computed."""
    rates = [record.labels_seconds / record.megapixels for record in records if record.labels_seconds is not None]
    return statistics.median(rates) if rates else None


def told_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The rows as text; measures with their 95 % intervals."""
    several = len({row.part for row in rows}) > 1
    empty = any(row.scores.empty_pairs for row in rows)
    told = []
    for row in rows:
        values, intervals = row.scores.values, row.scores.intervals
        cells = {"part": row.part} if several else {}
        cells |= {"method": row.entry.name, "images": str(row.scores.images)}
        cells |= {"IoU": _told(values["iou"], intervals["iou"])}
        if empty:
            cells |= {"IoU, both empty = 1": _told(values["iou_with_empty"], intervals["iou_with_empty"])}
        cells |= {name: _told(values[name], intervals[name]) for name in ("precision", "recall")}
        cells |= {"F1": _told(values["f1"], intervals["f1"]), "s/MP": f"{row.seconds:.3f}"}
        told.append(cells)
    return told


def told_published_rows(rows: Sequence[PublishedRow]) -> list[dict[str, str]]:
    """The agreement with published masks as text."""
    several = len({row.part for row in rows}) > 1
    return [
        ({"part": row.part} if several else {})
        | {
            "method": row.entry,
            "images": str(row.images),
            "images equal": f"{row.same} of {row.images}",
            "equal pixels": f"{100 * row.equal:.4f} %",
            "IoU": f"{row.iou:.4f}",
        }
        for row in rows
    ]


def told_paper() -> list[dict[str, str]]:
    """`PUBLISHED` as text."""
    names = ("IoU", "precision", "recall")
    return [
        {"method": method}
        | {name: "–" if value is None else f"{value:g}" for name, value in zip(names, values, strict=True)}
        for method, values in PUBLISHED.items()
    ]


def as_csv(rows: Sequence[Row]) -> str:
    """A table of numbers, with the bounds of the intervals and all counts."""
    sink = io.StringIO()
    table = [_numbers(row) for row in rows]
    writer = csv.DictWriter(sink, list(table[0]) if table else ["part", "method"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return sink.getvalue()


def _parts(records: Sequence[Record]) -> Mapping[str, Sequence[Record]]:
    """The records of each part, and of all where there are several."""
    by_part: dict[str, list[Record]] = {}
    for record in records:
        by_part.setdefault(record.part, []).append(record)
    return by_part if len(by_part) == 1 else by_part | {ALL: list(records)}


def _published_row(part: str, entry: str, found: Sequence[Sameness]) -> PublishedRow:
    ious = [same.intersection / same.union if same.union else 1.0 for same in found]
    return PublishedRow(
        part=part,
        entry=entry,
        images=len(found),
        same=sum(same.equal == same.pixels for same in found),
        iou=sum(ious) / len(ious),
        equal=sum(same.equal for same in found) / sum(same.pixels for same in found),
    )


def _numbers(row: Row) -> dict[str, Any]:
    scores, total = row.scores, row.scores.total
    numbers: dict[str, Any] = {
        "part": row.part,
        "method": row.entry.name,
        "threshold": row.entry.threshold,
        "images": scores.images,
        "empty_pairs": scores.empty_pairs,
    }
    for measure, value in scores.values.items():
        low, high = scores.intervals[measure] or (None, None)
        numbers |= {measure: value, f"{measure}_low": low, f"{measure}_high": high}
    counts = {name: getattr(total, name) for name in ("detected", "right", "marked", "found")}
    return numbers | counts | {"seconds_per_megapixel": round(row.seconds, 4)}


def _told(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else "")
