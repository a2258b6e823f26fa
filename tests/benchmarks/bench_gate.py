"""What rounds save in the gate: the same candidates judged in rounds, and on all held-out images.

Ten candidates stand in for the raw and EMA weights of five checkpoints: the small GAN model moved towards its MSE twin
in small to large steps. The raw weights have moved twice as far as the EMA weights, and have noise. Everything else is
real: mining, photos, networks, judgements.
Run it with ``python tests/benchmarks/run.py gate``.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import torch
from markdown import print_table

from deployments.commands.demo import make_photos
from desra_core.gate.comparison import decide_and_publish, plan_comparison
from desra_core.gate.criteria import Verdict
from desra_core.gate.judge import CONTROL, judge_stage
from desra_core.networks.checkpoints import read_weights
from desra_core.planning.plan import target_of
from desra_core.settings.models import Comparing
from desra_core.stages import StageJob
from desra_core.workspace import Workspace

# The side of a photo, cut from those of the demo.
SIDE = 56
STEPS = (0.1, 0.2, 0.3, 0.4, 0.5)
MODELS = Path(__file__).resolve().parents[1] / "models"
# Such candidates lose much detail for what they remove. With the usual limit, none of them would pass.
LIMITS = {"max_detail_loss": 0.4}


def run() -> None:
    with tempfile.TemporaryDirectory(prefix="desra-bench-") as name:
        folder = Path(name)
        _cut_photos(folder)
        models = [f"--{kind}-model={MODELS / kind}.pth" for kind in ("mse", "gan")]
        mine = ["mine", str(folder / "photos"), *models, f"--workspace={folder / 'ws'}", "--min-area=400"]
        subprocess.run([sys.executable, "-m", "deployments.cli", *mine], check=True, capture_output=True)
        _save_candidates(folder / "run" / "models")
        _judged(folder, rounds=True, held_out=1, clean=1)  # loads and compiles what both need
        rows, verdicts = [], []
        for rounds in (False, True):
            verdict, calls, seconds = _judged(folder, rounds=rounds, **LIMITS)
            rows.append(
                ["in rounds" if rounds else "on all images", calls, seconds, str(verdict.best), verdict.outcome]
            )
            verdicts.append(verdict)
        whole, parts = rows
        rows.append(["rounds / all", float(parts[1]) / float(whole[1]), float(parts[2]) / float(whole[2]), "", ""])
        control = verdicts[0].control
        print(f"{len(verdicts[0].scores)} candidates, {control.images} held-out images, {control.clean_images} of them "
              f"clean, with {control.regions} regions.\n")  # fmt: skip
        print_table(["judged", "candidates x images", "CPU s", "best", "verdict"], rows)
        assert (whole[3], verdicts[0].reasons) == (parts[3], verdicts[1].reasons)


def _cut_photos(folder: Path) -> None:
    make_photos(folder / "whole")
    (folder / "photos").mkdir()
    for path in sorted((folder / "whole").iterdir()):
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        for top in range(0, pixels.shape[0] - SIDE + 1, SIDE):
            for left in range(0, pixels.shape[1] - SIDE + 1, SIDE):
                part = pixels[top : top + SIDE, left : left + SIDE]
                cv2.imwrite(str(folder / "photos" / f"{path.stem}-{top}-{left}.png"), part)


def _save_candidates(folder: Path) -> None:
    folder.mkdir(parents=True)
    gan, mse = (read_weights(MODELS / f"{kind}.pth") for kind in ("gan", "mse"))
    torch.manual_seed(0)
    for number, step in enumerate(STEPS, 1):
        ema, raw = ({name: gan[name] + (mse[name] - gan[name]) * moved for name in gan} for moved in (step, 2 * step))
        raw = {name: value + 0.1 * step * torch.randn_like(value) * value.std() for name, value in raw.items()}
        torch.save({"params": raw, "params_ema": ema}, folder / f"iteration_{number:06d}.pth")


def _judged(folder: Path, **settings: float) -> tuple[Verdict, int, float]:
    """Judge in a copy of the workspace; return the verdict, the judgements of candidates, and CPU seconds."""
    workspace = Workspace(Path(shutil.copytree(folder / "ws", folder / "copy")))
    with workspace.locked():
        comparison = plan_comparison(Comparing(workspace=workspace.root, after=folder / "run", **settings))
        _, weights = target_of(comparison.corpus)
        job = StageJob(comparison.corpus, comparison.target, weights, comparison.key, "cpu", 256, 1, 2**26)
        started, calls = time.process_time(), 0
        for each in comparison.rounds():
            for image, names in comparison.by_networks(each.missing):
                judge_stage(image, names, workspace, comparison, job)
                calls += len(set(names) - {CONTROL})
        seconds = time.process_time() - started
        verdict = decide_and_publish(comparison)
    shutil.rmtree(workspace.root)
    return verdict, calls, seconds
