"""Faults at random moments: after each, the same command again leaves what an undisturbed one leaves, or names a loss.

``make chaos SEED=3 FAULTS=200`` makes the table of ``docs/reliability.md``; ``ONLY=17`` repeats a single fault.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from desra_core.settings import Machine
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import read_manifest
from tasks.dask_cluster import standing_cluster
from tests.chaos.faults import KINDS, Kind
from tests.chaos.scenes import PARTS, Outputs, Stage, outputs, unmount

SEED, FAULTS = int(os.environ.get("SEED", "0")), int(os.environ.get("FAULTS", "200"))
ONLY = [int(number) for number in os.environ.get("ONLY", "").split()]
# The faults of the tests: of each of these kinds the first, on a command that is quick.
FEW = ("driver killed", "worker killed", "disk full", "workspace read-only", "second run at the same time",
       "photo gone in mid-run")  # fmt: skip
# Those that only desra verify finds.
BITS = ("one bit turned: mask", "one bit turned: zarr chunk", "one bit turned: table of records")
# The same command again, while it says that it should be given again.
TURNS = 3
IMAGES = sum(map(len, PARTS.values()))
# Python restarts a process of its own that was killed, and this process has lost its memory.
OF_PYTHON = re.compile(
    r"Traceback \(most recent call last\):\n  File \"[^\"]*resource_tracker\.py\"(?:.*\n)+?KeyError: .*\n"
)
COMPUTED = re.compile(r"(\d+) of \d+ images, \d+ failed")


class Result(NamedTuple):
    """What came of a fault.

    Attributes:
        outcome: ``equal``, ``named``, or what is wrong.
        redone: How many images were computed again, beside those that were lacking.
        told: What was done, and what was seen.
    """

    outcome: str
    redone: int
    told: str


def kind_of(number: int) -> tuple[Kind, random.Random]:
    """Choose the kind of a fault: all kinds in turn, in an order that the seed decides."""
    turn, place = divmod(number - 1, len(KINDS))
    order = random.Random(f"{SEED} order {turn}").sample(KINDS, len(KINDS))
    return order[place], random.Random(f"{SEED} {number}")


def result_of(stage: Stage, kind: Kind, rng: random.Random) -> Result:
    """Let a fault happen, run the same command again, and compare."""
    scene, end = stage.scenes[kind.scene], stage.scenes[kind.scene].end
    stage.wanted(end)  # now, because it is made in the same place
    damage = kind.strike(stage, scene, rng)
    before = outputs(stage.workspace)
    said, wrong = damage.ended.said if damage.ended else "", list(damage.wrong)
    if damage.in_place:
        said += stage.run(["verify", "--workspace", stage.workspace, "--repair"]).said
        if scene.begin == "mined":  # a training does not make again what mining has made
            said += stage.run(stage.scenes["mine"].arguments).said
    again, codes, redone = stage.entry() == damage.entry, [], 0
    if not again and damage.in_place:  # the next command begins another turn of the cycle
        again, end = True, "turned twice"
    if not again and stage.entry() == "0002":  # a second run, which began after the first one had ended
        end = "turned twice"
    while again:
        lacking = IMAGES - finished(outputs(stage.workspace))
        ended = stage.run(scene.arguments)
        codes.append(ended.code)
        said += ended.said
        if scene.arguments[0] in ("mine", "detect"):  # a cycle tells how many it has judged in the same words
            redone += max(0, computed(ended.said) - lacking)
        again = ended.code == 1 and len(codes) < TURNS
    found, wanted = outputs(stage.workspace), stage.wanted(end)
    different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if different and damage.path is not None and not is_named(damage.path, stage, said):
        said += stage.run(["verify", "--workspace", stage.workspace]).said  # of what no command needs any more
    named = damage.path is not None and is_named(damage.path, stage, said)
    refused = bool(codes) and codes[-1] == 2
    # What a refused command has not made, or has left as it was, is no lie.
    lies = [name for name in different if not (refused and found.get(name) in (None, before.get(name)))]
    if named:
        lies = [name for name in lies if not belongs(name, damage.path, stage)]
    said = OF_PYTHON.sub("", said)
    if "Traceback" in said:
        wrong.append("a traceback: " + said[said.index("Traceback") :][:2000])
    if different and not (named and not lies):
        wrong.append(
            f"neither equal nor named: {', '.join(lies[:4])}, and {len(different)} in all differ; {said[-500:]}"
        )
    elif codes and codes[-1] != 0 and not named:
        wrong.append(f"exit code {codes[-1]}: {said[-500:]}")
    outcome = "; ".join(wrong) or ("named" if different or refused else "equal")
    late = ", too late" if damage.late else ""
    return Result(outcome, redone, f"{damage.told}{late}; codes {codes}")


def computed(said: str) -> int:
    """Return how many images a command has computed, by its last line about that."""
    found = COMPUTED.findall(said)
    return int(found[-1]) if found else 0


def finished(found: Outputs) -> int:
    """Count the images whose mask was published."""
    records = (json.loads(content) for name, content in found.items() if name.startswith("record of"))
    return sum(record["mask_key"] is not None for record in records)


def names_of(path: Path, stage: Stage) -> set[str]:
    """List the names by which a line may tell of a file: its path, its array, its image."""
    inside = path.relative_to(stage.place)
    names = {str(inside)}
    if inside.parts[:2] == ("ws", "maps"):
        names |= {str(Path(*inside.parts[:5])), Path(inside.parts[3]).stem}
    return names


def is_named(path: Path, stage: Stage, said: str) -> bool:
    """Check whether a line names a file."""
    return any(name in said for name in names_of(path, stage))


def belongs(output: str, path: Path, stage: Stage) -> bool:
    """Check whether an output is a file that was hurt or about the same image; of a photo, also a table with a row."""
    image = path.stem if path.stem.startswith("photo") else None
    ids = {row["name"]: row["id"] for row in read_manifest(Workspace(stage.workspace)).to_pylist()}
    listed = path.parent == stage.photos and output in ("failures.parquet", "regions.parquet", "split.parquet")
    about_it = image and any(word in output for word in (image, ids.get(image, image)))
    return output == os.path.relpath(path, stage.workspace) or listed or bool(about_it)


@pytest.fixture
def stage(tmp_path: Path, prefect_environment: dict[str, str]) -> Iterator[Stage]:
    """Make the place where all happens."""
    with standing_cluster(Machine(workers=2, memory="4GB"), gpus=0, key=tmp_path / "key") as dask:
        stage = Stage(tmp_path, prefect_environment, dask.environment)
        yield stage
        stage.close()


def may_mount(folder: Path) -> bool:
    """Check whether this process may mount disks."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    unmount(folder)
    return True


