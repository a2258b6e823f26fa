"""Everything that only a GPU can show, as one page of tables, in about eight minutes: ``make gpu``.

For a machine with one GPU, its own torch and no network: what else it lacks comes as wheels, as CONTRIBUTING.md says.
A part that fails or finds no time left says so in its place, and the others go on. With ``--device cpu`` all parts run
on a small scale, which shows that the script works and nothing about a GPU.
"""

import argparse
import contextlib
import io
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow.compute as pc
import torch
from bench_inference import _WEIGHTS, _photo, _psnr, plain_loop
from markdown import print_table
from torch.utils.flop_counter import FlopCounterMode

from desra_core.networks.checkpoints import Engine, load_model, spandrel
from desra_core.networks.super_resolution import super_resolve
from desra_core.settings.models import Training
from desra_core.workspace import Workspace
from desra_core.workspace.products import read_records

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 5
THREADS = (3, 8, 16)
# How networks may compute: the number format of autocast, the memory format, and whether float32 is rounded to TF32.
FORMATS = {
    "float32 NCHW": (torch.float32, torch.contiguous_format, "ieee"),
    "float32 NHWC": (torch.float32, torch.channels_last, "ieee"),
    "tf32 NHWC": (torch.float32, torch.channels_last, "tf32"),
    "bfloat16 NHWC": (torch.bfloat16, torch.channels_last, "ieee"),
    "float16 NHWC": (torch.float16, torch.channels_last, "ieee"),
}
# A command of desra whose workers with a GPU have a number of threads of their own.
_WITH_THREADS = """
import os, sys, tasks.dask_cluster as cluster
usual, threads = cluster.share_of, int(sys.argv.pop(1))
def share_of(machine, base_bytes, gpus, pixels=0):
    if not gpus:
        return usual(machine, base_bytes, gpus, pixels)
    workers = max(1, len(os.sched_getaffinity(0)) - threads)
    memory = int(cluster.MEMORY_LIMIT * 0.8 / (workers + threads))
    share = usual(machine.model_copy(update={"workers": workers}), base_bytes, gpus, pixels)
    return share._replace(threads=1, memory=memory, gpu_threads=threads)
cluster.share_of = share_of
from deployments.cli import run_as_process
run_as_process()
"""


class Scale(NamedTuple):
    """How large the measurements are."""

    device: str
    photo: int  # side of the photo that is enlarged, px
    matrix: int  # side of the matrices whose product is the machine's rate
    photos: int  # photos to mine, of ``mined`` px a side
    mined: int


FULL = Scale("cuda", photo=1024, matrix=8192, photos=96, mined=512)
SMALL = Scale("cpu", photo=96, matrix=512, photos=4, mined=64)


def networks(folder: Path) -> dict[str, Path]:
    """The GAN models: Real-ESRGAN's own where they are present, else untrained ones of the same shape."""
    real = {
        "RRDBNet": _WEIGHTS / "RealESRGAN_x4plus.safetensors",
        "SRVGGNetCompact": _WEIGHTS / "realesr-general-x4v3.pth",
    }
    if all(path.exists() for path in real.values()):
        return real
    spandrel()  # with what its imports need here
    from spandrel.architectures.Compact import Compact
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    made = {
        "RRDBNet": ESRGAN(num_filters=64, num_blocks=23, scale=4),
        "SRVGGNetCompact": Compact(num_feat=64, num_conv=32, upscale=4, act_type="prelu"),
    }
    for name, network in made.items():
        torch.save({"params": network.state_dict()}, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in made}


