"""What is disturbed: commands over a small corpus, the workspaces that they begin with, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import cv2
import psutil
import torch

from deployments.serving.connection import CONSOLE
from desra_core.errors import DesraError
from desra_core.files import digest, read_document
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import StoredArray
from desra_core.workspace.manifest import read_manifest
from desra_core.workspace.products import read_records
from tests.conftest import MODELS, desra_command
from tests.fork_server import ForkServer

# Top and left of parts of 64x48 px. Of their results, some have artifacts and some are clean.
PARTS = {
    "motorcycle_left.png": ((0, 180), (0, 450), (180, 270), (300, 0), (300, 90), (360, 0), (360, 450), (420, 270),
                            (420, 360), (60, 0)),
    "chelsea.png": ((240, 180), (60, 180), (60, 360), (240, 90)),
}  # fmt: skip
CHANGED = "photo02"
COMMON = ("--shard-size", 4, "--min-area", 2000)
# At this rate artifacts are left, so that another turn of a cycle has something to train on.
FINETUNE = ("--preset", "cpu", "--iterations", 12, "--checkpoint-every", 4, "--patch", 64, "--batch", 2, "--images", 3,
            "--discriminator-features", 4, "--warmup", 2, "--learning-rate", 1e-5)  # fmt: skip
OPEN_GATE = ("--min-removal", 0, "--max-detail-loss", 1)
PATIENCE = 1200.0  # seconds: a command that takes longer hangs

# The files that a command makes, roughly in this order: the moments to disturb it at.
MINING = ("lock", "manifest.parquet", "journal/*/*.json", "masks/*.png", "maps/*/*/*", "outcomes/*.parquet",
          "regions.parquet")  # fmt: skip
TRAINING = ("finetunes/*/data/*", "finetunes/*/progress.json", "finetunes/*/state.pth", "finetunes/*/models/*.pth")
JUDGING = ("gate/candidates/*.pth", "gate/judgements/*/*.json", "gate/verdict.json", "models/*")

# Outputs that are compared byte for byte; arrays, weights, records and the verdict are compared by their values.
FILES = ("masks/**/*.png", "dataset/**/*.png", "human/**/*.png", "split.parquet", "regions.parquet",
         "failures.parquet", "dataset/manifest.parquet", "human/manifest.parquet", "finetunes/*/losses.json",
         "models/current/model.pth")  # fmt: skip

# The content of each output, by a path.
Outputs = dict[str, str]
Meanwhile = Callable[[int], object]


@dataclass(frozen=True)
class Scene:
    """A command that is disturbed, and the names of stored workspaces that it begins with and leaves undisturbed."""

    arguments: list[object]
    begin: str | None  # None: a new workspace
    end: str
    moments: tuple[str, ...]


class Ended(NamedTuple):
    """A command that has ended: its exit code, and all that it printed."""

    code: int
    said: str


class Stage:
    """A corpus, workspaces over it, and the commands that are disturbed.

    All happens in one place, so that paths are the same in every workspace.

    Args:
        folder: An empty folder.
        environment: The environment of the commands, with a Prefect server.
        standing: Variables with which a command finds workers that stand ready, which is quicker.
    """

    def __init__(self, folder: Path, environment: dict[str, str], standing: dict[str, str]) -> None:
        self.place = folder / "place"
        self.workspace, self.photos = self.place / "ws", self.place / "photos"
        self.stored = folder / "stored"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        # Other trainings on this machine have their lock elsewhere. No command can silence a Prefect that the fork
        # server has imported already.
        self.environment = environment | {"TMPDIR": str(self.temporary), CONSOLE: "CRITICAL"}
        self._standing = standing
        self._forks = ForkServer(self.environment)
        self._wanted: dict[str, Outputs] = {}
        over = ["--workspace", self.workspace]
        models = ["--mse-model", MODELS / "mse.pth", "--gan-model", MODELS / "gan.pth"]
        mine = ["mine", self.photos, *models, *over, *COMMON, "--workers", 2]
        pairs = ["--mse-sr", self.stored / "pairs/mse_sr", "--gan-sr", self.stored / "pairs/gan_sr"]
        detect = ["detect", *pairs, *over, *COMMON, "--workers", 1]
        finetune = ["finetune", *over, *FINETUNE]
        cycle = ["cycle", self.photos, *models, *over, *COMMON, "--workers", 1, *FINETUNE, *OPEN_GATE]
        self.scenes = {
            "mine": Scene(mine, None, "mined", MINING),
            "detect": Scene(detect, None, "detected", MINING),
            "finetune": Scene(finetune, "mined", "finetuned", TRAINING),
            "cycle": Scene(cycle, None, "turned", (*MINING, *TRAINING, *JUDGING)),
            "next cycle": Scene(cycle, "turned", "turned twice", (*TRAINING, *JUDGING)),
            "mine with human masks": Scene(mine, "corrected", "corrected", MINING),
            "mine a changed photo": Scene(mine, None, "changed", MINING),
        }
        # How the stored workspaces are made: from which one, and by which steps.
        self._recipes: dict[str, tuple[str | None, list[Callable[[], object]]]] = {
            scene.end: (scene.begin, [partial(self.succeed, scene.arguments)])
            for scene in (self.scenes[name] for name in ("mine", "detect", "finetune", "cycle", "next cycle"))
        } | {
            "pairs": (None, [partial(self.succeed, [*mine, "--keep", "all"])]),
            "corrected": ("mined", [self._correct, partial(self.succeed, mine)]),
            "changed": (None, [self.change_photo, partial(self.succeed, mine)]),
            "half mined": (None, [partial(self._cut_off, mine, "journal/*/*.json", 3)]),
            "half finetuned": ("mined", [partial(self._cut_off, finetune, "finetunes/*/models/*8.pth", 1)]),
            "half turned": (None, [partial(self._cut_off, cycle, "gate/judgements/*/*.json", 2)]),
        }

    def close(self) -> None:
        """End the processes of the stage."""
        self._forks.close()

    def set_up(self, stored: str | None) -> None:
        """Put the photos, and a stored workspace if one is named, into the place."""
        if stored:
            self._store(stored)
        unmount(self.workspace)
        shutil.rmtree(self.place, ignore_errors=True)
        _write_photos(self.photos)
        if stored:
            shutil.copytree(self.stored / stored, self.workspace, symlinks=True)

    def run(self, arguments: list[object], meanwhile: Meanwhile | None = None) -> Ended:
        """Run a command to its end; ``meanwhile`` is called with its process id.

        What nobody disturbs has the standing workers; trainings have workers of their own in any case.
        """
        ready = meanwhile is None and arguments[0] in ("mine", "detect", "verify")
        environment = self._standing if ready else {}
        meanwhile = meanwhile or (lambda _: None)
        done = self._forks.run(*map(str, arguments), environment=environment, meanwhile=meanwhile)
        return Ended(done.returncode, done.stdout + done.stderr)

    def run_alone(self, arguments: list[object], meanwhile: Meanwhile = lambda _: None) -> Ended:
        """Run a command to its end in a process and with a Prefect server of its own."""
        environment = {name: value for name, value in self.environment.items() if not name.startswith("PREFECT_")}
        with tempfile.TemporaryFile() as said:
            with subprocess.Popen(desra_command(*arguments), env=environment, stdout=said, stderr=said) as process:
                meanwhile(process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)
                process.kill()
            said.seek(0)
            return Ended(process.returncode, said.read().decode(errors="replace"))

    def succeed(self, arguments: list[object]) -> None:
        """Run a command that has to end well."""
        ended = self.run(arguments)
        assert ended.code == 0, ended.said

    def wanted(self, stored: str) -> Outputs:
        """Return the outputs of a stored workspace."""
        if stored not in self._wanted:
            self.set_up(stored)
            self._wanted[stored] = outputs(self.workspace)
        return self._wanted[stored]

    def count(self, stored: str, pattern: str) -> int:
        """Count the files of a pattern in a stored workspace; journals are not there any more, so suppose some."""
        self._store(stored)
        return sum(1 for _ in (self.stored / stored).glob(pattern)) or 6

    def entry(self) -> str | None:
        """Return the name of the workspace's current model, None where none was promoted."""
        with contextlib.suppress(OSError):
            return os.readlink(self.workspace / "models/current")
        return None

    def change_photo(self) -> None:
        """Put another photo in the place of one."""
        path = self.photos / f"{CHANGED}.png"
        assert cv2.imwrite(str(path), cv2.imread(str(path))[::-1])

    def _store(self, stored: str) -> None:
        """Make a stored workspace unless it is there."""
        if (self.stored / stored).exists():
            return
        begin, steps = self._recipes[stored]
        if stored == "detected":
            self._store("pairs")
        self.set_up(begin)
        for step in steps:
            step()
        self.stored.mkdir(exist_ok=True)
        (self.workspace / "dataset" if stored == "pairs" else self.workspace).rename(self.stored / stored)

    def _correct(self) -> None:
        """Draw a rectangle instead of the regions of one image, and nothing instead of those of another."""
        exported = self.place / "exported"
        self.succeed(["export", "--workspace", self.workspace, "--format", "labelme", "--output", exported])
        corners = [[40.0, 30.0], [140.0, 100.0]]
        drawn = {"label": "artifact", "shape_type": "rectangle", "points": corners, "group_id": None, "flags": {}}
        files = [path for path in sorted(exported.rglob("*.json")) if "shapes" in json.loads(path.read_bytes())]
        for path, shapes in zip(files, ([drawn], []), strict=False):
            path.write_text(json.dumps(json.loads(path.read_bytes()) | {"shapes": shapes}))
        self.succeed(["import", "labelme", exported, "--workspace", self.workspace])

    def _cut_off(self, arguments: list[object], pattern: str, count: int) -> None:
        """Kill a command when it has made so many files of a pattern."""
        ended = self.run(arguments, lambda pid: when(self.workspace, pattern, count, pid) and kill(pid))
        assert ended.code == -signal.SIGKILL, ended.said


