"""The criteria of the gate: add up judgements to scores, and compare the scores with the gate's limits.

The verdict is stored with its models, images and pictures in ``gate/verdict.json`` of the workspace.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from desra_core.errors import UsageError
from desra_core.evaluation.metrics import Interval, psnr, ratio, wilson_interval
from desra_core.evaluation.table import counted, in_percent
from desra_core.files import parse_json
from desra_core.settings.models import Gate
from desra_core.workspace import Workspace

# With four digits, a share that narrowly misses a threshold does not print as the threshold.
_percent = partial(in_percent, form=".4g")


# The negative number of unmet criteria, the merit, and the PSNR to the old model: see `rank`.
Rank = tuple[int, float, float]


@dataclass(frozen=True)
class NewRegion:
    """A region of the mask after finetuning that was not there before. Lengths and areas are in pixels."""

    x: int
    y: int
    width: int
    height: int
    area: int
    class_name: str | None
    severity: float


@dataclass(frozen=True)
class OldRegion(NewRegion):
    """A region of the mask before finetuning, and whether it is gone after."""

    gone: bool


@dataclass(frozen=True)
class Judgement:
    """A comparison of a candidate's result of one held-out image with the old model's result.

    ``before`` is the old model's result, ``after`` the candidate's. Squared error, SSIM and similarity of gradients are
    those of `desra_core.evaluation.fidelity`, outside of the mask before. Sharpness is that of the whole result.
    """

    image: str  # its first name
    id: str  # the hash of its content
    candidate: str
    pixels: int
    regions: list[OldRegion]
    added: list[NewRegion]
    artifact_pixels_before: int
    artifact_pixels_after: int
    outside_pixels: int  # those outside of the mask before
    squared_error: float  # a sum
    ssim: float
    gradient_similarity: float
    lpips: float | None  # of the whole images, where LPIPS was asked for
    sharpness_before: float  # in grey levels of 255 per pixel
    sharpness_after: float
    # IoU of the people's mask with the masks before and after; None without one that marks anything.
    iou_before: float | None = None
    iou_after: float | None = None

    @property
    def clean(self) -> bool:
        """Check whether the old model's result has no artifact."""
        return not self.regions


@dataclass(frozen=True)
class Score:
    """The sums and shares of a candidate over all judged images. Shares are in 0..1, areas in pixels, intervals 95 %.

    PSNR, SSIM and similarity of gradients compare with the old model's results, over all pixels outside of the masks
    before; they are None without images.
    """

    candidate: str
    images: int
    clean_images: int  # without an artifact before
    regions: int  # artifact regions before
    gone: int  # regions before that are gone after
    removal: float | None  # the share of regions that are gone; None without regions
    removal_interval: Interval
    images_added: int  # images with an added region
    addition: float | None  # the share of images with an added region; None without images
    addition_interval: Interval
    regions_added: int
    area_before: int  # artifact pixels of all images
    area_after: int
    psnr: float | None  # also None where nothing differs
    ssim: float | None
    gradient_similarity: float | None
    lpips: float | None  # the mean over the images with LPIPS; None without such images
    # The share of the clean images' sharpness that is lost, below 0 where they became sharper; None where they have no
    # sharpness to lose.
    detail_loss: float | None
    # By class name ("" without labels), the most frequent first: the regions before, and how many of them are gone.
    classes: dict[str, tuple[int, int]]
    human_images: int = 0  # images with a people's mask that marks something
    # Over these, the mean IoU of that mask with the masks before and after, and by how many points it rises.
    iou_before: float | None = None
    iou_after: float | None = None
    delta_iou: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The gate's decision on the candidates of one finetune."""

    passed: bool  # whether a candidate passes
    best: str | None  # the name of the best candidate; None without candidates
    reasons: tuple[str, ...]  # a sentence for each criterion that the best candidate does not meet
    scores: tuple[Score, ...]  # of the candidates in the given order
    control: Score
    thresholds: dict[str, float]  # ``min_removal`` and ``max_detail_loss`` of the gate
    # The best candidate misses no criterion, but no judged image can show whether it meets one of them.
    undecided: bool = False
    # The names of the candidates that were judged on a part of the images only, because they cannot be the best.
    dropped: tuple[str, ...] = ()

    @property
    def outcome(self) -> Literal["passed", "failed", "undecided"]:
        """The verdict in one word."""
        return "passed" if self.passed else "undecided" if self.undecided else "failed"


class Checkpoint(BaseModel):
    """A file of a model and the key of its content."""

    path: str
    key: str


class BestCandidate(Checkpoint):
    """The best candidate: one kind of weights of a checkpoint, alone in ``file``."""

    weights: str
    file: str


class PicturedRegion(BaseModel):
    """A region before finetuning, and the paths of its crops below the gate's folder by kind."""

    image: str
    region: OldRegion
    crops: dict[str, str]