def cuda_tests(scale: Scale, models: dict[str, Path], folder: Path) -> None:
    """All tests that are skipped without a GPU."""
    choice = ["-m", "slow or not slow", "-k", "cuda or gpu", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", "-q", *choice, "tests/desra_core/networks", "tests/desra_core/training"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print("\n".join([*failed, (done.stdout.splitlines() or [done.stderr[-300:]])[-1]]))


def formats(scale: Scale, models: dict[str, Path], folder: Path) -> None:
    """One window of each network in each format: how fast, how exact, which share of the machine's matrix rate."""
    rows = []
    for name, path in models.items():
        model = load_model(path, scale.device)
        side = min(model.traits.tile, scale.photo)
        values = torch.from_numpy(_photo(0, (side, side))).permute(2, 0, 1)[None].float().div(255).to(scale.device)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.network(values)
        exact, first = None, 0.0
        for kind, (dtype, layout, rounding) in FORMATS.items():
            network = model.network.to(memory_format=layout)
            with (
                torch.inference_mode(),
                _rounded(rounding),
                torch.autocast(scale.device, dtype, enabled=dtype.itemsize < 4),
            ):
                given = values.contiguous(memory_format=layout)
                seconds = _timed(partial(network, given), scale.device)
                result = network(given).float().clamp(0, 1)
                rate = _matrix_rate(scale, dtype)
            exact, first = (result, seconds) if exact is None else (exact, first)
            error = float((result - exact).square().mean())
            decibels = "" if not error else f"{-10 * math.log10(error):.1f}"
            share = counter.get_total_flops() / seconds / rate
            rows.append([f"{name} {side} px: {kind}", 1 / seconds, first / seconds, decibels, f"{100 * share:.0f} %"])
        model.network.to(memory_format=torch.channels_last)
    print_table(["", "windows/s", "x float32 NCHW", "dB to it", "of the matrix rate"], rows)


def whole_photos(scale: Scale, models: dict[str, Path], folder: Path) -> None:
    """A photo by desra and by the plain loop, one tile at a time."""
    photo, rows = _photo(1, (scale.photo, scale.photo)), []
    engines: tuple[Engine, ...] = ("float32", "bfloat16")
    for name, path in models.items():
        model = load_model(path, scale.device)
        plain_seconds, plain = _timed_result(lambda model=model: plain_loop(model, photo), scale.device)
        rows.append([f"{name}: plain loop, float32", 1 / plain_seconds, 1.0, "", _peak(scale.device)])
        for precision in engines:
            own = load_model(path, scale.device, precision)
            seconds, result = _timed_result(lambda own=own: super_resolve(own, photo).pixels, scale.device)
            row = [plain_seconds / seconds, f"{_psnr(result, plain):.1f}", _peak(scale.device)]
            rows.append([f"{name}: desra, {precision}", 1 / seconds, *row])
    print_table([f"{scale.photo} px a side", "photos/s", "x plain loop", "dB to it", "peak MB on the device"], rows)


def mining(scale: Scale, models: dict[str, Path], folder: Path) -> None:
    """The whole of ``desra mine`` with some numbers of threads per GPU, against the inference in it."""
    photos = folder / "photos"
    photos.mkdir()
    for index in range(scale.photos):
        assert cv2.imwrite(str(photos / f"{index:03d}.jpg"), _photo(index, (scale.mined, scale.mined))[:, :, ::-1])
    rows = []
    for threads in THREADS if scale.device == "cuda" else THREADS[:1]:
        with _busy_share(scale.device) as busy:
            seconds = _mine(scale.device, photos, models["RRDBNet"], folder / f"ws{threads}", threads)
            share = busy()
        spent = read_records(Workspace(folder / f"ws{threads}"), ["seconds"])["seconds"].combine_chunks()
        inference = pc.sum(pc.map_lookup(spent, "inference", "first")).as_py()
        rows.append([str(threads), seconds, inference, seconds / inference, share])
    print_table(["threads per GPU", "seconds, all", "inference, waiting included", "x inference", "GPU busy"], rows)


def masks_of_devices(scale: Scale, models: dict[str, Path], folder: Path) -> None:
    """Masks of the same photos by the CPU and by the GPU."""
    few, side = folder / "few", min(scale.mined, 192)
    few.mkdir()
    for index in range(4):
        assert cv2.imwrite(str(few / f"{index}.png"), _photo(index, (side, side))[:, :, ::-1])
    # Under these settings every photo has masked pixels.
    loose = ["--threshold", "0.95", "--min-area", "16"]
    for device in ("cpu", scale.device):
        _mine(device, few, models["SRVGGNetCompact"], folder / f"by-{device}", THREADS[0], *loose)
    pairs = [
        (path, folder / f"by-{scale.device}/masks" / path.name) for path in (folder / "by-cpu/masks").glob("*.png")
    ]
    read = [[cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 0 for path in pair] for pair in pairs]
    marked = sum(int(first.sum()) for first, _ in read)
    differ = sum(int((first ^ second).sum()) for first, second in read)
    print(f"{len(read)} masks with {marked:,} pixels on the CPU; on {scale.device}, {differ:,} pixels differ.")


def finetuning(scale: Scale, models: dict[str, Path], folder: Path) -> None:
    """Steps per second of a finetune, against the plain loop of the usual tools."""
    import bench_training

    sizes = {"patch": 256, "batch": 12} if scale.device == "cuda" else {"patch": 32, "batch": 2}
    rows = []
    for amp in ("float32", "bfloat16") if scale.device == "cuda" else ("float32",):
        training = Training(**sizes | {"amp": amp, "perceptual": "off", "iterations": 1000, "seed": 0})  # type: ignore[arg-type]
        seconds = bench_training.measured(models["SRVGGNetCompact"], training, scale.device)
        plain = seconds["plain loop"]
        names = {what: f"{what} in {amp}" if what == "desra" else what for what in seconds}
        rows += [[names[what], 1 / each, plain / each] for what, each in seconds.items()]
    print_table([f"{sizes['batch']} patches of {sizes['patch']} px", "per second", "x plain loop in float32"], rows)


PARTS = {
    "Networks by number format": formats,
    "Whole photos": whole_photos,
    "Masks by the CPU and by the GPU": masks_of_devices,
    "The whole of desra mine": mining,
    "Steps of a finetune": finetuning,
    "The tests of CUDA": cuda_tests,
}


def main() -> None:
    """Run all parts; print their tables, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=400, help="no part begins after these")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu.md")
    arguments = parser.parse_args()
    scale = FULL if arguments.device == "cuda" else SMALL
    if scale.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: PyTorch sees no GPU here; --device cpu tries the script out")
    name = torch.cuda.get_device_name() if scale.device == "cuda" else "the CPU, on a small scale"
    started = time.monotonic()
    page = [f"# {name}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"]
    with tempfile.TemporaryDirectory(prefix="desra-gpu-") as place:
        models = networks(Path(place))
        for title, part in PARTS.items():
            page.append(f"\n## {title}\n\n{_told(part, scale, models, Path(place), started + arguments.seconds)}")
            print(page[-1], flush=True)
            arguments.output.write_text("\n".join(page) + "\n")  # what is done is not lost
    print(f"\n({time.monotonic() - started:.0f} s; written to {arguments.output})")


def _told(part: Callable[..., None], scale: Scale, models: dict[str, Path], place: Path, deadline: float) -> str:
    """What a part prints, or why it did not run to its end."""
    if time.monotonic() > deadline:
        return "Not run: no time was left."
    folder = place / part.__name__
    folder.mkdir()
    with contextlib.redirect_stdout(io.StringIO()) as told:
        try:
            part(scale, models, folder)
        except Exception:  # noqa: BLE001 - the other parts go on
            print(f"Failed:\n\n```\n{traceback.format_exc()[-2000:]}```")
    return told.getvalue().rstrip()


def _mine(device: str, photos: Path, gan_model: Path, workspace: Path, threads: int, *more: str) -> float:
    command = [sys.executable, "-c", _WITH_THREADS, str(threads), "mine", str(photos), "--workspace", str(workspace)]
    command += ["--gan-model", str(gan_model), "--mse-model", "bicubic", "--device", device, *more]
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]
    return time.perf_counter() - started


@contextlib.contextmanager
def _busy_share(device: str) -> Iterator[Callable[[], str]]:
    """Ask the driver ten times a second whether the GPU is busy; the function tells the mean share."""
    if device != "cuda":
        yield lambda: "no GPU"
        return
    asking = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100"]
    with tempfile.TemporaryFile("w+") as told, subprocess.Popen(asking, stdout=told) as driver:

        def share() -> str:
            told.seek(0)
            seen = [int(line) for line in told if line.strip().isdigit()]
            return f"{sum(seen) / len(seen):.0f} %" if seen else "unknown"

        try:
            yield share
        finally:
            driver.terminate()


@contextlib.contextmanager
def _rounded(float32: str) -> Iterator[None]:
    from torch.backends import cuda, cudnn

    places = (cudnn.conv, cuda.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = float32
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def _matrix_rate(scale: Scale, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of large matrices of this kind of number."""
    first, second = (torch.randn(scale.matrix, scale.matrix, device=scale.device, dtype=dtype) for _ in range(2))
    return float(2 * scale.matrix**3 / _timed(lambda: first @ second, scale.device))


def _timed(function: Callable[[], object], device: str) -> float:
    return _timed_result(function, device)[0]


def _timed_result(function: Callable[[], object], device: str) -> tuple[float, np.ndarray]:
    """The least seconds of some calls after one that warms up, and the result."""
    times = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:]), result  # type: ignore[return-value]


def _peak(device: str) -> str:
    return f"{torch.cuda.max_memory_allocated() / 1e6:.0f}" if device == "cuda" else ""


if __name__ == "__main__":
    main()
