"""What a run wants of every image: its settings, resolved to keys that can be compared with the records."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from desra_core.detection.segmenters import segmenter_key
from desra_core.detection.semantics import Weights, load_weights
from desra_core.errors import UsageError
from desra_core.settings import Detection
from desra_core.workspace import Workspace, fingerprint

# Raise a version when the meaning or a bit of that product changes: everything that depends on it is made anew.
SIMILARITY_VERSION = 1
MASK_VERSION = 1


@dataclass(frozen=True)
class Target:
    """What the outcome of an image must say for the image to count as done."""

    similarity_key: str
    segmentation_key: str
    weighting_key: str
    min_weight: float
    threshold: float
    min_area: str
    keep: str
    mask_key: str

    @property
    def segments(self) -> bool:
        """Whether labels are computed, rather than read or absent."""
        return self.segmentation_key.startswith("mmseg:")

    @property
    def reads_labels(self) -> bool:
        """Whether labels are read from files."""
        return self.segmentation_key == "labels"


def target_of(detection: Detection) -> tuple[Target, Weights]:
    """Resolve settings to keys and class weights.

    Raises
    ------
    UsageError
        Weights without labels, or unreadable weights, config or checkpoint.
    """
    labelled = detection.segmenter != "none"
    source = detection.weights or ("published" if labelled else "none")
    if source != "none" and not labelled:
        raise UsageError("--weights", f"{source} needs class labels", "add --labels or --segmenter, or drop --weights")
    weights = load_weights(source)
    kind = detection.segmenter.partition(":")[0]
    segmentation_key = segmenter_key(detection.segmenter) if kind == "mmseg" else kind
    similarity_key = fingerprint("similarity", SIMILARITY_VERSION, detection.window)
    weighting_key = fingerprint("weighting", segmentation_key, weights.key)
    mask_key = fingerprint("mask", MASK_VERSION, similarity_key, weighting_key, detection.threshold, detection.min_area)
    target = Target(
        similarity_key=similarity_key,
        segmentation_key=segmentation_key,
        weighting_key=weighting_key,
        min_weight=float(weights.values.min()),
        threshold=detection.threshold,
        min_area=detection.min_area,
        keep=detection.keep,
        mask_key=mask_key,
    )
    return target, weights


def save_settings(workspace: Workspace, detection: Detection, target: Target) -> None:
    """Record what the latest run wanted."""
    document = {"detection": detection.model_dump(mode="json"), "target": asdict(target)}
    workspace.publish(workspace.settings, json.dumps(document, indent=2).encode())


def load_settings(workspace: Workspace) -> tuple[Detection, Target]:
    """What the latest run wanted.

    Raises
    ------
    UsageError
        The folder is no workspace, or no run has got that far.
    """
    try:
        document: dict[str, Any] = json.loads(workspace.settings.read_bytes())
        return Detection.model_validate(document["detection"]), Target(**document["target"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(workspace.root, "is no workspace with a run in it", "name one, or run desra detect") from None
