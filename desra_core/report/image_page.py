"""Render a page about one image: pictures and score maps of the whole image, at one size and one colour scale.

Each score map is divided by the threshold of its detector, so that all maps have one scale.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import numpy as np
import pyarrow.compute as pc

from desra_core.detection.class_weights import load_weights, weighted_scores
from desra_core.detection.detectors import METHODS, TIMES, AppliedDetector, DetectorInputs, applied
from desra_core.detection.mask import WINDOW, valid
from desra_core.detection.similarity import TILE
from desra_core.errors import ImageError, UsageError
from desra_core.images.codec import Labels
from desra_core.images.parts import RGB, Rectangle, fitted
from desra_core.report.document import Cell, hex_colour, make_cell, render_page
from desra_core.report.pictures import HUMAN_OUTLINE, KINDS, Crops, StoredImage, class_shares, heat_map, label_picture
from desra_core.report.results import WorkspaceResults

FOLDER = "pages"
# The share of pictures in the 20 MB of a page.
PICTURE_CHARACTERS = 18_000_000

_LARGEST = 900
_REGIONS = 200
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
    """A kind of score map; ``adjusted``: class weights are applied to the scores of the detector."""

    kind: str
    caption: str
    detector: AppliedDetector
    adjusted: bool = False


def render_pages(results: WorkspaceResults, pages: list[Page], report: str) -> Iterator[tuple[Page, str]]:
    """Render pages about images, one after the other; each links back to the file ``report``."""
    images = results.stored_images([page.name for page in pages], [page.id for page in pages])
    for page in pages:
        image = images[page.name]
        regions = results.regions.filter(pc.equal(results.regions["image"], page.name)).to_pylist()
        regions.sort(key=lambda region: (-region["severity"], region["y"], region["x"]))
        scores = score_kinds(image.measure)
        labels = None if 0 in image.shape else _or_none(partial(_labels, image))
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

    Each map has the default threshold of its detector. Only ``measure``, the detector of the run, has that of the run.
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


def score_picture(kind: ScoreMap, pair: DetectorInputs, settings: dict[str, Any], *, largest: int) -> RGB:
    """Draw a heat map of the whole image from 0 to twice the threshold, gray where there is no score.

    Args:
        kind: One of `score_kinds`.
        pair: The image.
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
    window = settings.get("window")
    if not isinstance(window, int) or window < 1 or window % 2 == 0:
        window = WINDOW
    try:
        scores = kind.detector.score("the image", pair, window, TILE, 1)
        frame = (height - scores.shape[0]) // 2
        if kind.adjusted and pair.labels is not None:
            weights = load_weights(str(settings.get("weights") or "published")).values
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
        return [Cell(kind, None, reason="The image has failed since.") for kind in kinds]
    crops = Crops(image, largest=_LARGEST)
    draw: dict[str, Callable[[], RGB]] = {kind: partial(crops.make, kind) for kind in kinds}
    draw["labels"] = lambda: label_picture(_labels(image) if labels is None else labels, largest=_LARGEST)
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


def _labels(image: StoredImage) -> Labels:
    """Read the classes of the whole image (raises `ImageError`)."""
    return image.label_reader()(Rectangle(0, 0, *image.shape))


def _or_none(read: Callable[[], Read]) -> Read | None:
    try:
        return read()
    except (ImageError, MemoryError):
        return None
