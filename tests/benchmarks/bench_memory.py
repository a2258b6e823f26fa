"""How much memory the stages take for a 16 MP pair, each in a fresh process.

Run it with ``python tests/benchmarks/run.py memory``.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import psutil
from bench_inference import models
from markdown import print_table
from memory import MEGABYTE, peak_memory
from pairs import large_pair

from desra_core.planning.plan import prepare
from desra_core.settings import CorpusSettings, Detection, Machine, Mining
from desra_core.stages import run_stage
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import image_refs, read_manifest
from desra_core.workspace.products import Record, read_shard
from tasks.shards import stages_of

SIDE = 4096
SMALL = 256


class Case(NamedTuple):
    """A kind of pair.

    ``ruined`` is all one artifact and has class labels, the most that a pair can ask for; ``mined`` is a noisy photo,
    a quarter as wide, whose pair is inferred.
    """

    name: str
    depth: int
    alpha: bool
    ruined: bool
    mined: bool = False

    @property
    def decoded(self) -> int:
        """Bytes of both images as arrays, alpha left out."""
        return 2 * SIDE * SIDE * 3 * self.depth // 8


CASES = (
    Case("8-bit RGB, 16 regions", 8, alpha=False, ruined=False),
    Case("16-bit RGBA, 16 regions", 16, alpha=True, ruined=False),
    Case("16-bit RGBA, labels, all artifact", 16, alpha=True, ruined=True),
    Case("mined 8-bit RGB", 8, alpha=False, ruined=False, mined=True),
    Case("mined 16-bit RGBA", 16, alpha=True, ruined=False, mined=True),
)


def run() -> None:
    from tasks.dask_cluster import BYTES_PER_PIXEL

    print(
        f"{SIDE}x{SIDE} px, stages as Dask runs them, each in a new process; growth since it did a {SMALL} px pair.\n"
    )
    rows: list[list[str | float]] = []
    worst = 0.0
    for case in CASES:
        with tempfile.TemporaryDirectory(prefix="desra-bench-") as name:
            _write_pairs(Path(name), case)
            for stage in ("super_resolution" if case.mined else "similarity", "mask"):
                measured = _measured_in_a_process(Path(name), stage)
                growth, each = measured["growth"], measured["growth"] / SIDE**2
                worst = max(worst, each)
                row = [growth / MEGABYTE, each, case.decoded / MEGABYTE, growth / case.decoded]
                rows.append([f"{case.name}: {stage}", measured["base"] / MEGABYTE, *row])
    headings = ["", "MB before", "peak growth MB", "bytes a pixel", "decoded pair MB", "x decoded pair"]
    print_table(headings, rows)
    verdict = "holds" if worst <= BYTES_PER_PIXEL else "IS TOO SMALL"
    print(f"\ndask_cluster.BYTES_PER_PIXEL, {BYTES_PER_PIXEL} bytes a pixel, {verdict}: the most was {worst:.1f}.")


def _write_pairs(folder: Path, case: Case) -> None:
    """The large pair, and a small one that warms the process up, in corpora of their own."""
    pair = large_pair(SIDE, depth=case.depth, alpha=case.alpha, ruined=case.ruined)
    if case.mined:
        for size, side in (("large", SIDE // 4), ("small", SMALL // 4)):
            (folder / size / "photos").mkdir(parents=True)
            assert cv2.imwrite(str(folder / size / "photos/image.png"), pair[1][:side, :side])
        return
    for size, results in (("large", pair), ("small", [result[:SMALL, :SMALL] for result in pair])):
        for role, result in zip(("mse_sr", "gan_sr"), results, strict=True):
            path = folder / size / role / "image.png"
            path.parent.mkdir(parents=True)
            assert cv2.imwrite(str(path), result)
        if case.ruined:
            (folder / size / "labels").mkdir()
            assert cv2.imwrite(str(folder / size / "labels" / "image.png"), np.full(result.shape[:2], 2, np.uint8))


def _measured_in_a_process(folder: Path, stage: str) -> dict[str, int]:
    command = [sys.executable, __file__, str(folder), stage]
    measured: dict[str, int] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return measured


def measure(folder: Path, stage: str) -> dict[str, int]:
    """Run one stage on the small pair, then on the large one, and say by how much the peak has risen.

    What a stage needs of an earlier one is in the workspace, where an earlier process left it.
    """
    first = "super_resolution" if (folder / "small/photos").exists() else "similarity"
    _run_stages(folder / "small", [first, "mask"])
    base = psutil.Process().memory_info().rss
    record = _run_stages(folder / "large", [stage])
    assert not record.failed, record.error
    return {"growth": peak_memory() - base, "base": base}


class _OneProcess:
    """What the jobs of the stages are made from, in the place of a cluster."""

    threads, max_pixels, gpus = 1, 2**40, 0

    def call(self, *_: object, **__: object) -> None:
        """Load nothing in advance."""


def _run_stages(corpus: Path, names: list[str]) -> Record:
    workspace = Workspace(corpus / "workspace")
    workspace.create()
    settings = _settings(corpus)
    _, plan, weights, _ = prepare(settings)
    specs = stages_of(settings, plan.target, weights, Machine(), _OneProcess())  # type: ignore[arg-type]
    stages = {spec.name: spec for spec in specs}
    manifest = read_manifest(workspace)
    assert manifest is not None
    (image,) = image_refs(manifest)
    record = read_shard(workspace, image.shard).get(image.id, Record(image.id))
    for name in names:
        record = run_stage(stages[name].function, image, record, workspace, stages[name].job)
    return record


def _settings(corpus: Path) -> CorpusSettings:
    if (corpus / "photos").exists():
        mse_model, gan_model = models()
        return Mining(
            photos=corpus / "photos", mse_model=mse_model, gan_model=gan_model, workspace=corpus / "workspace"
        )
    labels = corpus / "labels"
    return Detection(
        mse_sr=corpus / "mse_sr",
        gan_sr=corpus / "gan_sr",
        workspace=corpus / "workspace",
        segmenter=f"labels:{labels}" if labels.exists() else "none",
    )


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
