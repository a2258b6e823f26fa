"""Detectors of artifacts in a pair of results: DeSRA, and the detectors to compare it with, behind one protocol.

Each module that `METHODS` names sets ``detector`` to a `Detector`, as does a user's file for ``--method FILE.py``. To
add a detector, add such a module and its entry. `description` and `trained` read detectors from other files.
`load_detector` and `detector_key` find a detector by its name, `score_pair` calls it, and `applied` gives the
`AppliedDetector` by which runs use it.

Scores are larger where a pixel is worse. A workspace stores minus the score of any detector, as DeSRA's similarity is:
in the arrays called similarity, in the mean similarity of regions and in recorded thresholds. Negation is exact.
"""

import importlib.util
import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from desra_core.errors import ImageError, UsageError, described, printable
from desra_core.files import content_key, fingerprint
from desra_core.images.codec import Labels, Pixels

Scores = npt.NDArray[np.floating[Any]]

# The detectors of this package and their versions. Raise a version when a bit of the detector's scores changes. Runs
# use the first detector unless the user names another.
METHODS = {"desra": 1, "ldl": 1, "ssim": 1, "niqe": 1, "colour": 1, "flip": 1}
DEFAULT = next(iter(METHODS))
_DESCRIBED = 1  # the same version for detectors that TOML files describe
# Suffixes of files that are detectors: code that sets `detector`, a description of one, and one that was trained.
SUFFIXES = (".py", ".toml", ".json")
_REMEDY = f"name one of {', '.join(METHODS)}, or a {', '.join(SUFFIXES)} file, as docs/how-to/detector.md shows"
# By each possible entry of a detector's ``inputs``: the name in messages, and the flags that provide this input.
NEEDED_INPUTS = {"lr": ("LR photos", "give --lr"), "labels": ("class labels", "add --labels or --segmenter")}
# Pictures show scores up to this many times the threshold.
TIMES = 2


class DetectorInputs(NamedTuple):
    """A pair and the other inputs of detectors; shapes and dtypes as for `Detector`."""

    mse_sr: Pixels
    gan_sr: Pixels
    lr: Pixels | None = None
    labels: Labels | None = None


@runtime_checkable
class Detector(Protocol):
    """Scores the pixels of a GAN result by how much they look like an artifact; more is worse."""

    threshold: float  # a pixel is suspect where its score is above this, unless the user gives another threshold
    smallest: int  # images with a shorter side are refused, in pixels
    inputs: tuple[str, ...]  # which of ``lr`` and ``labels`` the detector needs; it does not get the others

    def __call__(self, mse_sr: Pixels, gan_sr: Pixels, lr: Pixels | None, labels: Labels | None, /) -> Scores:
        """Score every pixel of a pair.

        Args:
            mse_sr, gan_sr: ``(H, W, C)`` RGB (or gray, C = 1), uint8 or uint16.
            lr: ``(h, w, C)``, the photo, where there is one.
            labels: ``(H, W)`` uint8 ADE20K class, where there are any.

        Returns:
            ``(H - 2 f, W - 2 f)`` finite floats; in the frame of width f >= 0 nothing is found.
        """


def load_detector(method: str) -> Detector:
    """Load a detector by its name in `METHODS`, or from a file.

    Raises:
        UsageError: There is no detector of this name, or the file fails or sets no detector.
    """
    if method in METHODS:
        return cast(Detector, import_module(f"{__name__}.{method}").detector)
    path, key = Path(method), detector_key(method)
    if path.suffix == ".py":
        return _load_file(path, key)
    if path.suffix == ".toml":
        from desra_core.detection.detectors.description import load_described

        return cast(Detector, load_described(path))
    from desra_core.detection.detectors.trained import load_trained

    return cast(Detector, load_trained(path))


def detector_key(method: str) -> str:
    """Return the cache key of a detector's scores: name and version, or the hash of its files, which are not run.

    Raises:
        UsageError: There is no detector of this name, or the file cannot be read.
    """
    if method in METHODS:
        return f"{method} {METHODS[method]}"
    keys = [content_key(path) for path in detector_files(method)]
    return keys[0] if len(keys) == 1 else fingerprint(_DESCRIBED, *keys)


def detector_files(method: str) -> list[Path]:
    """List the files that a detector consists of (raises `UsageError`); none for those of this package."""
    if method in METHODS:
        return []
    path = Path(method)
    if path.suffix not in SUFFIXES:
        raise UsageError(method, "is no method", _REMEDY)
    if path.suffix != ".toml":
        return [path]
    from desra_core.detection.detectors.description import read_description

    return [path, read_description(path).file]


