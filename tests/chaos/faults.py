"""What goes wrong: faults of processes, disks, files, photos and people, each at a moment that a seed decides."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import psutil

from desra_core.files import is_unfinished, read_document
from tests.chaos.scenes import Ended, Scene, Stage, alive, family_of, kill, unmount, when
from tests.conftest import MODELS
from tests.served import Served, until

# What a file of a workspace is, by the pattern of its path; the first that fits counts.
CLASSES = {
    "mask": "masks/**/*.png",
    "dataset picture": "dataset/**/*.png",
    "zarr chunk": "maps/*/*/*/c/**/*",
    "zarr.json": "maps/**/zarr.json",
    "table of records": "outcomes/*.parquet",
    "manifest": "manifest.parquet",
    "journal record": "journal/*/*.json",
    "settings.json": "settings.json",
    "checkpoint": "finetunes/*/models/*.pth",
    "promoted model": "models/0*/*",
    "state of a training": "finetunes/*/state.pth",
    "training data": "finetunes/*/data/**/*.npy",
    "document of a training": "finetunes/*/*.json",
    "human mask": "human/**/*.png",
    "table of human masks": "human/manifest.parquet",
    "pools": "split.parquet",
    "judgement": "gate/judgements/*/*.json",
    "verdict": "gate/verdict.json",
    "table for readers": "*.parquet",
}


BIT, LOSS = "one bit turned", "file deleted, cut off or emptied"
_REMOUNTS = 20
# Of the last message about a served run whose process was killed.
_EXITED = "Process exited"
LOSSES = ("deleted", "cut off", "emptied")


@dataclass
class Damage:
    """What a fault has done: in words, and the file that a line has to name where one was hurt."""

    told: str
    entry: str | None  # the current model of the workspace before
    path: Path | None = None
    # Whether the file was hurt where it lies, so that only reading it again can show that.
    in_place: bool = False
    # Whether the moment had passed, because the command had ended before.
    late: bool = False
    ended: Ended | None = None
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """A kind of fault: its name, the scene that it disturbs, and the function that does it."""

    name: str
    scene: str
    strike: Strike


def disturb(
    stage: Stage,
    scene: Scene,
    rng: random.Random,
    fault: Callable[[int, Damage], None],
    *,
    alone: bool = False,
    begun: bool = False,
) -> Damage:
    """Run the command of a scene, and let a fault happen to it at some moment.

    Args:
        stage, scene: What is disturbed.
        rng: Decides the moment: when the command has made a number of files of a kind, or a while after that.
        fault: Gets the id of the process, and says in the damage what it has done.
        alone: With a Prefect server of its own.
        begun: Whether the place is set up already.
    """
    pattern = rng.choice(scene.moments)
    count = rng.randint(1, max(1, stage.count(scene.end, pattern)))
    pause = rng.choice((0.0, rng.uniform(0, 1.0)))
    if not begun:
        stage.set_up(scene.begin)
    entry = stage.entry()
    before = sum(1 for _ in stage.workspace.glob(pattern))
    count = max(count, before + 1) if before else count
    damage = Damage(f"at {count} of {pattern} + {pause:.1f} s", entry)

    def meanwhile(pid: int) -> None:
        if when(stage.workspace, pattern, count, pid):
            time.sleep(pause)
        if alive(pid):
            fault(pid, damage)
        else:
            damage.late = True

    damage.ended = (stage.run_alone if alone else stage.run)(scene.arguments, meanwhile)
    return damage


def kill_driver(stage: Stage, scene: Scene, rng: random.Random) -> Damage:
    """SIGKILL the process of the command."""
    return disturb(stage, scene, rng, lambda pid, _: kill(pid))


def kill_worker(stage: Stage, scene: Scene, rng: random.Random) -> Damage:
    """SIGKILL a worker, where there is one: in a finetune, it is the process that trains."""
    return disturb(stage, scene, rng, lambda pid, damage: _signal_worker(pid, damage, rng, signal.SIGKILL))


def kill_server(stage: Stage, scene: Scene, rng: random.Random) -> Damage:
    """SIGKILL the Prefect server of the run."""

    def fault(pid: int, damage: Damage) -> None:
        servers = _started(pid, "uvicorn")
        damage.late = not servers
        for server in servers:
            server.kill()

    return disturb(stage, scene, rng, fault, alone=True)


def stop_driver(stage: Stage, scene: Scene, rng: random.Random) -> Damage:
    """SIGSTOP the process of the command for some seconds."""

    def fault(pid: int, _: Damage) -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(rng.uniform(1, 5))
        os.kill(pid, signal.SIGCONT)

    return disturb(stage, scene, rng, fault)


def stop_worker(stage: Stage, scene: Scene, rng: random.Random) -> Damage:
    """SIGSTOP a worker for some seconds."""

    def fault(pid: int, damage: Damage) -> None:
        if worker := _signal_worker(pid, damage, rng, signal.SIGSTOP):
            time.sleep(rng.uniform(1, 5))
            with contextlib.suppress(psutil.Error):
                worker.send_signal(signal.SIGCONT)

    return disturb(stage, scene, rng, fault)


def fill_disk(stage: Stage, scene: Scene, rng: random.Random) -> Damage:
    """Leave no room on the disk of the workspace, for some seconds or to the end of the command."""
    ballast = stage.place / "ballast"

    def fault(pid: int, damage: Damage) -> None:
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        _for_a_while(pid, rng, ballast.unlink)

    with _mounted(stage.place):
        damage = disturb(stage, scene, rng, fault)
        ballast.unlink(missing_ok=True)
    return _ended(damage, "the disk is full; free some space and run again")


def make_read_only(stage: Stage, scene: Scene, rng: random.Random) -> Damage:
    """Let the workspace be read-only, for some seconds or to the end of the command."""

    def fault(pid: int, damage: Damage) -> None:
        subprocess.run(["mount", "--bind", stage.workspace, stage.workspace], check=True)
        remount = ["mount", "-o", "remount,bind,ro", stage.workspace]
        # It is refused while a file is being written.
        damage.late = not any(not subprocess.run(remount, check=False).returncode for _ in range(_REMOUNTS))
        _for_a_while(pid, rng, partial(unmount, stage.workspace))

    try:
        damage = disturb(stage, scene, rng, fault)
    finally:
        unmount(stage.workspace)
    return _ended(damage, "Read-only file system")


def start_another(stage: Stage, scene: Scene, rng: random.Random) -> Damage:
    """Start the same command again while it runs: it has to be refused."""

    def fault(pid: int, damage: Damage) -> None:
        other = stage.run_alone(scene.arguments)
        if alive(pid) and (other.code != 2 or f"process {pid}" not in other.said):
            damage.wrong.append(f"a second run was not refused: code {other.code}: {other.said[-300:]}")

    return disturb(stage, scene, rng, fault)


def hurt_meanwhile(stage: Stage, scene: Scene, rng: random.Random) -> Damage:
    """Delete, cut off or empty any file of the workspace, or turn a bit of it, while the command runs."""

    def fault(_: int, damage: Damage) -> None:
        there = [path for path in stage.workspace.rglob("*") if path.is_file() and _counts(path, stage.workspace)]
        damage.late = not there
        if there:
            with contextlib.suppress(FileNotFoundError):
                hurt(rng.choice(sorted(there)), rng.choice((BIT, *LOSSES)), damage, rng)

    return disturb(stage, scene, rng, fault)


def change_photo(stage: Stage, scene: Scene, rng: random.Random) -> Damage:
    """Put another photo in the place of one while the command runs."""
    return disturb(stage, scene, rng, lambda *_: stage.change_photo())


def take_photo(stage: Stage, scene: Scene, rng: random.Random) -> Damage:
    """Take a photo away while the command runs, and bring it back afterwards."""
    away = stage.place / "away.png"

    def fault(_: int, damage: Damage) -> None:
        damage.path = rng.choice(sorted(stage.photos.iterdir()))
        damage.path.rename(away)

    damage = disturb(stage, scene, rng, fault)
    if damage.path:
        away.rename(damage.path)
    return damage


def kill_nanny(stage: Stage, scene: Scene, rng: random.Random) -> Damage:
    """SIGKILL the nanny of a worker that was started elsewhere, and start another worker."""
    dask, file = [sys.executable, "-m"], stage.place / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    worker = [*dask, "distributed.cli.dask_worker", "--scheduler-file", file, "--nthreads", "1", "--no-dashboard"]
    stage.set_up(scene.begin)
    with contextlib.ExitStack() as stack:

        def start(command: list[object]) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(list(map(str, command)), cwd=stage.temporary, **quiet)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return process

        start([*dask, "distributed.cli.dask_scheduler", "--port", 0, "--no-dashboard", "--scheduler-file", file])
        nanny = start(worker)
        until(file.exists)

        def fault(_: int, damage: Damage) -> None:
            nanny.kill()
            start(worker)

        elsewhere = replace(scene, arguments=[*scene.arguments, "--scheduler", read_document(file)["address"]])
        return disturb(stage, elsewhere, rng, fault, begun=True)


def kill_served(stage: Stage, scene: Scene, rng: random.Random, *, whole: bool) -> Damage:
    """SIGKILL `desra serve` while it mines, or (not ``whole``) any process that it has started."""
    stage.set_up(scene.begin)
    config = stage.place / "serve.toml"
    given = {"photos": stage.photos, "workspace": stage.workspace, "mse-model": MODELS / "mse.pth",
             "gan-model": MODELS / "gan.pth", "mine-at": "never", "cycle-at": "never", "finetune-after": 0, "port": 0,
             "keep-mse": False, "workers": 1, "shard-size": 4, "min-area": "2000"}  # fmt: skip
    lines = [f"{key} = {json.dumps(value if isinstance(value, int) else str(value))}" for key, value in given.items()]
    config.write_text("\n".join(lines))
    pattern = rng.choice(scene.moments[1:])
    count, pause = rng.randint(1, stage.count(scene.end, pattern)), rng.choice((0.0, rng.uniform(0, 1.0)))
    damage = Damage(f"at {count} of {pattern} + {pause:.1f} s,", None)
    served = Served(stage.place, config)
    try:
        until(served.is_up)
        served.start("mine")
        when(stage.workspace, pattern, count, served.process.pid, lambda: bool(served.ended("")))
        time.sleep(pause)
        damage.late = bool(served.ended(""))
        if whole:
            served.stop(signal.SIGKILL)
            served = Served(stage.place, config)
            until(served.is_up)
        else:
            victim = rng.choice(family_of(served.process.pid))
            damage.told += f" {' '.join(victim.cmdline())[:90]}"
            victim.kill()
        done = ("images computed", "nothing new")
        until(lambda: any(map(served.ended, (*done, _EXITED))))
        if served.ended(_EXITED):  # the victim was the run itself: desra serve says so, and the next run goes on
            served.start("mine")
            until(lambda: any(map(served.ended, done)))
        served.stop()
        damage.wrong += [f"still runs: {process}" for process in served.processes()]
    finally:
        if served.process.poll() is None:
            served.stop()
        damage.ended = Ended(served.process.returncode, served.said())
    return damage


def hurt_afterwards(kind: str, begin: str, how: str = BIT) -> Strike:
    """Hurt a file of a kind in a stored workspace, for the next run to find."""

    def strike(stage: Stage, _: Scene, rng: random.Random) -> Damage:
        stage.set_up(begin)
        paths = sorted(path for path in stage.workspace.glob(CLASSES[kind]) if path.is_file() and path.stat().st_size)
        damage = Damage("", stage.entry())
        hurt(rng.choice(paths), rng.choice(LOSSES) if how == LOSS else how, damage, rng)
        return damage

    return strike


def hurt(path: Path, how: str, damage: Damage, rng: random.Random) -> None:
    """Delete, cut off or empty a file, or turn one bit of it; its times stay, as on a disk that goes bad."""
    before, content = path.stat(), bytearray(path.read_bytes())
    where = ""
    if how == "deleted":
        path.unlink()
    else:
        if how == BIT and content:
            place = rng.randrange(8 * len(content))
            content[place // 8] ^= 1 << place % 8
            where = f" {place} of {8 * len(content)}"
        else:
            del content[rng.randrange(len(content)) if how == "cut off" and content else 0 :]
            where = f" at {len(content)} of {before.st_size} bytes"
        with path.open("r+b") as file:  # in place, so that it is the same file
            file.write(content)
            file.truncate()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    damage.told = f"{damage.told} {path}: {how}{where}".strip()
    damage.path, damage.in_place = path, True


def _ended(damage: Damage, reason: str) -> Damage:
    """Check that a command ended well or gave a reason."""
    assert damage.ended is not None
    if damage.ended.code and (damage.ended.code not in (1, 2) or reason not in damage.ended.said):
        damage.wrong.append(f"it ended with {damage.ended.code} and without the reason: {damage.ended.said[-300:]}")
    return damage


def _signal_worker(pid: int, damage: Damage, rng: random.Random, number: int) -> psutil.Process | None:
    workers = _started(pid, "spawn_main")
    damage.late = not workers
    if not workers:
        return None
    worker = rng.choice(workers)
    with contextlib.suppress(psutil.Error):
        worker.send_signal(number)
    return worker


def _started(pid: int, word: str) -> list[psutil.Process]:
    """Wait until a command has started a process with a word in its arguments; return all of these."""
    while alive(pid):
        found = []
        for process in family_of(pid):
            with contextlib.suppress(psutil.Error):
                found += [process] if any(word in part for part in process.cmdline()) else []
        if found:
            return found
        time.sleep(0.01)
    return []


def _for_a_while(pid: int, rng: random.Random, undo: Callable[[], object]) -> None:
    """Undo a fault after some seconds, or leave it to the end of the command."""
    if rng.random() < 0.5:
        end = time.monotonic() + rng.uniform(0.5, 4)
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.05)
        undo()


@contextlib.contextmanager
def _mounted(place: Path) -> Iterator[None]:
    """Mount a small disk in a place; its content stays when it is unmounted."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
    try:
        yield
        aside = place.with_name(f"{place.name}.aside")
        shutil.copytree(place, aside, symlinks=True)
    finally:
        unmount(place)
    shutil.copytree(aside, place, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(aside)


def _counts(path: Path, workspace: Path) -> bool:
    """Check whether a file of a workspace holds anything of worth."""
    inside = path.relative_to(workspace)
    passing = inside.parts[0] in ("prefect", "tmp", "lock", "metrics.prom", "report.html") or path.name == "lock"
    return not passing and not any(is_unfinished(part) for part in inside.parts)


Strike = Callable[[Stage, Scene, random.Random], Damage]
RUNS = ("mine", "detect", "finetune", "cycle")
KINDS = [
    *(Kind("driver killed", scene, kill_driver) for scene in (*RUNS, "next cycle")),
    *(Kind("worker killed", scene, kill_worker) for scene in ("mine", "detect", "cycle")),
    Kind("training process killed", "finetune", kill_worker),
    *(Kind("Prefect server killed", scene, kill_server) for scene in RUNS),
    *(Kind("driver stopped for seconds", scene, stop_driver) for scene in RUNS),
    *(Kind("worker stopped for seconds", scene, stop_worker) for scene in RUNS),
    *(Kind("disk full", scene, fill_disk) for scene in RUNS),
    *(Kind("workspace read-only", scene, make_read_only) for scene in RUNS),
    *(Kind("second run at the same time", scene, start_another) for scene in RUNS),
    *(Kind("any file hurt in mid-run", scene, hurt_meanwhile) for scene in RUNS),
    *(Kind("photo changed in mid-run", "mine a changed photo", change_photo) for _ in range(2)),
    *(Kind("nanny killed", scene, kill_nanny) for scene in ("mine", "detect")),
    Kind("desra serve killed", "mine", partial(kill_served, whole=True)),
    *(Kind("process of desra serve killed", "mine", partial(kill_served, whole=False)) for _ in range(3)),
    *(Kind("photo gone in mid-run", scene, take_photo) for scene in ("mine", "cycle")),
] + [
    Kind(f"{BIT}: {name}" if how == BIT else LOSS, scene, hurt_afterwards(name, begin, how))
    for name, begin, scene in (
        ("mask", "mined", "mine"),
        ("mask", "detected", "detect"),
        ("dataset picture", "mined", "mine"),
        ("dataset picture", "mined", "finetune"),
        ("zarr chunk", "mined", "mine"),
        ("zarr chunk", "turned", "next cycle"),
        ("zarr.json", "mined", "mine"),
        ("table of records", "mined", "mine"),
        ("table of records", "mined", "finetune"),
        ("table of records", "detected", "detect"),
        ("manifest", "mined", "mine"),
        ("manifest", "mined", "finetune"),
        ("journal record", "half mined", "mine"),
        ("settings.json", "mined", "mine"),
        ("settings.json", "mined", "finetune"),
        ("checkpoint", "half finetuned", "finetune"),
        ("checkpoint", "half turned", "cycle"),
        ("checkpoint", "turned", "next cycle"),
        ("promoted model", "turned", "next cycle"),
        ("state of a training", "half finetuned", "finetune"),
        ("training data", "half finetuned", "finetune"),
        ("document of a training", "half finetuned", "finetune"),
        ("document of a training", "half turned", "cycle"),
        ("human mask", "corrected", "mine with human masks"),
        ("table of human masks", "corrected", "mine with human masks"),
        ("pools", "turned", "next cycle"),
        ("judgement", "half turned", "cycle"),
        ("verdict", "turned", "next cycle"),
        ("table for readers", "mined", "mine"),
    )
    for how in (BIT, LOSS)
]
