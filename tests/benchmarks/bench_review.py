"""`desra review` in headless Chromium: 100 regions by keys, on images of 16 MP, and what each kind of tile takes.

Run it with ``python tests/benchmarks/run.py review``.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from markdown import Cell, print_table
from pairs import write_photo_pairs

from deployments.serving.review import review_server
from desra_core import find_regions
from desra_core.annotations.review import Review
from desra_core.images.codec import encode_mask
from desra_core.planning.plan import prepare, publish_tables
from desra_core.report.pictures import StoredImage
from desra_core.report.tiles import Tile, TiledPictures
from desra_core.settings import Detection, detector_of
from desra_core.workspace import Workspace
from desra_core.workspace.answers import open_answers
from desra_core.workspace.arrays import write_array
from desra_core.workspace.manifest import image_refs, read_manifest
from desra_core.workspace.products import Record, gather_shard

sys.path.append(str(Path(__file__).resolve().parents[1]))
from browser import opened

SIDE, IMAGES, REGIONS = 4000, 6, 100


def _make(folder: Path) -> Workspace:
    """Write pairs of 16 MP, and record regions in them: 18 boxes of three sizes each."""
    write_photo_pairs(folder, IMAGES, SIDE)
    workspace = Workspace(folder / "ws")
    workspace.create()
    settings = Detection(mse_sr=folder / "mse_sr", gan_sr=folder / "gan_sr", workspace=workspace.root, keep="maps")
    target = prepare(settings).plan.target
    mask = np.zeros((SIDE, SIDE), bool)
    for number in range(18):
        x, y, side = number % 5 * 800 + 60, number // 5 * 900 + 60, (80, 200, 600)[number % 3]
        mask[y : y + side, x : x + side] = True
    records = []
    for index, image in enumerate(image_refs(read_manifest(workspace))):
        similarity = np.random.default_rng(index).random((SIDE - 10, SIDE - 10), np.float32) * np.float32(0.9)
        similarity += np.float32(0.01)
        workspace.publish(workspace.mask(image.names[0]), encode_mask(mask))
        write_array(workspace, image.id, "similarity", similarity, key=target.similarity_key)
        regions = [region._asdict() for region in find_regions(mask, similarity)]
        records.append(
            Record(image.id, SIDE, SIDE, similarity_key=target.similarity_key, similarity_kept=True,
                   mask_key=target.mask_key, weighting_key=target.weighting_key, threshold=target.threshold,
                   min_area=4000, artifact_pixels=int(mask.sum()), regions=regions)
        )  # fmt: skip
    gather_shard(workspace, 0, records)
    publish_tables(workspace, target)
    return workspace


def run() -> None:
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory(prefix="desra-bench-") as name:
        workspace = _make(Path(name))
        with open_answers(workspace, "rater") as file:
            review = Review(workspace, file, "rater")
            with review_server(review, 0, None) as address, opened("about:blank", Path(name) / "browser") as page:
                page.visit(address, width=1500, height=1000)
                started, each = time.perf_counter(), []
                for number in range(REGIONS):
                    page.wait_until("document.body.dataset.ready && !busy")
                    before = time.perf_counter()
                    page.press("ar"[number % 2])
                    page.wait_until(f"now.state === {number + 1} && document.body.dataset.ready && !busy")
                    each.append(time.perf_counter() - before)
                rows.append([f"{REGIONS} regions by keys, seconds", time.perf_counter() - started])
                rows += [[f"from the key to the next picture, {share} %, ms", 1000 * float(np.percentile(each, share))]
                         for share in (50, 95, 100)]  # fmt: skip
                page.press("9")
                before = time.perf_counter()
                page.evaluate("drawAll()")
                page.wait_until("!asked && [...tiles.values()].every(tile => tile.bitmap || tile.error)")
                rows.append(["the whole image in all canvases, ms", 1000 * (time.perf_counter() - before)])
                assert page.complaints == [], page.complaints
            image = review.images[0]
        stored = StoredImage(image.files, workspace.group(image.id), image.shape, detector_of(review.settings))
        pictures = TiledPictures()
        for what, kind, level in (("first tile of a picture, with decoding", "gan_sr", 0), ("tile", "gan_sr", 0),
                                  ("tile of level 3, all of it", "gan_sr", 3), ("tile of the heat map", "heat", 0),
                                  ("the same, of level 3", "heat", 3)):  # fmt: skip
            before = time.perf_counter()
            pictures.tile(stored, kind, Tile(level, 0, 0))
            rows.append([f"{what}, ms", 1000 * (time.perf_counter() - before)])
    print_table(["", ""], rows)
