"""Write the report of a workspace, one HTML file that needs no other file, and pages about single images."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.detection.class_weights import load_weights, weighted_scores
from desra_core.detection.detectors import METHODS, TIMES, AppliedDetector, DetectorInputs, applied
from desra_core.detection.mask import valid
from desra_core.detection.similarity import TILE
from desra_core.errors import ImageError, UsageError, printable
from desra_core.evaluation.table import counted
from desra_core.files import check_names, replace_file
from desra_core.images.codec import Labels
from desra_core.images.parts import RGB, fitted
from desra_core.images.scanning import kinds_in_words
from desra_core.planning.doubts import stored_doubts
from desra_core.report import charts, document
from desra_core.report.document import Cell, cells_within, hex_colour, make_cell, render_page, shortened, stage_name
from desra_core.report.finetuning import read_finetuning
from desra_core.report.pictures import HUMAN_OUTLINE, KINDS, Crops, StoredImage, class_shares, heat_map, label_picture
from desra_core.report.results import (
    CorpusSummary,
    WorkspaceResults,
    class_counts,
    numbers,
    read_results,
    stage_times,
)
from desra_core.settings import CorpusSettings, detector_of
from desra_core.workspace import Workspace

WORST = 24
PER_IMAGE = 3
FOLDER = "pages"  # of the pages about images
MOST = 500  # regions or pages
# The most characters that pictures may take of a page's 20 MB. All else takes at most 2 MB, since rows are limited.
PICTURE_CHARACTERS = 17_000_000

_FAILURES = 200
_CLASSES_DRAWN = 15
_ORDER = [("severity", "descending"), ("image", "ascending"), ("y", "ascending"), ("x", "ascending")]
_AT_ONCE = 1000
_FAILED = "The image has failed since."
_NOTE = 480  # most characters of a note
_LARGEST = 900  # longer side of a picture of a whole image, in pixels
_REGIONS = 200  # rows in the table of an image's page
# Scores of larger images would take minutes and gigabytes for a picture of a few hundred pixels.
_MOST_PIXELS = 2**26

Read = TypeVar("Read")


class Page(NamedTuple):
    """A page to be written: the name and id of its image, and its path relative to the report."""

    name: str
    id: str
    path: str

    @property
    def link(self) -> str:
        """The address of the page in links of the report."""
        return quote(os.fsencode(self.path))


class ScoreMap(NamedTuple):
    """A kind of score map; ``adjusted`` says whether class weights are applied to the detector's scores."""

    kind: str
    caption: str
    detector: AppliedDetector
    adjusted: bool = False


def write_report(
    workspace: Workspace,
    *,
    worst: int = WORST,
    pages: int = 0,
    output: Path | None = None,
    on_left_out: Callable[[ImageError], None] | None = None,
) -> Path:
    """Write the report of a workspace: a page below 20 MB that needs no other file and no network.

    Reports of the same results have the same bytes.

    Args:
        workspace: The workspace; its latest run may have been cut off. Only the report in it changes.
        worst: Number of regions to show, the most severe ones first, `MOST` at most. Regions that would make the page
            too large are left out, and the page says so.
        pages: Number of images that get a page of their own, ``pages/NAME.html`` beside the report, which links to it:
            the images with the most severe regions.
        output: The HTML file; ``report.html`` in the workspace by default.
        on_left_out: Called with the reason for each page of an image that cannot be written, because its name is too
            long.

    Returns:
        The file.

    Raises:
        UsageError: The folder is no workspace, a table of it is damaged, or ``output`` is no HTML file.
        TransientError: The disk is full or failed.
    """
    path = workspace.root / "report.html" if output is None else output.absolute()
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise UsageError(path, "is no HTML file", "name one with the suffix .html")
    results = read_results(workspace)
    chosen = []
    for region in choose(results.regions, min(pages, MOST), per_image=1):
        page = Page(region["image"], region["id"], f"{FOLDER}/{region['image']}.html")
        try:
            check_names([path.parent / page.path])
            chosen.append(page)
        except ImageError as error:
            if on_left_out:
                on_left_out(error)
    inside = path.resolve().is_relative_to(workspace.root.resolve())
    publish: Callable[[Path, bytes], object] = workspace.publish if inside else replace_file
    for page, text in render_pages(results, chosen, path.name):
        publish(path.parent / page.path, text.encode())
    publish(path, render_page("report.html.j2", **_content(results, min(worst, MOST), chosen)).encode())
    return path


def make_gallery(
    results: WorkspaceResults, worst: int, budget: int
) -> tuple[list[tuple[dict[str, Any], list[Cell]]], int]:
    """Cut out and encode the pictures of the ``worst`` most severe regions, in at most ``budget`` characters.

    Returns:
        Regions (rows of the region table) with their pictures, and the number of regions that did not fit.
    """
    chosen = choose(results.regions, worst)
    images = results.stored_images([region["image"] for region in chosen], [region["id"] for region in chosen])
    kinds = [kind for kind in KINDS if kind != "lr" or "lr" in results.sources]

    def draw(region: dict[str, Any]) -> list[Cell]:
        image = images[region["image"]]
        if 0 in image.shape:
            return [Cell(kind, None, reason=_FAILED) for kind in kinds]
        crops = Crops(image, (region["x"], region["y"], region["width"], region["height"]))
        return [make_cell(kind, partial(crops.make, kind)) for kind in kinds]

    rows = cells_within(budget, chosen, draw)
    return rows, len(chosen) - len(rows)


