"""Verify: a workspace in, the list of its damaged files out."""

import contextlib
from dataclasses import dataclass

from desra_core.errors import UsageError
from desra_core.evaluation.table import counted
from desra_core.housekeeping.verify import Checked, Damage, Verification, mark, unknown_files, verify_documents
from desra_core.settings import Machine
from desra_core.settings.models import Verifying
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import note_checksums
from desra_core.workspace.products import gather_journals
from flows.desra_flow import desra_flow
from tasks.dask_cluster import open_dask
from tasks.judging import verify_shard
from tasks.logs import NowAndThen
from tasks.progress import RunProgress
from tasks.run_end import RunEnd, show_damage


@dataclass(frozen=True, kw_only=True)
class Verified(RunEnd):
    """What a verification found.

    ``marked`` are the damaged files that were deleted for the next run, ``unchecked`` the images whose records or whose
    manifest are damaged, ``untold`` those with pictures of an older desra, whose checksums are taken with ``repair``.
    """

    checked: Checked
    marked: tuple[Damage, ...]
    unknown: tuple[str, ...]
    unchecked: int
    untold: int


@desra_flow
def verify(verifying: Verifying, machine: Machine = Machine()) -> Verified:  # noqa: B008
    """Check every file of a workspace against its checksum; with repair, mark what is damaged for the next run.

    Args:
        verifying: The workspace, and whether to repair it.
        machine: Where and how wide to compute.
    """
    with Workspace(verifying.workspace).locked() as workspace:
        with contextlib.suppress(UsageError):  # a damaged table, which is named below
            gather_journals(workspace)
        found = verify_documents(workspace, NowAndThen("checking tables and models: {} of {}"))
        verification = Verification(workspace, {damage.path for damage in found.damaged})
        untold: dict[str, dict[str, str]] = {}
        if verification.images:
            with (
                open_dask(machine, folder=workspace.root) as dask,
                RunProgress("verify", verification.images, 1) as progress,
            ):
                for number in verification.shards:
                    of_shard, untold_there = verify_shard(number, verification, dask, progress)
                    found, untold = found + of_shard, untold | untold_there
        marked: list[Damage] = []
        if verifying.repair:
            marked = [damage for damage in found.damaged if damage.remedy is None]
            for damage in marked:
                mark(workspace, damage)
            note_checksums(workspace, untold)
        line = f"{counted(found.files, 'file')} checked, {len(found.damaged)} damaged, {len(found.missing)} missing"
        show_damage(line, [damage.error for damage in found.damaged])
        return Verified(
            in_one_line=line,
            task_runs=len(verification.shards),
            to_look_at=len(marked) < len(found.damaged),
            checked=found,
            marked=tuple(marked),
            unknown=tuple(unknown_files(workspace)),
            unchecked=verification.unchecked,
            untold=len(untold),
        )
