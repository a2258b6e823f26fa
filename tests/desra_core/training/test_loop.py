"""The finetune itself, on a CPU with a small model: steps of a few milliseconds, with all parts of a real one."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from desra_core.errors import LockedError, TransientError, UsageError
from desra_core.files import read_json, write_json
from desra_core.networks.checkpoints import load_model, read_weights
from desra_core.settings.models import Training
from desra_core.training import loop
from desra_core.training.loop import finetune
from desra_core.training.patches import Batch
from desra_core.training.plan import RunFolder, settle_precision

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="has no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
# Losses of all kinds.
EVERYTHING = {"perceptual_weight": 0.01, "keep_weight": 0.5, "mask_weight": 2.0, "pixel": "l2", "accumulate": 2}

Prepared = Callable[[Path], RunFolder]
Settings = Callable[..., Training]
Weights = dict[str, torch.Tensor]


@pytest.fixture
def run(tmp_path: Path, prepared: Prepared) -> RunFolder:
    return prepared(tmp_path / "run")


@pytest.fixture
def go(gan_model: Path, training: Settings) -> Callable[..., int]:
    """Finetune in a folder with some settings."""

    def finetuned(run: RunFolder, device: str = "cpu", threads: int = 1, **changes: Any) -> int:
        return finetune(run, gan_model, training(**changes), device, threads)

    return finetuned


def content(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def everything(run: RunFolder) -> dict[str, Weights]:
    """Read all weights that a run has saved."""
    files = sorted((run.root / "models").glob("*.pth"))
    return {f"{file.name} {kind}": weights for file in files for kind, weights in content(file).items()}


def assert_same(first: dict[str, Weights], second: dict[str, Weights]) -> None:
    assert list(first) == list(second)
    for name, weights in first.items():
        assert list(weights) == list(second[name])
        for key, value in weights.items():
            assert torch.equal(value, second[name][key]), f"{name} {key}"


def distance(first: Weights, second: Weights) -> float:
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("losses", ["l1", "gan", "everything"])
def test_a_finetune(
    run: RunFolder, go: Callable[..., int], gan_model: Path, vgg19_file: Path, losses: str, device: str
) -> None:
    changes: dict[str, Any] = {"l1": {"gan_weight": 0}, "gan": {},
                               "everything": EVERYTHING | {"perceptual": str(vgg19_file)}}[losses]  # fmt: skip
    write_json(run.document, {"parent": "gan.pth"})
    assert go(run, device, **changes) == 6
    assert [path.name for path in run.models()] == ["iteration_000003.pth", "iteration_000006.pth"]
    parent = read_weights(gan_model)
    for iteration, path in zip((3, 6), run.models(), strict=True):
        assert path == run.model(iteration)
        precision = "bfloat16" if device == "cuda" else "float32"
        told = {"parent": "gan.pth", "iteration": iteration, "precision": precision}
        document = read_json(path.with_suffix(".json"))
        assert 0 < document.pop("loss") < 1
        assert document == told
        saved = content(path)
        assert list(saved) == ["params", "params_ema"]
        assert 1e-5 < distance(saved["params"], parent) < 0.01
        assert 0 < distance(saved["params_ema"], parent) < 0.1 * distance(saved["params"], parent)
        assert load_model(path).scale == 4
        assert path.with_suffix(".discriminator.pth").exists() == (losses != "l1")
    assert run.read_losses() == []
    assert read_json(run.progress) == {
        "iteration": 6, "iterations": 6, "warmed": 3 * (losses != "l1"), "warmup": 3 * (losses != "l1"),
        "worse": content(run.state)["worse"], "losses": {},
    }  # fmt: skip


def test_batches_that_are_drawn_ahead_are_the_same() -> None:
    """Also where steps are left out, as by a run that goes on, and after batches for other purposes."""
    drawn: list[tuple[int, int]] = []

    def draw(purpose: int, step: int) -> Batch:
        drawn.append((purpose, step))
        return Batch(*(np.full((1, 3, 4, 4), 10 * purpose + step, np.float32) for _ in range(3)))

    wanted = [(1, 0), (1, 1), (0, 4), (0, 5), (2, 0), (0, 6), (3, 1), (0, 7)]
    for ahead in (False, True):
        with loop.batches(draw, "cpu", ahead=ahead) as batch:
            for purpose, step in wanted:
                assert [tensor.unique().tolist() for tensor in batch(purpose, step)] == [[10 * purpose + step]] * 3
    assert drawn[: len(wanted)] == wanted
    later = drawn[len(wanted) :]
    assert sorted(each for each in later if each in wanted) == sorted(wanted)
    assert set(later) - set(wanted) <= {(1, 2), (0, 8)}


def test_a_state_goes_on_with_another_adam(run: RunFolder, go: Callable[..., int]) -> None:
    """It says whether Adam was fused, as it is on a GPU; the device at hand decides."""
    go(run, iterations=3)
    state = content(run.state)
    for name in ("optimizer", "optimizer_d"):
        for group in state[name]["param_groups"]:
            assert group["fused"] is False
            group["fused"] = True
    torch.save(state, run.state)
    assert go(run) == 6
    assert {group["fused"] for group in content(run.state)["optimizer"]["param_groups"]} == {False}


def test_a_part_that_diverges_is_not_averaged_out() -> None:
    losses = loop._Losses(2)
    for error in (0.01, 0.3):
        losses.add("error", torch.tensor(error))
    assert losses.worst() == {"error": pytest.approx(0.3)}
    assert losses.means() == {"error": pytest.approx(0.155)}
    for value in (float("nan"), 2.0):
        losses.add("pixel", torch.tensor(value))
    assert math.isnan(losses.worst()["pixel"])


def test_a_discriminator_that_was_saved_is_taken_up(
    run: RunFolder, go: Callable[..., int], tmp_path: Path, prepared: Prepared
) -> None:
    go(run, iterations=3)
    other = prepared(tmp_path / "other")
    saved = run.model(3).with_suffix(".discriminator.pth")
    go(other, iterations=1, discriminator=saved, discriminator_features=64)
    assert read_json(other.progress)["warmup"] == 0
    before, after = (content(path)["params"] for path in (saved, other.model(1).with_suffix(".discriminator.pth")))
    assert 0 < distance(before, after) < 0.1


def test_the_loss_falls(run: RunFolder, go: Callable[..., int]) -> None:
    go(run, gan_weight=0, iterations=40, learning_rate=1e-3, batch=4, checkpoint_every=40)
    rows = run.read_losses()
    assert [row["iteration"] for row in rows] == [10, 20, 30, 40]
    assert rows[-1]["pixel"] < 0.8 * rows[0]["pixel"]


def test_the_generator_waits_for_a_new_discriminator(
    run: RunFolder, go: Callable[..., int], gan_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is stopped before the generator's first step, as by Ctrl+C."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    parent, seen = read_weights(gan_model), []
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    monkeypatch.setattr(loop.Trainer, "step", stopped)
    for warmup in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            go(run, warmup=warmup)
        state = content(run.state)
        assert (state["warmed"], state["iteration"]) == (warmup, 0)
        assert state["optimizer"]["state"] == {}
        for part in ("generator", "ema"):
            assert all(torch.equal(state[part][name], value) for name, value in parent.items())
        seen.append(state["discriminator"])
    assert any(name.endswith("weight_u") for name in seen[0])
    assert all(not torch.equal(value, seen[1][name]) for name, value in seen[0].items())


def test_a_running_mean_of_the_weights(run: RunFolder, go: Callable[..., int], gan_model: Path) -> None:
    go(run, iterations=4, checkpoint_every=1, ema=0.75)
    mean = {name: value.double() for name, value in read_weights(gan_model).items()}
    for path in run.models():
        saved = content(path)
        mean = {name: 0.75 * value + 0.25 * saved["params"][name] for name, value in mean.items()}
        for name, value in mean.items():
            torch.testing.assert_close(saved["params_ema"][name].double(), value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("ema", [0, 0.5])
def test_ema_of_zero_is_the_raw_weights(run: RunFolder, go: Callable[..., int], ema: float) -> None:
    go(run, gan_weight=0, iterations=2, ema=ema)
    saved = content(run.model(2))
    assert (distance(saved["params"], saved["params_ema"]) == 0) == (ema == 0)


@pytest.mark.parametrize("changes", [{"gan_weight": 0}, {}], ids=["l1", "gan"])
def test_parts_of_a_batch_add_up(
    go: Callable[..., int], tmp_path: Path, prepared: Prepared, demo_discriminator: Path, changes: dict[str, Any]
) -> None:
    """After one step, Adam's mean is a tenth of the gradient."""
    gradients = []
    for accumulate in (1, 2, 4):
        run = prepared(tmp_path / str(accumulate))
        go(run, iterations=1, batch=4, accumulate=accumulate, discriminator=demo_discriminator, **changes)
        moments = content(run.state)["optimizer"]["state"].values()
        gradients.append(torch.cat([moment["exp_avg"].flatten() for moment in moments]))
    for gradient in gradients[1:]:
        # Each look of the discriminator moves its spectral norm a little.
        assert (gradient - gradients[0]).norm() < (0.01 if not changes else 1e-5) * gradients[0].norm()


