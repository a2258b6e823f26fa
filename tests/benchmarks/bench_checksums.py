"""What it costs to check the bytes that are read: each kind of file with its checksum, and by its reader alone.

CPU seconds of one process, the two in turns, from a warm cache of the disk. Run it with ``python
tests/benchmarks/run.py checksums``.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
import zarr
from markdown import Cell, print_table
from pairs import photo_files

from desra_core.files import as_json, checksum, parse_json, read_checked
from desra_core.images.codec import decode
from desra_core.networks.checkpoints import load_checkpoint
from desra_core.workspace import Workspace, as_parquet, read_table
from desra_core.workspace.arrays import read_array, write_array
from desra_core.workspace.products import SCHEMA, Record, to_table

REPEATS = 15
RECORDS = 1000
MODEL = Path(__file__).resolve().parents[1] / "models" / "gan.pth"

Read = Callable[[], object]


def run() -> None:
    with tempfile.TemporaryDirectory(prefix="desra-bench-") as name:
        rows: list[list[Cell]] = []
        for what, size, times, checked, alone in _readers(Path(name)):
            seconds = [(_seconds(checked, times), _seconds(alone, times)) for _ in range(REPEATS)]
            with_check, without = (float(np.median(column)) for column in zip(*seconds, strict=True))
            rows.append([what, f"{size:,}", 1000 * without, 1000 * with_check, with_check / without])
    print_table(["", "bytes", "reader alone, ms", "with the check, ms", "x"], rows)


def _readers(folder: Path) -> Iterator[tuple[str, int, int, Read, Read]]:
    """Each kind of file: its size, reads in one measurement, and how it is read with the check and without."""
    keys = {"similarity_key": "0" * 32, "mask_key": "1" * 32, "height": 1024, "width": 1024}
    records = [Record(id=f"{index:032x}", **keys) for index in range(RECORDS)]  # type: ignore[arg-type]
    document = to_table(records[:1]).to_pylist()[0]
    told, plain = as_json(document), json.dumps(document, indent=1).encode()
    yield "record in a journal", len(told), 1000, lambda: parse_json(told), lambda: json.loads(plain)

    sealed, open_one = folder / "sealed.parquet", folder / "open.parquet"
    sealed.write_bytes(as_parquet(to_table(records)))
    pq.write_table(to_table(records), open_one)
    yield (
        f"table of {RECORDS} records", sealed.stat().st_size, 10,
        lambda: read_table(sealed, SCHEMA), lambda: read_table(open_one, SCHEMA),
    )  # fmt: skip

    workspace = Workspace(folder / "ws")
    workspace.create()
    similarity = cv2.GaussianBlur(np.random.default_rng(0).random((1024, 1024), np.float32), (0, 0), 4)
    with workspace.locked() as held:
        write_array(held, "0" * 32, "similarity", similarity, key="k")
    array = workspace.group("0" * 32) / "similarity"
    size = sum(path.stat().st_size for path in array.rglob("*") if path.is_file())
    yield (
        "similarity map of 1 MP", size, 3,
        lambda: read_array(workspace, "0" * 32, "similarity", key="k"), lambda: zarr.open_array(array, mode="r")[:],
    )  # fmt: skip

    picture = photo_files()[0]
    expected = checksum(picture.read_bytes())
    yield (
        "photo as PNG", picture.stat().st_size, 3,
        lambda: decode(read_checked(picture, expected), picture), lambda: decode(picture.read_bytes(), picture),
    )  # fmt: skip

    yield (
        "checkpoint", MODEL.stat().st_size, 10,
        lambda: load_checkpoint(MODEL, ""), lambda: torch.load(MODEL, map_location="cpu", weights_only=True),
    )  # fmt: skip


def _seconds(read: Read, times: int) -> float:
    """CPU seconds of one read."""
    started = time.process_time()
    for _ in range(times):
        read()
    return (time.process_time() - started) / times
