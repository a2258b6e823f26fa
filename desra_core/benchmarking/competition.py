"""Who competes in a benchmark, and the files of each image that this depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from desra_core.benchmarking.data_sets import DataSet, Example
from desra_core.benchmarking.entries import Contender, contenders
from desra_core.detection.class_weights import Weights, load_weights
from desra_core.errors import ImageError, UsageError
from desra_core.evaluation.mask_files import is_lossy
from desra_core.files.hashing import digest, fingerprint, read_bytes
from desra_core.networks.segmentation import segmenter_key
from desra_core.settings.benchmark import Benchmarking
from desra_core.workspace.manifest import File, ImageRef

_MASKS = ("gt_mask", "desra_mask", "exclude")
_INPUTS = {"labels": ("class labels", "add --labels or --segmenter"), "lr": ("LR photos", "give --lr")}


def given_folders(settings: Benchmarking) -> dict[str, Path]:
    """The folders that flags name, by role (raises `UsageError` where they contradict each other)."""
    if settings.labels and settings.segmenter != "none":
        raise UsageError("--labels", "and --segmenter are both given", "leave one out")
    roles = ("mse_sr", "gan_sr", "lr", "labels", "exclude")
    return {role: folder for role in roles if (folder := getattr(settings, role)) is not None}


def compete(settings: Benchmarking, data_set: DataSet) -> tuple[list[Contender], Weights | None, str | None]:
    """The contenders, the class weights of DeSRA (None where each is 1), and the key of what computes class labels.

    Raises
    ------
    UsageError
        A method, the weights or the segmenter cannot be used, or lacks what it needs.
    """
    segmentation = segmenter_key(settings.segmenter) if settings.segmenter != "none" else None
    there = {role: any(role in example.files for example in data_set.examples) for role in ("labels", "lr")}
    there["labels"] |= segmentation is not None
    source = settings.weights or ("published" if there["labels"] else "none")
    if source != "none" and not there["labels"]:
        raise UsageError("--weights", f"{source} needs class labels", "add --labels or --segmenter, or drop --weights")
    weights = load_weights(source) if source != "none" else None
    competing = contenders(settings.methods.split(","), weights_key=weights.key if weights else None)
    for contender in competing:
        for role in contender.inputs:
            if not there[role]:
                what, remedy = _INPUTS[role]
                raise UsageError("--methods", f"{contender.name} needs {what}", remedy)
    return competing, weights, segmentation


class Hashed(NamedTuple):
    """The files of an image that anything depends on, and those of its masks that are lossy."""

    example: Example
    files: dict[str, File]
    lossy: list[Path]


def hash_files(
    examples: Sequence[Example], competing: Sequence[Contender], segmentation: str | None
) -> tuple[list[Hashed], list[ImageError]]:
    """Identify the content of all files, as far as they are used; and what cannot be read."""
    used = {"mse_sr", "gan_sr", *_MASKS}
    used |= {role for contender in competing for role in contender.inputs}
    if segmentation:
        used.discard("labels")

    def hashed(example: Example) -> Hashed | ImageError:
        files, lossy = {}, []
        try:
            for role, path in example.files.items():
                if role in used:
                    data = read_bytes(path)
                    files[role] = File(path, digest(data))
                    if role in _MASKS and is_lossy(data):
                        lossy.append(path)
        except ImageError as error:
            return error
        return Hashed(example, files, lossy)

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(hashed, examples))
    return [row for row in found if isinstance(row, Hashed)], [row for row in found if isinstance(row, ImageError)]


def input_hashes(contender: Contender, files: Mapping[str, File], segmentation: str | None) -> list[str] | None:
    """What the scores of a contender depend on beside the pair; None where the image lacks it."""
    hashes = {role: file.hash for role, file in files.items()} | ({"labels": segmentation} if segmentation else {})
    return [hashes[role] for role in contender.inputs] if all(role in hashes for role in contender.inputs) else None


def image_of(example: Example, files: Mapping[str, File]) -> ImageRef:
    """The pair as workers know it; equal pairs with other masks are other images."""
    return ImageRef(
        id=fingerprint(example.part, example.name),
        shard=0,
        names=(example.title,),
        mse_sr=files["mse_sr"],
        gan_sr=files["gan_sr"],
        lr=files.get("lr"),
        labels=files.get("labels"),
    )