class TrainedImage(BaseModel):
    """An image that was trained on."""

    model_config = ConfigDict(extra="allow")

    name: str
    severity: float


class FinetuneRecord(BaseModel):
    """The training of the candidates: the run.json of `desra_core.training.plan`."""

    model_config = ConfigDict(extra="allow")

    parent: Checkpoint
    discriminator: Checkpoint | None
    training: dict[str, Any]
    precision: str | None = None
    images: list[TrainedImage]
    data: str
    versions: dict[str, str]


class VerdictDocument(BaseModel):
    """A verdict with its models, images and pictures."""

    verdict: Verdict
    before: Checkpoint
    mse_model: Checkpoint | None
    after: str
    best: BestCandidate | None
    pictures: list[PicturedRegion]
    finetune: FinetuneRecord | None
    losses: list[dict[str, float]]
    images: list[str] = []
    key: str = ""
    mask_key: str

    @property
    def best_score(self) -> Score | None:
        """The score of the best candidate; None without candidates."""
        return next((score for score in self.verdict.scores if score.candidate == self.verdict.best), None)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not {"min_removal", "max_detail_loss"} <= self.verdict.thresholds.keys():
            raise ValueError("a threshold is missing")
        if (self.verdict.best is None) != (self.best_score is None):
            raise ValueError("the score of the best candidate is missing")
        return self


def decide(scores: Sequence[Score], control: Score, gate: Gate, *, dropped: Collection[str] = ()) -> Verdict:
    """Compare candidates with the gate's limits, and choose the best candidate.

    A candidate passes when it meets three criteria: at least the share ``gate.min_removal`` of the artifact regions are
    gone, no more images gain a region than with the control, and clean images lose at most the share
    ``gate.max_detail_loss`` of their sharpness. The best candidate has the highest `rank`; ties go to the first one.

    Args:
        scores: Of the candidates.
        control: The score of the control.
        gate: The limits.
        dropped: The names of candidates that were judged on a part of the images only; none of them is the best.
    """
    complete = [score for score in scores if score.candidate not in dropped]
    best = max(complete, key=lambda score: rank(score, control, gate), default=None)
    missed, unshown = _unmet(best, control, gate) if best else (("There is no candidate.",), ())
    return Verdict(
        passed=not missed and not unshown,
        best=best.candidate if best else None,
        reasons=(*missed, *unshown),
        scores=tuple(scores),
        control=control,
        thresholds={"min_removal": gate.min_removal, "max_detail_loss": gate.max_detail_loss},
        undecided=bool(unshown) and not missed,
        dropped=tuple(score.candidate for score in scores if score.candidate in dropped),
    )


def rank(candidate: Score, control: Score, gate: Gate) -> Rank:
    """Compute the rank of a candidate; of two candidates, the one with the greater rank is better.

    First counts how few criteria are unmet, then the merit, then the PSNR to the old model. Merit is
    ``removal * (1 - detail_loss / max_detail_loss)``, so that a candidate cannot win by blurring all photos.
    """
    merit = -math.inf
    if candidate.removal is not None and candidate.detail_loss is not None:
        loss = max(candidate.detail_loss, 0.0)
        left = 1 - loss / gate.max_detail_loss if gate.max_detail_loss else float(loss == 0)
        merit = candidate.removal * left
    missed, unshown = _unmet(candidate, control, gate)
    return -len(missed) - len(unshown), merit, math.inf if candidate.psnr is None else candidate.psnr


