"""Settings of a run: frozen models behind flags, TOML files and flow parameters.

Gives the settings of a corpus; `settings.models` gives those of finetuning, benchmarks and serving.
"""

import os
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from desra_core.detection.detectors import DEFAULT, METHODS, AppliedDetector, applied
from desra_core.networks.checkpoints import BICUBIC, Engine, Precision
from desra_core.remote import Remote, check_url, place_of
from desra_core.workspace import Workspace
from desra_core.workspace.matching import Sources


def at_home(path: str | Path) -> Path:
    """Replace a leading ``~`` by the home folder: a shell does that on the command line, but not in TOML files."""
    return Path(os.path.expanduser(path))


def whole_path(path: str | Path) -> Path:
    """Make a path absolute, for workers that run in other folders; ``~`` is the home folder, and a URL stays a URL."""
    return place_of(at_home(path)).absolute()


def path_unless(*words: str | None) -> BeforeValidator:
    """Return a validator that makes a text an absolute path, unless the text is one of these words.

    A file of such a name is named as ``./word``.
    """

    def validated(value: object) -> object:
        return str(whole_path(value)) if isinstance(value, str | Path) and value not in words else value

    return BeforeValidator(validated)


def _not_above_all(min_area: str) -> str:
    if min_area.endswith("%") and Decimal(min_area[:-1]) > 100:
        raise ValueError("is more than the whole image")
    return min_area


MinArea = Annotated[
    str,
    StringConstraints(pattern=r"^\d+$|^\d+(\.\d+)?%$"),
    AfterValidator(_not_above_all),
    Field(description="Regions up to this size are dropped: pixels, or a share of the image like 0.1%."),
]


# Headings of fields in the help of a command, in their order there; fields without one come first.
Heading = Literal[
    "Schedule", "Detection", "Scores", "Networks", "Training", "Losses", "Gate", "Weights", "Storage", "Server",
    "Machine and log",
]  # fmt: skip
# For single fields, in place of their class's heading; None puts a field first.
USUAL: JsonDict = {"heading": None}
STORAGE: JsonDict = {"heading": "Storage"}


