"""Mask: publish the artifact mask and its regions, and for mined photos the dataset that finetuning reads."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np

from desra_core.detection.mask import Components, assemble_pseudo_gt, find_regions
from desra_core.files import checksum
from desra_core.images.codec import Mask, Pixels, check_size, encode_mask, encode_png
from desra_core.networks.super_resolution import resize_alpha
from desra_core.stages import StageJob, read_labels, read_photo, read_sr
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import drop_array, read_array
from desra_core.workspace.human_masks import HumanMask, find_human_mask
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import Record, kept_whole, write_journal


def mask_stage(image: ImageRef, record: Record, workspace: Workspace, job: StageJob) -> Record:
    """Publish the mask at every name of the image and measure its regions (raises `ImageError`).

    An image without a stored map is known to have an empty mask. Photos with artifacts go into the dataset, whether
    the detector or a person marked them; the dataset prefers the human mask.
    """
    target = job.target
    mask, regions, dropped = _found(image, record, workspace, job)
    if record.mask_key is not None:
        # The files change from here on. If the run is killed meanwhile, the record must not claim the old mask.
        write_journal(workspace, image.shard, replace(record, mask_key=None))
    human = None
    if target.super_resolves:  # only mined photos have a dataset
        human = find_human_mask(workspace, image.id, image.names, target.gan_sr_key)
    whole = kept_whole(target.keep, bool(regions), human is not None and human.pixels > 0)
    encoded = encode_mask(mask)
    checksums = {"masks": checksum(encoded)}
    for name in image.names:
        workspace.publish(workspace.mask(name), encoded)
    if target.super_resolves and whole:
        checksums |= _publish_pictures(image, mask, human, workspace, job)
    elif target.super_resolves:
        for name in image.names:
            workspace.withdraw_dataset(name)
        if target.keep == "maps":
            for role in ("gan_sr",) if target.keep_mse else ("mse_sr", "gan_sr"):
                drop_array(workspace, image.id, role)
    if regions or dropped:
        proven_weight = None
    elif record.similarity_kept:
        # This mask is empty with these labels. Without class weights, all weights are 1, and labels do not matter.
        proven_weight = 1.0 if job.class_weights is None else None
    else:
        proven_weight = record.proven_weight
    kept = whole or target.keep != "artifacts"
    return replace(
        record,
        similarity_kept=kept and record.similarity_kept,
        labels_kept=kept and record.labels_kept,
        labels_hash=image.labels.hash if image.labels else None,
        weighting_key=target.weighting_key,
        proven_weight=proven_weight,
        # An empty mask is no proof for other settings where regions were dropped that few notice.
        threshold=None if dropped else target.threshold,
        min_area=None if dropped else job.min_area(record.shape),
        mask_key=target.mask_key,
        artifact_pixels=int(mask.sum()),
        regions=regions,
        checksums=checksums,
    )


def _found(
    image: ImageRef, record: Record, workspace: Workspace, job: StageJob
) -> tuple[Mask, list[dict[str, Any]], int]:
    """Compute the mask of the detector, its regions as records hold them, and how many were dropped as unnoticed."""
    labels = read_labels(image, record, workspace, job.target.segmentation_key, job.max_pixels)
    if not record.similarity_kept:
        return np.zeros(record.shape, np.bool_), [], 0
    similarity = read_array(workspace, image.id, "similarity", key=record.similarity_key)
    scores = np.negative(similarity, out=similarity)
    mask = job.score_mask(scores, record.shape, labels, job.class_weights)
    if not mask.any():
        return mask, [], 0
    similarity = np.negative(scores, out=scores)
    found = find_regions(mask, similarity, threshold=job.target.threshold, labels=labels, weights=job.class_weights)
    dropped = 0
    if path := job.settings.severity_model:
        from desra_core.detection.severity import load_severity_model

        mse_sr, gan_sr = (read_sr(role, image, workspace, job) for role in ("mse_sr", "gan_sr"))
        found = load_severity_model(path).rated(found, mse_sr, gan_sr, mask)
        kept = np.array([region.severity >= job.settings.min_noticed for region in found])
        mask, found = Components(mask).chosen(kept), list(itertools.compress(found, kept))
        dropped = int(np.count_nonzero(~kept))
    return mask, [region._asdict() for region in found], dropped


def _publish_pictures(
    image: ImageRef, mask: Mask, human: HumanMask | None, workspace: Workspace, job: StageJob
) -> dict[str, str]:
    """Write the dataset pictures one after the other, because encoding one takes the memory of several.

    Returns their checksums, as records have them.
    """
    if human is not None:
        shape, mask = mask.shape, human.read()
        check_size(mask, human.path, "import it again, or delete it", shape)
    assert image.lr is not None
    lr, alpha, *_ = read_photo(image.lr, job.max_pixels)
    sr_alpha = None if alpha is None else resize_alpha(alpha, mask.shape[0] // alpha.shape[0])

    def result(role: str) -> Pixels:
        return read_sr(role, image, workspace, job)

    checksums = workspace.publish_picture("lr", image.names, encode_png(lr, alpha))
    for role in ("mse_sr", "gan_sr"):
        checksums |= workspace.publish_picture(role, image.names, encode_png(result(role), sr_alpha))
    pseudo_gt = assemble_pseudo_gt(result("mse_sr"), result("gan_sr"), mask)
    return checksums | workspace.publish_pseudo_gt(image.names, mask, pseudo_gt, sr_alpha)
