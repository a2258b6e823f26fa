"""Which images may be trained on and which only judge: settled for an image once and for ever.

An image belongs to a group, of images that show the same, and a group to the training pool or to the held-out pool.
Only images that were asked for have been assigned; all of them stay in ``split.parquet``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import pyarrow as pa

from desra_core.errors import ImageError, UsageError
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import decode
from desra_core.images.perceptual_hash import Duplicates, signature
from desra_core.workspace import Workspace, read_table

TRAINING_SHARE = 0.7

Pool = Literal["training", "held_out"]

_SCHEMA = pa.schema(
    [("id", pa.string()), ("group", pa.string()), ("pool", pa.string()), ("signature", pa.binary()),
     ("group_by", pa.string())]
)  # fmt: skip
_BATCH = 512


class Member(NamedTuple):
    """An image to be assigned: its content id, its first name, and the LR photo."""

    id: str
    name: str
    lr: Path


def pool_of(group: str) -> Pool:
    """The pool of a group, by the hash of its key: `TRAINING_SHARE` of all groups are for training.

    Examples
    --------
    >>> pool_of("kodak/kodim01"), pool_of("kodak/kodim02")
    ('held_out', 'training')
    """
    number = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest())
    return "training" if number < TRAINING_SHARE * 2**64 else "held_out"


def assign_pools(workspace: Workspace, members: Sequence[Member], group_by: str) -> dict[str, Pool]:
    """Look up the pools of images, and assign those that have none yet.

    Parameters
    ----------
    workspace
        Must be locked.
    members
        Images of the workspace.
    group_by
        ``duplicates``: an image joins the group of the nearest known one that shows the same, else founds one;
        ``folder``: its folder; or a regular expression, of which the first group, or else all that matched, counts
        (images that it does not match are groups of their own).

    Returns
    -------
    Pools by image id. Photos that cannot be decoded have none.

    Raises
    ------
    UsageError
        The pattern is none, or the images of this workspace were grouped in another way before.
    """
    known = read_table(workspace.split, _SCHEMA).to_pylist()
    if known and known[0]["group_by"] != group_by:
        remedy = "keep to it: with another one, what was trained on could become a judge"
        raise UsageError("--group-by", f"{group_by}, but this workspace was split by {known[0]['group_by']}", remedy)
    pools: dict[str, Pool] = {row["id"]: row["pool"] for row in known}
    fresh = sorted({member.id: member for member in members if member.id not in pools}.values())
    rows = _by_duplicates(fresh, known) if group_by == "duplicates" else _by_name(fresh, group_by)
    for row in rows:
        row |= {"pool": pool_of(str(row["group"])), "group_by": group_by}
    if rows:
        workspace.publish_table(workspace.split, pa.Table.from_pylist(known + rows, _SCHEMA))
    pools |= {row["id"]: pool_of(row["group"]) for row in rows}
    return {member.id: pools[member.id] for member in members if member.id in pools}


def _by_name(fresh: list[Member], group_by: str) -> list[dict[str, str]]:
    if group_by == "folder":
        return [{"id": member.id, "group": str(PurePosixPath(member.name).parent)} for member in fresh]
    try:
        pattern = re.compile(group_by)
    except (re.error, OverflowError, RecursionError) as error:
        remedy = "give duplicates, folder or a pattern"
        raise UsageError("--group-by", f"{group_by} is no regular expression ({error})", remedy) from None
    rows = []
    for member in fresh:
        match = pattern.search(member.name)
        group = member.name if match is None else match[1] if pattern.groups else match[0]
        rows.append({"id": member.id, "group": group or member.name})
    return rows


def _by_duplicates(fresh: list[Member], known: list[dict[str, str]]) -> list[dict[str, str]]:
    duplicates = Duplicates()
    for row in known:
        duplicates.add(row["signature"], row["group"])  # type: ignore[arg-type]
    rows = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(fresh), _BATCH):
            batch = fresh[start : start + _BATCH]
            for member, found in zip(batch, pool.map(_signature, batch), strict=True):
                if found is None:
                    continue
                group = duplicates.group(found) or member.id
                duplicates.add(found, group)
                rows.append({"id": member.id, "group": group, "signature": found})
    return rows  # type: ignore[return-value]


def _signature(member: Member) -> bytes | None:
    try:
        return signature(decode(read_bytes(member.lr), member.lr).pixels)
    except ImageError:
        return None
