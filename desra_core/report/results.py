"""Read the results of a workspace as columns, and compute the numbers of its report from them."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import UsageError
from desra_core.planning.plan import REGIONS, failure_table, load_settings, settings_document
from desra_core.report.pictures import StoredImage
from desra_core.settings import CorpusSettings, detector_of
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.human_masks import HumanMask, read_human_masks
from desra_core.workspace.manifest import MANIFEST, asked_for, picture_files, read_passed_over
from desra_core.workspace.matching import FAILURES
from desra_core.workspace.products import PRODUCTS, Target, read_records

_RECORD = ["height", "width", "mask_key", "artifact_pixels", "failed_stage", "subject", "reason", "remedy"]
_ROLES = [name.removesuffix("_path") for name in MANIFEST.names if name.endswith("_path")]
# The usual order of stages; other stages follow. The time of a part is also in the time of the stage before it.
_STAGES = ("super_resolution", "inference", *(product.name for product in PRODUCTS[1:]))
_PARTS = frozenset({"inference"})


@dataclass(frozen=True)
class WorkspaceResults:
    """Results of a workspace, without a Python object per image or region."""

    workspace: Workspace
    settings: CorpusSettings  # of the latest run
    target: Target
    document: dict[str, Any]  # content of settings.json
    sources: dict[str, str]  # the scanned folders by role
    images: pa.Table  # a row per image name of the run, sorted: name, id and the fields _RECORD of its record, or null
    seconds: pa.Table  # computing times: a row (stage, seconds) per image content and stage
    regions: pa.Table  # of these images, schema desra_core.planning.plan.REGIONS
    failures: pa.Table  # those of the scan included, schema desra_core.workspace.matching.FAILURES
    vanished: int  # number of names that are no longer in the folders; they are in no table
    unasked: int  # number of names in the folders that the latest run was not asked for
    unscanned: int  # number of files that no image could be made of; they are in the failures only
    passed_over: dict[str, int]  # other files that the latest scan passed over, by kind
    changed: datetime  # when the results last changed

    def human_masks(self) -> dict[str, HumanMask]:
        """Read which human masks count, by image id."""
        return read_human_masks(self.workspace, self.target.gan_sr_key)

    def stored_images(self, names: Iterable[str], ids: Iterable[str]) -> dict[str, StoredImage]:
        """Find where images are stored, by name; ``ids`` has the id of the image of each name."""
        by_name = dict(zip(names, ids, strict=True))
        rows = self.images.filter(pc.is_in(self.images["id"], pa.array(by_name.values(), pa.string())))
        shapes = {row["id"]: (row["height"] or 0, row["width"] or 0) for row in rows.to_pylist()}
        files, measure = picture_files(self.workspace, self.settings.verb, sorted(by_name)), detector_of(self.settings)
        human = self.human_masks()
        for name in [name for name in files if by_name[name] in human]:
            files[name]["human"] = human[by_name[name]].path
        return {
            name: StoredImage(files.get(name, {}), self.workspace.group(key), shapes.get(key, (0, 0)), measure)
            for name, key in by_name.items()
        }


class CorpusSummary:
    """The corpus in numbers: image names as ``desra status`` counts them, and pixels of all images that are done."""

    def __init__(self, results: WorkspaceResults) -> None:
        images = results.images
        failed = images["failed_stage"].is_valid()
        done = images.filter(pc.and_(images["mask_key"].is_valid(), pc.invert(failed)))
        marked = _marked(done)
        self.images = images.num_rows + results.unscanned
        self.done = done.num_rows
        self.failed = _total(failed) + results.unscanned
        self.pending = self.images - self.done - self.failed
        self.marked = marked.num_rows  # images with artifacts
        # Of these, the images whose mask was made under other settings than those of the latest run.
        self.outdated = _total(pc.not_equal(marked["mask_key"], results.target.mask_key))
        self.pixels = _total(pc.multiply(pc.cast(done["height"], pa.int64()), pc.cast(done["width"], pa.int64())))
        self.artifact_pixels = _total(done["artifact_pixels"])
        self.regions = results.regions.num_rows
        # Images with a human mask that counts, copies once.
        people = pa.array(results.human_masks(), pa.string())
        self.looked_at = len(images.filter(pc.is_in(images["id"], people))["id"].unique())
        self.marked_share = self.marked / self.done if self.done else None
        self.pixel_share = self.artifact_pixels / self.pixels if self.pixels else None
        # Computing time of all stages.
        self.seconds = sum(time.total for time in stage_times(results.seconds) if not time.part)


class StageTime(NamedTuple):
    """Computing time of one stage, in seconds; a ``part`` is contained in the time of the stage before it."""

    stage: str
    part: bool
    images: int
    total: float
    median: float
    mean: float

    @property
    def rate(self) -> float | None:
        """Images per second and worker."""
        return 1 / self.mean if self.mean > 0 else None


def read_results(workspace: Workspace) -> WorkspaceResults:
    """Read the tables of a workspace, and write nothing.

    Raises:
        UsageError: The folder is no workspace with a run in it, or a table of it is damaged or missing.
    """
    settings, target = load_settings(workspace)
    if not workspace.manifest.exists():
        raise UsageError(workspace.root, "has no manifest", f"run desra {settings.verb}")
    manifest = read_table(workspace.manifest, MANIFEST, ["name", "id", "present", "asked"])
    vanished = manifest.num_rows - (pc.sum(manifest["present"]).as_py() or 0)
    asked = asked_for(manifest)
    rows = asked.select(["name", "id"]).slice(0, settings.limit)
    records = read_records(workspace, ["id", *_RECORD, "seconds"])
    index = pc.index_in(rows["id"].combine_chunks(), records["id"].combine_chunks())
    images = rows
    for name in _RECORD:
        images = images.append_column(name, records[name].combine_chunks().take(index))
    seconds = records.filter(pc.is_in(records["id"], rows["id"].combine_chunks()))["seconds"]
    regions = read_table(workspace.regions, REGIONS)
    unscanned = read_table(workspace.scan_failures, FAILURES)
    metadata = manifest.schema.metadata or {}
    changing = [workspace.manifest, workspace.settings, workspace.regions, workspace.failures, workspace.records]
    return WorkspaceResults(
        workspace=workspace,
        settings=settings,
        target=target,
        document=settings_document(workspace),
        sources={role: metadata[role.encode()].decode() for role in _ROLES if role.encode() in metadata},
        images=images,
        seconds=flat_seconds(seconds),
        regions=regions.filter(pc.is_in(regions["image"], rows["name"].combine_chunks())),
        failures=pa.concat_tables([unscanned, failure_table(rows, records)]).sort_by("name"),
        vanished=vanished,
        unasked=manifest.num_rows - vanished - asked.num_rows,
        unscanned=unscanned.num_rows,
        passed_over=read_passed_over(workspace),
        changed=datetime.fromtimestamp(max(path.stat().st_mtime for path in changing if path.exists()), UTC),
    )


def stage_times(seconds: pa.Table) -> list[StageTime]:
    """Sum up computing times by stage, from the columns ``stage`` and ``seconds``."""
    stages = seconds["stage"].unique().to_pylist()
    stages.sort(key=lambda stage: (_STAGES.index(stage) if stage in _STAGES else len(_STAGES), stage))
    times = []
    for stage in stages:
        values = numbers(seconds.filter(pc.equal(seconds["stage"], stage))["seconds"])
        total, median = float(values.sum()), float(np.median(values))
        times.append(StageTime(stage, stage in _PARTS, values.size, total, median, total / values.size))
    return times


def class_counts(regions: pa.Table) -> list[dict[str, Any]]:
    """Count regions, images and pixels by class, and their mean similarity and share; the most frequent class first."""
    grouped = regions.group_by("class_name", use_threads=False).aggregate(
        [([], "count_all"), ("image", "count_distinct"), ("area", "sum"), ("mean_similarity", "mean")]
    )
    counts = grouped.rename_columns(["name", "regions", "images", "pixels", "mean_similarity"]).to_pylist()
    counts.sort(key=lambda count: (-count["regions"], count["name"] or ""))
    return [count | {"share": count["regions"] / regions.num_rows} for count in counts]


def numbers(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Convert a column to float64."""
    return np.asarray(pc.cast(column, pa.float64()).to_numpy(), np.float64)


def flat_seconds(maps: pa.ChunkedArray) -> pa.Table:
    """Flatten maps from stage to seconds to the columns ``stage`` and ``seconds``."""
    entry = pa.struct([("stage", pa.string()), ("seconds", pa.float64())])
    flat = pa.table({"entry": pc.list_flatten(maps.cast(pa.list_(entry)))}).flatten()
    return flat.rename_columns(["stage", "seconds"])


def _marked(images: pa.Table) -> pa.Table:
    return images.filter(pc.fill_null(pc.greater(images["artifact_pixels"], 0), False))


def _total(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)
