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
