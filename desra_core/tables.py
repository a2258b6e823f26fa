"""The tables a person reads: regions and failures of the whole corpus, made from the outcomes of its images."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from desra_core.corpus import read_manifest
from desra_core.detection.semantics import class_names
from desra_core.matching import FAILURES
from desra_core.outcomes import REGION_FIELDS, read_outcomes
from desra_core.plan import failure_table
from desra_core.workspace import Workspace, read_table

REGIONS = pa.schema(
    [pa.field("image", pa.string()), pa.field("id", pa.string()), *REGION_FIELDS, pa.field("class_name", pa.string())]
)


def publish_tables(workspace: Workspace) -> None:
    """Write ``regions.parquet`` and ``failures.parquet`` (raises `desra_core.errors.TransientError`)."""
    manifest = read_manifest(workspace)
    assert manifest is not None
    columns = ["id", "regions", "failed_stage", "subject", "reason", "remedy"]
    outcomes = read_outcomes(workspace, columns)
    workspace.publish_table(workspace.regions, _regions(manifest, outcomes))
    failed = failure_table(manifest.filter(manifest["present"]), outcomes)
    failures = pa.concat_tables([read_table(workspace.scan_failures, FAILURES), failed]).sort_by("name")
    workspace.publish_table(workspace.failures, failures)


def worst_regions(workspace: Workspace, count: int) -> pa.Table:
    """The most severe regions of a workspace, worst first (schema `REGIONS`)."""
    regions = read_table(workspace.regions, REGIONS)
    return regions.take(pc.select_k_unstable(regions, count, [("severity", "descending"), ("image", "ascending")]))


def _regions(manifest: pa.Table, outcomes: pa.Table) -> pa.Table:
    """One row per region and name, sorted by name, regions of a name from top to bottom."""
    index = pc.index_in(manifest["id"].combine_chunks(), outcomes["id"].combine_chunks())
    names = manifest["name"].combine_chunks().filter(index.is_valid())
    ids = manifest["id"].combine_chunks().filter(index.is_valid())
    lists = outcomes["regions"].combine_chunks().take(index.drop_null())
    parents = pc.list_parent_indices(lists)
    fields = pc.list_flatten(lists)
    columns = [names.take(parents), ids.take(parents)]
    columns += [pc.struct_field(fields, field.name) for field in REGION_FIELDS]
    classes = pc.struct_field(fields, "dominant_class")
    columns.append(pa.array(class_names(), pa.string()).take(classes))
    return pa.table(columns, schema=REGIONS)