def score_pair(detector: Detector, name: str, image: object, inputs: DetectorInputs) -> Scores:
    """Call a detector with the inputs that it needs, and check that it returns a score map.

    Args:
        detector, name: The detector, of this package or a user's, and its name for messages.
        image: The file to name in errors.
        inputs: The pair and its other inputs.

    Raises:
        ImageError: The image is too small, an input is missing, or the detector raises or returns anything but a score
            map.
    """
    height, width = inputs.gan_sr.shape[:2]
    if min(height, width) < detector.smallest:
        reason = f"is {width}x{height}, smaller than the {detector.smallest} px that {name} needs"
        raise ImageError(image, reason, "remove it, or take another method")
    for key in detector.inputs:
        if getattr(inputs, key) is None:
            needed, remedy = NEEDED_INPUTS[key]
            raise ImageError(image, f"has no {needed}, which {name} needs", remedy)
    lr, labels = (getattr(inputs, key) if key in detector.inputs else None for key in NEEDED_INPUTS)
    try:
        scores = np.asarray(detector(inputs.mse_sr, inputs.gan_sr, lr, labels))
    except Exception as error:  # noqa: BLE001 a user's file may raise anything
        reason = f"makes {name} fail ({described(error)})"
        raise ImageError(image, reason, "mend the method, or take another") from None
    is_map = scores.ndim == 2 and scores.dtype.kind in "fiub"
    lost = height - scores.shape[0] if is_map else -1  # rows that have no score: twice the frame
    if lost < 0 or lost % 2 or scores.shape[1] != width - lost or not np.isfinite(scores).all():
        returned = f"{scores.dtype} of the shape {scores.shape}"
        reason = f"makes {name} return {returned} instead of finite scores of the shape (H - 2 f, W - 2 f)"
        raise ImageError(image, reason, "mend the method, or take another")
    return scores


@dataclass(frozen=True)
class AppliedDetector:
    """A detector as runs use it, with the threshold of the run. DeSRA overrides some of these members.

    A pixel has three numbers: its score; its value, which thresholds and tables show to people; and its heat value,
    which heat maps show. For DeSRA these are -D, D and 1 - D. For other detectors the three numbers are equal.
    """

    name: str  # one of `METHODS`, or the path of a user's file
    threshold: float  # the value at the border between suspect pixels and others
    # Whether class weights (Eq. 9) apply to its scores.
    weighs_classes: ClassVar[bool] = False
    usual_threshold: ClassVar[float | None] = None  # the default threshold; None for that of the `Detector`
    highest: ClassVar[float | None] = None  # the largest possible value, and the largest heat value
    # All scores lie below this limit. That of DeSRA is 0: a lost chunk of a stored map reads as 0, and so is noticed.
    limit: ClassVar[float] = math.inf
    # The name of a value in a sentence, and the side of the threshold on which artifacts lie.
    word: ClassVar[str] = "score"
    worse: ClassVar[str] = "above"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Which of ``lr`` and ``labels`` its scores depend on (raises as `load_detector`)."""
        return tuple(load_detector(self.name).inputs)

    @property
    def score_threshold(self) -> float:
        """The score above which a pixel is suspect (raises `UsageError` where the threshold is out of range)."""
        return self.threshold

    def weighted(self, _weights: npt.NDArray[np.float64] | None) -> Detector:
        """Load the detector, with class weights where they apply."""
        return load_detector(self.name)

    def scores_key(self, decoding: int, _window: int, labels_key: str | None) -> tuple[object, ...]:
        """Return the parts of a score map's cache key that do not depend on the pair."""
        return "score", decoding, detector_key(self.name), labels_key

    def score(self, image: object, inputs: DetectorInputs, _window: int, _tile: int, _threads: int) -> Scores:
        """Compute the float32 score map of a pair, before class weights (raises `ImageError`, which names the image).

        Window, tile and threads are those of `desra_core.detection.similarity.variance_similarity`.
        """
        return score_pair(load_detector(self.name), self.name, image, inputs).astype(np.float32)

    @property
    def title(self) -> str:
        """The name of the detector, shortened to 43 characters at most."""
        name = printable(PurePath(self.name).name)
        return name if len(name) <= 40 else f"{name[:20]} … {name[-20:]}"

    @property
    def heat_name(self) -> str:
        """The name of a heat value."""
        return f"{self.title} score"

    @property
    def value_name(self) -> str:
        """The name of a value."""
        return self.heat_name

    @property
    def top(self) -> float:
        """The largest value, and heat value, that heat maps show."""
        return self.highest or TIMES * self.threshold

    @property
    def heat_threshold(self) -> float:
        """The heat value above which a pixel is suspect."""
        return float(self.heat_value(self.score_threshold))

    def text(self, score: float) -> str:
        """Write the value of a score."""
        return f"{score:.3g}"

    def heat_value(self, scores: Any) -> Any:
        """Turn a score, or an array of scores, into heat values."""
        return scores

    def heat(self, scores: Scores) -> Scores:
        """Turn scores into 0..1 of a colour scale, from a heat value of 0 to `top`; NaN stays NaN."""
        return np.asarray(np.clip(self.heat_value(scores) / self.top, 0, 1))


def applied(name: str = DEFAULT, threshold: float | None = None) -> AppliedDetector:
    """Return a detector as runs use it.

    Args:
        name: One of `METHODS`, or the path of a user's file, which is not read where a threshold is given.
        threshold: A value, as people give it; by default the detector's own threshold.

    Raises:
        UsageError: No threshold is given, and the detector cannot be loaded.
    """
    module = import_module(f"{__name__}.{name}") if name in METHODS else None
    kind: type[AppliedDetector] = getattr(module, "applied_class", AppliedDetector)
    if threshold is None:
        threshold = kind.usual_threshold or load_detector(name).threshold
    return kind(name, threshold)


@lru_cache(maxsize=8)
def _load_file(path: Path, key: str) -> Detector:
    """Run a file and return its detector, once per process and content."""
    name = f"desra_detector_{key}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the module of a class
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 a user's file may raise anything
        raise UsageError(path, f"fails ({described(error)})", "mend the file") from None
    detector = getattr(module, "detector", None)
    if not isinstance(detector, Detector) or isinstance(detector, type):
        raise UsageError(path, "holds no detector", _REMEDY)
    return detector
