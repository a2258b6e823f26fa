"""The methods of a benchmark and their operating points."""

from __future__ import annotations

import pytest

from desra_core.benchmarking.benchmark import load_methods
from desra_core.detection.detectors import load_detector
from desra_core.errors import UsageError


def test_the_rows_of_the_table() -> None:
    found = load_methods(["desra", "ldl", "niqe"], weights_key="k")
    assert [(method.name, method.weighted, method.inputs) for method in found] == [
        ("desra", True, ("labels",)), ("desra, weight 1", False, ()), ("ldl", False, ()), ("niqe", False, ())
    ]  # fmt: skip
    points = {point.name: (point.threshold, point.folder) for method in found for point in method.points}
    assert points == {
        "desra": (1 - 0.7, "desra"),
        "desra, weight 1": (1 - 0.7, "desra-weight-1"),
        "ldl, 0.01": (0.01, "ldl-0.01"),
        "ldl, 0.005": (0.005, "ldl-0.005"),
        "ldl, 0.001": (0.001, "ldl-0.001"),
        "niqe": (load_detector("niqe").threshold, "niqe"),
    }
    assert [method.name for method in load_methods(["desra"], weights_key=None)] == ["desra, weight 1"]
    assert len({method.key for method in found}) == len(found)


def test_keys_follow_the_weights() -> None:
    assert load_methods(["desra"], weights_key="a")[0].key != load_methods(["desra"], weights_key="b")[0].key


def test_curves_pass_through_the_threshold() -> None:
    for method in load_methods(["desra", "ldl", "ssim", "niqe"], weights_key="k"):
        thresholds = method.thresholds
        assert list(thresholds) == sorted(thresholds)
        assert any(point.threshold in thresholds for point in method.points)


def test_a_file_is_called_like_its_stem(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("class A:\n    threshold, smallest, inputs = -1.0, 3, ()\n    def __call__(self, *_): ...\n"
                    "detector = A()\n")  # fmt: skip
    (found,) = load_methods([str(path)], weights_key="k")
    assert (found.name, found.thresholds, found.points[0].threshold) == ("mine", (), -1.0)
    (tmp_path / "ldl-0.01.py").write_text(path.read_text())
    with pytest.raises(UsageError, match=r"has two methods called ldl-0\.01"):
        load_methods(["ldl", str(tmp_path / "ldl-0.01.py")], weights_key=None)
