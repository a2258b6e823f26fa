"""Compare a whole set of masks with its ground truth, and add up the measures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

from desra_core.errors import ImageError, UsageError
from desra_core.evaluation.image_agreement import ImageAgreement, Sizes, compare_pair
from desra_core.evaluation.mask_pairs import MaskPair, Pairing
from desra_core.evaluation.metrics import Agreement, MaskScores, pooled, score_masks
from desra_core.evaluation.severity_labels import Ratings, check_ratings

# Each holds two decoded masks and their components.
_THREADS = 8


class SeverityLabels(NamedTuple):
    """Ratings of ground-truth regions, their file, and the share of viewers from which on a region is prominent."""

    ratings: Ratings
    path: Path
    least_noticed: float


@dataclass(frozen=True)
class Evaluation:
    """The result of comparing a set of masks with its ground truth.

    Attributes:
        pairing: The pairs, and the files that have no twin.
        images: The images that could be judged, by name.
        failures: Files that could not, and names that are ambiguous.
        sizes: The size that masks of one size with their ground truth have, where it had to be assumed; else None.
        scores: Of all images.
        classes: The sums over the images with labels, by class; None where none has any.
        severity, prominent: The severity labels, if there are any, and the scores against the prominent regions alone.
    """

    pairing: Pairing
    images: list[ImageAgreement]
    failures: list[ImageError]
    sizes: Sizes | None
    scores: MaskScores
    classes: dict[int, Agreement] | None
    severity: SeverityLabels | None
    prominent: MaskScores | None

    @property
    def lossy(self) -> list[Path]:
        """The JPEG and lossy WebP files."""
        return [path for image in self.images for path in image.lossy]

    @property
    def unlabelled(self) -> int:
        """Images without class labels."""
        return sum(image.classes is None for image in self.images)


def evaluate_masks(
    pairing: Pairing,
    *,
    sizes: Literal["auto"] | Sizes = "auto",
    severity: SeverityLabels | None = None,
    on_judged: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare all pairs of masks, on the valid region of each image.

    Args:
        pairing: The masks.
        sizes: The size of masks that are as large as their ground truth, where no other file shows the image's: the
            image's or that of its valid region. With ``auto`` it is the image's, unless one of these masks marks
            something in the outermost 5 px: DeSRA marks nothing in the frame of an image.
        severity: Severity labels.
        on_judged: Called with the number of images judged and to be judged.

    Raises:
        UsageError: Not one image could be judged (the message is that of the first failure, if there are any), or the
            severity labels do not belong to this ground truth.
    """
    taken: Sizes = "image" if sizes == "auto" else sizes
    results = _judged(pairing.pairs, severity, taken, on_judged, until_framed=sizes == "auto")
    if results is None:
        taken = "valid"
        results = _judged(pairing.pairs, severity, taken, on_judged) or []
    judged = [result for result in results if isinstance(result, ImageAgreement)]
    failures = pairing.failures + [result for result in results if isinstance(result, ImageError)]
    if not judged:
        raise _nothing_judged(pairing, failures)
    if severity:
        regions = dict.fromkeys(chain((pair.name for pair in pairing.pairs), pairing.without_mask))
        check_ratings(severity.ratings, severity.path, regions | {image.pair.name: image.marked for image in judged})
    by_class = [image.classes for image in judged if image.classes is not None]
    classes = sorted({index for image in by_class for index in image})
    prominent = [image.prominent for image in judged if image.prominent is not None]
    return Evaluation(
        pairing=pairing,
        images=judged,
        failures=failures,
        sizes=taken if any(image.assumed for image in judged) else None,
        scores=score_masks([image.agreement for image in judged]),
        classes={index: pooled(image[index] for image in by_class if index in image) for index in classes}
        if by_class
        else None,
        severity=severity,
        prominent=score_masks(prominent) if severity else None,
    )


def _judged(
    pairs: Sequence[MaskPair],
    severity: SeverityLabels | None,
    sizes: Sizes,
    on_judged: Callable[[int, int], None] | None,
    *,
    until_framed: bool = False,
) -> list[ImageAgreement | ImageError] | None:
    """Compare all pairs in their order, a few at a time.

    With ``until_framed`` None, as soon as a mask that is to have the image's size marks its frame.
    """
    results = []
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for result in pool.map(partial(_compare, severity=severity, sizes=sizes), pairs):
                if until_framed and isinstance(result, ImageAgreement) and result.framed:
                    return None
                results.append(result)
                if on_judged:
                    on_judged(len(results), len(pairs))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return results


def _compare(pair: MaskPair, *, severity: SeverityLabels | None, sizes: Sizes) -> ImageAgreement | ImageError:
    noticed, least = None, 0.0
    if severity is not None:
        rows = severity.ratings.get(pair.name, {})
        noticed = {number: rating.noticed for number, rating in rows.items() if rating.noticed is not None}
        least = severity.least_noticed
    try:
        return compare_pair(pair, sizes=sizes, noticed=noticed, least_noticed=least)
    except ImageError as error:
        return error
    except MemoryError:
        return ImageError(pair.mask, "needs more memory than there is", "judge it on a larger machine")


def _nothing_judged(pairing: Pairing, failures: Sequence[ImageError]) -> UsageError:
    if failures:
        subject, reason, remedy = failures[0].failure
        others = f" ({len(failures) - 1} more files fail)" if len(failures) > 1 else ""
        return UsageError(subject, reason + others, remedy)
    lacking = next(chain(pairing.without_ground_truth.values(), pairing.without_mask.values()), "the ground truth")
    remedy = "a mask and its ground truth have the same path below their folders, suffix aside"
    return UsageError(lacking, "has no twin, and neither has any other mask", remedy)
