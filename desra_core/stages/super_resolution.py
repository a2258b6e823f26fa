"""Super-resolution: infer the results of a photo that are not stored yet, and compare the pair in memory."""

import time
from dataclasses import replace
from typing import Any

from desra_core.errors import ImageError, TransientError, UsageError
from desra_core.images.codec import Pixels
from desra_core.networks.checkpoints import BICUBIC, load_pair
from desra_core.networks.super_resolution import super_resolve
from desra_core.planning.plan import result_keys
from desra_core.settings import Mining
from desra_core.stages import StageJob, read_photo, told_by
from desra_core.stages.similarity import compare, is_suspect, proven_clean
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import find_array, write_array
from desra_core.workspace.human_masks import find_human_mask
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import Product, Record, stages_for


def network(job: StageJob) -> tuple[Any, ...]:
    """Return the call that loads the networks: a function and its arguments."""
    mining = job.settings
    assert isinstance(mining, Mining)
    return load_pair, mining.mse_model, mining.gan_model, job.device, mining.engine


def super_resolution_stage(image: ImageRef, record: Record, workspace: Workspace, job: StageJob) -> Record:
    """Infer the pair and compare it; store what is needed later (raises `ImageError`)."""
    human = find_human_mask(workspace, image.id, image.names, job.target.gan_sr_key)
    if human is not None and human.pixels:  # a person has marked an artifact: keep everything
        job = replace(job, target=replace(job.target, keep="all"))
    target = job.target
    # The products that later stages make from the GAN results of all images, clean images included.
    later = [product for product in stages_for(target) if product.name not in ("super_resolution", "mask")]
    if target.keep == "artifacts":
        later = []
    if target.keep != "all" and _is_known_clean(image, record, workspace, job, later):
        return proven_clean(record, job)
    keys = {"mse_sr": target.mse_sr_key, "gan_sr": target.gan_sr_key}
    found = {role: find_array(workspace, image.id, role, key=key) for role, key in keys.items()}
    stored = {role: array for role, array in found.items() if array is not None}
    lacking = {role: keys[role] for role in keys if role not in stored}
    inferred, photo, record = _inferred(image, record, job, lacking)
    pair = stored | inferred
    made = compare(image, pair["mse_sr"], pair["gan_sr"], record, workspace, job, photo)
    pair_needed = made.artifact_pixels is None or target.keep == "all"  # None: it may have artifacts
    for role, is_needed in (("mse_sr", pair_needed or target.keep_mse), ("gan_sr", pair_needed or bool(later))):
        if is_needed and role in inferred:
            write_array(workspace, image.id, role, inferred[role], key=keys[role] or "")
    return made


def _inferred(
    image: ImageRef, record: Record, job: StageJob, keys: dict[str, str | None]
) -> tuple[dict[str, Pixels], Pixels | None, Record]:
    """Infer the results of these keys; returns the photo too, None where it had not to be read.

    The record gets the seconds and the smallest tile of the pair.
    """
    mining = job.settings
    assert isinstance(mining, Mining)
    assert image.lr is not None
    if not keys:
        pixels = None
        if record.further_pages is None:  # the record was lost, but not the results
            photo = read_photo(image.lr, job.max_pixels)
            pixels = photo.pixels
            record = told_by(photo, record)
        return {}, pixels, replace(record, seconds=record.seconds | {"inference": 0.0})
    models = load_pair(mining.mse_model, mining.gan_model, job.device, mining.engine)
    photo = read_photo(image.lr, job.max_pixels // models[0].scale ** 2)
    found_keys = result_keys(mining.mse_model, mining.gan_model, mining.engine)
    results: dict[str, Pixels] = {}
    tiles = [] if len(keys) == len(models) else [record.tile]  # the stored result was made with that tile
    seconds = 0.0
    for role, key in keys.items():
        model = models[role == "gan_sr"]
        if found_keys[role == "gan_sr"] != key:
            checkpoint = model.path if mining.mse_model != BICUBIC else mining.gan_model
            raise TransientError(checkpoint, "changed after the run had started", "run again")
        started = time.perf_counter()
        try:
            results[role], tile = super_resolve(model, photo.pixels)
        except UsageError as error:  # weights that overflow on this photo, maybe on no other
            reason = f"cannot be upscaled: {error.subject} {error.reason}"
            raise ImageError(image.path, reason, error.remedy) from None
        seconds += time.perf_counter() - started
        tiles.append(tile)
    record = replace(
        told_by(photo, record),
        tile=min((tile for tile in tiles if tile), default=None),
        seconds=record.seconds | {"inference": round(seconds, 4)},
    )
    return results, photo.pixels, record


def _is_known_clean(image: ImageRef, record: Record, workspace: Workspace, job: StageJob, later: list[Product]) -> bool:
    """Check whether an image needs no inference: its stored map proves it clean, and the later products are made."""
    key = job.target.similarity_key
    if not record.similarity_kept or record.similarity_key != key:
        return False
    made = record.further | {"segmentation": record.segmentation_key if record.labels_kept else None}
    if any(made.get(product.name) != product.key(job.target) for product in later):
        return False
    similarity = find_array(workspace, image.id, "similarity", key=key)
    return similarity is not None and not is_suspect(-similarity, job, record.shape)