def when(workspace: Path, pattern: str, count: int, pid: int, has_ended: Callable[[], bool] = lambda: False) -> bool:
    """Wait until a process has made so many files of a pattern; False where it ends before."""
    while alive(pid) and not has_ended():
        if sum(1 for _ in workspace.glob(pattern)) >= count:
            return True
        time.sleep(0.003)
    return False


def alive(pid: int) -> bool:
    """Check whether a process runs."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def kill(pid: int) -> None:
    """Kill a process, and wait until all that it has started has ended."""
    family = family_of(pid)
    os.kill(pid, signal.SIGKILL)
    _, left = psutil.wait_procs(family, timeout=60)
    assert not left, f"something of the killed command goes on: {left}"


def family_of(pid: int) -> list[psutil.Process]:
    """List the processes that a process has started; none where it has ended."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def unmount(place: Path) -> None:
    """Unmount what is mounted in a place, if anything is."""
    if f" {place} " in Path("/proc/self/mounts").read_text():
        subprocess.run(["umount", "-l", place], check=True)


def outputs(root: Path) -> Outputs:
    """Read what a workspace holds for its users, and what later runs rest on; times are left out."""
    workspace = Workspace(root)
    found = {}
    for path in (path for pattern in FILES for path in root.glob(pattern)):
        found[str(path.relative_to(root))] = _told(path, path.read_bytes)
    for path in root.glob("finetunes/*/models/*.pth"):
        found[str(path.relative_to(root))] = _told(path, partial(_weights, path))
    with contextlib.suppress(OSError, DesraError):
        manifest = read_manifest(workspace)
        names = {row["id"]: row["name"] for row in manifest.filter(manifest["present"]).to_pylist()}
        for path in (path for image_id in names for path in workspace.group(image_id).glob("*/")):
            found[str(path.relative_to(root))] = _told(path, lambda path=path: StoredArray(path).whole().tobytes())
        for record in read_records(workspace).to_pylist():
            if record["id"] in names:
                del record["seconds"]
                found[f"record of {names[record['id']]}"] = json.dumps(record)
    if workspace.verdict.exists():
        document = read_document(workspace.verdict)
        for name in ("verdict", "before", "best"):
            found[f"{workspace.verdict.relative_to(root)}: {name}"] = json.dumps(document.get(name))
    return found


def _told(path: Path, read: Callable[[], bytes]) -> str:
    try:
        return digest(read())
    except Exception as error:  # noqa: BLE001 - whatever it is, the content is not the one that was wanted
        return f"cannot be read: {type(error).__name__}"


def _weights(path: Path) -> bytes:
    """Read the tensors of a checkpoint, whose file has other bytes each time."""
    read = torch.load(path, weights_only=True)
    tensors = {f"{kind} {name}": value for kind, each in read.items() for name, value in each.items()}
    return b"".join(name.encode() + value.numpy().tobytes() for name, value in sorted(tensors.items()))


def _write_photos(folder: Path) -> None:
    """Write the photos of the corpus."""
    folder.mkdir(parents=True)
    parts = [(source, *corner) for source, corners in PARTS.items() for corner in corners]
    for number, (source, top, left) in enumerate(parts):
        photo = cv2.imread(str(resources.files("skimage") / "data" / source))
        assert cv2.imwrite(str(folder / f"photo{number:02d}.png"), photo[top : top + 48, left : left + 64])
