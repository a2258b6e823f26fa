"""The document of the gate's latest verdict, as `desra_core.gate.comparison.conclude` publishes it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Self

from pydantic import BaseModel, model_validator

from desra_core.errors import UsageError
from desra_core.gate.verdict import Score, Verdict
from desra_core.workspace import Workspace


class Model(BaseModel):
    """A checkpoint."""

    path: str
    key: str


class Best(Model):
    """The best candidate: one kind of the weights in a checkpoint, which ``file`` holds alone."""

    weights: str
    file: str


class Region(BaseModel):
    """A region before, with its fate."""

    area: int
    class_name: str | None
    severity: float
    gone: bool


class Picture(BaseModel):
    """A region and its crops: paths below the gate's folder by kind."""

    image: str
    region: Region
    crops: dict[str, str]


class TrainingImage(BaseModel):
    """An image that was trained on."""

    name: str
    severity: float


class Finetune(BaseModel):
    """How the candidates were trained, and in which number format; see `desra_core.training.run_folder`."""

    parent: Model
    discriminator: Model | None
    training: dict[str, Any]
    precision: str | None = None
    images: list[TrainingImage]
    data: str
    versions: dict[str, str]


class Document(BaseModel):
    """All of it. What is not used here is left out."""

    verdict: Verdict
    before: Model
    mse_model: Model | None
    after: str
    best: Best | None
    pictures: list[Picture]
    finetune: Finetune | None
    losses: list[dict[str, float]]
    mask_key: str

    @property
    def best_score(self) -> Score | None:
        """Of the best candidate; None where there are none."""
        return next((score for score in self.verdict.scores if score.candidate == self.verdict.best), None)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not {"min_removal", "max_detail_loss"} <= self.verdict.thresholds.keys():
            raise ValueError("a threshold is missing")
        if (self.verdict.best is None) != (self.best_score is None):
            raise ValueError("the score of the best candidate is missing")
        return self


def read_document(workspace: Workspace) -> tuple[Document, datetime] | None:
    """Read the latest verdict, and when it was published; None where there is none.

    Raises
    ------
    UsageError
        It is damaged.
    """
    remedy = "run desra compare again"
    try:
        document = Document.model_validate_json(workspace.verdict.read_bytes())
        return document, datetime.fromtimestamp(workspace.verdict.stat().st_mtime, UTC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(workspace.verdict, f"cannot be read ({error.strerror})", remedy) from None
    except ValueError:
        raise UsageError(workspace.verdict, "is damaged or of another version", remedy) from None
