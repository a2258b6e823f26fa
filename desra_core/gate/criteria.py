"""The criteria of the gate: add up judgements to scores, and compare the scores with the gate's limits.

The verdict is stored with its models, images and pictures in ``gate/verdict.json`` of the workspace.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from desra_core.errors import UsageError
from desra_core.evaluation.fidelity import psnr
from desra_core.evaluation.metrics import Interval, ratio, wilson_interval
from desra_core.evaluation.table import in_percent
from desra_core.settings.models import Gate
from desra_core.workspace import Workspace

# With four digits, a near miss does not read like the threshold.
_percent = partial(in_percent, form=".4g")


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
    """A candidate's result of one held-out image, compared with the old model's.

    Attributes:
        image, id: Name of the image, and the hash of its content.
        candidate: Name of the candidate.
        pixels, outside_pixels: Pixels of the result, and those outside of the mask before.
        squared_error, ssim, gradient_similarity: Outside of the mask before, see `desra_core.evaluation.fidelity`; the
            squared error is a sum.
        lpips: Distance of the whole images, where LPIPS was asked for.
        sharpness_before, sharpness_after: Of the whole images, in grey levels of 255 per pixel.
    """

    image: str
    id: str
    candidate: str
    pixels: int
    regions: list[OldRegion]
    added: list[NewRegion]
    artifact_pixels_before: int
    artifact_pixels_after: int
    outside_pixels: int
    squared_error: float
    ssim: float
    gradient_similarity: float
    lpips: float | None
    sharpness_before: float
    sharpness_after: float

    @property
    def clean(self) -> bool:
        """Check whether the old model's result has no artifact."""
        return not self.regions


@dataclass(frozen=True)
class Score:
    """A candidate over all judged images. Shares are in 0..1, areas in pixels, intervals hold 95 %.

    Attributes:
        images, clean_images: All judged images, and those without an artifact before.
        regions, gone, removal, removal_interval: Artifact regions before, those of them that are gone, and their share;
            None without regions.
        images_added, addition, addition_interval, regions_added: Images with an added region, their share (None without
            images), and the added regions.
        area_before, area_after: Artifact pixels of all images.
        psnr, ssim, gradient_similarity: Against the old model's results, over all pixels outside of the masks before.
            All are None without images, ``psnr`` also where nothing differs.
        lpips: The mean over the images with LPIPS; None without such images.
        detail_loss: The share of the clean images' sharpness that is lost, below 0 where they became sharper; None
            where there is no sharpness to lose.
        classes: Regions, and those of them that are gone, by class name (``""`` without labels), the most frequent
            first.
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
    """The gate's decision on the candidates of one finetune.

    Attributes:
        passed, best: Whether a candidate passes, and the name of the best candidate; None without candidates.
        reasons: A sentence for each criterion that the best candidate does not meet.
        scores, control: The scores of the candidates in the given order, and of the control.
        thresholds: ``min_removal`` and ``max_detail_loss`` of the gate.
        undecided: Whether the best candidate misses no criterion, but no judged image can show one of them.
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
    """The training of the candidates: the run.json of `desra_core.training.run_folder`."""

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


def decide(scores: Sequence[Score], control: Score, gate: Gate) -> Verdict:
    """Compare candidates with the gate's limits, and choose the best candidate.

    A candidate passes when it meets all three criteria of `unmet`. The best candidate leaves the fewest unmet; ties
    are decided by merit, then by PSNR to the old model, then by order. Merit is ``removal * (1 - detail_loss /
    max_detail_loss)``, so that a candidate cannot win by blurring all photos. The verdict is undecided where the best
    candidate misses no criterion, but no judged image can show one of them.
    """
    found = [unmet(candidate, control, gate) for candidate in scores]

    def order(index: int) -> tuple[int, float, float]:
        candidate, (missed, unshown) = scores[index], found[index]
        similarity = math.inf if candidate.psnr is None else candidate.psnr
        merit = -math.inf
        if candidate.removal is not None and candidate.detail_loss is not None:
            loss = max(candidate.detail_loss, 0.0)
            left = 1 - loss / gate.max_detail_loss if gate.max_detail_loss else float(loss == 0)
            merit = candidate.removal * left
        return len(missed) + len(unshown), -merit, -similarity

    best = min(range(len(scores)), key=order, default=None)
    missed, unshown = (("There is no candidate.",), ()) if best is None else found[best]
    return Verdict(
        passed=not missed and not unshown,
        best=None if best is None else scores[best].candidate,
        reasons=(*missed, *unshown),
        scores=tuple(scores),
        control=control,
        thresholds={"min_removal": gate.min_removal, "max_detail_loss": gate.max_detail_loss},
        undecided=bool(unshown) and not missed,
    )


def unmet(candidate: Score, control: Score, gate: Gate) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Find the criteria that a candidate misses, and those that no judged image can show.

    At least the share ``gate.min_removal`` of the artifact regions must be gone. No more images may gain a region than
    with the control. Clean images may lose at most the share ``gate.max_detail_loss`` of their sharpness.

    Returns:
        A sentence for each criterion that is missed, and for each that cannot be shown.
    """
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
    classes: dict[str, tuple[int, int]] = {}
    for region in regions:
        count, removed = classes.get(region.class_name or "", (0, 0))
        classes[region.class_name or ""] = count + 1, removed + region.gone
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
        classes=dict(sorted(classes.items(), key=lambda item: (-item[1][0], item[0]))),
    )


def read_verdict(workspace: Workspace) -> tuple[VerdictDocument, datetime] | None:
    """Read the latest verdict and its time; None where none was published (raises `UsageError`: damaged)."""
    remedy = "run desra compare again"
    try:
        document = VerdictDocument.model_validate_json(workspace.verdict.read_bytes())
        return document, datetime.fromtimestamp(workspace.verdict.stat().st_mtime, UTC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(workspace.verdict, f"cannot be read ({error.strerror})", remedy) from None
    except ValueError:
        raise UsageError(workspace.verdict, "is damaged or of another version", remedy) from None


def score_rows(verdict: Verdict) -> list[dict[str, str]]:
    """Format the scores of all candidates and of the control; LPIPS only where it was measured."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    rows = []
    scores = (*verdict.scores, verdict.control)
    measured = any(score.lpips is not None for score in scores)
    for score in scores:
        added = in_percent(score.addition, score.addition_interval)
        rows.append({
            "candidate": score.candidate,
            "regions gone": f"{score.gone} of {score.regions}",
            "removal": in_percent(score.removal, score.removal_interval),
            "images with added": f"{score.images_added} of {score.images}, {added}",
            "artifact area": in_percent(score.area_after / score.area_before if score.area_before else None),
            "PSNR": "same" if score.psnr is None else f"{score.psnr:.1f} dB",
            "SSIM": number(score.ssim),
            "GMS": number(score.gradient_similarity),
            **({"LPIPS": number(score.lpips)} if measured else {}),
            "detail lost": in_percent(score.detail_loss),
        })  # fmt: skip
    return rows