def simulated(rows: list[dict[str, float]], patience: int) -> int:
    """Find the end of a run with a checkpoint at each row: after `patience` rows that are not 1 % below the best."""
    best, worse = float("inf"), 0
    for row in rows:
        best, worse = (row["pixel"], 0) if row["pixel"] < 0.99 * best else (best, worse + 1)
        if worse == patience:
            return int(row["iteration"])
    return int(rows[-1]["iteration"])


def test_a_run_ends_when_its_loss_no_longer_falls(run: RunFolder, go: Callable[..., int]) -> None:
    still = {"gan_weight": 0, "learning_rate": 1e-9, "checkpoint_every": 10, "iterations": 200}
    ended = go(run, **still, patience=2)
    rows = run.read_losses()
    assert ended == simulated(rows, 2)
    assert ended < 200
    assert run.models()[-1] == run.model(ended)
    assert read_json(run.progress)["worse"] == 2
    before = {path: path.stat().st_mtime_ns for path in (*run.models(), run.state)}
    assert go(run, **still, patience=2) == ended
    assert {path: path.stat().st_mtime_ns for path in (*run.models(), run.state)} == before
    further = go(run, **still, patience=3)
    rows = run.read_losses()
    assert further == simulated(rows, 3) > ended


@pytest.mark.parametrize(("means", "worse"), [
    ([1.0], 0), ([1.0, 0.995], 1), ([1.0, 0.98], 0), ([1.0, 0.995, 0.991], 2), ([1.0, 0.995, 0.989], 0),
    ([1.0, 2.0, 3.0, 1.5], 3), ([1.0, 2.0, 0.9, 0.9], 1),
])  # fmt: skip
def test_checkpoints_that_are_no_better(means: list[float], worse: int) -> None:
    state: dict[str, Any] = {"best": None, "worse": 0}
    for mean in means:
        state["since"] = {"steps": 4, "pixel": 4 * mean}
        loop.compare_with_best(state)
    assert state["worse"] == worse
    assert state["since"] == {}


