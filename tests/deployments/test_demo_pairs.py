from pathlib import Path

import numpy as np
import pytest

from deployments import demo, demo_pairs
from desra_core import detection, imageio


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    demo_pairs.make_pairs(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(path: Path) -> np.ndarray:
    return imageio.decode(path.read_bytes(), path).pixels


def test_every_sample_has_its_three_files_and_nothing_else(pairs):
    names = {sample.name for sample in demo_pairs.SAMPLES}
    assert set(content(pairs)) == {f"{kind}/{name}.png" for kind in demo_pairs.KINDS for name in names}
    assert any(not sample.artifacts for sample in demo_pairs.SAMPLES)


def test_the_same_bytes_every_time(pairs, tmp_path):
    demo_pairs.make_pairs(tmp_path)
    assert content(tmp_path) == content(pairs)


@pytest.mark.parametrize("sample", demo_pairs.SAMPLES, ids=lambda sample: sample.name)
def test_results_agree_in_size_and_lr_is_a_quarter(pairs, sample):
    lr, mse_sr, gan_sr = (pixels(pairs / kind / f"{sample.name}.png") for kind in demo_pairs.KINDS)
    width, height = sample.size
    assert mse_sr.shape == gan_sr.shape == (height, width, lr.shape[2])
    assert lr.shape[:2] == (height // 4, width // 4)


@pytest.mark.parametrize("sample", demo_pairs.SAMPLES, ids=lambda sample: sample.name)
def test_artifacts_are_found_where_they_were_put_and_nowhere_else(pairs, sample):
    mse_sr, gan_sr = (pixels(pairs / kind / f"{sample.name}.png") for kind in ("mse_sr", "gan_sr"))
    mask = detection.artifact_mask(detection.variance_similarity(mse_sr, gan_sr))
    rows, columns = np.nonzero(mask)
    width, height = sample.size
    explained = np.zeros(rows.shape, bool)
    for artifact in sample.artifacts:
        (cx, cy), (rx, ry) = artifact.centre, artifact.radii
        near = np.hypot((columns / width - cx) / rx, (rows / height - cy) / ry) < 1.25
        assert near.sum() > 6000
        explained |= near
    assert explained.all()


def test_complete_pairs_are_left_alone_and_a_lost_file_comes_back(pairs):
    lost, kept = pairs / "gan_sr" / "camera.png", pairs / "gan_sr" / "rocket.png"
    before, written = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    demo_pairs.make_pairs(pairs)
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == written


def test_the_picture_shows_each_region_with_its_mask(pairs, tmp_path):
    regions = [
        {"image": "camera", "x": 2, "y": 3, "width": 60, "height": 50, "area": 3000},
        {"image": "rocket", "x": 880, "y": 590, "width": 70, "height": 40, "area": 2800},
    ]
    for region in regions:
        mask = np.zeros(pixels(pairs / "gan_sr" / f"{region['image']}.png").shape[:2], bool)
        mask[region["y"] :, region["x"] :][: region["height"], : region["width"]] = True
        (tmp_path / f"{region['image']}.png").write_bytes(imageio.encode_mask(mask))
    picture = demo.draw(regions, pairs, tmp_path)
    assert len(imageio.encode_png(picture)) < 1_500_000
    outlined = (picture == (0, 255, 128)).all(axis=2)
    halves = np.array_split(outlined, 2)
    assert all(half.sum() > 300 for half in halves)
    assert not outlined[:, : 2 * demo.CELL_WIDTH].any()
