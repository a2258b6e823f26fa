"""Who competes in a benchmark."""

from __future__ import annotations

import pytest

from desra_core.benchmarking.entries import contenders
from desra_core.detection.detectors import load_detector
from desra_core.errors import UsageError


def test_the_rows_of_the_table() -> None:
    found = contenders(["desra", "ldl", "niqe"], weights_key="k")
    assert [(c.name, c.weighted, c.inputs) for c in found] == [
        ("desra", True, ("labels",)), ("desra, weight 1", False, ()), ("ldl", False, ()), ("niqe", False, ())
    ]  # fmt: skip
    entries = {entry.name: (entry.threshold, entry.folder) for c in found for entry in c.entries}
    assert entries == {
        "desra": (1 - 0.7, "desra"),
        "desra, weight 1": (1 - 0.7, "desra-weight-1"),
        "ldl, 0.01": (0.01, "ldl-0.01"),
        "ldl, 0.005": (0.005, "ldl-0.005"),
        "ldl, 0.001": (0.001, "ldl-0.001"),
        "niqe": (load_detector("niqe").threshold, "niqe"),
    }
    assert [c.name for c in contenders(["desra"], weights_key=None)] == ["desra, weight 1"]
    assert len({c.key for c in found}) == len(found)


def test_keys_follow_the_weights() -> None:
    assert contenders(["desra"], weights_key="a")[0].key != contenders(["desra"], weights_key="b")[0].key


def test_curves_pass_through_the_threshold() -> None:
    for contender in contenders(["desra", "ldl", "ssim", "niqe"], weights_key="k"):
        thresholds = contender.thresholds
        assert list(thresholds) == sorted(thresholds)
        assert any(entry.threshold in thresholds for entry in contender.entries)


def test_a_file_is_called_like_its_stem(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("class A:\n    threshold, smallest, inputs = -1.0, 3, ()\n    def __call__(self, *_): ...\n"
                    "detector = A()\n")  # fmt: skip
    (found,) = contenders([str(path)], weights_key="k")
    assert (found.name, found.thresholds, found.entries[0].threshold) == ("mine", (), -1.0)
    (tmp_path / "ldl-0.01.py").write_text(path.read_text())
    with pytest.raises(UsageError, match=r"has two methods called ldl-0\.01"):
        contenders(["ldl", str(tmp_path / "ldl-0.01.py")], weights_key=None)
