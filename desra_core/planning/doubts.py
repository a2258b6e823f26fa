"""What the images of a run say against its two models or folders: see `desra_core.detection.agreement`."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.detection.agreement import CONTRAST, FIRST, Columns, PairAgreement, find_doubts, strangers
from desra_core.errors import DesraError, UsageError
from desra_core.networks.super_resolution import NOT_FINITE
from desra_core.settings import CorpusSettings, Detection, Mining
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.manifest import asked_for, read_manifest
from desra_core.workspace.products import SCHEMA, Record, Target, finished_shards, flags_of, read_records

_NAMED = 3


def names_of(settings: CorpusSettings) -> tuple[str, str]:
    """Name the origins of the MSE and of the GAN results of a run."""
    if isinstance(settings, Mining):
        return str(settings.mse_model), str(settings.gan_model)
    assert isinstance(settings, Detection)
    return str(settings.mse_sr), str(settings.gan_sr)


def stored_doubts(workspace: Workspace, settings: CorpusSettings, target: Target) -> list[DesraError]:
    """Judge the agreement of all pairs that were compared under the settings of the latest run.

    Raises:
        UsageError: A table of the workspace is damaged.
    """
    rows = asked_for(read_manifest(workspace)).slice(0, settings.limit)
    records = read_records(workspace, ["id", "similarity_key", "agreement"])
    seen = records.filter(_compared(records, rows["id"].combine_chunks(), target))
    columns = _columns(seen["agreement"])
    doubts = find_doubts(columns, *names_of(settings))
    odd = strangers(columns)
    if odd.any() and not any(isinstance(doubt, UsageError) for doubt in doubts):
        ids = seen["id"].filter(pa.array(odd)).combine_chunks()
        names = rows["name"].filter(pc.is_in(rows["id"], ids)).to_pylist()
        named = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        reason = f"show other things in both results: {named}"
        images = f"{len(names)} image{'s' * (len(names) > 1)}"
        doubts.append(DesraError(images, reason, "give the results of the same photos"))
    return doubts


class FirstPairs:
    """Collect the agreement of the first pairs of a run, and judge it once there are enough.

    What an earlier run has measured on the images of this one counts. Not for several threads at once.

    Args:
        workspace: The workspace.
        settings: Settings of the run.
        target: The same as keys.
        ids: The images of the run.
    """

    def __init__(self, workspace: Workspace, settings: CorpusSettings, target: Target, ids: pa.Array) -> None:
        self._names = names_of(settings)
        self._pairs: list[dict[str, float | None]] = []
        self._with_contrast = self._not_finite = 0
        self._is_judged = False
        columns = ["id", "similarity_key", "agreement"]
        for shard in finished_shards(workspace):
            if self._is_enough:
                break
            records = read_table(workspace.shard_records(shard), SCHEMA, columns)
            for pair in records.filter(_compared(records, ids, target))["agreement"].to_pylist():
                self._add(pair)

    @property
    def _is_enough(self) -> bool:
        return self._with_contrast >= FIRST

    def _add(self, pair: dict[str, float | None]) -> None:
        self._pairs.append(pair)
        self._with_contrast += (pair["contrast"] or 0) >= CONTRAST

    def add(self, records: Iterable[Record]) -> list[DesraError]:
        """Add records of images that were compared, or failed to be; return the doubts when it is time for them.

        Raises:
            UsageError: No real pair can be like this: to go on would be in vain.
        """
        if self._is_judged:
            return []
        for record in records:
            if record.failed and NOT_FINITE in (record.reason or ""):
                self._not_finite += 1
                if self._not_finite == FIRST and not self._pairs:
                    mse, gan = self._names
                    wrong = gan if gan in (record.reason or "") else mse
                    reason = f"{NOT_FINITE} for any of the first {FIRST} photos"
                    raise UsageError(wrong, reason, record.remedy or "copy or train it again")
            elif not record.failed and record.agreement:
                self._add(record.agreement)
        if not self._is_enough:
            return []
        self._is_judged = True
        columns = {name: np.array([pair[name] for pair in self._pairs], np.float64) for name in PairAgreement._fields}
        doubts = find_doubts(columns, *self._names)
        for doubt in doubts:
            if isinstance(doubt, UsageError):
                raise doubt
        return doubts


def _compared(records: pa.Table, ids: pa.Array, target: Target) -> pa.Array:
    """Flag the records of some images that were compared under the keys of a run, and whose agreement was measured."""
    flags = flags_of(pc.is_in(records["id"].combine_chunks(), ids))
    flags &= flags_of(pc.equal(records["similarity_key"].combine_chunks(), target.similarity_key))
    return pa.array(flags & flags_of(records["agreement"].combine_chunks().is_valid()))


def _columns(pairs: pa.ChunkedArray) -> Columns:
    """Turn a column of records into the fields of `PairAgreement`, NaN where they are null."""
    whole = pairs.combine_chunks()
    found = {name: pc.fill_null(pc.struct_field(whole, name), np.nan) for name in PairAgreement._fields}
    return {name: values.to_numpy(zero_copy_only=False).astype(np.float64) for name, values in found.items()}
