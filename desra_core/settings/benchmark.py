"""Settings of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from desra_core.detection.detectors import METHODS
from desra_core.settings import MinArea, whole_path

SYNTHETIC = "synthetic"


class Benchmarking(BaseModel):
    """Pairs with human masks, or clean pairs to inject artifacts into, and the detectors that are to be measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    verb: ClassVar[str] = "benchmark"

    dataset: str = Field(
        description="Folder with MSE-SR, GAN-SR and GT-Mask in it, a folder of such folders, or a COCO file; or the "
        "word synthetic: artifacts are injected into the clean results of --mse-sr and --gan-sr; no masks needed."
    )
    output: Path = Field(description="Folder for masks, tables and the page; the same one again goes on.")
    methods: str = Field(
        ",".join(METHODS), description=f"Detectors, by commas: {', '.join(METHODS)}, and .py files of your own."
    )
    min_area: MinArea = Field(
        "4000", description="Regions up to this size are dropped: pixels, or a share of the image like 0.1%."
    )
    mse_sr: Path | None = Field(None, description="Folder of the MSE-trained model's results, where it lies elsewhere.")
    gan_sr: Path | None = Field(None, description="Folder of the GAN-trained model's results, where it lies elsewhere.")
    lr: Path | None = Field(None, description="Folder of the low-resolution inputs, where it lies elsewhere.")
    labels: Path | None = Field(None, description="Folder of class-index PNGs by image name, where it lies elsewhere.")
    segmenter: str = Field(
        "none",
        pattern=r"^(none|mmseg:.+,.+)$",
        description="What computes class labels that are not there: none or mmseg:CONFIG,CHECKPOINT.",
    )
    weights: str | None = Field(
        None,
        description="Class weights of desra: published, none, or a file. By default published when there are labels.",
    )
    exclude: Path | None = Field(
        None, description="With synthetic: folder of human masks; the artifacts that they mark are no false alarms."
    )
    seed: int = Field(0, ge=0, description="With synthetic: seed of the artifacts that are injected.")

    @field_validator("dataset")
    @classmethod
    def _place(cls, dataset: str) -> str:
        return dataset if dataset == SYNTHETIC else str(whole_path(dataset))

    @field_validator("methods")
    @classmethod
    def _files(cls, methods: str) -> str:
        names = [name.strip() for name in methods.split(",") if name.strip()]
        if not names:
            raise ValueError("names no method")
        return ",".join(str(whole_path(name)) if name.endswith(".py") else name for name in names)

    @field_validator("segmenter")
    @classmethod
    def _models(cls, segmenter: str) -> str:
        kind, colon, paths = segmenter.partition(":")
        return kind + colon + ",".join(str(whole_path(path.strip())) for path in paths.split(",") if path.strip())

    @field_validator("weights")
    @classmethod
    def _file(cls, weights: str | None) -> str | None:
        return weights if weights in (None, "published", "none") else str(whole_path(weights))

    @property
    def synthetic(self) -> bool:
        """Whether artifacts are injected."""
        return self.dataset == SYNTHETIC
