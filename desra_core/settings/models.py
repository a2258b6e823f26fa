"""Settings of finetuning, the gate, the cycle, calibration and benchmarks; at the end those of desra serve.

`parse_period` and `parse_span` read times and lengths of time in words, by which desra serve starts and deletes runs.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.config import JsonDict
from tzlocal import get_localzone_name

from desra_core.detection.detectors import METHODS, SUFFIXES
from desra_core.errors import UsageError
from desra_core.networks.checkpoints import BICUBIC, Precision
from desra_core.remote import Remote, is_tar
from desra_core.settings import (
    STORAGE,
    USUAL,
    Detection,
    Frozen,
    Heading,
    MinArea,
    Mining,
    path_unless,
    whole_path,
)

PERCENTILE = 85.0
RATE = 0.001
# A class with fewer pixels or images gets no weight of its own.
MIN_PIXELS, MIN_IMAGES = 100_000, 3

Rule = Literal["published", "quantile"]
Fallback = Literal["published", "one", "pooled"]

_TRAINING: JsonDict = {"heading": "Training"}
_DETECTION: JsonDict = {"heading": "Detection"}
_SCORES: JsonDict = {"heading": "Scores"}
_GATE: JsonDict = {"heading": "Gate"}
_SERVER: JsonDict = {"heading": "Server"}
_LPIPS = "AlexNet weights of torchvision, to measure the LPIPS distance to the old model too."
_PHOTOS = "Folder of the LR photos, where the latest run recorded none."
# Warm-up of a discriminator that starts from nothing: steps, and with preset cpu at most this share of the iterations.
_WARMUP, _WARMUP_SHARE = 200, 0.2

_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
_SPAN = re.compile(rf"(\d+)? ?({'|'.join(_UNITS)})s?")
_DAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
_CLOCK = re.compile(rf"(daily|weekdays|(?:{'|'.join(_DAYS)})s?) at (\d\d?):(\d\d)")
_SHORTEST_PERIOD = timedelta(seconds=10)  # with shorter periods, a server is busy with planning runs
_SHORTEST_HISTORY = timedelta(days=1)  # Prefect keeps no run for less
_LONGEST_SPAN = timedelta(days=36500)  # longer spans lead to dates that Python does not have


class Gate(Frozen):
    """Limits of the gate: what a finetuned model must reach before it may replace the old one."""

    heading: ClassVar[Heading | None] = "Gate"

    min_removal: float = Field(0.75, ge=0, le=1, description="Share of the artifact regions that must be gone.")
    max_detail_loss: float = Field(
        0.10, ge=0, le=1, description="Share of the sharpness of clean images that may be lost."
    )
    held_out: int = Field(100, ge=1, description="Held-out images with artifacts to judge, at most.")
    clean: int = Field(50, ge=1, description="Held-out clean images to judge, at most.")
    rounds: bool = Field(
        True, description="Stop judging a candidate when the images judged so far show that it cannot be the best."
    )


def _without_preset_defaults(schema: dict[str, Any], model: type["Optimising"]) -> None:
    """Keep the defaults of preset fields out of forms: a form sends all it shows, which would overrule the preset."""
    for name in model.cpu_preset:
        schema["properties"][name].pop("default", None)


class Optimising(Frozen):
    """Settings of any training: its steps, patches, number format and checkpoints."""

    model_config = ConfigDict(json_schema_extra=_without_preset_defaults)
    heading: ClassVar[Heading | None] = "Training"
    # The values of fields that were not given, with preset cpu.
    cpu_preset: ClassVar[dict[str, Any]] = {}

    preset: Literal["paper", "cpu"] = Field(
        "paper",
        description="Defaults of the other flags: for a GPU, or what a CPU can do in minutes.",
        json_schema_extra=USUAL,
    )
    iterations: int = Field(1000, ge=1, le=999_999, description="Steps of the generator.")
    patch: int = Field(
        256,
        ge=32,
        description="Side of a patch in SR pixels, where the image is as large. By default 256, or 96 with preset cpu.",
    )
    batch: int = Field(12, ge=1, description="Patches of a step. By default 12; with preset cpu 8, for a twin 3.")
    accumulate: int = Field(1, ge=1, description="Compute the patches of a step in this many parts, to save memory.")
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate of Adam, also for a discriminator.")
    ema: float = Field(0.999, ge=0, lt=1, description="Decay of the running mean of the weights.")
    amp: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number format of training; auto is bfloat16 on a GPU and float32 on a CPU. A run that goes on "
        "keeps to the one it began in.",
    )
    checkpoint_every: int = Field(
        250, ge=1, description="Save a model every so many steps; the best saved one is chosen."
    )
    patience: int = Field(
        4, ge=1, description="Stop when the mean loss has not fallen by 1 % over this many checkpoints."
    )
    seed: int = Field(0, ge=0, description="Seed of the patches, and of networks that start from nothing.")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return cls.cpu_preset | values if isinstance(values, dict) and values.get("preset") == "cpu" else values

    @field_validator("accumulate")
    @classmethod
    def _divides(cls, accumulate: int, info: ValidationInfo) -> int:
        batch = info.data.get("batch", accumulate)  # absent where the batch is invalid
        if batch % accumulate:
            raise ValueError(f"a batch of {batch} cannot be computed in so many equal parts")
        return accumulate


class Training(Optimising):
    """Settings of a finetune on pseudo-GT. The defaults are those of the authors, except the batch."""

    heading: ClassVar[Heading | None] = "Losses"
    cpu_preset: ClassVar[dict[str, Any]] = {
        "patch": 96, "batch": 8, "discriminator_features": 16, "perceptual": "off", "warmup": None,
    }  # fmt: skip

    group_by: str = Field(
        "duplicates",
        description="Images that stay together in the training or in the held-out pool: duplicates, folder, or a "
        "regular expression on names.",
        json_schema_extra=_TRAINING,
    )
    images: int = Field(
        50,
        ge=1,
        description="The most severe images of the training pool to train on.",
        json_schema_extra=_TRAINING,
    )
    mask_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the patches that overlap an artifact mask.",
        json_schema_extra=_TRAINING,
    )
    pixel: Literal["l1", "l2"] = Field("l1", description="Pixel loss: absolute or squared differences.")
    pixel_weight: float = Field(1.0, ge=0, description="Weight of the pixel loss.")
    mask_weight: float = Field(1.0, gt=0, description="Weight of masked pixels in the pixel loss; others have 1.")
    keep_weight: float = Field(
        0.0, ge=0, description="Weight of the L1 distance to the old model's result outside the masks."
    )
    perceptual: Annotated[str, path_unless("vgg19", "off")] = Field(
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

    @property
    def warmup_steps(self) -> int:
        """Steps of the discriminator alone, before those of the generator."""
        if not self.gan_weight or self.discriminator is not None:
            return 0
        return min(_WARMUP, int(_WARMUP_SHARE * self.iterations)) if self.warmup is None else self.warmup


class Twinning(Optimising):
    """Settings of desra twin, which trains the MSE twin of a GAN model on degraded photos."""

    verb: ClassVar[str] = "twin"
    heading: ClassVar[Heading | None] = None
    cpu_preset: ClassVar[dict[str, Any]] = {"iterations": 250, "patch": 96, "batch": 3, "ema": 0.98,
                                            "checkpoint_every": 50}  # fmt: skip

    urls: ClassVar[frozenset[str]] = frozenset({"photos", "lr"})

    photos: Path = Field(description="Folder of sharp photos of the kind that the GAN model enlarges to.")
    gan_model: Path = Field(description="Checkpoint of the GAN-trained model.")
    output: Path = Field(
        description="Checkpoint of the twin to write, a .pth; a JSON file and the run's folder go beside."
    )
    lr: Path | None = Field(
        None, description="Folder of the low-resolution versions of PHOTOS, of the same names; by default made of them."
    )
    degradation: Literal["real", "mild", "bicubic"] = Field(
        "real", description="How to make them: as real photos are, mild, or bicubic shrinking as by MATLAB."
    )
    self: bool = Field(
        False, description="Train on PHOTOS to mine, low-resolution ones: shrink them, and take the sharper half."
    )
    exclude: tuple[str, ...] = Field((), description="Glob of photos to leave out, as for desra mine.")
    include: tuple[str, ...] = Field((), description="Glob of photos to take, as for desra mine; others are left out.")
    loss: Literal["l1", "l2"] = Field("l1", description="Absolute or squared differences.", json_schema_extra=_TRAINING)
    iterations: int = Field(
        5000, ge=1, le=999_999, description="Steps of the training. By default 5000, or 250 with preset cpu."
    )
    learning_rate: float = Field(2e-4, gt=0, description="Learning rate of Adam at first; it falls as a cosine to 0.")

    @property
    def training(self) -> Training:
        """The settings of the loop: those of a finetune by the pixel loss alone."""
        shared = {name: getattr(self, name) for name in Training.model_fields if hasattr(self, name)}
        return Training(**shared, pixel=self.loss, gan_weight=0.0, perceptual="off", warmup=0)

    @field_validator("self")
    @classmethod
    def _without_lr(cls, chosen: bool, info: ValidationInfo) -> bool:
        if chosen and info.data.get("lr"):
            raise ValueError("--lr is given, too")
        return chosen

    @field_validator("output")
    @classmethod
    def _is_file(cls, output: Path) -> Path:
        if output.suffix != ".pth":
            raise ValueError("has another suffix than .pth")
        return output


class Finetuning(Training):
    """Settings of desra finetune, which trains a GAN model on the artifacts of a workspace."""

    verb: ClassVar[str] = "finetune"
    heading: ClassVar[Heading | None] = None
    urls: ClassVar[frozenset[str]] = frozenset({"lr"})

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
    heading: ClassVar[Heading | None] = None
    urls: ClassVar[frozenset[str]] = frozenset({"lr"})

    workspace: Path = Field(description="Workspace whose held-out images judge.")
    after: Path = Field(description="A finetuned checkpoint, or the folder of a finetune for all that it saved.")
    before: Path | None = Field(
        None, description="Checkpoint of the old model; by default what the latest desra mine used."
    )
    mse_model: Annotated[str | None, path_unless(BICUBIC)] = Field(
        None, description="Checkpoint of the MSE-trained model, or bicubic; by default what the latest desra mine used."
    )
    lr: Path | None = Field(None, description=_PHOTOS)
    group_by: str = Field(
        "duplicates", description="Images that stay together, as for the finetune.", json_schema_extra=_GATE
    )
    lpips: Path | None = Field(None, description=_LPIPS, json_schema_extra=_GATE)
    promote: bool = Field(False, description="Make the best one the workspace's current model, if it passes.")


class Cycling(Mining, Training, Gate):
    """Settings of desra cycle, which mines photos, finetunes the GAN model and judges the result."""

    verb: ClassVar[str] = "cycle"
    heading: ClassVar[Heading | None] = None

    twin_photos: Path | None = Field(
        None, description="Folder of sharp photos, to train the workspace's twin on first, where there is no MSE model."
    )
    self: bool = Field(False, description="Train the workspace's twin on PHOTOS themselves, as desra twin --self.")

    @field_validator("self")
    @classmethod
    def _without_sharp_photos(cls, chosen: bool, info: ValidationInfo) -> bool:
        if chosen and info.data.get("twin_photos"):
            raise ValueError("--twin-photos is given, too")
        return chosen

    lpips: Path | None = Field(None, description=_LPIPS, json_schema_extra=_GATE)
    keep_mse: bool = Field(
        True,
        description="Keep the MSE model's result of every image: a promoted GAN model then needs only its own.",
        json_schema_extra=STORAGE,
    )
    promote: bool = Field(True, description="Make the best model the workspace's current one, if it passes.")


class Delivering(Frozen):
    """Settings of desra deliver, which writes the best result of every photo."""

    verb: ClassVar[str] = "deliver"
    heading: ClassVar[Heading | None] = None
    urls: ClassVar[frozenset[str]] = frozenset({"photos", "output"})

    photos: Path | None = Field(
        None,
        description="Folder of photos; or one photo, or a glob in quotes. By default those of the workspace's latest "
        "run.",
    )
    output: Path = Field(
        description="Folder to write the pictures to, under the relative paths of the photos; or NAME.tar, for tar "
        "files NAME-000000.tar and so on."
    )
    workspace: Path = Field(
        default_factory=lambda given: _folder_of(given.get("output", Path())) / ".desra",
        validate_default=True,
        description="Workspace of desra mine, detect or cycle, or a new one. By default .desra in the output folder.",
    )
    gan_model: Path | None = Field(
        None,
        description="Checkpoint of the GAN-trained model; by default the workspace's current model, or what the latest "
        "desra mine used.",
    )
    mse_model: Annotated[str | None, path_unless(BICUBIC)] = Field(
        None,
        description="The reference, as of desra mine; by default what the latest desra mine used, the workspace's "
        "twin, or else bicubic.",
    )
    precision: Precision | None = Field(
        None, description="Number format of inference, as of desra mine; by default that of the latest run, or float32."
    )
    repair: Literal["mse", "off"] = Field(
        "mse", description="Put the MSE model's result in the place of artifacts, or leave them (off)."
    )
    strength: float = Field(1.0, ge=0, le=1, description="How much of an artifact to replace.")
    feather: int = Field(
        16, ge=1, le=1024, description="Pixels over which a repair fades out, and more where it would show."
    )
    trust_map: bool = Field(
        False,
        description="Also write a map of each picture to OUTPUT/trust_maps: red where it was repaired, green where it "
        "is doubtful. Needs both results of every photo.",
    )
    format: Literal["png", "jpeg", "webp", "tiff", "avif"] = Field("png", description="Format of the pictures.")
    quality: int = Field(95, ge=1, le=100, description="Quality of JPEG, WebP and AVIF.")
    suffix: str = Field("", pattern=r"^[^/]*$", description="Text after the name of each picture, such as _x4.")
    colour: Literal["source", "srgb"] = Field(
        "source", description="Colour profile of the pictures: that of the photo, or sRGB."
    )

    @field_validator("output", mode="after")
    @classmethod
    def _writable(cls, output: Path) -> Path:
        if isinstance(output, Remote) and output.scheme in ("http", "https"):
            raise ValueError("is of a web server, which takes no files: name a folder, or a URL of s3, gs or az")
        return output


class Inspecting(Frozen):
    """Settings of desra inspect, which counts the photos of a place before a run."""

    verb: ClassVar[str] = "inspect"
    heading: ClassVar[Heading | None] = None
    urls: ClassVar[frozenset[str]] = frozenset({"photos"})

    photos: Path = Field(description="Folder of photos; or one photo, a glob in quotes, a URL, or tar files of photos.")
    include: tuple[str, ...] = Field((), description="Glob of photos to take, as for desra mine; others are left out.")
    exclude: tuple[str, ...] = Field((), description="Glob of photos to leave out, as for desra mine.")
    gan_model: Path | None = Field(
        None, description="Checkpoint of the GAN-trained model, to measure what a mine with it takes."
    )
    mse_model: Annotated[str | None, path_unless(BICUBIC)] = Field(
        None, description="The reference, as of desra mine: a checkpoint, or bicubic. With --gan-model only."
    )
    precision: Precision = Field("float32", description="Number format of inference, as of desra mine.")


def _folder_of(output: Path) -> Path:
    """Return an output folder, or the folder of tar files."""
    return output.parent if is_tar(output) else output


class Verifying(Frozen):
    """Settings of desra verify, which checks the files of a workspace."""

    verb: ClassVar[str] = "verify"
    heading: ClassVar[Heading | None] = None

    workspace: Path = Field(description="The workspace whose files to check.")
    repair: bool = Field(False, description="Delete damaged files, so that the next run makes them again.")


class Calibrating(Frozen):
    """Settings of desra calibrate, which derives class weights from artifact-free pairs."""

    verb: ClassVar[str] = "calibrate"
    heading: ClassVar[Heading | None] = "Weights"

    urls: ClassVar[frozenset[str]] = frozenset({"mse_sr", "gan_sr"})

    workspace: Path = Field(description="Workspace of desra detect or mine, or a new folder.")
    output: Path = Field(description="Weights file to write, .toml or .csv; a page and a picture go beside it.")
    mse_sr: Path | None = Field(
        None,
        description="Folder of the MSE-trained model's results; by default as the workspace's latest run.",
        json_schema_extra=USUAL,
    )
    gan_sr: Path | None = Field(
        None,
        description="Folder of the GAN-trained model's results; by default as the workspace's latest run.",
        json_schema_extra=USUAL,
    )
    segmenter: str = Field(
        "none",
        pattern=r"^(none|mmseg:.+,.+|labels:.+)$",
        description="Where class labels come from: mmseg:CONFIG,CHECKPOINT or labels:DIR; with none, from where the "
        "workspace's latest run had them.",
        json_schema_extra=USUAL,
    )
    exclude: Path | None = Field(
        None,
        description="Folder of masks by image name whose pixels are not counted; those of human masks in the "
        "workspace are not counted either.",
        json_schema_extra=USUAL,
    )
    rule: Rule = Field("published", description="In 20 bins, as published, or exact to a ten-thousandth (quantile).")
    percentile: float = Field(
        PERCENTILE, gt=0, lt=100, description="Share of a class's pixels that its weight lifts to 1, in percent."
    )
    false_alarm_rate: float = Field(
        RATE,
        gt=0,
        lt=1,
        description="Share of the counted pixels that the suggested threshold may call suspect.",
        json_schema_extra=USUAL,
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


class Measuring(Frozen):
    """Settings of desra benchmark, whatever the ground truth is."""

    verb: ClassVar[str] = "benchmark"

    output: Path = Field(description="Folder for masks, tables and the page; the same one again goes on.")
    methods: str = Field(
        ",".join(METHODS), description=f"Detectors, by commas: {', '.join(METHODS)}, and files of your own."
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
        json_schema_extra=_DETECTION,
    )
    weights: Annotated[str | None, path_unless("published", "none")] = Field(
        None,
        description="Class weights of desra: published, none, or a file. By default published when there are labels.",
        json_schema_extra=_DETECTION,
    )

    @field_validator("methods")
    @classmethod
    def _files(cls, methods: str) -> str:
        names = [name.strip() for name in methods.split(",") if name.strip()]
        if not names:
            raise ValueError("names no method")
        return ",".join(str(whole_path(name)) if name.endswith(SUFFIXES) else name for name in names)

    @field_validator("segmenter")
    @classmethod
    def _models(cls, segmenter: str) -> str:
        kind, colon, paths = segmenter.partition(":")
        return kind + colon + ",".join(str(whole_path(path.strip())) for path in paths.split(",") if path.strip())


class Benchmarking(Measuring):
    """Settings of desra benchmark DATASET, which measures detectors by human masks."""

    dataset: Path = Field(
        description="Folder with MSE-SR, GAN-SR and GT-Mask in it, a folder of such folders, a COCO file, or a CSV "
        "file of masks with the share of viewers who noticed each."
    )
    image_column: str = Field("image", description="Column of a CSV file with the images.", json_schema_extra=_SCORES)
    mask_column: str = Field(
        "mask", description="Column of a CSV file with the files of the masks.", json_schema_extra=_SCORES
    )
    prominence_column: str = Field(
        "prominence",
        description="Column of a CSV file with the share of viewers who noticed what a mask marks.",
        json_schema_extra=_SCORES,
    )
    severity: Path | None = Field(
        None,
        description="CSV with the share of viewers who noticed each ground-truth region: image,region,noticed.",
        json_schema_extra=_SCORES,
    )
    prominent: float = Field(
        0.5,
        ge=0,
        le=1,
        description="A region noticed by at least this share of viewers is prominent.",
        json_schema_extra=_SCORES,
    )
    kappa: float = Field(
        0.5,
        ge=0.01,
        le=1,
        description="A region counts in found_at_kappa where at least this share of it lies in the mask.",
        json_schema_extra=_SCORES,
    )
    dilate: int = Field(
        0,
        ge=0,
        le=1000,
        description="Widen the mask by so many pixels before it counts for found_at_kappa.",
        json_schema_extra=_SCORES,
    )
    reference: tuple[str, ...] = Field(
        (),
        description="NAME=FOLDER of other results to compare the GAN results with, beside the data set's MSE results.",
        json_schema_extra=_SCORES,
    )

    @field_validator("reference")
    @classmethod
    def _named_folders(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        parts = [reference.partition("=")[::2] for reference in given]
        names = [name for name, _ in parts]
        for name, folder in parts:
            if not folder or not re.fullmatch(r"[\w.-]+", name):
                raise ValueError("is no NAME=FOLDER, where the name has letters, digits, dots, dashes and underscores")
            if names.count(name) > 1 or name == "MSE-SR":
                raise ValueError(f"gives the name {name} twice, or to other results than the data set's MSE results")
        return tuple(f"{name}={whole_path(folder)}" for name, folder in parts)

    @property
    def references(self) -> dict[str, Path]:
        """The folders of the references by name."""
        parts = (reference.partition("=") for reference in self.reference)
        return {name: Path(folder) for name, _, folder in parts}


class SyntheticBenchmarking(Measuring):
    """Settings of desra benchmark synthetic, which measures detectors by artifacts that it injects into clean pairs."""

    mse_sr: Path = Field(description="Folder of the MSE-trained model's results.")
    gan_sr: Path = Field(description="Folder of the GAN-trained model's results.")
    min_area: str = Field("4000", pattern=r"^\d+$", description="Regions up to this size in pixels are dropped.")
    lr: Path | None = Field(None, description="Folder of the low-resolution inputs, for methods that need them.")
    labels: Path | None = Field(None, description="Folder of class-index PNGs by image name.")
    exclude: Path | None = Field(
        None, description="Folder of human masks; the artifacts that they mark are no false alarms."
    )
    seed: int = Field(0, ge=0, description="Seed of the artifacts that are injected.")


class Period(NamedTuple):
    """The times at which a flow runs: a cron expression or a period; neither where it never runs by itself."""

    cron: str | None = None
    every: timedelta | None = None


class FinetuneTrigger(Frozen):
    """The number of new images with artifacts at which a mining run starts a finetune."""

    artifacts: int = Field(
        ge=1,
        description="Start a finetune when this many images with artifacts have joined the training pool since the "
        "last finetune.",
    )
    group_by: str = Field("duplicates", description="Images that stay together, as for the finetune.")


class Serving(Cycling):
    """Settings of desra serve, which mines a growing folder of photos and finetunes the model at set times."""

    verb: ClassVar[str] = "serve"
    heading: ClassVar[Heading | None] = "Schedule"

    photos: Path = Field(description="Folder that new photos come to.")
    name: str | None = Field(
        None,
        pattern=r"^[\w.-]+$",
        description="Name of the deployments and of their work pool; by default that of the workspace folder.",
        json_schema_extra=_SERVER,
    )
    mine_at: str = Field(
        "daily at 2:00",
        description="When new photos are mined: daily at 2:00, weekdays at 6:30, sundays at 4:00, every 15 minutes, a "
        "cron expression, or never.",
    )
    cycle_at: str = Field("sundays at 4:00", description="When a whole cycle runs, given in the same way.")
    finetune_after: int = Field(
        200,
        ge=0,
        description="Finetune when this many images with artifacts have joined the training pool since the last "
        "finetune; 0 for never.",
    )
    timezone: str | None = Field(
        None, description="Time zone of the clock times, like Europe/Berlin; by default that of this machine."
    )
    webhook: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="Address that gets a JSON message, with a text field as Slack and Mattermost read it, of each run "
        "that failed; by default $DESRA_WEBHOOK.",
        json_schema_extra=_SERVER,
    )
    history: str = Field(
        "90 days",
        description="How long runs stay in the UI, with their logs, artifacts and cached results.",
        json_schema_extra=_SERVER,
    )
    port: int = Field(
        4200,
        ge=0,
        le=65533,
        description="Port of the Prefect server on this machine; the report and Dask's dashboard are at the next two. "
        "0 for any free ports.",
        json_schema_extra=_SERVER,
    )

    @field_validator("mine_at", "cycle_at")
    @classmethod
    def _known_period(cls, text: str) -> str:
        parse_period(text)
        return text

    @field_validator("timezone")
    @classmethod
    def _known_timezone(cls, timezone: str | None) -> str | None:
        try:
            ZoneInfo(timezone or "UTC")
        except (LookupError, OSError, ValueError):
            raise ValueError("no such time zone") from None
        return timezone

    @field_validator("history")
    @classmethod
    def _long_enough(cls, history: str) -> str:
        if parse_span(history) < _SHORTEST_HISTORY:
            raise ValueError("is less than a day")
        return history

    @property
    def title(self) -> str:
        """Name of the deployments and of their work pool."""
        return self.name or re.sub(r"[^\w.-]+", "-", self.workspace.name)

    @property
    def clock(self) -> str:
        """The time zone of the schedules."""
        return self.timezone or local_timezone()


def workspace_of(parameters: Mapping[str, Any]) -> str | None:
    """Find the workspace in the parameters of a flow, as a server stores them; None where there is no workspace."""
    given = (each for each in parameters.values() if isinstance(each, dict) and "workspace" in each)
    return next((str(settings["workspace"]) for settings in given), None)


def parse_span(text: str) -> timedelta:
    """Parse a length of time like ``90 days``; other texts raise ValueError."""
    found = _SPAN.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError("no length of time like 90 days or 12 hours")
    seconds = int(found[1] or 1) * _UNITS[found[2]]
    if seconds > _LONGEST_SPAN.total_seconds():
        raise ValueError("no length of time below a hundred years")
    return timedelta(seconds=seconds)


def parse_period(text: str) -> Period:
    """Parse times in words or as a cron expression; other texts raise ValueError.

    Examples:
        >>> parse_period("daily at 2:00")
        Period(cron='0 2 * * *', every=None)
        >>> parse_period("every 15 minutes").every.seconds
        900
    """
    words = " ".join(text.lower().split())
    if words == "never":
        return Period()
    if found := _CLOCK.fullmatch(words):
        hour, minute = int(found[2]), int(found[3])
        if hour > 23 or minute > 59:
            raise ValueError("no time of day")
        days = {"daily": "*", "weekdays": "1-5"}.get(found[1]) or str(_DAYS.index(found[1].removesuffix("s")))
        return Period(cron=f"{minute} {hour} * * {days}")
    if words.startswith("every "):
        every = parse_span(words.removeprefix("every "))
        if every < _SHORTEST_PERIOD:
            raise ValueError("is more often than every 10 seconds")
        return Period(every=every)
    with contextlib.suppress(CronSimError):
        CronSim(words, datetime.now(UTC))
        # CronSim takes seconds, last days (L) and weekdays near a day (W) as well, and Prefect does not.
        if len(words.split()) == 5 and not re.search(r"(?i)\b\d*lw?\b|\d+w\b|#", words):
            return Period(cron=words)
    raise ValueError("no time like daily at 2:00 or every 15 minutes, and no cron expression of five fields")


def local_timezone() -> str:
    """Find the name of this machine's time zone; UTC where it has none.

    Raises:
        UsageError: The name of the zone cannot be found, as in a container that has only a copy of the zone's file.
    """
    name = None
    with contextlib.suppress(LookupError, OSError, ValueError):
        name = get_localzone_name()
    if name is None and not os.path.exists("/etc/localtime"):
        name = "UTC"
    if name:
        now = datetime.now(UTC)
        moments = (now, now + timedelta(days=182))  # winter and summer
        if all(moment.astimezone().utcoffset() == moment.astimezone(ZoneInfo(name)).utcoffset() for moment in moments):
            return name
    raise UsageError("--timezone", "is not given, and that of this machine has no name", "give one like Europe/Berlin")


# The settings of each command that has a model of its own.
SETTINGS: dict[str, type[Frozen]] = {
    **{kind.verb: kind for kind in (Mining, Detection, Twinning, Finetuning, Comparing, Cycling, Serving)},
    **{kind.verb: kind for kind in (Calibrating, Delivering, Inspecting, Verifying)},
    "benchmark": Benchmarking,
    "benchmark synthetic": SyntheticBenchmarking,
}