def _unmet(candidate: Score, control: Score, gate: Gate) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write a sentence for each criterion that a candidate misses, and for each that no judged image can show."""
    missed, unshown = [], []
    if candidate.removal is None:
        unshown.append("No held-out image has an artifact region, so nothing shows that artifacts are deleted.")
    elif candidate.removal < gate.min_removal:
        low, high = (round(100 * bound) for bound in candidate.removal_interval)
        missed.append(
            f"{candidate.gone} of {candidate.regions} artifact regions are gone, {_percent(candidate.removal)} (95 % "
            f"interval: {low} to {high} %), where {_percent(gate.min_removal)} are asked for."
        )
    if candidate.images_added > control.images_added:
        missed.append(
            f"{candidate.images_added} of {candidate.images} images gained an artifact region; of the control, which "
            f"is noise of 2 grey levels, {control.images_added} did."
        )
    if candidate.detail_loss is None:
        unshown.append("No clean image with detail was judged, so nothing shows that detail was kept.")
    elif candidate.detail_loss > gate.max_detail_loss:
        missed.append(
            f"Clean images lost {_percent(candidate.detail_loss)} of their sharpness, where "
            f"{_percent(gate.max_detail_loss)} are tolerated."
        )
    return tuple(missed), tuple(unshown)


def score(candidate: str, judgements: Iterable[Judgement]) -> Score:
    """Add up the judgements of one candidate."""
    judged = list(judgements)
    clean = [judgement for judgement in judged if judgement.clean]
    regions = [region for judgement in judged for region in judgement.regions]
    distances = [judgement.lpips for judgement in judged if judgement.lpips is not None]
    gone = sum(region.gone for region in regions)
    images_added = sum(bool(judgement.added) for judgement in judged)
    outside = sum(judgement.outside_pixels for judgement in judged)
    error = sum(judgement.squared_error for judgement in judged)
    ssim = sum(judgement.ssim * judgement.outside_pixels for judgement in judged)
    gms = sum(judgement.gradient_similarity * judgement.outside_pixels for judgement in judged)
    sharpness = sum(judgement.sharpness_before for judgement in clean)
    kept = sum(judgement.sharpness_after for judgement in clean)
    ious = [(each.iou_before, each.iou_after) for each in judged]
    drawn = [(before, after) for before, after in ious if before is not None and after is not None]
    iou_before, iou_after = (ratio(sum(column), len(drawn)) for column in (list(zip(*drawn, strict=True)) or [(), ()]))
    classes = Counter(region.class_name or "" for region in regions)
    gone_of_class = Counter(region.class_name or "" for region in regions if region.gone)
    by_frequency = sorted(classes.items(), key=lambda item: (-item[1], item[0]))
    return Score(
        candidate=candidate,
        images=len(judged),
        clean_images=len(clean),
        regions=len(regions),
        gone=gone,
        removal=ratio(gone, len(regions)),
        removal_interval=wilson_interval(gone, len(regions)),
        images_added=images_added,
        addition=ratio(images_added, len(judged)),
        addition_interval=wilson_interval(images_added, len(judged)),
        regions_added=sum(len(judgement.added) for judgement in judged),
        area_before=sum(judgement.artifact_pixels_before for judgement in judged),
        area_after=sum(judgement.artifact_pixels_after for judgement in judged),
        psnr=psnr(error, outside) if error else None,
        ssim=ratio(ssim, outside),
        gradient_similarity=ratio(gms, outside),
        lpips=ratio(sum(distances), len(distances)),
        detail_loss=1 - kept / sharpness if sharpness else None,
        classes={name: (count, gone_of_class[name]) for name, count in by_frequency},
        human_images=len(drawn),
        iou_before=iou_before,
        iou_after=iou_after,
        delta_iou=None if iou_before is None or iou_after is None else 100 * (iou_after - iou_before),
    )


def read_verdict(workspace: Workspace) -> tuple[VerdictDocument, datetime] | None:
    """Read the latest verdict and when it was published; None without a verdict (raises `UsageError`: damaged)."""
    remedy = "run desra compare again"
    try:
        document = VerdictDocument.model_validate(parse_json(workspace.verdict.read_bytes()))
        return document, datetime.fromtimestamp(workspace.verdict.stat().st_mtime, UTC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(workspace.verdict, f"cannot be read ({error.strerror})", remedy) from None
    except ValueError:
        raise UsageError(workspace.verdict, "is damaged or of another version", remedy) from None


def score_rows(verdict: Verdict) -> list[dict[str, str]]:
    """Format the scores of all candidates and of the control.

    LPIPS and IoU are there only where they were measured, and the number of images only where candidates were dropped.
    """

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    def judged_on(score: Score) -> str:
        return counted(score.images, "image") + (", dropped" if score.candidate in verdict.dropped else "")

    def of_people(score: Score) -> str:
        if score.iou_before is None or score.iou_after is None or score.delta_iou is None:
            return ""
        return f"{100 * score.iou_before:.1f} to {100 * score.iou_after:.1f}, {score.delta_iou:+.1f}"

    rows = []
    scores = (*verdict.scores, verdict.control)
    drawn = any(score.human_images for score in scores)
    measured = any(score.lpips is not None for score in scores)
    for score in scores:
        added = in_percent(score.addition, score.addition_interval)
        rows.append({
            "candidate": score.candidate,
            **({"judged on": judged_on(score)} if verdict.dropped else {}),
            "regions gone": f"{score.gone} of {score.regions}",
            "removal": in_percent(score.removal, score.removal_interval),
            "images with added": f"{score.images_added} of {score.images}, {added}",
            "artifact area": in_percent(score.area_after / score.area_before if score.area_before else None),
            **({"IoU with people": of_people(score)} if drawn else {}),
            "PSNR": "same" if score.psnr is None else f"{score.psnr:.1f} dB",
            "SSIM": number(score.ssim),
            "GMS": number(score.gradient_similarity),
            **({"LPIPS": number(score.lpips)} if measured else {}),
            "detail lost": in_percent(score.detail_loss),
        })  # fmt: skip
    return rows
