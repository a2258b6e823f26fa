"""Settings of finetuning, the gate, the cycle, calibration and benchmarks."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from desra_core.detection.detectors import METHODS
from desra_core.settings import Frozen, MinArea, Mining, whole_path

PERCENTILE = 85.0
RATE = 0.001
# A class with fewer pixels or images gets no weight of its own.
MIN_PIXELS, MIN_IMAGES = 100_000, 3

Rule = Literal["published", "quantile"]
Fallback = Literal["published", "one", "pooled"]

SYNTHETIC = "synthetic"


_LPIPS = "AlexNet weights of torchvision, to measure the LPIPS distance to the old model too."
_PHOTOS = "Folder of the LR photos, where the latest run recorded none."
# The values of fields that were not given, with preset cpu.
_CPU_PRESET = {"patch": 96, "batch": 8, "discriminator_features": 16, "perceptual": "off", "warmup": None}
# Warm-up of a discriminator that starts from nothing: steps, and with preset cpu at most this share of the iterations.
_WARMUP, _WARMUP_SHARE = 200, 0.2


def _path_unless(*words: str | None) -> AfterValidator:
    """Make a text an absolute path, unless it is one of these words."""
    return AfterValidator(lambda text: text if text in words else str(whole_path(text)))


class Gate(Frozen):
    """Limits of the gate: what a finetuned model must reach before it may replace the old one."""

    min_removal: float = Field(0.75, ge=0, le=1, description="Share of the artifact regions that must be gone.")
    max_detail_loss: float = Field(
        0.10, ge=0, le=1, description="Share of the sharpness of clean images that may be lost."
    )
    held_out: int = Field(100, ge=1, description="Held-out images with artifacts to judge, at most.")
    clean: int = Field(50, ge=1, description="Held-out clean images to judge, at most.")


def _without_preset_defaults(schema: dict[str, Any]) -> None:
    """Keep the defaults of preset fields out of forms: a form sends all it shows, which would overrule the preset."""
    for name in _CPU_PRESET:
        schema["properties"][name].pop("default", None)


class Training(Frozen):
    """Settings of a finetune on pseudo ground truths. The defaults are those of the authors, except the batch."""

    model_config = ConfigDict(json_schema_extra=_without_preset_defaults)

    preset: Literal["paper", "cpu"] = Field(
        "paper", description="Defaults of the other flags: the authors', or what a CPU can do in minutes."
    )
    group_by: str = Field(
        "duplicates",
        description="Images that stay together in the training or in the held-out pool: duplicates, folder, or a "
        "regular expression on names.",
    )
    images: int = Field(50, ge=1, description="The most severe images of the training pool to train on.")
    iterations: int = Field(1000, ge=1, le=999_999, description="Steps of the generator.")
    patch: int = Field(
        256,
        ge=32,
        description="Side of a patch in SR pixels, where the image is as large. By default 256, or 96 with preset cpu.",
    )
    batch: int = Field(12, ge=1, description="Patches of a step. By default 12, or 8 with preset cpu.")
    accumulate: int = Field(1, ge=1, description="Parts that the patches of a step are computed in, to save memory.")
    mask_share: float = Field(0.5, ge=0, le=1, description="Share of the patches that overlap an artifact mask.")
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate of Adam, for generator and discriminator.")
    pixel: Literal["l1", "l2"] = Field("l1", description="Pixel loss: absolute or squared differences.")
    pixel_weight: float = Field(1.0, ge=0, description="Weight of the pixel loss.")
    mask_weight: float = Field(1.0, gt=0, description="Weight of masked pixels in the pixel loss; others have 1.")
    keep_weight: float = Field(
        0.0, ge=0, description="Weight of the L1 distance to the old model's result outside the masks."
    )
    perceptual: Annotated[str, _path_unless("vgg19", "off")] = Field(
        "vgg19",
        description="Weights of the perceptual loss: vgg19 (torchvision gets them), a local file, or off. By default "
        "vgg19, or off with preset cpu.",
    )
    perceptual_weight: float = Field(1.0, gt=0, description="Weight of the perceptual loss.")
    gan_weight: float = Field(0.1, ge=0, description="Weight of the GAN loss; with 0 there is no discriminator.")
    discriminator: Path | None = Field(
        None, description="Checkpoint of the discriminator that the GAN model was trained with."
    )
    discriminator_features: int = Field(
        64, ge=4, description="Width of a discriminator that starts from nothing. By default 64, or 16 with preset cpu."
    )
    warmup: int | None = Field(
        _WARMUP,
        ge=0,
        description="Steps of a discriminator that starts from nothing before the generator moves. By default 200, or "
        "with preset cpu a fifth of the iterations, at most 200.",
    )
    ema: float = Field(0.999, ge=0, lt=1, description="Decay of the running mean of the weights.")
    amp: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number format of training; auto is bfloat16 on a GPU and float32 on a CPU. A run that goes on "
        "keeps to the one it began in.",
    )
    checkpoint_every: int = Field(250, ge=1, description="Steps between saved models, which the gate compares.")
    patience: int = Field(
        4, ge=1, description="Stop when the mean pixel loss has not fallen by 1 % for so many checkpoints."
    )
    seed: int = Field(0, ge=0, description="Seed of the patches, and of a discriminator that starts from nothing.")

    @property
    def warmup_steps(self) -> int:
        """Steps of the discriminator alone, before those of the generator."""
        if not self.gan_weight or self.discriminator is not None:
            return 0
        return min(_WARMUP, int(_WARMUP_SHARE * self.iterations)) if self.warmup is None else self.warmup

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return _CPU_PRESET | values if isinstance(values, dict) and values.get("preset") == "cpu" else values

    @field_validator("accumulate")
    @classmethod
    def _divides(cls, accumulate: int, info: ValidationInfo) -> int:
        batch = info.data.get("batch", accumulate)  # absent where the batch is invalid
        if batch % accumulate:
            raise ValueError(f"a batch of {batch} cannot be computed in so many equal parts")
        return accumulate


class Finetuning(Training):
    """Settings of desra finetune, which trains a GAN model on the artifacts of a workspace."""

    verb: ClassVar[str] = "finetune"

    workspace: Path = Field(description="Workspace of desra mine or detect, whose artifacts are to be deleted.")
    output: Path | None = Field(
        None,
        description="Folder of this finetune; the same one again goes on. By default one in the workspace, named after "
        "all that goes into the finetune.",
    )
    gan_model: Path | None = Field(
        None, description="Checkpoint of the GAN-trained model; by default what the latest desra mine used."
    )
    lr: Path | None = Field(None, description=_PHOTOS)


class Comparing(Gate):
    """Settings of desra compare, which judges finetuned models by the held-out images of a workspace."""

    verb: ClassVar[str] = "compare"

    workspace: Path = Field(description="Workspace whose held-out images judge.")
    after: Path = Field(description="A finetuned checkpoint, or the folder of a finetune for all that it saved.")
    before: Path | None = Field(
        None, description="Checkpoint of the old model; by default what the latest desra mine used."
    )
    mse_model: Path | None = Field(
        None, description="Checkpoint of the MSE-trained model; by default what the latest desra mine used."
    )
    lr: Path | None = Field(None, description=_PHOTOS)
    group_by: str = Field("duplicates", description="Images that stay together, as for the finetune.")
    lpips: Path | None = Field(None, description=_LPIPS)
    promote: bool = Field(False, description="Make the best one the workspace's current model, if it passes.")


class Cycling(Mining, Training, Gate):
    """Settings of desra cycle, which mines photos, finetunes the GAN model and judges the result."""

    verb: ClassVar[str] = "cycle"

    lpips: Path | None = Field(None, description=_LPIPS)
    keep_mse: bool = Field(
        True, description="Keep the MSE model's result of every image: a promoted GAN model then needs only its own."
    )
    promote: bool = Field(True, description="Make the best model the workspace's current one, if it passes.")


class Calibrating(Frozen):
    """Settings of desra calibrate, which derives class weights from artifact-free pairs."""

    verb: ClassVar[str] = "calibrate"

    workspace: Path = Field(description="Workspace of desra detect or mine, or a new folder.")
    output: Path = Field(description="Weights file to write, .toml or .csv; a page and a picture go beside it.")
    mse_sr: Path | None = Field(
        None, description="Folder of the MSE-trained model's results; by default as the workspace's latest run."
    )
    gan_sr: Path | None = Field(
        None, description="Folder of the GAN-trained model's results; by default as the workspace's latest run."
    )
    segmenter: str = Field(
        "none",
        pattern=r"^(none|mmseg:.+,.+|labels:.+)$",
        description="Where class labels come from: mmseg:CONFIG,CHECKPOINT or labels:DIR; by default as the "
        "workspace's latest run.",
    )
    exclude: Path | None = Field(
        None,
        description="Folder of masks by image name whose pixels are not counted; those of human masks in the "
        "workspace are not counted either.",
    )
    rule: Rule = Field("published", description="20 bins as published, or the quantile to a ten-thousandth (quantile).")
    percentile: float = Field(
        PERCENTILE, gt=0, lt=100, description="Share of a class's pixels that its weight lifts to 1, in percent."
    )
    false_alarm_rate: float = Field(
        RATE, gt=0, lt=1, description="Share of the counted pixels that the suggested threshold may call suspect."
    )
    min_pixels: int = Field(MIN_PIXELS, ge=1, description="A class with fewer pixels gets the fallback.")
    min_images: int = Field(MIN_IMAGES, ge=1, description="A class in fewer images gets the fallback.")
    fallback: Fallback = Field(
        "published",
        description="Weight of classes with too few pixels or images: published, one, or that of all classes together "
        "(pooled).",
    )

    @field_validator("output")
    @classmethod
    def _known_format(cls, output: Path) -> Path:
        if output.suffix.lower() not in (".toml", ".csv"):
            raise ValueError("has another suffix than .toml or .csv")
        if output.is_dir():
            raise ValueError("is a folder")
        return output


class Benchmarking(Frozen):
    """Settings of desra benchmark, which measures detectors by human masks, or by artifacts that it injects itself."""

    verb: ClassVar[str] = "benchmark"

    dataset: Annotated[str, _path_unless(SYNTHETIC)] = Field(
        description="Folder with MSE-SR, GAN-SR and GT-Mask in it, a folder of such folders, or a COCO file; or the "
        "word synthetic: artifacts are injected into the clean results of --mse-sr and --gan-sr; no masks needed."
    )
    output: Path = Field(description="Folder for masks, tables and the page; the same one again goes on.")
    methods: str = Field(
        ",".join(METHODS), description=f"Detectors, by commas: {', '.join(METHODS)}, and .py files of your own."
    )
    min_area: MinArea = "4000"
    mse_sr: Path | None = Field(None, description="Folder of the MSE-trained model's results, where it lies elsewhere.")
    gan_sr: Path | None = Field(None, description="Folder of the GAN-trained model's results, where it lies elsewhere.")
    lr: Path | None = Field(None, description="Folder of the low-resolution inputs, where it lies elsewhere.")
    labels: Path | None = Field(None, description="Folder of class-index PNGs by image name, where it lies elsewhere.")
    segmenter: str = Field(
        "none",
        pattern=r"^(none|mmseg:.+,.+)$",
        description="Segmenter for class labels that are not given: none or mmseg:CONFIG,CHECKPOINT.",
    )
    weights: Annotated[str | None, _path_unless(None, "published", "none")] = Field(
        None,
        description="Class weights of desra: published, none, or a file. By default published when there are labels.",
    )
    exclude: Path | None = Field(
        None, description="With synthetic: folder of human masks; the artifacts that they mark are no false alarms."
    )
    seed: int = Field(0, ge=0, description="With synthetic: seed of the artifacts that are injected.")

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

    @property
    def synthetic(self) -> bool:
        """Whether artifacts are injected into clean pairs."""
        return self.dataset == SYNTHETIC
