"""How fast super-resolution is against the plain loop, how near to it, and its share of ``desra mine``.

Run it with ``python tests/benchmarks/run.py inference``.
"""

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# As tasks.dask_cluster starts its workers; the plain loop does not mind. Read when PyTorch first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
from markdown import print_table
from pairs import photo_files

from desra_core.networks.checkpoints import Engine, Model, load_model
from desra_core.networks.super_resolution import super_resolve
from desra_core.workspace import Workspace
from desra_core.workspace.products import read_records

PHOTOS = 24
WORKERS = 2
SIZE = (320, 240)
# The plain loop's: Real-ESRGAN's usual halo, and a tile that is kind to a CPU's caches.
TILE, HALO = 256, 10
REPEATS = 3

_WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights"
_DEMO = Path(__file__).resolve().parents[1] / "models"

Pixels = npt.NDArray[np.uint8]


def models() -> tuple[Path, Path]:
    """A pair of Real-ESRGAN's own networks, where they are present, or the small one."""
    real = _WEIGHTS / "realesr-general-wdn-x4v3.pth", _WEIGHTS / "realesr-general-x4v3.pth"
    return real if all(path.exists() for path in real) else (_DEMO / "mse.pth", _DEMO / "gan.pth")


def run() -> None:
    torch.set_num_threads(WORKERS)
    gan_model = models()[1]
    print(f"{gan_model.name} on {torch.get_num_threads()} threads, one photo of 640x480 px; best of {REPEATS}.\n")
    photo = _photo(0, (640, 480))
    exact = load_model(gan_model)
    whole = _whole(exact, photo)
    plain_seconds, plain = _timed(lambda: plain_loop(exact, photo))
    rows: list[list[str | float]] = [["plain loop", plain_seconds, 1.0, _psnr(plain, whole), math.inf]]
    engines: tuple[Engine, ...] = ("float32", "openvino-float32", "bfloat16", "openvino-bfloat16")
    for name in engines:
        measured = load_model(gan_model, engine=name)
        seconds, result = _timed(lambda measured=measured: super_resolve(measured, photo).pixels)
        rows.append([name, seconds, plain_seconds / seconds, _psnr(result, whole), _psnr(result, plain)])
    print_table(["", "seconds", "x plain loop", "PSNR against whole image, dB", "against plain loop, dB"], rows)
    with tempfile.TemporaryDirectory(prefix="desra-bench-") as name:
        _job(Path(name))


def plain_loop(model: Model, photo: Pixels) -> Pixels:
    """One tile at a time, NCHW, float32, with a halo of 10: what Real-ESRGAN's own script does."""
    network = model.network.to(memory_format=torch.contiguous_format)
    scale = model.scale
    height, width = photo.shape[:2]
    result = np.empty((height * scale, width * scale, 3), np.float32)
    values = torch.from_numpy(photo.astype(np.float32) / 255).permute(2, 0, 1)[None].contiguous().to(model.device)
    with torch.inference_mode():
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                bottom, right = min(top + TILE, height), min(left + TILE, width)
                y, x = max(top - HALO, 0), max(left - HALO, 0)
                out = network(values[:, :, y : bottom + HALO, x : right + HALO])[0].permute(1, 2, 0).cpu().numpy()
                rows = slice((top - y) * scale, (bottom - y) * scale)
                columns = slice((left - x) * scale, (right - x) * scale)
                result[top * scale : bottom * scale, left * scale : right * scale] = out[rows, columns]
    network.to(memory_format=torch.channels_last)
    return (result.clip(0, 1) * 255).round().astype(np.uint8)


def _job(folder: Path) -> None:
    """Mine a small corpus and tell what its inference took."""
    (folder / "photos").mkdir()
    for index in range(PHOTOS):
        assert cv2.imwrite(str(folder / f"photos/{index:03d}.jpg"), _photo(index, SIZE)[:, :, ::-1])
    mse_model, gan_model = models()
    command = [sys.executable, "-m", "deployments.cli", "mine", str(folder / "photos"), "--workers", str(WORKERS)]
    command += ["--mse-model", str(mse_model), "--gan-model", str(gan_model), "--workspace", str(folder / "ws")]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    wall = time.perf_counter() - started
    seconds = read_records(Workspace(folder / "ws"), ["seconds"])["seconds"].combine_chunks()
    spent = {stage: pc.sum(pc.map_lookup(seconds, stage, "first")).as_py()
             for stage in ("inference", "super_resolution", "mask")}  # fmt: skip
    computed = spent["super_resolution"] + spent["mask"]

    def row(what: str, value: float) -> list[str | float]:
        return [what, value, f"{100 * value / computed:.0f} %", f"{100 * value / WORKERS / wall:.0f} %"]

    print(f"\ndesra mine, {PHOTOS} photos of {SIZE[0]}x{SIZE[1]} px, both models, {WORKERS} workers: {wall:.1f} s, "
          f"{PHOTOS / wall:.2f} images/s.\n")  # fmt: skip
    print_table(
        ["computing seconds, all workers", "seconds", "of computing", "of the whole job"],
        [
            row("inference, both models", spent["inference"]),
            row("decode, similarity, arrays", spent["super_resolution"] - spent["inference"]),
            row("mask, regions, dataset", spent["mask"]),
            row("all stages", computed),
        ],
    )


def _whole(model: Model, photo: Pixels) -> Pixels:
    values = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        out = model.network(values)[0].permute(1, 2, 0).clamp(0, 1)
    return (out * 255).round().to(torch.uint8).numpy()


def _photo(index: int, size: tuple[int, int]) -> Pixels:
    files = photo_files()
    photo = cv2.imread(str(files[index % len(files)]))[:, :, ::-1]
    return np.ascontiguousarray(cv2.resize(photo, size, interpolation=cv2.INTER_AREA))


def _timed(function: Callable[[], Pixels]) -> tuple[float, Pixels]:
    function()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - started)
    return min(times), result


def _psnr(first: Pixels, second: Pixels) -> float:
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / float(error))
