"""Compute photos again whose colour profile an older version of desra has ignored, where the profile says much."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import ImageError, TransientError
from desra_core.images.codec import profile_by_header
from desra_core.images.colour import Treatment
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import ImageRef, asked_for, image_refs
from desra_core.workspace.products import Record, gather_shard, read_records, read_shard


def honour_profiles(workspace: Workspace, manifest: pa.Table) -> None:
    """Note what becomes of profiles of which the records say nothing, and forget the products of photos they change.

    Most profiles are of sRGB: these photos stay as they are. The workspace must be locked, and hold mined photos.
    """
    records = read_records(workspace, ["id", "icc_profile", "colour_profile"])
    ignored = records.filter(pc.and_(records["icc_profile"], pc.is_null(records["colour_profile"])))
    rows = asked_for(manifest)
    rows = rows.filter(pc.is_in(rows["id"], ignored["id"].combine_chunks()))
    for shard in rows["shard"].unique().to_pylist():
        stored = read_shard(workspace, shard)
        images = image_refs(rows.filter(pc.equal(rows["shard"], shard)))
        with ThreadPoolExecutor() as pool:
            treatments = list(pool.map(_treatment, images))
        for image, treatment in zip(images, treatments, strict=True):
            if treatment is None:
                continue
            if treatment == "converted":
                # The arrays first: their keys are those of the new ones.
                workspace.drop_group(image.id)
                stored[image.id] = Record(image.id)
            else:
                stored[image.id] = replace(stored[image.id], colour_profile=treatment)
        gather_shard(workspace, shard, stored.values())


def _treatment(image: ImageRef) -> Treatment | None:
    """Look up a profile: None where it cannot be read for now; of a damaged file, as if it changed the photo."""
    assert image.lr is not None
    try:
        return profile_by_header(image.lr.path) or "unusable"
    except TransientError:
        return None
    except ImageError:
        return "converted"
