"""Resolve the settings of a run to cache keys, which are compared with the keys in the records."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from desra_core import __version__
from desra_core.detection.class_weights import Weights, load_weights
from desra_core.detection.detectors import DEFAULT, NEEDED_INPUTS, AppliedDetector
from desra_core.errors import UsageError
from desra_core.files.content import content_key, fingerprint
from desra_core.networks.checkpoints import load_pair
from desra_core.networks.segmentation import segmenter_key, try_segmenter
from desra_core.settings import CorpusSettings, Detection, Mining, detector_of
from desra_core.workspace import Workspace
from desra_core.workspace.products import Target

# Raise a version when the meaning or a bit of that product changes: everything that depends on it is made anew.
DECODING_VERSION = 2
SUPER_RESOLUTION_VERSION = 1
MASK_VERSION = 1

_KINDS: dict[str, type[CorpusSettings]] = {kind.verb: kind for kind in (Detection, Mining)}
# Packages on whose versions results depend.
_PACKAGES = ("torch", "spandrel", "mmsegmentation", "numpy", "opencv-python", "pillow", "tifffile", "imagecodecs")


def target_of(settings: CorpusSettings) -> tuple[Target, Weights]:
    """Resolve settings to keys and class weights.

    Raises:
        UsageError: Weights without labels, one model in both roles, a method that lacks its inputs, or an unreadable
            file of weights, config, checkpoint or detector.
    """
    detector = detector_of(settings)
    weights = load_weights(_origin_of_weights(settings, detector))
    mse_sr_key = gan_sr_key = None
    if isinstance(settings, Mining):
        mse_sr_key = result_key(settings.mse_model, settings.precision)
        gan_sr_key = result_key(settings.gan_model, settings.precision)
        if mse_sr_key == gan_sr_key:
            reason = f"is the same as {settings.mse_model}"
            raise UsageError(settings.gan_model, reason, "give the GAN-trained twin of it")
    # "none", "labels" where label files are read, or "mmseg:KEY". The key of computed labels covers the GAN results.
    segmentation_key = settings.segmenter.partition(":")[0]
    if segmentation_key == "mmseg":
        segmented = fingerprint(segmenter_key(settings.segmenter), gan_sr_key or DECODING_VERSION)
        segmentation_key = f"mmseg:{segmented}"
    # Results that are files need no key: the id of an image is the hash of their content.
    results = (mse_sr_key, gan_sr_key) if gan_sr_key else ()
    labels_first = "labels" in detector.inputs
    labels_key = segmentation_key if labels_first else None
    similarity_key = fingerprint(*detector.scores_key(DECODING_VERSION, settings.window, labels_key), *results)
    weighting_key = fingerprint("weighting", segmentation_key, weights.key)
    threshold = -detector.score_threshold
    target = Target(
        similarity_key=similarity_key,
        segmentation_key=segmentation_key,
        weighting_key=weighting_key,
        min_weight=float(weights.values.min()),
        threshold=threshold,
        min_area=settings.min_area,
        keep=settings.keep,
        keep_mse=isinstance(settings, Mining) and settings.keep_mse,
        mask_key=fingerprint("mask", MASK_VERSION, similarity_key, weighting_key, threshold, settings.min_area),
        mse_sr_key=mse_sr_key,
        gan_sr_key=gan_sr_key,
        method=detector.name,
        labels_first=labels_first,
    )
    return target, weights


def _origin_of_weights(settings: CorpusSettings, detector: AppliedDetector) -> str:
    """Choose ``published``, ``none`` or a file, after checking that weights and detector get all that they need."""
    given = {"lr": settings.sources.lr is not None, "labels": settings.segmenter != "none"}
    for name in detector.inputs:
        if not given[name]:
            needed, remedy = NEEDED_INPUTS[name]
            raise UsageError("--method", f"{detector.name} needs {needed}", remedy)
    if settings.weights in (None, "none"):
        return "published" if settings.weights is None and given["labels"] and detector.weighs_classes else "none"
    if not detector.weighs_classes:
        raise UsageError("--weights", f"{settings.weights} is for {DEFAULT}, not for {detector.name}", "drop --weights")
    if not given["labels"]:
        remedy = "add --labels or --segmenter, or drop --weights"
        raise UsageError("--weights", f"{settings.weights} needs class labels", remedy)
    return settings.weights


def result_key(model: Path, precision: str) -> str:
    """Return the cache key of the results of a checkpoint (raises `UsageError` where it cannot be read)."""
    return fingerprint("super_resolution", SUPER_RESOLUTION_VERSION, DECODING_VERSION, content_key(model), precision)


def save_settings(workspace: Workspace, settings: CorpusSettings, target: Target) -> None:
    """Write the settings and keys of a run, and the versions of packages that results depend on."""
    document = {
        "verb": settings.verb,
        "settings": settings.model_dump(mode="json"),
        "target": asdict(target),
        "versions": {"desra": __version__, "python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES},
    }
    workspace.publish(workspace.settings, json.dumps(document, indent=2).encode())


def check_kind(workspace: Workspace, settings: CorpusSettings) -> None:
    """Check that a workspace is new or of this kind of run (raises `UsageError`).

    A run of another kind would take all images of the workspace for replaced ones.
    """
    kind = settings_document(workspace).get("verb", settings.verb)
    if kind != settings.verb:
        reason = f"belongs to runs of desra {kind}"
        raise UsageError(workspace.root, reason, f"name another folder as workspace of desra {settings.verb}")


def check_models(workspace: Workspace, settings: CorpusSettings, target: Target) -> None:
    """Check that models can be loaded and run, unless the latest run used them.

    Raises:
        UsageError: A model cannot be loaded or run, or the scales of the MSE and the GAN model differ.
    """
    before = settings_document(workspace).get("target", {})
    keys = {"mse_sr_key": target.mse_sr_key, "gan_sr_key": target.gan_sr_key}
    if isinstance(settings, Mining) and not keys.items() <= before.items():
        load_pair(settings.mse_model, settings.gan_model, precision=settings.precision)
    if target.segments and before.get("segmentation_key") != target.segmentation_key:
        try_segmenter(settings.segmenter)


def load_settings(workspace: Workspace) -> tuple[CorpusSettings, Target]:
    """Read the settings and keys of the latest run.

    Raises:
        UsageError: The folder is no workspace, or no run has got that far.
    """
    document = settings_document(workspace)
    try:
        settings = _KINDS[document["verb"]].model_validate(document["settings"])
        return settings, Target(**document["target"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(workspace.root, "is no workspace with a run in it", "name one, or run desra mine") from None


def settings_document(workspace: Workspace) -> dict[str, Any]:
    """Read the document of `save_settings`: verb, settings, target, versions; empty where it cannot be read."""
    try:
        document = json.loads(workspace.settings.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) and isinstance(document.get("settings"), dict) else {}