def choose(regions: pa.Table, worst: int, per_image: int = PER_IMAGE) -> list[dict[str, Any]]:
    """Choose the ``worst`` most severe regions, at most ``per_image`` of an image and its copies together.

    Regions with a severity below zero are left out: their mean pixel is not suspect.
    """
    seen: Counter[str] = Counter()
    shown: set[tuple[Any, ...]] = set()
    chosen: list[dict[str, Any]] = []
    for batch in regions.filter(pc.greater_equal(regions["severity"], 0)).sort_by(_ORDER).to_batches(_AT_ONCE):
        for region in batch.to_pylist():
            if len(chosen) >= worst:
                return chosen
            place = tuple(region[name] for name in ("id", "x", "y", "width", "height"))
            if seen[region["id"]] < per_image and place not in shown:
                seen[region["id"]] += 1
                shown.add(place)
                chosen.append(region)
    return chosen


def _content(results: WorkspaceResults, worst: int, pages: list[Page]) -> dict[str, Any]:
    summary = CorpusSummary(results)
    times = stage_times(results.seconds)
    settings, measure = results.settings, detector_of(results.settings)
    classes = class_counts(results.regions)
    notes = _notes(results, summary)
    try:
        finetuning = read_finetuning(results.workspace, results.target.mask_key)
    except UsageError as error:
        finetuning = None
        notes.append(shortened(f"The verdict on finetuned models is left out: {error}.", _NOTE))
    budget = PICTURE_CHARACTERS - (finetuning["characters"] if finetuning else 0)
    gallery, left_out = make_gallery(results, worst, budget)
    return {
        "results": results,
        "workspace": results.workspace.root.absolute(),
        "sources": {document.ROLES.get(role, role): folder for role, folder in results.sources.items()},
        "summary": summary,
        "notes": notes,
        "finetuning": finetuning,
        "weighted": settings.segmenter != "none" and settings.weights != "none",
        "measure": measure,
        "by_viewers": settings.severity_model is not None,
        "classes": classes,
        "gallery": gallery,
        "left_out": left_out,
        "worst": worst,
        "pages": pages,
        "links": {page.id: page.link for page in pages},
        "kinds": KINDS | {"difference": measure.heat_name},
        "per_image": PER_IMAGE,
        "failures": results.failures.slice(0, _FAILURES).to_pylist(),
        "times": times,
        # Rate: images per second of one worker that runs all stages.
        "total_rate": max(time.images for time in times) / summary.seconds if summary.seconds > 0 else None,
        "settings": document.settings_rows(settings.model_dump(mode="json")),
        "versions": results.document.get("versions") or {},
        "keys": asdict(results.target),
        "severities": numbers(results.regions["severity"]),
        "charts": charts,
        "class_counts": {row["name"] or "no label": float(row["regions"]) for row in classes[:_CLASSES_DRAWN]},
        "means": {stage_name(time.stage): time.mean for time in times},
    }


def _notes(results: WorkspaceResults, summary: CorpusSummary) -> list[str]:
    """Write the notes that a reader needs to judge the numbers."""
    notes = []
    if summary.pending:
        pending = counted(summary.pending, "image is", "images are")
        notes.append(f"{pending} still to be done: the same command goes on where it stopped.")
    if summary.outdated:
        outdated = counted(summary.outdated, "image still has", "images still have")
        notes.append(
            f"{outdated} the artifacts that earlier settings found: the latest run was cut off before it got there."
        )
    if summary.marked and not results.workspace.regions.exists():
        notes.append("The region table is missing: the run was cut off before it wrote one. Run it again.")
    notes += [f"{printable(doubt)}." for doubt in stored_doubts(results.workspace, results.settings, results.target)]
    if results.vanished:
        vanished = counted(results.vanished, "image that is", "images that are")
        notes.append(f"{vanished} no longer in the folders: left out.")
    if results.unasked:
        unasked = counted(results.unasked, "image that was", "images that were")
        notes.append(f"{unasked} not asked for by the latest run: left out.")
    if others := kinds_in_words(results.passed_over):
        notes.append(f"In the folders, these were passed over: {others}.")
    return notes


