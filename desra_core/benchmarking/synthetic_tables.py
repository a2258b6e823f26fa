"""The synthetic benchmark as tables and sentences, for a terminal, a page and Markdown."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from desra_core import __version__
from desra_core.benchmarking.benchmark import Benchmark
from desra_core.benchmarking.injection import FULL_CONTRAST, KINDS
from desra_core.benchmarking.synthetic import RATIOS, GridPoint, MethodSummary, Rate, SyntheticJob, SyntheticSummary
from desra_core.benchmarking.trial import FAINT
from desra_core.detection.detectors import DEFAULT
from desra_core.errors import ImageError, printable
from desra_core.evaluation import table
from desra_core.evaluation.table import Section, failure_rows, fixed, in_percent

STEM = "synthetic"

# Shares of the clean pixels that may be marked, for the table of the recall at that price.
BUDGETS = (0.001, 0.003, 0.01, 0.03, 0.1)

# Bounds of a recall's interval, by which one of `_VERDICTS` is chosen.
_UNSEEN, _RARE, _COMMON = 0.15, 0.5, 0.75
_VERDICTS = ("It does not see", "It misses most", "It sees some", "It sees most")
_PLURALS = {"checkerboard": "checkerboards", "colour_shift": "colour shifts"}
_NOTES = (
    "An artifact is found where at least half of its place is marked. Artifacts are left out where a method marks the "
    "place without them, too. Intervals in brackets hold 95 % and take the artifacts of one image as independent.",
    "The highest recall of all thresholds and minimal areas (in brackets) that mark no more than this share of the "
    "clean pixels. Thresholds are those of scores; desra's score is 1 - adjusted similarity, so 0.3 is its "
    "--threshold 0.7.",
    "Of artifacts that add something (blotches, checkerboards, worms, ringing), by their contrast as a multiple of the "
    "MSE result's texture at their place: D sees a ratio of contrasts, so texture hides artifacts.",
)
_WHY = (
    "D compares local contrasts and nothing else. A shift of colour changes none. A flattened GAN result first grows "
    "like its MSE twin, which is flat itself, and then has to be 2.45 times flatter. A wide blotch has contrast at its "
    "border only. In texture, an artifact has to raise the contrast to 2.45 times that of the twin (weight 1)."
)


def title_of(benchmark: Benchmark[SyntheticJob]) -> str:
    """Return the title of the results."""
    gan_sr = benchmark.settings.gan_sr
    return f"Synthetic benchmark on {printable(gan_sr.name if gan_sr else '')}"


def sections_of(summary: SyntheticSummary) -> list[Section]:
    """List all tables, after the kinds of artifacts that DeSRA, else the first method, does not see."""
    methods = summary.methods
    if not methods or not summary.injected:
        nothing = "Nothing could be injected: the images are too small, or marked or excluded as a whole."
        return [Section(note=nothing)]
    preface = (
        f"{summary.injected} artifacts in {summary.images} pairs ({summary.clean_pixels / 1e6:.1f} MP that count as "
        f"clean); {summary.faint} more were left out, because the image gave them less than {FAINT:g} grey levels of "
        "contrast. False alarms are marked regions of the unchanged pairs, also artifacts that were not excluded."
    )
    desra = [method for method in methods if method.method.startswith(DEFAULT)]
    unseen = []
    for method in desra or methods[:1]:
        why = _WHY if method in desra[-1:] else ""
        unseen.append(Section(f"Artifacts that {method.method} does not see", statements(method), why))
    kinds = [
        {"kind": _named(kind)} | {method.method: _share(method.recall(kind=kind)) for method in methods}
        for kind in (*KINDS, None)
    ]
    return [
        Section(note=preface),
        *unseen,
        Section("Methods at their own thresholds", note=_NOTES[0], table=[_method_row(method) for method in methods]),
        Section("Recall by kind", table=kinds),
        Section("Recall by contrast over texture", note=_NOTES[2], table=_ratio_rows(methods)),
        Section("Recall at a price", note=_NOTES[1], table=[_budget_row(method) for method in methods]),
        *(
            Section(f"{method.method}: recall by kind, strength and size", table=_cell_rows(method))
            for method in methods
        ),
    ]


def as_files(
    benchmark: Benchmark[SyntheticJob], summary: SyntheticSummary, failures: Sequence[ImageError]
) -> dict[str, str]:
    """Format the results by file name: Markdown, CSV (recall by kind, strength and size) and JSON (all tables)."""
    tables = to_rows(summary)
    settings = benchmark.settings.model_dump(mode="json")
    document = {"desra": __version__, "settings": settings, **tables, "failures": failure_rows(failures)}
    recall = tables["recall"]
    return {
        f"{STEM}.md": table.document_as_markdown(title_of(benchmark), sections_of(summary)),
        f"{STEM}.csv": table.as_csv(recall, list(recall[0]) if recall else ["method"]),
        f"{STEM}.json": table.as_json(document),
    }


def statements(method: MethodSummary) -> list[str]:
    """Describe in sentences with numbers which artifacts a method sees at its default point, and which not."""
    rates = {kind: method.recall(kind=kind) for kind in KINDS if method.recall(kind=kind).trials}
    lines = []
    for verdict in _VERDICTS:
        kinds = sorted((k for k in rates if _verdict(rates[k]) == verdict), key=lambda kind: rates[kind].share or 0)
        if kinds:
            lines.append(f"{verdict}: {'; '.join(f'{_PLURALS.get(k, k)}, {_found(rates[k])}' for k in kinds)}.")
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


def to_rows(summary: SyntheticSummary) -> dict[str, list[dict[str, Any]]]:
    """List the tables for JSON and CSV, with shares in 0..1.

    ``recall`` is by method, kind, strength and size at the default point; ``methods`` has each at its default point,
    ``curve`` each at all points; ``texture`` is the recall by contrast over texture.
    """
    tables: dict[str, list[dict[str, Any]]] = {"recall": [], "methods": [], "curve": [], "texture": []}
    for method in summary.methods:
        name = {"method": method.method}
        for (kind, strength, size), rate in method.cells.items():
            tables["recall"].append(name | {"kind": kind, "strength": strength, "size": size} | _rate(rate))
        own = {"already": method.already, "iou": method.iou, "seconds_per_megapixel": method.seconds_per_megapixel}
        tables["methods"].append(name | _point(method.default) | own)
        tables["curve"] += [name | _point(point) for point in method.curve]
        for low, rate in zip((0.0, *RATIOS), method.ratios, strict=True):
            tables["texture"].append(name | {"at_least": low} | _rate(rate))
    return tables


def curves(summary: SyntheticSummary) -> dict[str, list[tuple[float, float]]]:
    """Trace the operating curve of each method; a point that marks more than another but finds no more is left out.

    A point is the share of the clean pixels that is marked, ascending, and the recall.
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


