"""The tables of a corpus for readers: regions, failures and dataset, made from the records of its images."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.detection.class_weights import class_names
from desra_core.planning.plan import failure_table, with_records
from desra_core.workspace import DATASET, Workspace, read_table
from desra_core.workspace.human_masks import read_human_masks
from desra_core.workspace.manifest import read_manifest
from desra_core.workspace.matching import FAILURES
from desra_core.workspace.products import Target, kept_whole
from desra_core.workspace.records import REGION_FIELDS, flags_of, read_records

REGIONS = pa.schema(
    [pa.field("image", pa.string()), pa.field("id", pa.string()), *REGION_FIELDS, pa.field("class_name", pa.string())]
)
# Paths are relative to the dataset. Rows with one ``made_under`` come from the same models and settings; clean images,
# which are there with --keep all, have none. Where ``mask_by`` is ``person``, not ``detector``, pixels and regions are
# those of the human mask; the severity is always that of the detector.
IMAGES = pa.schema(
    [pa.field(name, pa.string()) for name in ("image", "id", *DATASET)]
    + [pa.field(name, pa.int32()) for name in ("height", "width")]
    + [pa.field("artifact_pixels", pa.int64()), pa.field("regions", pa.int32()), pa.field("severity", pa.float64())]
    + [pa.field("made_under", pa.string()), pa.field("mask_by", pa.string())]
)

_COLUMNS = [
    "id", "height", "width", "artifact_pixels", "regions", "mask_key", "failed_stage", "subject", "reason", "remedy",
]  # fmt: skip


def publish_tables(workspace: Workspace, target: Target) -> None:
    """Write the tables of regions, of failures and, of a mined corpus, of the dataset (raises `TransientError`)."""
    manifest = read_manifest(workspace)
    assert manifest is not None
    records = read_records(workspace, _COLUMNS)
    if target.super_resolves:
        workspace.publish_table(workspace.dataset_manifest, _dataset(workspace, manifest, records, target))
    workspace.publish_table(workspace.regions, _regions(manifest, records))
    failed = failure_table(manifest.filter(manifest["present"]), records)
    failures = pa.concat_tables([read_table(workspace.scan_failures, FAILURES), failed]).sort_by("name")
    workspace.publish_table(workspace.failures, failures.replace_schema_metadata(None))


def images_of_several_pages(workspace: Workspace) -> list[str]:
    """Name the images whose file has further full pages, which are not read."""
    manifest = read_manifest(workspace)
    assert manifest is not None
    records = read_records(workspace, ["id", "further_pages"])
    ids = records["id"].filter(pc.greater(records["further_pages"], 0)).combine_chunks()
    names: list[str] = manifest["name"].filter(pc.and_(manifest["present"], pc.is_in(manifest["id"], ids))).to_pylist()
    return names


def worst_regions(workspace: Workspace, count: int) -> pa.Table:
    """List the most severe regions of a workspace, worst first (schema `REGIONS`), none with a severity below zero."""
    regions = read_table(workspace.regions, REGIONS)
    regions = regions.filter(pc.greater_equal(regions["severity"], 0))
    return regions.take(pc.select_k_unstable(regions, count, [("severity", "descending"), ("image", "ascending")]))


def _dataset(workspace: Workspace, manifest: pa.Table, records: pa.Table, target: Target) -> pa.Table:
    """Make the table of the dataset: one row per image name, sorted by name."""
    human = read_human_masks(workspace, target.gan_sr_key)
    # An image that only a person has marked may not have its pictures yet.
    pictured = [key for key, mask in human.items() if mask.pixels and workspace.dataset("mask", mask.name).exists()]
    marked = flags_of(pc.is_in(records["id"], pa.array(pictured, pa.string())))
    whole = kept_whole(target.keep, flags_of(pc.greater(records["artifact_pixels"], 0)), marked)
    records = records.filter(pa.array(whole & flags_of(pc.is_valid(records["mask_key"]))))
    rows, records = with_records(manifest, records)
    names = rows["name"].combine_chunks()
    files = [pc.binary_join_element_wise(kind, pc.binary_join_element_wise(names, "png", "."), "/") for kind in DATASET]
    lists = records["regions"].combine_chunks()
    severities = pc.struct_field(pc.list_flatten(lists), "severity")
    severity = np.bincount(pc.list_parent_indices(lists), weights=severities, minlength=len(lists))
    ids = records["id"]
    pixels = _preferring(records["artifact_pixels"], ids, {key: mask.pixels for key, mask in human.items()})
    regions = _preferring(pc.list_value_length(lists), ids, {key: mask.regions for key, mask in human.items()})
    made_under = pc.if_else(pc.greater(pixels, 0), records["mask_key"], pa.scalar(None, pa.string()))
    mask_by = _preferring(pa.array(["detector"] * len(ids), pa.string()), ids, dict.fromkeys(human, "person"))
    columns = [names, ids, *files, records["height"], records["width"], pixels, regions]
    columns += [pa.array(severity, pa.float64()), made_under, mask_by]
    return pa.table(columns, schema=IMAGES)


def _preferring(values: pa.Array, ids: pa.Array, by_id: Mapping[str, int | str]) -> pa.Array:
    """Replace the values of those images whose ids are in ``by_id``."""
    index = pc.index_in(ids, pa.array(by_id, pa.string()))
    return pc.if_else(index.is_valid(), pa.array(by_id.values(), values.type).take(index), values)


def _regions(manifest: pa.Table, records: pa.Table) -> pa.Table:
    """Make the table of regions: one row per region and name, sorted by name, then from top to bottom."""
    rows, records = with_records(manifest, records)
    lists = records["regions"].combine_chunks()
    images = rows.select(["name", "id"]).take(pc.list_parent_indices(lists))
    regions = pc.list_flatten(lists)
    fields = [pc.struct_field(regions, field.name) for field in REGION_FIELDS]
    classes = pa.array(class_names(), pa.string()).take(pc.struct_field(regions, "dominant_class"))
    return pa.table([*images.columns, *fields, classes], schema=REGIONS)
