"""Runs of desra detect with other detectors: real planning, stages and tables, in this process."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from desra_core.detection.detectors import load_detector
from desra_core.detection.mask import score_mask
from desra_core.errors import UsageError
from desra_core.planning.plan import load_settings, prepare, target_of
from desra_core.settings import Detection
from desra_core.workspace import Workspace
from desra_core.workspace.products import read_records
from tests.in_process import process

BY_CLASS = """
import numpy as np


class ByClass:
    threshold = 0.5
    smallest = 1
    inputs = ("labels",)

    def __call__(self, mse_sr, gan_sr, lr, labels, /):
        assert lr is None
        return (labels == 7).astype(np.float64)


detector = ByClass()
"""


@pytest.fixture(scope="module")
def pairs(make_pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for name in make_pairs(folder, 4):
        labels = np.zeros((200, 240), np.uint8)
        labels[20:100, 30:130] = 7
        path = folder / "labels" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), labels)
    return folder


def detection(pairs: Path, workspace: Path, **changes: object) -> Detection:
    return Detection(mse_sr=pairs / "mse_sr", gan_sr=pairs / "gan_sr", workspace=workspace, **changes)


def mask(workspace: Workspace, name: str) -> np.ndarray:
    return cv2.imread(str(workspace.mask(name)), cv2.IMREAD_UNCHANGED) > 0


def expected_mask(pairs: Path, name: str, method: str, threshold: float, min_area: int) -> np.ndarray:
    images = [cv2.imread(str(pairs / role / f"{name}.png"))[:, :, ::-1] for role in ("mse_sr", "gan_sr")]
    scores = load_detector(method)(*images, None, None)
    return score_mask(scores, images[0].shape[:2], threshold=threshold, min_area=min_area)


@pytest.mark.parametrize("method", ["ldl", "ssim", "niqe"])
def test_a_method_marks_what_its_scores_say(pairs, tmp_path, method) -> None:
    settings = detection(pairs, tmp_path / "ws", method=method)
    assert settings.threshold == load_detector(method).threshold
    workspace = process(settings)
    names = pq.read_table(workspace.manifest)["name"].to_pylist()
    marked = 0
    for name in names:
        found = mask(workspace, name)
        np.testing.assert_array_equal(found, expected_mask(pairs, name, method, settings.threshold, 4000))
        marked += bool(found.any())
    assert marked >= 2
    regions = pq.read_table(workspace.regions).to_pylist()
    assert sum(region["area"] for region in regions) == sum(int(mask(workspace, name).sum()) for name in names)
    for region in regions:
        score = -region["mean_similarity"]
        assert region["severity"] == pytest.approx(region["area"] * (score - settings.threshold), abs=1e-6)


def test_a_stricter_threshold_reads_what_is_there_and_a_looser_one_computes(pairs, tmp_path) -> None:
    process(detection(pairs, tmp_path / "ws", method="ldl"))
    for threshold, scored in ((0.02, 0), (0.0001, 2)):
        settings = detection(pairs, tmp_path / "ws", method="ldl", threshold=threshold)
        workspace = Workspace(settings.workspace)
        with workspace.locked():
            plan = prepare(settings).plan
        kept = read_records(workspace, ["similarity_kept"])["similarity_kept"].to_pylist()
        assert plan.dropped == (kept.count(False) if scored else 0)
        process(settings)
        for name in pq.read_table(workspace.manifest)["name"].to_pylist():
            np.testing.assert_array_equal(mask(workspace, name), expected_mask(pairs, name, "ldl", threshold, 4000))


def test_another_method_redoes_the_scores(pairs, tmp_path) -> None:
    process(detection(pairs, tmp_path / "ws"))
    workspace = process(detection(pairs, tmp_path / "ws", method="ssim"))
    np.testing.assert_array_equal(
        mask(workspace, "set1/photo001"), expected_mask(pairs, "set1/photo001", "ssim", 0.65, 4000)
    )
    _, target = load_settings(workspace)
    assert (target.method, target.threshold) == ("ssim", -0.65)


def test_a_detector_file_gets_the_labels_and_runs_again_when_they_change(pairs, tmp_path) -> None:
    own = tmp_path / "own.py"
    own.write_text(BY_CLASS)
    labels = tmp_path / "labels"
    for path in (pairs / "labels").rglob("*.png"):
        copy = labels / path.relative_to(pairs / "labels")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    settings = detection(pairs, tmp_path / "ws", method=str(own), segmenter=f"labels:{labels}", keep="all")
    workspace = process(settings)
    before = mask(workspace, "set1/photo001")
    assert before[60, 80]
    assert not before[60, 180]
    regions = pq.read_table(workspace.regions)
    assert set(regions["dominant_class"].to_pylist()) == {7}
    moved = np.zeros((200, 240), np.uint8)
    moved[20:100, 130:230] = 7
    assert cv2.imwrite(str(labels / "set1/photo001.png"), moved)
    process(settings)
    after = mask(workspace, "set1/photo001")
    assert after[60, 180]
    assert not after[60, 80]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ValueError('no\\nway')", "makes .* fail .*no way"),
        ("return np.full(gan_sr.shape[:2], np.nan)", "instead of finite scores"),
        ("return gan_sr", "instead of finite scores"),
        ("return np.zeros((gan_sr.shape[0] - 1, gan_sr.shape[1] - 1))", "instead of finite scores"),
    ],
)
def test_a_failing_detector_file_gives_one_line_per_image(pairs, tmp_path, body, reason) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import numpy as np\n\n\nclass Own:\n    threshold = 1\n    smallest = 1\n    inputs = ()\n\n"
        f"    def __call__(self, mse_sr, gan_sr, lr, labels, /):\n        {body}\n\n\ndetector = Own()\n"
    )
    workspace = process(detection(pairs, tmp_path / "ws", method=str(own)))
    reasons = pq.read_table(workspace.failures)["reason"]
    assert len(reasons) == 4
    assert re.search(reason, reasons[0].as_py())
    assert "\n" not in reasons[0].as_py()


def test_an_image_below_the_smallest_side_fails(pairs, tmp_path) -> None:
    for role in ("mse_sr", "gan_sr"):
        (tmp_path / role).mkdir()
        assert cv2.imwrite(str(tmp_path / role / "a.png"), np.zeros((95, 200, 3), np.uint8))
    workspace = process(detection(tmp_path, tmp_path / "ws", method="niqe"))
    assert "smaller than the 96 px" in pq.read_table(workspace.failures)["reason"][0].as_py()


def test_settings_that_do_not_fit_a_method_are_refused(pairs, tmp_path) -> None:
    own = tmp_path / "own.py"
    own.write_text(BY_CLASS)
    labels = {"segmenter": f"labels:{pairs / 'labels'}"}
    for changes, message in (
        ({"threshold": 1.5}, "no similarity"),
        ({"method": "ldl", "weights": "published", **labels}, "is for desra, not for ldl"),
        ({"method": str(own)}, "needs class labels"),
        ({"method": "magic"}, "is no method"),
        ({"method": str(tmp_path / "none.py")}, "does not exist"),
    ):
        with pytest.raises(UsageError, match=message):
            target_of(detection(pairs, tmp_path / "ws", **changes))