def _verdict(rate: Rate) -> str:
    low, high = rate.interval
    if high <= _UNSEEN:
        return _VERDICTS[0]
    if high <= _RARE:
        return _VERDICTS[1]
    return _VERDICTS[3] if low >= _COMMON else _VERDICTS[2]


def _named(kind: str | None) -> str:
    return (kind or "all").replace("_", " ")


def _axes(method: MethodSummary) -> tuple[list[float], list[int]]:
    return sorted({strength for _, strength, _ in method.cells}), sorted({size for *_, size in method.cells})


def _method_row(method: MethodSummary) -> dict[str, str]:
    point = method.default
    return {
        "method": method.method,
        "threshold": f"{point.threshold:.4g}",
        "recall": _share(point.rate),
        "IoU of finds": fixed(method.iou, 2),
        "marked before": str(method.already),
        "false regions per MP": fixed(point.regions_per_megapixel, 2),
        "clean pixels marked": in_percent(point.pixel_share, form=".3g"),
        "s per MP": fixed(method.seconds_per_megapixel, 2),
    }


def _ratio_rows(methods: Sequence[MethodSummary]) -> list[dict[str, str]]:
    ends = [f"below {RATIOS[0]:g}", *(f"{low:g} to {high:g}" for low, high in pairwise(RATIOS))]
    return [
        {"contrast / texture": end} | {method.method: _share(method.ratios[number]) for method in methods}
        for number, end in enumerate([*ends, f"{RATIOS[-1]:g} and more"])
    ]


def _cell_rows(method: MethodSummary) -> list[dict[str, str]]:
    strengths, sizes = _axes(method)

    def row(kind: str | None) -> dict[str, str]:
        cells = {f"strength {value:g}": method.recall(kind=kind, strength=value) for value in strengths}
        cells |= {f"{size:,} px": method.recall(kind=kind, size=size) for size in sizes}
        return {"kind": _named(kind)} | {name: _share(rate) for name, rate in cells.items()}

    return [row(kind) for kind in (*KINDS, None)]


def _budget_row(method: MethodSummary) -> dict[str, str]:
    row = {"method": method.method}
    for budget in BUDGETS:
        point = method.best(budget)
        at = f" ({point.threshold:.3g}, {point.min_area})" if point else ""
        row[f"{100 * budget:g} %"] = in_percent(point.rate.share if point else None, form=".3g") + at
    return row


def _point(point: GridPoint) -> dict[str, Any]:
    return {
        "threshold": point.threshold,
        "min_area": point.min_area,
        **_rate(point.rate),
        "false_regions": point.false_regions,
        "false_regions_per_megapixel": point.regions_per_megapixel,
        "false_pixels": point.false_pixels,
        "false_pixel_share": point.pixel_share,
    }


def _rate(rate: Rate) -> dict[str, Any]:
    low, high = rate.interval
    return {"found": rate.found, "injected": rate.trials, "recall": rate.share, "low": low, "high": high}


def _found(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.found} of {rate.trials} found ({100 * low:.0f}–{100 * high:.0f} %)"


def _share(rate: Rate) -> str:
    share = in_percent(rate.share, rate.interval, form=".0f")
    return share if rate.share is None else f"{share} of {rate.trials}"
