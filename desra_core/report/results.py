"""What a workspace holds, as the report needs it: columns for everything, no Python object per image or region."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from desra_core.errors import UsageError
from desra_core.planning.keys import settings_document
from desra_core.planning.plan import failure_table
from desra_core.planning.tables import REGIONS
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.manifest import MANIFEST, read_passed_over
from desra_core.workspace.matching import FAILURES
from desra_core.workspace.records import read_records

_RECORD = ["height", "width", "mask_key", "artifact_pixels", "failed_stage", "subject", "reason", "remedy",
           "similarity_kept", "labels_kept"]  # fmt: skip


@dataclass(frozen=True)
class Results:
    """The results of a workspace.

    Attributes
    ----------
    document
        Content of ``settings.json``; empty where there is none.
    sources
        The scanned folders by role.
    images
        One row per image name of the run, sorted by name: name, id and the fields ``_RECORD`` of its record, null
        where there is none yet.
    seconds
        Computing times, a row per image content and stage: ``stage``, ``seconds``.
    regions
        Regions of these images (schema `desra_core.planning.tables.REGIONS`).
    failures
        What failed, the scan's failures included (schema `desra_core.workspace.matching.FAILURES`).
    vanished
        Names that are no longer in the folders; they are in none of the above.
    unscanned
        Files that no image could be made of; they are in ``failures`` only.
    passed_over
        What else the latest scan came upon, see `desra_core.images.scanning.kinds_in_words`.
    changed
        When the workspace's results last changed.
    """

    workspace: Workspace
    document: dict[str, Any]
    sources: dict[str, str]
    images: pa.Table
    seconds: pa.Table
    regions: pa.Table
    failures: pa.Table
    vanished: int
    unscanned: int
    passed_over: dict[str, int]
    changed: datetime

    @property
    def verb(self) -> str:
        """The command that made the results: ``detect`` or ``mine``."""
        return str(self.document.get("verb", "detect"))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the latest run."""
        settings: dict[str, Any] = self.document.get("settings", {})
        return settings


def read_results(workspace: Workspace) -> Results:
    """Read the tables of a workspace; nothing is written.

    Raises
    ------
    UsageError
        The folder is no workspace, or a table of it is damaged.
    """
    if not workspace.manifest.exists():
        raise UsageError(workspace.root, "is no workspace with a run in it", "name one, or run desra mine")
    document = settings_document(workspace)
    manifest = read_table(workspace.manifest, MANIFEST, ["name", "id", "present"])
    rows = manifest.filter(manifest["present"])
    vanished = manifest.num_rows - rows.num_rows
    limit = document.get("settings", {}).get("limit")
    rows = rows.select(["name", "id"]).slice(0, limit if isinstance(limit, int) else None)
    records = read_records(workspace, ["id", *_RECORD, "seconds"])
    images = _joined(rows, records)
    regions = read_table(workspace.regions, REGIONS)
    unscanned = read_table(workspace.scan_failures, FAILURES)
    return Results(
        workspace=workspace,
        document=document,
        sources=_sources(workspace),
        images=images,
        seconds=_seconds(records, rows["id"].combine_chunks()),
        regions=regions.filter(pc.is_in(regions["image"], rows["name"].combine_chunks())),
        failures=pa.concat_tables([unscanned, failure_table(rows, records)]).sort_by("name"),
        vanished=vanished,
        unscanned=unscanned.num_rows,
        passed_over=read_passed_over(workspace),
        changed=_changed(workspace),
    )


def firsts(images: pa.Table) -> pa.Table:
    """Of each image content among some rows of `Results.images` the first name: id, name, height, width."""
    grouped = images.group_by("id", use_threads=False)
    return grouped.aggregate([(name, "min") for name in ("name", "height", "width")]).rename_columns(
        ["id", "name", "height", "width"]
    )


def _sources(workspace: Workspace) -> dict[str, str]:
    metadata = pq.read_schema(workspace.manifest).metadata or {}
    roles = {name.removesuffix("_path") for name in MANIFEST.names if name.endswith("_path")}
    stored = {key.decode(): value.decode() for key, value in metadata.items()}
    return {role: folder for role, folder in stored.items() if role in roles}


def _joined(rows: pa.Table, records: pa.Table) -> pa.Table:
    index = pc.index_in(rows["id"].combine_chunks(), records["id"].combine_chunks())
    for name in _RECORD:
        rows = rows.append_column(name, records[name].combine_chunks().take(index))
    return rows


def _seconds(records: pa.Table, ids: pa.Array) -> pa.Table:
    """Flatten the maps of these images."""
    schema = pa.schema([("stage", pa.string()), ("seconds", pa.float64())])
    tables = [schema.empty_table()]
    for maps in records.filter(pc.is_in(records["id"], ids))["seconds"].chunks:
        if len(maps):
            used = slice(maps.offsets[0].as_py(), maps.offsets[-1].as_py())
            tables.append(pa.table([maps.keys[used], maps.items[used]], schema=schema))
    return pa.concat_tables(tables)


def _changed(workspace: Workspace) -> datetime:
    paths = [workspace.manifest, workspace.settings, workspace.regions, workspace.failures, workspace.records]
    return datetime.fromtimestamp(max(path.stat().st_mtime for path in paths if path.exists()), UTC)