def test_an_ended_run_goes_on_with_more_iterations(
    run: RunFolder, go: Callable[..., int], tmp_path: Path, prepared: Prepared
) -> None:
    for iterations in (3, 6):
        assert go(run, iterations=iterations) == iterations
    whole = prepared(tmp_path / "whole")
    go(whole)
    assert_same(everything(run), everything(whole))


def test_a_run_keeps_its_number_of_threads(run: RunFolder, go: Callable[..., int]) -> None:
    go(run, threads=2, gan_weight=0, iterations=3)
    torch.set_num_threads(1)
    go(run, threads=1, gan_weight=0, iterations=4)
    assert torch.get_num_threads() == 2
    assert content(run.state)["threads"] == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp", ["bfloat16", pytest.param("float16", marks=gpu)])
def test_other_number_formats(
    run: RunFolder, go: Callable[..., int], gan_model: Path, vgg19_file: Path, amp: str, device: str
) -> None:
    if (device, amp) == ("cpu", "float16"):
        pytest.skip("is for GPUs")
    # In float16 the first steps may be left out, because their gradients are too large.
    for iterations in (1, 2) if amp == "bfloat16" else (3, 6):
        go(run, device, iterations=iterations, warmup=1, amp=amp, **EVERYTHING, perceptual=str(vgg19_file))
    for weights in everything(run).values():
        assert {value.dtype for value in weights.values()} == {torch.float32}
        assert all(bool(value.isfinite().all()) for value in weights.values())
    assert 1e-5 < distance(content(run.models()[-1])["params"], read_weights(gan_model)) < 0.01