@pytest.mark.slow
def test_a_few_faults_are_mended_or_named(stage: Stage) -> None:
    names = FEW + BITS
    if not may_mount(stage.place):
        names = tuple(name for name in names if name not in ("disk full", "workspace read-only"))
    few = {kind.name: kind for kind in KINDS if kind.scene == "mine"}
    try_all(stage, {number: (few[name], random.Random(name)) for number, name in enumerate(names)})


@pytest.mark.faults
@pytest.mark.timeout(0)
def test_many_faults_are_mended_or_named(stage: Stage) -> None:
    try_all(stage, {number: kind_of(number) for number in ONLY or range(1, FAULTS + 1)})


def try_all(stage: Stage, faults: dict[int, tuple[Kind, random.Random]]) -> None:
    """Print a line for each fault, and a table; fail where something was neither equal nor named."""
    rows: dict[str, Counter[str]] = {}
    wrong = []
    for number, (kind, rng) in faults.items():
        began = time.monotonic()
        try:
            result = result_of(stage, kind, rng)
        except AssertionError as error:
            result = Result(str(error) or repr(error), 0, "it could not be compared")
        line = f"{number:3} seed {SEED}: {kind.name}, {kind.scene}: {result.told}: {result.outcome}"
        print(f"{line}, {result.redone} redone ({time.monotonic() - began:.0f} s)", flush=True)
        outcome = result.outcome if result.outcome in ("equal", "named") else "neither"
        rows.setdefault(kind.name, Counter()).update({"tries": 1, outcome: 1, "redone": result.redone})
        if outcome == "neither":
            wrong.append(line)
    columns = ("tries", "equal", "named", "neither", "redone")
    print(f"\n| fault | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, row in sorted(rows.items()):
        print(f"| {name} | {' | '.join(str(row[column]) for column in columns)} |")
    assert not wrong, "\n".join(wrong)
