"""What windows and precision change in results and masks of trained networks, and the memory that a window takes.

Run it with ``python tests/benchmarks/run.py windows``. It reads ../shared/data and makes the tables of docs/design.md
("Halos and windows") on trained weights; on two cores it takes half an hour.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# As tasks.dask_cluster starts its workers. Read when PyTorch first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import numpy.typing as npt
import psutil
import torch
from markdown import Cell, print_table
from memory import MEGABYTE, peak_memory

from desra_core import artifact_mask, read_image, variance_similarity
from desra_core.detection.mask import Components
from desra_core.images.codec import Mask
from desra_core.networks.checkpoints import Model, load_model
from desra_core.networks.super_resolution import super_resolve

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TWIN, GAN, CRACKED = "RealESRGAN_x4plus-l1-twin", "RealESRGAN_x4plus", "RealSR_DF2K_x4"
COMPACT, RLFN = "realesr-general-x4v3", "rlfn-ntire2022-x4"
# Photos in which one of the pairs has regions, and height and width of the part in the middle that is enlarged.
PHOTOS = (
    "real-esrgan/00003.png",
    "real-esrgan/0014.jpg",
    "real-esrgan/ADE_val_00000114.jpg",
    "realsrset/comic3.png",
)
PART = 96, 192
HALOS = (8, 16, 24, 32, 48, 64)
# RLFN is fast enough for a photo in which its windows differ.
LARGE_PHOTO, LARGE_PART = "hr/clic/28d24b9c83de066597ff96a68769884f.png", (1280, 1280)
TILES = (1024, 512, 256)
# Half the default, so that small parts of photos have regions.
MIN_AREA = 2000
# Checkpoints, and sides of windows; the first is the default one.
WINDOWS = {GAN: (608, 320), COMPACT: (768, 352, 1024), RLFN: (832, 512, 1024)}

Samples = npt.NDArray[np.uint16]


def run() -> None:
    if not (DATA / "weights").is_dir():
        print("Not measured: there is no ../shared/data beside the checkout.")
        return
    parts = [middle(DATA / "lr" / name, PART) for name in PHOTOS]
    print(f"Parts of {PART[1]}x{PART[0]} px of {len(parts)} photos in two windows, and whole in other precisions, "
          f"against the whole in float32. Masks: weight 1, areas above {MIN_AREA} px.\n")  # fmt: skip
    compare(parts, {name: cases_of(name) for name in (TWIN, GAN, CRACKED)}, [(TWIN, GAN), (TWIN, CRACKED)])
    print(f"\nA part of {LARGE_PART[1]}x{LARGE_PART[0]} px of a photo in windows against the whole.\n")
    network, exact = load_model(checkpoint(RLFN)), load_model(checkpoint(COMPACT))
    cases = {"whole": max(LARGE_PART)} | {f"windows of {tile} px": tile for tile in TILES}
    stretched = {case: tiled(network, tile) for case, tile in cases.items()}
    compare([middle(DATA / LARGE_PHOTO, LARGE_PART)], {RLFN: stretched, COMPACT: {"whole": exact}}, [(RLFN, COMPACT)])
    print("\nOne window in a fresh process with one thread; growth since the network was loaded and first used.\n")
    rows: list[list[Cell]] = []
    for name, sides in WINDOWS.items():
        for side in sides:
            growths = [growth_in_a_process(name, side, precision) for precision in ("float32", "bfloat16")]
            rows.append([name, side, *(growth / MEGABYTE for growth in growths)])
    print_table(["", "side of the window", "float32, MB", "bfloat16, MB"], rows)


def checkpoint(name: str) -> Path:
    (path,) = (DATA / "weights").glob(f"{name}.*")
    return path


def middle(path: Path, part: tuple[int, int]) -> Samples:
    """The middle of a photo, with 16 bits, so that results are rounded to 1/257 of a grey level.

    Rounding these to 8 bits gives exactly the results of the photo with 8 bits.
    """
    pixels = read_image(path)
    rows, columns = (
        slice(max(0, (size - side) // 2), (size + side) // 2) for size, side in zip(pixels.shape, part, strict=False)
    )
    assert pixels.dtype == np.uint8
    return np.ascontiguousarray(pixels[rows, columns].astype(np.uint16) * 257)


def tiled(model: Model, tile: int, halo: int | None = None) -> Model:
    return replace(model, traits=model.traits._replace(tile=tile, halo=model.traits.halo if halo is None else halo))


def cases_of(name: str) -> dict[str, Model]:
    """The ways to run an RRDBNet: the whole in float32 first."""
    exact = load_model(checkpoint(name))
    rounded = load_model(checkpoint(name), engine="bfloat16")
    halos = {f"halo {halo} px": tiled(exact, PART[1] // 2 + halo, halo) for halo in HALOS}
    # The product does not offer float16. The last module computes in float32, as with bfloat16.
    precisions = {"bfloat16": rounded, "float16": replace(rounded, dtype=torch.float16)}
    wholes = {case: tiled(model, max(PART)) for case, model in ({"whole": exact} | precisions).items()}
    return wholes | halos


@dataclass
class Differences:
    """What differs between exact results and others, summed over photos."""

    largest: float = 0
    differing: int = 0
    pixels: int = 0
    squared: float = 0

    def add(self, exact: Samples, other: Samples) -> None:
        self.largest = max(self.largest, float(np.abs(exact.astype(float) - other).max() / 257))
        errors = eight_bits(exact).astype(float) - eight_bits(other)
        self.differing += int(errors.any(axis=2).sum())
        self.pixels += errors.shape[0] * errors.shape[1]
        self.squared += float((errors**2).mean(axis=2).sum())

    def cells(self) -> list[Cell]:
        psnr = 10 * math.log10(255**2 * self.pixels / self.squared) if self.squared else math.inf
        return [f"{self.largest:.3f}", f"{self.differing / self.pixels:.4%}", f"{psnr:.1f}"]


@dataclass
class MaskChanges:
    """What differs between exact masks and others, summed over photos."""

    marked: int = 0
    pixels: int = 0
    regions: int = 0
    gone: int = 0
    new: int = 0

    def add(self, exact: Mask, other: Mask) -> None:
        before, after = Components(exact), Components(other)
        self.marked += int(exact.sum())
        self.pixels += int((exact != other).sum())
        self.regions += len(before)
        self.gone += int((~before.covered(other)).sum())
        self.new += int((~after.covered(exact)).sum())

    def cells(self) -> list[Cell]:
        return [self.pixels, self.marked, self.gone, self.new, self.regions]


def compare(photos: Iterable[Samples], models: dict[str, dict[str, Model]], pairs: list[tuple[str, str]]) -> None:
    """Print how results and masks of each case differ from those of the first; a model may have the first alone."""
    (first, *cases), *_ = models.values()
    results = {(name, case): Differences() for name in models for case in cases if case in models[name]}
    masks = {(pair, case): MaskChanges() for pair in pairs for case in cases}
    largest = {name: largest_value(by_case[first].network) for name, by_case in models.items()}
    for photo in photos:
        exact: dict[str, Samples] = {name: enlarged(by_case[first], photo) for name, by_case in models.items()}
        marked = {pair: mask_of(*(exact[name] for name in pair)) for pair in pairs}
        for case in cases:
            others = dict(exact)
            for name in (name for name in models if (name, case) in results):
                others[name] = enlarged(models[name][case], photo)
                results[name, case].add(exact[name], others[name])
            for pair, mask in marked.items():
                masks[pair, case].add(mask, mask_of(*(others[name] for name in pair)))
    print_table(
        ["network", "", "largest error, levels", "pixels that differ in 8 bits", "PSNR, dB"],
        [[name, case, *found.cells()] for (name, case), found in results.items()],
    )
    print()
    print_table(
        ["pair", "", "mask pixels that change", "of", "regions gone", "new", "of"],
        [[" and ".join(pair), case, *found.cells()] for (pair, case), found in masks.items()],
    )
    print()
    print_table(["network", "largest value inside, float32"], [[name, max(seen)] for name, seen in largest.items()])


def largest_value(network: torch.nn.Module) -> list[float]:
    """A list to which every module of a network appends the largest value of its results; float16 ends at 65504."""
    seen: list[float] = []
    for module in network.modules():
        module.register_forward_hook(lambda _module, _values, result: seen.append(float(result.abs().amax())))
    return seen


def enlarged(model: Model, photo: Samples) -> Any:
    return super_resolve(model, photo).pixels


def eight_bits(samples: Samples) -> npt.NDArray[np.uint8]:
    return np.rint(samples / 257).astype(np.uint8)


def mask_of(reference: Samples, gan_sr: Samples) -> Mask:
    return artifact_mask(variance_similarity(eight_bits(reference), eight_bits(gan_sr)), min_area=MIN_AREA)


def growth_in_a_process(name: str, side: int, precision: str) -> int:
    command = [sys.executable, __file__, name, str(side), precision]
    return int(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def growth(name: str, side: int, precision: Any) -> int:
    """The bytes by which the peak rises when a photo of the size of one window is enlarged."""
    torch.set_num_threads(1)
    model = load_model(checkpoint(name), engine=precision)
    photo = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    super_resolve(model, photo[:32, :32])
    before = psutil.Process().memory_info().rss
    super_resolve(tiled(model, side), photo)
    return peak_memory() - before


if __name__ == "__main__":
    print(growth(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
