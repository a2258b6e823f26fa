"""What a run is asked to do. Flow parameters, command-line flags and TOML files all become these models."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from desra_core.matching import Sources
from desra_core.sr.checkpoints import Precision

MinArea = Annotated[str, StringConstraints(pattern=r"^\d+$|^\d+(\.\d+)?%$")]


class Machine(BaseModel):
    """Where and how wide a run computes. Nothing here changes a result or enters a cache key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int | None = Field(None, ge=1, description="Worker processes; by default one per core.")
    memory: str | None = Field(
        None,
        pattern=r"(?i)^\d+(\.\d+)? ?([KMGT]i?)?B?$",
        description="Memory of one worker (on a GPU, of each of its threads), like 4GB; by default 80 % of the "
        "machine, shared evenly.",
    )
    scheduler: str | None = Field(
        None, pattern=r"^\w+://.+", description="Address of a running Dask scheduler, like tcp://host:8786."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where networks run.")
    tile: int = Field(256, ge=32, description="Side of a tile in pixels. Any value gives the same result.")


class CorpusSettings(BaseModel):
    """How the artifacts of a corpus are found, wherever its results come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    verb: ClassVar[str]

    workspace: Path = Field(description="Folder that holds everything the runs of a corpus produce.")
    segmenter: str = Field(
        "none",
        pattern=r"^(none|mmseg:.+,.+|labels:.+)$",
        description="Where class labels come from: none, mmseg:CONFIG,CHECKPOINT or labels:DIR.",
    )
    weights: str | None = Field(
        None,
        description="Class weights: published, none, or a CSV file. By default published when there are labels.",
    )
    threshold: float = Field(0.7, gt=0, le=1, description="Suspect where the adjusted similarity is below this.")
    min_area: MinArea = Field(
        "4000", description="Regions up to this size are dropped: pixels, or a share of the image like 0.1%."
    )
    window: int = Field(11, ge=3, le=255, description="Side of the Gaussian window in pixels; odd.")
    keep: Literal["artifacts", "maps", "all"] = Field(
        "artifacts",
        description="Keep arrays of images with artifacts only (artifacts), similarity and labels of all (maps), or "
        "all of all, SR results and dataset included (all).",
    )
    limit: int | None = Field(None, ge=1, description="Take only the first so many images, by name.")
    shard_size: int = Field(1000, ge=1, description="Images scheduled together, for images that are new.")

    @field_validator("window")
    @classmethod
    def _odd(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError("is even, but a window has a middle: give an odd number")
        return window

    @field_validator("min_area")
    @classmethod
    def _share(cls, min_area: str) -> str:
        if min_area.endswith("%") and Decimal(min_area[:-1]) > 100:
            raise ValueError("is more than the whole image")
        return min_area

    @property
    def labels(self) -> Path | None:
        """The folder of label files, if labels come from one."""
        return Path(self.segmenter.removeprefix("labels:")) if self.segmenter.startswith("labels:") else None

    @property
    def sources(self) -> Sources:
        """The folders to scan."""
        raise NotImplementedError


class Detection(CorpusSettings):
    """Two folders of super-resolution results to be compared, and how."""

    verb: ClassVar[str] = "detect"

    mse_sr: Path = Field(description="Folder of the MSE-trained model's results.")
    gan_sr: Path = Field(description="Folder of the GAN-trained model's results.")
    lr: Path | None = Field(None, description="Folder of the low-resolution inputs, for the pictures of the report.")

    @property
    def sources(self) -> Sources:
        """The folders to scan."""
        return Sources(mse_sr=self.mse_sr, gan_sr=self.gan_sr, lr=self.lr, labels=self.labels)


class Mining(CorpusSettings):
    """A folder of photos, and the two models whose results are to be compared."""

    verb: ClassVar[str] = "mine"

    photos: Path = Field(description="Folder of low-resolution photos.")
    mse_model: Path = Field(description="Checkpoint of the MSE-trained model.")
    gan_model: Path = Field(description="Checkpoint of the GAN-trained model, finetuned from the MSE one.")
    precision: Precision = Field(
        "float32", description="Number format of inference; bfloat16 is faster and changes results a little."
    )

    @property
    def sources(self) -> Sources:
        """The folders to scan."""
        return Sources(lr=self.photos, labels=self.labels)


# What a preset gives to fields that nobody has given.
_PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"patch": 96, "batch": 8, "discriminator_features": 16, "perceptual": "off"},
}


class Training(BaseModel):
    """How a GAN model is finetuned on pseudo ground truths. The defaults are the authors' but for the batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["paper", "cpu"] = Field(
        "paper", description="Defaults of the other flags: the authors', or what a CPU can do in minutes."
    )
    group_by: str = Field(
        "duplicates",
        description="What stays together in the training or in the held-out pool: duplicates, folder, or a regular "
        "expression on names.",
    )
    images: int = Field(50, ge=1, description="The most severe images of the training pool to train on.")
    iterations: int = Field(1000, ge=1, description="Steps of the generator.")
    patch: int = Field(256, ge=32, description="Side of a patch in SR pixels, where the image is as large.")
    batch: int = Field(12, ge=1, description="Patches of a step.")
    accumulate: int = Field(1, ge=1, description="Parts that the patches of a step are computed in, to save memory.")
    mask_share: float = Field(0.5, ge=0, le=1, description="Share of the patches that overlap an artifact mask.")
    learning_rate: float = Field(1e-4, gt=0, description="Of Adam, for generator and discriminator.")
    pixel: Literal["l1", "l2"] = Field("l1", description="Pixel loss: absolute or squared differences.")
    pixel_weight: float = Field(1.0, ge=0, description="Weight of the pixel loss.")
    mask_weight: float = Field(1.0, gt=0, description="Weight of masked pixels in the pixel loss; others have 1.")
    keep_weight: float = Field(
        0.0, ge=0, description="Weight of the L1 distance to the old model's result outside the masks."
    )
    perceptual: str = Field(
        "vgg19", description="Weights of the perceptual loss: vgg19 (torchvision gets them), a local file, or off."
    )
    perceptual_weight: float = Field(1.0, gt=0, description="Weight of the perceptual loss.")
    gan_weight: float = Field(0.1, ge=0, description="Weight of the GAN loss; with 0 there is no discriminator.")
    discriminator: Path | None = Field(
        None, description="Checkpoint of the discriminator that the GAN model was trained with."
    )
    discriminator_features: int = Field(64, ge=4, description="Width of a discriminator that starts from nothing.")
    warmup: int = Field(
        200, ge=0, description="Steps of a discriminator that starts from nothing before the generator moves."
    )
    ema: float = Field(0.999, ge=0, lt=1, description="Decay of the running mean of the weights.")
    amp: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of training; auto is bfloat16 on a GPU and float32 on a CPU."
    )
    checkpoint_every: int = Field(250, ge=1, description="Steps between saved models, which the gate compares.")
    patience: int = Field(
        4, ge=1, description="Stop when the mean pixel loss has not fallen by 1 % for so many checkpoints."
    )
    seed: int = Field(0, ge=0, description="Of patches and of a discriminator that starts from nothing.")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        preset = values.get("preset", "paper") if isinstance(values, dict) else None
        return _PRESETS[preset] | values if preset in _PRESETS else values

    @model_validator(mode="after")
    def _divided(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(f"a batch of {self.batch} cannot be computed in {self.accumulate} equal parts")
        return self


def min_area_pixels(min_area: str, height: int, width: int) -> int:
    """The minimal area in pixels of an image of the given size; a percentage is rounded down."""
    if min_area.endswith("%"):
        return int(Decimal(min_area[:-1]) * height * width / 100)
    return int(min_area)
