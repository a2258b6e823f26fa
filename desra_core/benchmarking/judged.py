"""What a benchmark finds of an image, as counts that add up over images, and how it is kept."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from desra_core.benchmarking.entries import Contender
from desra_core.detection.detectors import Scores
from desra_core.detection.mask import score_mask, valid
from desra_core.evaluation.mask_files import FRAME
from desra_core.evaluation.metrics import Agreement, compare_masks
from desra_core.images.codec import Mask


@dataclass(frozen=True)
class Sameness:
    """Pixels that our mask and another program's share: set in both, set in one, of equal value, and all."""

    intersection: int
    union: int
    equal: int
    pixels: int


@dataclass(frozen=True)
class Run:
    """What a contender did on an image.

    Attributes
    ----------
    key
        Identifies what it depends on.
    seconds
        Computing time for the score map and the mask, by entry, in one thread.
    agreements
        With the ground truth, by entry.
    curve
        The same at `Contender.thresholds`.
    published
        With the mask that the data set's authors found, by entry; empty without one.
    """

    key: str
    seconds: dict[str, float]
    agreements: dict[str, Agreement]
    curve: tuple[tuple[float, Agreement], ...]
    published: dict[str, Sameness]


@dataclass(frozen=True)
class Record:
    """An image of the data set: its runs by contender, or why there are none.

    Attributes
    ----------
    labels_seconds
        What it took to compute class labels; None where they were read.
    failure
        The key, subject, reason and remedy of an error that would come again.
    """

    part: str
    name: str
    height: int
    width: int
    labels_seconds: float | None
    runs: dict[str, Run]
    failure: tuple[str, str, str, str] | None = None

    @property
    def title(self) -> str:
        """Its part and name."""
        return f"{self.part}/{self.name}" if self.part else self.name

    @property
    def megapixels(self) -> float:
        """Of a result."""
        return self.height * self.width / 1e6


def curve_of(
    scores: Scores, contender: Contender, ground_truth: Mask, shape: tuple[int, int], min_area: int
) -> tuple[tuple[float, Agreement], ...]:
    """The agreement with a ground truth of ``(H - 10, W - 10)`` at each threshold of the contender's curve."""
    masks = (
        (threshold, score_mask(scores, shape, threshold=threshold, min_area=min_area))
        for threshold in contender.thresholds
    )
    return tuple((threshold, compare_masks(valid(mask, FRAME), ground_truth)) for threshold, mask in masks)


def sameness(mask: Mask, other: Mask) -> Sameness:
    """Count the pixels of two masks of one shape."""
    return Sameness(
        intersection=int((mask & other).sum()),
        union=int((mask | other).sum()),
        equal=int((mask == other).sum()),
        pixels=mask.size,
    )


def encode_record(record: Record) -> bytes:
    """As JSON."""
    return json.dumps(dataclasses.asdict(record)).encode()


def read_record(path: Path) -> Record | None:
    """Read what `encode_record` gave; None where there is nothing, or nothing of the kind."""
    try:
        document = json.loads(path.read_bytes())
        runs = {name: _run(run) for name, run in document["runs"].items()}
        failure = document["failure"]
        return Record(**(document | {"runs": runs, "failure": tuple(failure) if failure else None}))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _run(document: dict[str, Any]) -> Run:
    return Run(
        key=document["key"],
        seconds=document["seconds"],
        agreements={name: Agreement(**counts) for name, counts in document["agreements"].items()},
        curve=tuple((threshold, Agreement(**counts)) for threshold, counts in document["curve"]),
        published={name: Sameness(**counts) for name, counts in document["published"].items()},
    )
