"""Ways to find artifacts in a pair of results, behind one protocol: DeSRA and what it is compared with.

A module of this package holds one `Detector` under the name ``detector``; so does a file of a user's own, which
``--method FILE.py`` runs. A new one is such a module and its line in `METHODS`. `load_detector` and `detector_key` find
one by its name, `score_pair` calls it, and `desra_core.detection.detectors.applied` says how runs use it.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from desra_core.errors import ImageError, UsageError
from desra_core.files.hashing import content_key
from desra_core.images.codec import Labels, Pixels

Scores = npt.NDArray[np.floating[Any]]

# The detectors of this package, and the version of each: raise it when a bit of its scores changes. The first is the
# one that runs use unless the user names another.
METHODS = {"desra": 1, "ldl": 1, "ssim": 1, "niqe": 1}
DEFAULT = next(iter(METHODS))
_REMEDY = f"name one of {', '.join(METHODS)}, or a .py file that sets detector, as the README shows"
# Of a detector's ``inputs``: what to call them, and how to give them.
NEEDED_INPUTS = {"lr": ("LR photos", "give --lr"), "labels": ("class labels", "add --labels or --segmenter")}


class DetectorInputs(NamedTuple):
    """A pair and what else detectors may ask for; shapes and dtypes as for `Detector`."""

    mse_sr: Pixels
    gan_sr: Pixels
    lr: Pixels | None = None
    labels: Labels | None = None


@runtime_checkable
class Detector(Protocol):
    """Scores the pixels of a GAN result by how much they look like an artifact; more is worse.

    Attributes:
        threshold: A pixel is suspect where its score is above this, unless the user says otherwise.
        smallest: Images with a shorter side are refused, in pixels.
        inputs: Which of ``lr`` and ``labels`` it cannot do without; it is not given the others.
    """

    threshold: float
    smallest: int
    inputs: tuple[str, ...]

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
    """Load the detector of a name in `METHODS`, or of a file.

    Raises:
        UsageError: There is none of this name, or the file fails or holds none.
    """
    if method in METHODS:
        return cast(Detector, import_module(f"{__name__}.{method}").detector)
    return _load_file(Path(method), content_key(_checked_path(method)))


def detector_key(method: str) -> str:
    """Identify the scores of a detector: its name and version, or the content of its file.

    Raises:
        UsageError: As `load_detector`, but for what running the file would show.
    """
    return f"{method} {METHODS[method]}" if method in METHODS else content_key(_checked_path(method))


def score_pair(detector: Detector, name: str, image: object, inputs: DetectorInputs) -> Scores:
    """Give a detector the inputs that it asks for, and check that it returns a score map.

    Args:
        detector, name: A detector, which may be a user's own, and what it is called.
        image: The file to name in errors.
        inputs: The pair and what else there is.

    Raises:
        ImageError: The image is too small, an input is lacking, or the detector raises or returns anything but a score
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
    lr = inputs.lr if "lr" in detector.inputs else None
    labels = inputs.labels if "labels" in detector.inputs else None
    try:
        scores = np.asarray(detector(inputs.mse_sr, inputs.gan_sr, lr, labels))
    except Exception as error:  # noqa: BLE001 a user's file may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImageError(image, f"makes {name} fail ({reason})", "mend the method, or take another") from None
    frame = height - scores.shape[0] if scores.ndim == 2 and scores.dtype.kind in "fiub" else -1
    if frame < 0 or frame % 2 or scores.shape[1] != width - frame or not np.isfinite(scores).all():
        returned = f"{scores.dtype} of the shape {scores.shape}"
        reason = f"makes {name} return {returned} instead of finite scores of the shape (H - 2 f, W - 2 f)"
        raise ImageError(image, reason, "mend the method, or take another")
    return scores


def _checked_path(method: str) -> Path:
    path = Path(method)
    if path.suffix != ".py":
        raise UsageError(method, "is no method", _REMEDY)
    return path


@lru_cache(maxsize=8)
def _load_file(path: Path, key: str) -> Detector:
    """Run a file, once per process and content."""
    name = f"desra_detector_{key}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 a user's file may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(path, f"fails ({reason})", "mend it") from None
    detector = getattr(module, "detector", None)
    if not isinstance(detector, Detector) or isinstance(detector, type):
        raise UsageError(path, "holds no detector", _REMEDY)
    return detector
