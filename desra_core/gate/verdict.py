"""The document of the gate's latest verdict, ``gate/verdict.json``, and the table of its scores."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from desra_core.errors import UsageError
from desra_core.evaluation.table import in_percent
from desra_core.gate.criteria import OldRegion, Score, Verdict
from desra_core.workspace import Workspace


class Checkpoint(BaseModel):
    """A file of a model and the key of its content."""

    path: str
    key: str


class BestCandidate(Checkpoint):
    """The best candidate: one kind of the weights in a checkpoint, which ``file`` holds alone."""

    weights: str
    file: str


class PicturedRegion(BaseModel):
    """A region before finetuning and its crops: paths below the gate's folder by kind."""

    image: str
    region: OldRegion
    crops: dict[str, str]


class TrainedImage(BaseModel):
    """An image that was trained on."""

    model_config = ConfigDict(extra="allow")

    name: str
    severity: float


class FinetuneRecord(BaseModel):
    """How the candidates were trained: the run.json of `desra_core.training.run_folder`."""

    model_config = ConfigDict(extra="allow")

    parent: Checkpoint
    discriminator: Checkpoint | None
    training: dict[str, Any]
    precision: str | None = None
    images: list[TrainedImage]
    data: str
    versions: dict[str, str]


class VerdictDocument(BaseModel):
    """A verdict with the models, images and pictures that it is about."""

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
        """The score of the best candidate; None where there are none."""
        return next((score for score in self.verdict.scores if score.candidate == self.verdict.best), None)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not {"min_removal", "max_detail_loss"} <= self.verdict.thresholds.keys():
            raise ValueError("a threshold is missing")
        if (self.verdict.best is None) != (self.best_score is None):
            raise ValueError("the score of the best candidate is missing")
        return self


def publish_verdict(workspace: Workspace, document: VerdictDocument) -> None:
    """Write the latest verdict, durably (raises `TransientError`)."""
    content = document.model_dump_json(indent=1, exclude_unset=True)
    workspace.publish(workspace.verdict, content.encode(), durable=True)


def read_verdict(workspace: Workspace) -> tuple[VerdictDocument, datetime] | None:
    """Read the latest verdict, and when it was published; None where there is none (raises `UsageError`)."""
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


COLUMNS = ("candidate", "regions gone", "removal", "images with added", "artifact area", "PSNR", "SSIM", "GMS", "LPIPS",
           "detail lost")  # fmt: skip


def score_rows(verdict: Verdict) -> list[dict[str, str]]:
    """Format the scores of all candidates and of the control by `COLUMNS`; LPIPS only where it was measured."""
    scores = (*verdict.scores, verdict.control)
    rows = [dict(zip(COLUMNS, _texts(score), strict=True)) for score in scores]
    if all(score.lpips is None for score in scores):
        for row in rows:
            del row["LPIPS"]
    return rows


def _texts(score: Score) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    added = in_percent(score.addition, score.addition_interval)
    return (
        score.candidate,
        f"{score.gone} of {score.regions}",
        in_percent(score.removal, score.removal_interval),
        f"{score.images_added} of {score.images}, {added}",
        in_percent(score.area_after / score.area_before if score.area_before else None),
        "same" if score.psnr is None else f"{score.psnr:.1f} dB",
        number(score.ssim),
        number(score.gradient_similarity),
        number(score.lpips),
        in_percent(score.detail_loss),
    )
