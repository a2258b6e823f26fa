"""Say which reference the masks of a run rest on, and how far to trust them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from desra_core.files import content_key, read_document, read_json
from desra_core.networks.checkpoints import BICUBIC
from desra_core.settings import CorpusSettings, Mining

_LOOK = "look at the worst regions before you trust the masks"


def describe_reference(settings: CorpusSettings) -> str | None:
    """Describe the reference of a run in one line; None where results are files, whose origin is unknown.

    The JSON file that desra twin writes beside a checkpoint says from which GAN model it was trained.

    Raises:
        UsageError: A checkpoint cannot be read.
    """
    if not isinstance(settings, Mining):
        return None
    if settings.mse_model == BICUBIC:
        return (
            "bicubic enlargement, which draws no texture and removes no noise, so that good texture is marked and "
            f"artifacts are missed: {_LOOK}"
        )
    path = Path(settings.mse_model)
    document = read_document(path.with_suffix(".json"))
    try:
        parent, psnr = document["parent"]["key"], document["verdict"]["psnr"]
        scores = f"{psnr['twin']:.2f} dB against {psnr['gan']:.2f} dB"
    except (KeyError, TypeError, ValueError):
        return f"{path.name}, a network that desra did not train: unless the GAN model was finetuned from it, {_LOOK}"
    gan_model = settings.gan_model
    if not is_twin_of(gan_model, document):
        return f"{path.name}, a twin that desra trained from another GAN model: {_LOOK}, or train one from this model"
    origin = "this GAN model" if content_key(gan_model) == parent else "the GAN model that this one was finetuned from"
    return (
        f"{path.name}, the MSE twin that desra trained from {origin} ({scores} PSNR on held-out photos): trust the "
        "masks as far as those photos are like yours"
    )


def is_twin_of(gan_model: Path, document: dict[str, Any]) -> bool | None:
    """Check whether a twin was trained from a GAN model, or from one that this one was finetuned from.

    Args:
        gan_model: The checkpoint.
        document: The JSON file beside the twin.

    Returns:
        None where the document does not say it, as for a network that desra did not train.

    Raises:
        UsageError: The checkpoint cannot be read.
    """
    parent = document.get("parent")
    if not isinstance(parent, dict) or "key" not in parent:
        return None
    return parent["key"] in _lineage(gan_model)


def _lineage(gan_model: Path) -> Iterator[str]:
    """List the content keys of a GAN model and of those that it was finetuned from, by the files beside them."""
    key = content_key(gan_model)
    yield key
    events = read_json(gan_model.with_name("history.json"))  # beside a promoted model: all models before it
    yield from (str(e.get("model")) for e in (events if isinstance(events, list) else ()) if isinstance(e, dict))
    parent = read_document(gan_model.with_suffix(".json")).get("parent")  # beside a checkpoint of a finetune
    if not isinstance(parent, dict) or parent.get("key") in (None, key):
        return
    yield str(parent["key"])
    path = Path(str(parent.get("path")))
    if path.exists() and content_key(path) == parent["key"]:
        yield from _lineage(path)