class Frozen(BaseModel):
    """Base of all settings: immutable, and without other fields than those declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _without_null(cls, value: object) -> object:
        # TOML and JSON can spell a null character, and no path may hold one.
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str | Path) and "\0" in str(text):
                raise ValueError("holds a null character")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _at_url(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, Path) or not isinstance(place := place_of(value), Remote):
            return value
        if info.field_name not in cls.urls:
            raise ValueError("is a URL; only pictures are read from URLs, all else is on a file system")
        check_url(place)
        return place

    # The fields that may be URLs.
    urls: ClassVar[frozenset[str]] = frozenset()
    # The heading of the fields that this class is the first to declare: see `heading_of`.
    heading: ClassVar[Heading | None] = None


class Machine(Frozen):
    """The workers, memory and devices of a run. Nothing here changes a result or enters a cache key."""

    heading: ClassVar[Heading | None] = "Machine and log"

    workers: int | None = Field(
        None,
        ge=1,
        description="Worker processes, one for a finetune; by default one per core, fewer for large images or GPUs.",
    )
    memory: str | None = Field(
        None,
        pattern=r"(?i)^\d+(\.\d+)? ?([KMGT]i?)?B?$",
        description="Memory of one worker (on a GPU, of each of its threads), like 4GB; by default 80 % of the "
        "machine, shared evenly.",
    )
    scheduler: str | None = Field(
        None, pattern=r"^\w+://.+", description="Address of a running Dask scheduler, like tcp://host:8786."
    )
    cluster: Path | None = Field(
        None, description="YAML file of a Dask cluster to start for the run, such as one of SLURM or of SSH hosts."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where networks run.")
    tile: int = Field(
        256, ge=32, description="Side of the similarity's tiles in pixels. Any value gives the same result."
    )
    log_level: Literal["warning", "info", "debug"] = Field(
        "warning", description="Log each shard (info) and each image (debug) on stderr, from every worker."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Form of the log on stderr: text for readers, or json, an object per line, for programs."
    )

    @field_validator("cluster")
    @classmethod
    def _without_scheduler(cls, cluster: Path | None, info: ValidationInfo) -> Path | None:
        if cluster and info.data.get("scheduler"):
            raise ValueError("--scheduler is given, too")
        return cluster

    @property
    def elsewhere(self) -> bool:
        """Whether the workers are those of a given scheduler or cluster."""
        return bool(self.scheduler or self.cluster)


class CorpusSettings(Frozen):
    """Settings of detection that desra mine and desra detect share."""

    verb: ClassVar[str]
    heading: ClassVar[Heading | None] = "Detection"

    urls: ClassVar[frozenset[str]] = frozenset({"photos", "mse_sr", "gan_sr", "lr", "twin_photos"})

    workspace: Path = Field(description="Folder that holds everything the runs of a corpus produce.")
    segmenter: str = Field(
        "none",
        pattern=r"^(none|mmseg:.+,.+|labels:.+)$",
        description="Where class labels come from: none, mmseg:CONFIG,CHECKPOINT or labels:DIR.",
    )
    weights: str | None = Field(
        None, description="Class weights: published, none, or a TOML or CSV file. By default published with labels."
    )
    threshold: float = Field(0.7, gt=0, le=1, description="Suspect where the adjusted similarity is below this.")
    min_area: MinArea = "4000"
    severity_model: Path | None = Field(
        None,
        description="File of desra calibrate severity: regions are ranked by the share of viewers who notice them.",
    )
    min_noticed: float = Field(
        0.0, ge=0, le=100, description="Drop regions that fewer viewers notice, in percent; needs --severity-model."
    )
    window: int = Field(11, ge=3, le=255, description="Side of the Gaussian window in pixels; odd.")
    keep: Literal["artifacts", "maps", "all"] = Field(
        "artifacts",
        description="Keep arrays of images with artifacts only (artifacts), similarity and labels of all images "
        "(maps), or everything of all images, SR results and dataset included (all).",
        json_schema_extra=STORAGE,
    )
    limit: int | None = Field(
        None, ge=1, description="Take only this many images, the first by name.", json_schema_extra=USUAL
    )
    exclude: tuple[str, ...] = Field(
        (),
        description="Glob of files and folders to leave out, by name (thumbs, '*_old.png') or, with a slash in it, by "
        "path below the folder (2019/raw/*). May be given several times.",
        json_schema_extra=USUAL,
    )
    include: tuple[str, ...] = Field(
        (),
        description="Glob of files and folders to take, in the same form; others are left out. May be given several "
        "times.",
        json_schema_extra=USUAL,
    )
    shard_size: int = Field(
        1000,
        ge=1,
        description="Images per shard, the unit that is scheduled; for new images.",
        json_schema_extra=STORAGE,
    )

    @field_validator("segmenter")
    @classmethod
    def _labels_at_url(cls, segmenter: str) -> str:
        check_url(place_of(segmenter.removeprefix("labels:")))
        return segmenter

    @field_validator("min_noticed")
    @classmethod
    def _by_model(cls, min_noticed: float, info: ValidationInfo) -> float:
        if min_noticed and info.data.get("severity_model") is None:
            raise ValueError("needs --severity-model, which tells how many viewers notice a region")
        return min_noticed

    @field_validator("window")
    @classmethod
    def _odd(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError("is even, but a window has a middle: give an odd number")
        return window

    @property
    def labels(self) -> Path | None:
        """The folder of label files, if labels come from one."""
        return place_of(self.segmenter.removeprefix("labels:")) if self.segmenter.startswith("labels:") else None

    @property
    def sources(self) -> Sources:
        """The folders to scan."""
        raise NotImplementedError


class Detection(CorpusSettings):
    """Settings of desra detect, which compares two folders of super-resolution results."""

    verb: ClassVar[str] = "detect"

    mse_sr: Path = Field(
        description="Folder of the MSE-trained model's results; or one file, a glob in quotes, a URL, or tar files."
    )
    gan_sr: Path = Field(
        description="Folder of the GAN-trained model's results; or one file, a glob in quotes, a URL, or tar files."
    )
    lr: Path | None = Field(
        None,
        description="Folder of the low-resolution inputs, for the pictures of the report.",
        json_schema_extra=USUAL,
    )
    method: str = Field(DEFAULT, description=f"Detector: {', '.join(METHODS)}, or a file of your own.")
    threshold: float = Field(
        0.7,
        gt=0,
        description=f"Suspect where the adjusted similarity is below this; for another --method than {DEFAULT}, where "
        "its score is above, by default the method's own threshold.",
    )

    @model_validator(mode="before")
    @classmethod
    def _own_threshold(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "threshold" in values:
            return values
        return values | {"threshold": applied(str(values.get("method", DEFAULT))).threshold}

    @property
    def sources(self) -> Sources:
        """The folders to scan."""
        return Sources(self.mse_sr, self.gan_sr, self.lr, self.labels, self.exclude, self.include)


class Mining(CorpusSettings):
    """Settings of desra mine, which compares the results of two models for a folder of photos."""

    verb: ClassVar[str] = "mine"
    heading: ClassVar[Heading | None] = "Networks"

    photos: Path = Field(
        description="Folder of low-resolution photos; or one photo, a glob in quotes, a URL, or tar files of photos."
    )
    gan_model: Path = Field(description="Checkpoint of the GAN-trained model.")
    mse_model: Annotated[str, path_unless(BICUBIC)] = Field(
        default_factory=lambda given: str(Workspace(given["workspace"]).twin),
        description="The reference: checkpoint of the MSE-trained model that the GAN model was finetuned from, of its "
        "twin, or of another network of the scale; or the word bicubic. By default the workspace's twin.",
        json_schema_extra=USUAL,
    )
    precision: Precision = Field(
        "float32", description="Number format of inference; bfloat16 is faster and changes results a little."
    )
    backend: Literal["torch", "openvino"] = Field(
        "torch",
        description="What runs networks on a CPU; openvino, an extra, may be faster with AMX and takes more memory.",
    )
    keep_mse: bool = Field(
        False,
        description="Keep the MSE model's result of every image: a new GAN model then needs only its own.",
        json_schema_extra=STORAGE,
    )

    @property
    def sources(self) -> Sources:
        """The folders to scan."""
        return Sources(lr=self.photos, labels=self.labels, exclude=self.exclude, include=self.include)

    @property
    def engine(self) -> Engine:
        """How networks compute: precision and backend in one word, which the cache keys of results hold."""
        return self.precision if self.backend == "torch" else f"openvino-{self.precision}"  # type: ignore[return-value]


def heading_of(kind: type[Frozen], name: str) -> Heading | None:
    """Return the heading of a field: its own, or that of the class that declares it first.

    None stands for the fields that everybody needs, required ones among them.
    """
    field = kind.model_fields[name]
    if field.is_required():
        return None
    if isinstance(field.json_schema_extra, dict) and "heading" in field.json_schema_extra:
        return cast("Heading | None", field.json_schema_extra["heading"])
    declared = [base for base in kind.__mro__ if name in vars(base).get("__annotations__", {})]
    return cast(type[Frozen], declared[-1]).heading


def given_values(settings: BaseModel) -> dict[str, Any]:
    """Return, in JSON form, the required values and those that are not the defaults; None is left out.

    A default may depend on another value, so each value is left out on trial.
    """
    values = settings.model_dump(mode="json", exclude_none=True)
    for name, field in type(settings).model_fields.items():
        without = {other: value for other, value in values.items() if other != name}
        if not field.is_required() and _is_made_of(settings, without):
            values = without
    return values


def _is_made_of(settings: BaseModel, values: dict[str, Any]) -> bool:
    try:
        return type(settings).model_validate(values) == settings
    except ValidationError:  # the default does not go with another value
        return False


def folder_of(settings: BaseModel) -> Path:
    """Return the folder that a command works in: its workspace, or its output where it has no workspace."""
    return Path(getattr(settings, "workspace", None) or getattr(settings, "output"))  # noqa: B009 - not of all settings


def detector_of(settings: CorpusSettings) -> AppliedDetector:
    """Return the detector of a run with its threshold."""
    return applied(settings.method if isinstance(settings, Detection) else DEFAULT, settings.threshold)


def min_area_pixels(min_area: str, height: int, width: int) -> int:
    """Compute the minimal area in pixels for an image of the given size; a percentage is rounded down."""
    if min_area.endswith("%"):
        return int(Decimal(min_area[:-1]) * height * width / 100)
    return int(min_area)
