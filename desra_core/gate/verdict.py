"""Whether a finetuned model may replace the old one: judgements add up to scores, and scores are held to the gate.

Light to import: the command line reads its flags from `Gate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from desra_core.evaluation.fidelity import psnr
from desra_core.evaluation.removal import wilson_interval
from desra_core.settings.models import Gate

if TYPE_CHECKING:
    from desra_core.gate.judgement import Judgement

Interval = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """A candidate over all judged images. Shares are in 0..1, areas in pixels, intervals hold 95 %.

    Attributes
    ----------
    images, clean_images
        All judged images, and those without an artifact before.
    regions, gone, removal, removal_interval
        Artifact regions before, those of them that are gone, and their share; None where there are none.
    images_added, addition, addition_interval, regions_added
        Images with an added region, their share (None without images), and the added regions.
    area_before, area_after
        Artifact pixels of all images.
    psnr, ssim, gradient_similarity
        Against the old model's results, outside of the masks before: over all pixels together. The first is None where
        nothing differs, all are without images.
    lpips
        The mean over the images that have it; None where none has.
    detail_loss
        The share of the clean images' sharpness that is lost, below 0 where they became sharper; None where there is no
        sharpness to lose.
    classes
        Regions and those gone by class name, the most frequent first; under ``""`` where there are no labels.
    """

    candidate: str
    images: int
    clean_images: int
    regions: int
    gone: int
    removal: float | None
    removal_interval: Interval
    images_added: int
    addition: float | None
    addition_interval: Interval
    regions_added: int
    area_before: int
    area_after: int
    psnr: float | None
    ssim: float | None
    gradient_similarity: float | None
    lpips: float | None
    detail_loss: float | None
    classes: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Verdict:
    """What the gate says of the candidates of one finetuning.

    Attributes
    ----------
    passed, best
        Whether a candidate passes, and the name of the best one; None where there are none.
    reasons
        Why the best one does not pass, a sentence for each criterion; empty where it passes.
    scores, control
        Of the candidates as they were given, and of the control.
    thresholds
        ``min_removal`` and ``max_detail_loss`` as they were then.
    undecided
        Whether the best one misses nothing, but images are missing by which something could be shown.
    """

    passed: bool
    best: str | None
    reasons: tuple[str, ...]
    scores: tuple[Score, ...]
    control: Score
    thresholds: dict[str, float]
    undecided: bool = False

    @property
    def outcome(self) -> Literal["passed", "failed", "undecided"]:
        """The verdict in a word."""
        return "passed" if self.passed else "undecided" if self.undecided else "failed"

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Verdict:
        """Read what `to_json` gave."""
        read = {
            "reasons": tuple(document["reasons"]),
            "scores": tuple(_score(row) for row in document["scores"]),
            "control": _score(document["control"]),
        }
        return cls(**(document | read))


def score(candidate: str, judgements: Iterable[Judgement]) -> Score:
    """Add up the judgements of one candidate."""
    judged = list(judgements)
    fates = [region for judgement in judged for region in judgement.regions]
    gone = sum(region.gone for region in fates)
    images_added = sum(bool(judgement.added) for judgement in judged)
    error = sum(judgement.squared_error for judgement in judged)
    outside = sum(judgement.outside_pixels for judgement in judged)
    distances = [judgement.lpips for judgement in judged if judgement.lpips is not None]
    return Score(
        candidate=candidate,
        images=len(judged),
        clean_images=sum(judgement.clean for judgement in judged),
        regions=len(fates),
        gone=gone,
        removal=_ratio(gone, len(fates)),
        removal_interval=wilson_interval(gone, len(fates)),
        images_added=images_added,
        addition=_ratio(images_added, len(judged)),
        addition_interval=wilson_interval(images_added, len(judged)),
        regions_added=sum(len(judgement.added) for judgement in judged),
        area_before=sum(judgement.artifact_pixels_before for judgement in judged),
        area_after=sum(judgement.artifact_pixels_after for judgement in judged),
        psnr=psnr(error, outside) if error else None,
        ssim=_ratio(sum(judgement.ssim * judgement.outside_pixels for judgement in judged), outside),
        gradient_similarity=_ratio(
            sum(judgement.gradient_similarity * judgement.outside_pixels for judgement in judged), outside
        ),
        lpips=_ratio(sum(distances), len(distances)),
        detail_loss=_detail_loss([judgement for judgement in judged if judgement.clean]),
        classes=_by_class((region.class_name or "", region.gone) for region in fates),
    )


def decide(scores: Sequence[Score], control: Score, gate: Gate) -> Verdict:
    """Hold candidates to the gate, and choose the best.

    A candidate passes when it removes ``gate.min_removal`` of the artifact regions, when no more images have an added
    region than in the control, and when clean images lose no more than ``gate.max_detail_loss`` of their sharpness.
    The best misses the fewest of these; of several the one with the most merit, then that with the highest PSNR to the
    old model, then the first. Merit is the removal times the part of the tolerated detail loss that is left: the last
    region is not worth the texture of all photos. Where the best misses nothing but what no image could show, the
    verdict is undecided.
    """
    missed = [(*_missed(candidate, control, gate), *_unshown(candidate)) for candidate in scores]
    ranking = sorted(range(len(scores)), key=lambda index: (len(missed[index]), *_order(scores[index], gate)))
    best = ranking[0] if ranking else None
    return Verdict(
        passed=best is not None and not missed[best],
        best=None if best is None else scores[best].candidate,
        reasons=("There is no candidate.",) if best is None else missed[best],
        scores=tuple(scores),
        control=control,
        thresholds={"min_removal": gate.min_removal, "max_detail_loss": gate.max_detail_loss},
        undecided=best is not None and bool(missed[best]) and missed[best] == _unshown(scores[best]),
    )


def _unshown(candidate: Score) -> tuple[str, ...]:
    """Say what the judged images cannot show: a sentence for each criterion."""
    reasons = []
    if candidate.removal is None:
        reasons.append("No held-out image has an artifact region, so nothing shows that artifacts are deleted.")
    if candidate.detail_loss is None:
        reasons.append("No clean image with detail was judged, so nothing shows that detail was kept.")
    return tuple(reasons)


def _missed(candidate: Score, control: Score, gate: Gate) -> tuple[str, ...]:
    """Say what a candidate misses: a sentence for each criterion."""
    reasons = []
    if candidate.removal is not None and candidate.removal < gate.min_removal:
        low, high = (round(100 * bound) for bound in candidate.removal_interval)
        reasons.append(
            f"{candidate.gone} of {candidate.regions} artifact regions are gone, {_percent(candidate.removal)} (95 % "
            f"interval: {low} to {high} %), where {_percent(gate.min_removal)} are asked for."
        )
    if candidate.images_added > control.images_added:
        reasons.append(
            f"{candidate.images_added} of {candidate.images} images gained an artifact region, where noise that "
            f"nobody sees adds one in {control.images_added}."
        )
    if candidate.detail_loss is not None and candidate.detail_loss > gate.max_detail_loss:
        reasons.append(
            f"Clean images lost {_percent(candidate.detail_loss)} of their sharpness, where "
            f"{_percent(gate.max_detail_loss)} are tolerated."
        )
    return tuple(reasons)


def _order(candidate: Score, gate: Gate) -> tuple[float, float]:
    """Merit and PSNR, negated."""
    similarity = math.inf if candidate.psnr is None else candidate.psnr
    if candidate.removal is None or candidate.detail_loss is None:
        return math.inf, -similarity
    loss = max(candidate.detail_loss, 0.0)
    left = 1 - loss / gate.max_detail_loss if gate.max_detail_loss else float(loss == 0)
    return -candidate.removal * left, -similarity


def _detail_loss(clean: list[Judgement]) -> float | None:
    kept = _ratio(
        sum(judgement.sharpness_after for judgement in clean), sum(judgement.sharpness_before for judgement in clean)
    )
    return None if kept is None else 1 - kept


def _by_class(fates: Iterable[tuple[str, bool]]) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for class_name, gone in fates:
        regions, removed = counts.get(class_name, (0, 0))
        counts[class_name] = regions + 1, removed + gone
    return dict(sorted(counts.items(), key=lambda item: (-item[1][0], item[0])))


def _score(row: dict[str, Any]) -> Score:
    pairs = {name: tuple(row[name]) for name in ("removal_interval", "addition_interval")}
    return Score(**(row | pairs | {"classes": {name: tuple(counts) for name, counts in row["classes"].items()}}))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percent(share: float) -> str:
    """Percent to four digits, so that what just misses a threshold does not read like it."""
    return f"{100 * share:.4g} %"