def render_pages(results: WorkspaceResults, pages: list[Page], report: str) -> Iterator[tuple[Page, str]]:
    """Render pages about images, one after the other; each links back to the file ``report``."""
    images = results.stored_images([page.name for page in pages], [page.id for page in pages])
    for page in pages:
        image = images[page.name]
        regions = results.regions.filter(pc.equal(results.regions["image"], page.name)).to_pylist()
        regions.sort(key=lambda region: (-region["severity"], region["y"], region["x"]))
        scores = score_kinds(image.measure)
        labels = None if 0 in image.shape else _or_none(image.labels)
        cells = _cells(results, image, labels, scores)
        text = render_page(
            "image.html.j2",
            page=page,
            image=image,
            back="../" * page.path.count("/") + quote(os.fsencode(report)),
            marked=sum(region["area"] for region in regions),
            regions=[region | {"rank": rank} for rank, region in enumerate(regions[:_REGIONS], 1)],
            left_out=max(0, len(regions) - _REGIONS),
            pictures=cells[: -len(scores)],
            maps=cells[-len(scores) :],
            captions=KINDS
            | {"human": "human mask", "labels": "class labels"}
            | {score.kind: score.caption for score in scores},
            notes={score.kind: f"· threshold {score.detector.heat_threshold:.3g}" for score in scores},
            times=TIMES,
            legend=[] if labels is None else class_shares(labels),
            human_outline=hex_colour(HUMAN_OUTLINE),
        )
        yield page, text


def score_kinds(measure: AppliedDetector) -> list[ScoreMap]:
    """List all score maps, DeSRA's first, that of a user's own detector last.

    Each map has its detector's default threshold; only ``measure``, the detector of the run, has the run's threshold.
    """
    kinds = []
    for method in dict.fromkeys([*METHODS, measure.name]):
        detector = measure if method == measure.name else applied(method)
        if detector.weighs_classes:
            kinds.append(ScoreMap("difference", detector.heat_name, detector))
            kinds.append(ScoreMap("adjusted", "1 − adjusted similarity", detector, adjusted=True))
        else:
            kinds.append(ScoreMap(method if method in METHODS else "own", detector.heat_name, detector))
    return kinds


def score_picture(kind: ScoreMap, pair: DetectorInputs, settings: CorpusSettings, *, largest: int) -> RGB:
    """Draw a heat map of the whole image from 0 to twice the threshold, gray where there is no score.

    Args:
        kind: One of `score_kinds`.
        pair: The results of the image, and the other inputs of detectors.
        settings: Settings of the run, which give the window and the class weights.
        largest: Longer sides are scaled down to this, in pixels.

    Raises:
        ImageError: The image is too small or too large for the detector, lacks an input, or makes the detector fail.
    """
    height, width = pair.gan_sr.shape[:2]
    if height * width > _MOST_PIXELS:
        raise ImageError(kind.caption, f"not computed for {width}x{height} pixels", "look at a part of it")
    if kind.adjusted and pair.labels is None:
        raise ImageError("class labels", "there are none, so that every weight is 1", "add --segmenter")
    try:
        scores = kind.detector.score("the image", pair, settings.window, TILE, 1)
        frame = (height - scores.shape[0]) // 2
        if kind.adjusted and pair.labels is not None:
            weights = load_weights(settings.weights or "published").values
            scores = weighted_scores(scores, valid(pair.labels, frame), weights)
    except UsageError as error:
        raise ImageError("detector", error.reason, error.remedy) from None
    ratio = kind.detector.heat_value(scores).astype(np.float32) / np.float32(TIMES * kind.detector.heat_threshold)
    return heat_map(fitted(np.pad(np.clip(ratio, 0, 1), frame, constant_values=np.nan), largest))


def _cells(results: WorkspaceResults, image: StoredImage, labels: Labels | None, scores: list[ScoreMap]) -> list[Cell]:
    """Draw the pictures, then the score maps, as far as the page has room for them."""
    kinds = ["lr"] if "lr" in results.sources else []
    kinds += ["mse_sr", "gan_sr", "mask", *(["human"] if "human" in image.files else []), "pseudo_gt", "labels"]
    if 0 in image.shape:
        kinds += [score.kind for score in scores]
        return [Cell(kind, None, reason=_FAILED) for kind in kinds]
    crops = Crops(image, largest=_LARGEST)
    draw: dict[str, Callable[[], RGB]] = {kind: partial(crops.make, kind) for kind in kinds}
    draw["labels"] = lambda: label_picture(image.labels() if labels is None else labels, largest=_LARGEST)
    cells = [make_cell(kind, draw[kind]) for kind in kinds]
    try:
        mse_sr, gan_sr = image.picture("mse_sr"), image.picture("gan_sr")
        pair = DetectorInputs(mse_sr, gan_sr, _or_none(partial(image.picture, "lr")), labels)
        drawing = partial(score_picture, pair=pair, settings=results.settings, largest=_LARGEST)
        cells += [make_cell(score.kind, partial(drawing, score)) for score in scores]
    except (ImageError, MemoryError) as error:
        subject, reason = getattr(error, "subject", "memory"), getattr(error, "reason", "there is not enough")
        cells += [Cell(score.kind, None, reason=f"{Path(subject).name}: {reason}") for score in scores]
    left = PICTURE_CHARACTERS
    kept = []
    for cell in cells:
        left -= len(cell.uri or "")
        kept.append(cell if left >= 0 else Cell(cell.kind, None, reason="Left out, to keep this page below 20 MB."))
    return kept


def _or_none(read: Callable[[], Read]) -> Read | None:
    try:
        return read()
    except (ImageError, MemoryError):
        return None
