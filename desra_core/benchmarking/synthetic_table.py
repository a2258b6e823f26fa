"""The synthetic benchmark as tables and sentences: what is not seen comes first, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from desra_core.benchmarking.injection import FULL_CONTRAST, KINDS
from desra_core.benchmarking.synthetic import FAINT
from desra_core.benchmarking.synthetic_summary import RATIOS, MethodSummary, Point, Rate, Summary, summarise
from desra_core.evaluation.table import as_markdown as table
from desra_core.evaluation.table import fixed, in_percent

__all__ = ["Summary", "as_markdown", "curves", "statements", "summarise", "to_rows"]

# Shares of the clean pixels that may be marked, for the table of what is found at that price.
BUDGETS = (0.001, 0.003, 0.01, 0.03, 0.1)

# By what the interval of a recall lies below, or above.
_UNSEEN, _RARE, _COMMON = 0.15, 0.5, 0.75
_VERDICTS = ("It does not see", "It misses most", "It sees some", "It sees most")
_PLURALS = {"checkerboard": "checkerboards", "colour_shift": "colour shifts"}
_NOTES = (
    "An artifact is found where at least half of its place is marked. Left out are artifacts whose place a method "
    "marks without them, too. Intervals in brackets hold 95 % and take the artifacts of one image as independent.",
    "With any threshold and minimal area (in brackets), the most that is found while no more than this share of the "
    "clean pixels is marked. Thresholds are those of scores; desra's score is 1 - adjusted similarity, so 0.3 is its "
    "--threshold 0.7.",
    "Of artifacts that add something (blotches, checkerboards, worms, ringing), by their contrast as a multiple of the "
    "MSE result's texture at their place: D sees a ratio of contrasts, so texture hides what a wall would not.",
)
_WHY = (
    "D compares local contrasts and nothing else. A shift of colour changes none. A flattened GAN result first grows "
    "like its MSE twin, which is flat itself, and then has to be 2.45 times flatter. A wide blotch has contrast at its "
    "border only. In texture, an artifact has to raise the contrast to 2.45 times that of the twin (weight 1)."
)


def as_markdown(summary: Summary) -> str:
    """All tables, below what is not seen; headings of the second order and lower."""
    if not summary.methods or not summary.injected:
        return "Nothing could be injected: the images are too small, or all of them is marked or excluded.\n"
    methods = summary.methods
    told = [method for method in methods if method.method.startswith("desra")] or methods[:1]
    parts = [_preface(summary)]
    for method in told:
        parts += [f"## What {method.method} does not see", "\n".join(f"- {line}" for line in statements(method))]
    if told[0].method.startswith("desra"):
        parts.append(_WHY)
    parts += ["## Methods at their own thresholds", _NOTES[0], table([_method_row(method) for method in methods])]
    parts += ["## Recall by kind", table(_kind_rows(methods))]
    parts += ["## Recall by contrast over texture", _NOTES[2], table(_ratio_rows(methods))]
    parts += ["## Recall at a price", _NOTES[1], table([_budget_row(method) for method in methods])]
    for method in methods:
        parts += [f"## {method.method}: recall by kind, strength and size", table(_cell_rows(method))]
    return "\n\n".join(parts) + "\n"


def statements(method: MethodSummary) -> list[str]:
    """What a method does not see and what it sees at its default point: sentences with their numbers."""
    rates = {kind: method.recall(kind=kind) for kind in KINDS if method.recall(kind=kind).trials}
    lines = []
    for verdict in _VERDICTS:
        kinds = sorted((k for k in rates if _verdict(rates[k]) == verdict), key=lambda kind: rates[kind].share or 0)
        told = [f"{_PLURALS.get(kind, kind)}, {_found(rates[kind])}" for kind in kinds]
        if told:
            lines.append(f"{verdict}: {'; '.join(told)}.")
    strengths, sizes = _axes(method)
    weak, strong = (method.recall(strength=strength) for strength in (strengths[0], strengths[-1]))
    small, large = (method.recall(size=size) for size in (sizes[0], sizes[-1]))
    lines += [
        f"Strength: of the faintest ({FULL_CONTRAST * strengths[0]:g} grey levels RMS; {100 * strengths[0]:.3g} % of "
        f"the texture where it is flattened) {_found(weak)}; of the strongest ({FULL_CONTRAST * strengths[-1]:g}; "
        f"{100 * strengths[-1]:.3g} %) {_found(strong)}.",
        f"Size: of the smallest (some {sizes[0]:,} px; regions of at most {method.default.min_area:,} px are dropped) "
        f"{_found(small)}; of the largest (some {sizes[-1]:,} px) {_found(large)}.",
        f"Texture: of what adds less contrast than the texture of the MSE result has {_found(method.ratios[0])}; of "
        f"what adds at least {RATIOS[-1]:g} times as much {_found(method.ratios[-1])}.",
    ]
    return lines


def to_rows(summary: Summary) -> dict[str, list[dict[str, Any]]]:
    """Tables for JSON and CSV.

    Returns
    -------
    ``recall``: per method, kind, strength and size at the default point; ``methods``: each at its default point;
    ``curve``: each at all points; ``texture``: recall by contrast over texture. Shares are in 0..1.
    """
    recall = [
        {"method": method.method, "kind": kind, "strength": strength, "size": size} | _rate(rate)
        for method in summary.methods
        for (kind, strength, size), rate in method.cells.items()
    ]
    bounds = (0.0, *RATIOS)
    texture = [
        {"method": method.method, "at_least": low} | _rate(rate)
        for method in summary.methods
        for low, rate in zip(bounds, method.ratios, strict=True)
    ]
    methods = [
        {"method": method.method}
        | _point(method.default)
        | {"already": method.already, "iou": method.iou, "seconds_per_megapixel": method.seconds_per_megapixel}
        for method in summary.methods
    ]
    curve = [{"method": method.method} | _point(point) for method in summary.methods for point in method.curve]
    return {"recall": recall, "methods": methods, "curve": curve, "texture": texture}


def curves(summary: Summary) -> dict[str, list[tuple[float, float]]]:
    """The operating curve of each method: what `desra_core.report.charts.line_chart` takes.

    Returns
    -------
    By method, the share of the clean pixels that are marked, ascending, and the recall: the points of which no other
    finds more for less.
    """
    fronts = {}
    for method in summary.methods:
        points = {(point.pixel_share or 0.0, point.rate.share or 0.0) for point in method.curve if point.rate.trials}
        front: list[tuple[float, float]] = []
        for price, recall in sorted(points, key=lambda point: (point[0], -point[1])):
            if not front or recall > front[-1][1]:
                front.append((price, recall))
        fronts[method.method] = front
    return fronts


def _preface(summary: Summary) -> str:
    return (
        f"{summary.injected} artifacts in {summary.images} pairs ({summary.clean_pixels / 1e6:.1f} MP that count as "
        f"clean); {summary.faint} more were left out, because the image gave them less than {FAINT:g} grey levels of "
        "contrast. False alarms are what is marked in the pairs as they are: also artifacts that nobody has excluded."
    )


def _verdict(rate: Rate) -> str:
    low, high = rate.interval
    if high <= _UNSEEN:
        return _VERDICTS[0]
    if high <= _RARE:
        return _VERDICTS[1]
    return _VERDICTS[3] if low >= _COMMON else _VERDICTS[2]


def _axes(method: MethodSummary) -> tuple[list[float], list[int]]:
    return sorted({strength for _, strength, _ in method.cells}), sorted({size for *_, size in method.cells})


def _method_row(method: MethodSummary) -> dict[str, str]:
    point = method.default
    regions = point.regions_per_megapixel
    return {
        "method": method.method,
        "threshold": f"{point.threshold:.4g}",
        "recall": _share(point.rate),
        "IoU of finds": fixed(method.iou, 2),
        "marked before": str(method.already),
        "false regions per MP": fixed(regions, 2),
        "clean pixels marked": in_percent(point.pixel_share, form=".3g"),
        "s per MP": fixed(method.seconds_per_megapixel, 2),
    }


def _kind_rows(methods: Sequence[MethodSummary]) -> list[dict[str, str]]:
    rows = [
        {"kind": kind.replace("_", " ")} | {method.method: _share(method.recall(kind=kind)) for method in methods}
        for kind in KINDS
    ]
    return [*rows, {"kind": "all"} | {method.method: _share(method.default.rate) for method in methods}]


def _ratio_rows(methods: Sequence[MethodSummary]) -> list[dict[str, str]]:
    ends = [f"below {RATIOS[0]:g}", *(f"{low:g} to {high:g}" for low, high in pairwise(RATIOS))]
    return [
        {"contrast / texture": end} | {method.method: _share(method.ratios[number]) for method in methods}
        for number, end in enumerate([*ends, f"{RATIOS[-1]:g} and more"])
    ]


def _cell_rows(method: MethodSummary) -> list[dict[str, str]]:
    strengths, sizes = _axes(method)

    def row(kind: str | None) -> dict[str, str]:
        told = {"kind": (kind or "all").replace("_", " ")}
        told |= {
            f"strength {strength:g}": _share(method.recall(kind=kind, strength=strength)) for strength in strengths
        }
        return told | {f"{size:,} px": _share(method.recall(kind=kind, size=size)) for size in sizes}

    return [row(kind) for kind in (*KINDS, None)]


def _budget_row(method: MethodSummary) -> dict[str, str]:
    row = {"method": method.method}
    for budget in BUDGETS:
        point = method.best(budget)
        told = (
            "–"
            if point is None
            else f"{in_percent(point.rate.share, form='.3g')} ({point.threshold:.3g}, {point.min_area})"
        )
        row[f"{100 * budget:g} %"] = told
    return row


def _point(point: Point) -> dict[str, Any]:
    return (
        {"threshold": point.threshold, "min_area": point.min_area}
        | _rate(point.rate)
        | {
            "false_regions": point.false_regions,
            "false_regions_per_megapixel": point.regions_per_megapixel,
            "false_pixels": point.false_pixels,
            "false_pixel_share": point.pixel_share,
        }
    )


def _rate(rate: Rate) -> dict[str, Any]:
    low, high = rate.interval
    return {"found": rate.found, "injected": rate.trials, "recall": rate.share, "low": low, "high": high}


def _found(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.found} of {rate.trials} found ({100 * low:.0f}–{100 * high:.0f} %)"


def _share(rate: Rate) -> str:
    told = in_percent(rate.share, rate.interval, form=".0f")
    return told if rate.share is None else f"{told} of {rate.trials}"