def test_a_run_keeps_the_number_format_that_it_began_in(
    go: Callable[..., int], tmp_path: Path, prepared: Prepared, training: Settings
) -> None:
    """By its document the run was begun on a GPU; it goes on on a CPU."""
    begun, bfloat16, float32 = (prepared(tmp_path / name) for name in ("begun", "bfloat16", "float32"))
    write_json(begun.document, {"parent": "gan.pth"})
    assert settle_precision(begun, training(), "cuda:0") == "bfloat16"
    go(begun, iterations=3)
    go(bfloat16, iterations=3, amp="bfloat16")
    go(float32, iterations=3)
    assert_same(everything(begun), everything(bfloat16))
    assert distance(content(begun.model(3))["params"], content(float32.model(3))["params"]) > 0
    assert read_json(begun.model(3).with_suffix(".json"))["precision"] == "bfloat16"


def test_float16_goes_on_on_a_gpu_alone(go: Callable[..., int], run: RunFolder) -> None:
    write_json(run.document, {"parent": "gan.pth", "precision": "float16"})
    with pytest.raises(UsageError, match=r"--amp: is float16.*; go on with it on a GPU, or name another --output"):
        go(run)


def test_a_run_with_more_iterations_is_not_warmed_up_again(run: RunFolder, go: Callable[..., int]) -> None:
    for iterations, warmed in ((10, 2), (20, 2)):
        go(run, preset="cpu", warmup=None, iterations=iterations, checkpoint_every=5)
        progress = read_json(run.progress)
        assert (progress["iteration"], progress["warmed"], progress["warmup"]) == (iterations, warmed, warmed)


LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 9.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


