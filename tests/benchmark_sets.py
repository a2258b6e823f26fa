"""Made data sets of all layouts with the same content, and benchmarks on them in the tests' own process."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco

from desra_core.benchmarking import AnyBenchmark, plan
from desra_core.benchmarking.benchmark import judge_image
from desra_core.errors import ImageError
from desra_core.report.pages import PublishedBenchmark, publish_results
from desra_core.settings.models import Benchmarking, SyntheticBenchmarking
from tests.conftest import in_one_thread

# Small pairs: 200x240 px, of which two in three have an artifact at rows 40 to 140 and columns 60 to 180.
SIZE = (200, 240)
FAST = "desra,ldl"


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def ground_truth(index: int) -> np.ndarray:
    """What a person may have marked: a little beside the artifact, a second region, or nothing."""
    mask = np.zeros(SIZE, np.uint8)
    if index % 3:
        mask[50 : 140 + index, 50 + 5 * index : 170] = 255
        mask[150:165, 10 : 20 + 10 * index] = 255
    return mask


def make_plain(folder: Path, make_pairs: Callable[[Path, int], list[str]], count: int = 4) -> list[str]:
    """Folders mse_sr, gan_sr, gt_mask, lr and labels; one image of three has no artifact, and an empty mask."""
    names = make_pairs(folder, count)
    for index, name in enumerate(names):
        write(folder / "gt_mask" / f"{name}.png", ground_truth(index))
        gan_sr = cv2.imread(str(folder / "gan_sr" / f"{name}.png"))
        write(folder / "lr" / f"{name}.png", gan_sr[::4, ::4])
        labels = np.full(SIZE, 4, np.uint8)
        labels[:100] = 2
        write(folder / "labels" / f"{name}.png", labels)
    return names


def as_published(plain: Path, folder: Path, names: list[str], *, labels: bool = True) -> None:
    """The layout of the published data: method folders, names that tell the role, masks without the frame."""
    for number, name in enumerate(sorted(names)):
        part = folder / ("LDL" if number < len(names) // 2 else "SwinIR")
        spellings = {"mse_sr": "MSE-SR", "gan_sr": "GAN-SR", "lr": "LR", "labels": "labels"}
        for role, spelling in spellings.items():
            if role != "labels" or labels:
                target = part / spelling / f"{name}_{spelling}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(plain / role / f"{name}.png", target)
        truth = cv2.imread(str(plain / "gt_mask" / f"{name}.png"), cv2.IMREAD_GRAYSCALE)
        write(part / "GT-Mask" / f"{name}.png", truth[5:-5, 5:-5])


def as_coco(plain: Path, path: Path, names: list[str]) -> None:
    """A COCO file beside its folders: polygons, run lengths, compressed and not, and an image without annotations."""
    images, annotations = [], []
    for index, name in enumerate(names):
        truth = cv2.imread(str(plain / "gt_mask" / f"{name}.png"), cv2.IMREAD_GRAYSCALE) > 0
        images.append({"id": index, "file_name": f"images/{name}.png", "width": SIZE[1], "height": SIZE[0]})
        count, components = cv2.connectedComponents(truth.astype(np.uint8), connectivity=8)
        for number in range(1, count):
            annotations.append({"id": len(annotations), "image_id": index, "category_id": 7,
                                "segmentation": segmentation(components == number, len(annotations))})  # fmt: skip
    annotations.append({"id": 99, "image_id": 1, "category_id": 8, "segmentation": [[0, 0, 90, 0, 90, 90, 0, 90]]})
    categories = [{"id": 7, "name": "artifact"}, {"id": 8, "name": "text"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(document))


def segmentation(region: np.ndarray, kind: int) -> Any:
    """A region as one of the three kinds that COCO knows."""
    encoded = coco.encode(np.asfortranarray(region.astype(np.uint8)))
    if kind % 3 == 0:
        return {"size": list(region.shape), "counts": encoded["counts"].decode()}
    if kind % 3 == 1:
        flat = region.T.ravel().astype(int)
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *edges, flat.size]).tolist()
        return {"size": list(region.shape), "counts": runs if flat[0] == 0 else [0, *runs]}
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    assert region.sum() == (bottom - top) * (right - left), "a rectangle"
    corners = (left, top, right, top, right, bottom, left, bottom)
    return [list(map(int, corners))]


def run_here(benchmark: AnyBenchmark) -> list[str]:
    """Judge what lacks judgement, as workers would; returns the names of those images."""
    workspace = benchmark.workspace
    workspace.create()
    missing = benchmark.missing()
    with workspace.locked(), in_one_thread():
        for image, work in missing:
            with contextlib.suppress(ImageError):  # the record tells it, as a worker's does
                judge_image(image, work, benchmark, "cpu", 2**26)
    return [image.names[0] for image, _ in missing]


def judge(dataset: object, output: Path, **settings: Any) -> tuple[AnyBenchmark, PublishedBenchmark]:
    """A whole benchmark."""
    asked = {"methods": FAST, "min_area": "100"} | settings
    benchmark = plan(Benchmarking(dataset=Path(str(dataset)), output=output, **asked))
    run_here(benchmark)
    published = publish_results(benchmark)
    assert benchmark.missing() == []
    return benchmark, published


def spoil(plain: Path, output: Path, **settings: Any) -> tuple[AnyBenchmark, PublishedBenchmark]:
    """A whole synthetic benchmark."""
    pairs = {"mse_sr": plain / "mse_sr", "gan_sr": plain / "gan_sr"}
    asked = {"methods": "desra", "min_area": "400"} | pairs | settings
    benchmark = plan(SyntheticBenchmarking(output=output, **asked))
    run_here(benchmark)
    published = publish_results(benchmark)
    assert benchmark.missing() == []
    return benchmark, published
