"""How fast a picture file is decoded and how much memory that takes, beside Pillow (8 bits) and OpenCV (16 bits).

Run it with ``python tests/benchmarks/run.py decode``.
"""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import psutil
import tifffile
from markdown import print_table
from PIL import Image

from desra_core.images.codec import decode

HEIGHT, WIDTH = 3000, 4000
REPEATS = 3
KINDS = ("JPEG", "PNG", "TIFF", "TIFF deflate", "TIFF LZW", "16-bit PNG", "16-bit TIFF", "16-bit TIFF deflate",
         "16-bit TIFF LZW")  # fmt: skip


def run() -> None:
    print(f"{WIDTH}x{HEIGHT} RGB, each decoder in a new process; ratios are to Pillow or OpenCV.\n")
    rows: list[list[str | float]] = []
    for kind in KINDS:
        content = _file(kind)
        seconds, growth = _measured(kind, "desra", content)
        others = _measured(kind, "OpenCV" if kind.startswith("16") else "Pillow", content)
        rows.append([kind, seconds, seconds / others[0], growth, growth / others[1]])
    print_table(["", "s", "ratio", "peak growth MB", "ratio"], rows)


def _file(kind: str) -> bytes:
    noise = np.random.default_rng(0).standard_normal((HEIGHT, WIDTH, 3), np.float32)
    photo = cv2.GaussianBlur(noise, (0, 0), 3) * 250000 + noise * 300 + 30000
    pixels = photo.clip(0, 65535).astype(np.uint16)
    if not kind.startswith("16"):
        pixels = (pixels >> 8).astype(np.uint8)
    if "TIFF" not in kind:
        return cv2.imencode(".jpg" if kind == "JPEG" else ".png", pixels)[1].tobytes()
    method = {"deflate": "zlib", "LZW": "lzw"}.get(kind.split()[-1])
    sink = io.BytesIO()
    tifffile.imwrite(sink, pixels, photometric="rgb", compression=method, predictor=method is not None, rowsperstrip=64)
    return sink.getvalue()


def _measured(kind: str, decoder: str, content: bytes) -> list[float]:
    """Seconds, and MB by which the peak has risen."""
    command = [sys.executable, __file__, decoder]
    found: list[float] = json.loads(subprocess.run(command, input=content, stdout=subprocess.PIPE, check=True).stdout)
    return found


def measure(decoder: str, content: bytes) -> list[float]:
    decoders: dict[str, Callable[[bytes], object]] = {
        "desra": lambda data: decode(data, Path("picture")).pixels,
        "Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data))),
        "OpenCV": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED),
    }
    cv2.setNumThreads(1)
    base = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        decoders[decoder](content)
        times.append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return [min(times), (peak - base) / 2**20]


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.stdin.buffer.read())))