@pytest.mark.parametrize(("changes", "remedy"), [
    ({"batch": 6, "accumulate": 2}, "3 patches of 32 px at a time need more memory than there is (TORCH); raise "
     "--accumulate to 3, with which the run goes on, or begin another run with a smaller --patch or --batch"),
    ({"batch": 2, "accumulate": 2}, "1 patches of 32 px at a time need more memory than there is (TORCH); begin "
     "another run with a smaller --patch or --batch"),
    ({"batch": 1}, "begin another run with a smaller --patch"),
], ids=["parts", "most parts", "one"])  # fmt: skip
def test_a_lack_of_memory_names_its_remedy(
    run: RunFolder,
    go: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    remedy: str,
) -> None:
    """This holds in warming up and in training, whatever lacks memory; the run goes on with more parts."""
    changes |= {"iterations": 2, "warmup": 1}
    for error, part in itertools.product(LACKS, ("warm_up", "step")):

        def failing(*_: object, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(loop.Trainer, part, failing)
            with pytest.raises(UsageError) as told:
                go(run, **changes)
        assert str(told.value).startswith("--batch: ")
        assert str(told.value).endswith(remedy.replace("TORCH", str(error)))
    assert go(run, **changes | {"accumulate": changes["batch"]}) == 2


def test_other_errors_of_a_gpu_are_not_changed(
    run: RunFolder, go: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(loop.Trainer, "step", failing)
    with pytest.raises(torch.AcceleratorError):
        go(run)


@gpu
@pytest.mark.parametrize("devices", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_another_device(
    run: RunFolder,
    go: Callable[..., int],
    gan_model: Path,
    tmp_path: Path,
    prepared: Prepared,
    devices: tuple[str, str],
) -> None:
    for iterations, device in zip((3, 6), devices, strict=True):
        go(run, device, iterations=iterations, amp="float32")
    whole = prepared(tmp_path / "whole")
    go(whole, amp="float32")
    found, wanted, parent = (
        torch.cat([value.flatten() for value in weights.values()])
        for weights in (content(run.model(6))["params"], content(whole.model(6))["params"], read_weights(gan_model))
    )
    assert (found - wanted).norm() < 0.2 * (wanted - parent).norm()


def stop(go: Callable[..., int], run: RunFolder, **changes: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        go(run, **changes)
    assert caught.value.subject == str(run.root)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy.endswith("; start another run with a lower --learning-rate")
    return caught.value


@pytest.mark.parametrize("changes", [{"learning_rate": 0.03}, {"learning_rate": 1e4}, {"learning_rate": 0.03,
                                     "checkpoint_every": 100}], ids=str)  # fmt: skip
def test_a_run_that_diverges_at_once(run: RunFolder, go: Callable[..., int], changes: dict[str, Any]) -> None:
    """Diverged weights are never saved as a model."""
    error = (
        stop(go, run, gan_weight=0, checkpoint_every=1, **changes) if len(changes) == 1 else stop(go, run, **changes)
    )
    assert error.reason.startswith(("the mean absolute error has grown to ", "the pixel loss is not finite"))
    assert error.remedy.startswith("no model had been saved; ")
    assert run.models() == []


def spoil(run: RunFolder, part: str) -> None:
    """Make the next step of a run go wrong: its losses, or its result."""
    state = content(run.state)
    if part == "optimizer":
        state["optimizer"]["state"][0]["exp_avg"].fill_(1e9)
    else:
        next(iter(state[part].values()))[0] = float("nan")
    torch.save(state, run.state)


@pytest.mark.parametrize(("part", "reason", "checkpoint_every"), [
    ("generator", "the pixel loss is not finite", 3),
    ("discriminator", "the gan loss is not finite", 3),
    ("optimizer", "the mean absolute error has grown to ", 3),
    ("optimizer", "the mean absolute error has grown to ", 1),
    pytest.param("generator", "the pixel loss is not finite", 1, marks=pytest.mark.slow),
    pytest.param("discriminator", "the gan loss is not finite", 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_that_goes_wrong_later(
    run: RunFolder, go: Callable[..., int], part: str, reason: str, checkpoint_every: int
) -> None:
    go(run, iterations=3, checkpoint_every=checkpoint_every)
    models = everything(run)
    spoil(run, part)
    error = stop(go, run, iterations=9, checkpoint_every=checkpoint_every)
    assert error.reason.startswith(reason)
    assert error.remedy.startswith(f"the last good model is {run.model(3)}; ")
    assert torch.load(run.state, weights_only=True)
    assert_same(everything(run), models)
    load_model(run.model(3))


def test_heavy_masks_are_no_divergence(run: RunFolder, go: Callable[..., int]) -> None:
    assert go(run, gan_weight=0, iterations=2, mask_weight=1000, mask_share=1) == 2


def test_a_damaged_state(run: RunFolder, go: Callable[..., int]) -> None:
    go(run, iterations=1)
    for damage in (b"", b"PK\x03\x04", bytes(5000), run.state.read_bytes()[:-1000]):
        run.state.write_bytes(damage)
        with pytest.raises(UsageError) as caught:
            go(run)
        assert str(caught.value) == f"{run.state}: is damaged; delete it to start this training again"
    run.state.unlink()
    assert go(run, iterations=2) == 2


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(run: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Start another process that holds the run."""
    run.root.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLDER, str(run.root / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused(run: RunFolder, go: Callable[..., int], holder: subprocess.Popen[str]) -> None:
    with pytest.raises(LockedError) as caught:
        go(run)
    assert str(caught.value) == f"{run.root}: is in use by another training; wait until it has ended"
    assert not run.state.exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert go(run) == 6


def test_half_written_files_of_a_killed_run_are_deleted(run: RunFolder, go: Callable[..., int]) -> None:
    go(run, iterations=3)
    left = [run.root / ".0123.unfinished", run.root / "models" / ".4567.unfinished"]
    for path in left:
        path.write_bytes(b"half")
    go(run, iterations=3)
    assert not any(path.exists() for path in left)
    assert run.models() == [run.model(3)]


def test_a_folder_that_cannot_be_made(tmp_path: Path, go: Callable[..., int]) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TransientError, match="cannot be written"):
        go(RunFolder(tmp_path / "file" / "run"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # the caught error still has arrays open


def fill(disk: Path, *, but: int) -> Path:
    """Fill a disk up to some free bytes."""
    status = os.statvfs(disk)
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(status.f_bavail * status.f_frsize - but))
    return ballast


@pytest.fixture(scope="module")
def undisturbed(
    gan_model: Path, prepared: Prepared, training: Settings, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """A finetune of 12 iterations."""
    run = prepared(tmp_path_factory.mktemp("undisturbed") / "run")
    finetune(run, gan_model, training(iterations=12), "cpu", 1)
    return run


@pytest.mark.parametrize(("free", "subject"), [
    (0, ""), (400_000, "models/iteration_000006.pth"), (1_500_000, "state.pth"),
])  # fmt: skip
def test_a_full_disk(
    small_disk: Path, go: Callable[..., int], prepared: Prepared, undisturbed: RunFolder, free: int, subject: str
) -> None:
    run = prepared(small_disk / "run")
    go(run, iterations=3)
    before = everything(run)
    ballast = fill(small_disk, but=free)
    with pytest.raises(TransientError) as caught:
        go(run, iterations=12)
    assert caught.value.subject == str(run.root / subject)
    assert "\n" not in str(caught.value)
    assert "free some space" in caught.value.remedy
    assert torch.load(run.state, weights_only=True)["iteration"] == 3
    assert_same({name: weights for name, weights in everything(run).items() if name in before}, before)
    assert not list(run.root.rglob("*.unfinished"))
    ballast.unlink()
    go(run, iterations=12)
    assert_same(everything(run), everything(undisturbed))
    assert run.read_losses() == undisturbed.read_losses()


def test_the_files_of_a_run(run: RunFolder, go: Callable[..., int]) -> None:
    go(run, iterations=10, checkpoint_every=10, keep_weight=0.1)
    names = {path.name for path in run.root.iterdir()}
    assert names == {"data", "state.pth", "losses.json", "progress.json", "models", "tensorboard", "lock"}
    (row,) = run.read_losses()
    assert list(row) == ["iteration", "pixel", "keep", "gan", "discriminator_real", "discriminator_fake"]
    assert read_json(run.progress)["losses"] == row
    assert all(np.isfinite(list(row.values())))
    assert sorted(path.name for path in (run.root / "models").iterdir()) == [
        "iteration_000010.discriminator.pth", "iteration_000010.json", "iteration_000010.pth",
    ]  # fmt: skip
