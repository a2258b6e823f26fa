"""What a detector may return, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from desra_core.detection.detectors import DetectorInputs, score_pair
from desra_core.errors import ImageError

IMAGE = Path("a.png")
PAIR = DetectorInputs(*[np.zeros((20, 30, 3), np.uint8)] * 2)


class Fixed:
    """Returns what it is given."""

    threshold, smallest, inputs = 1.0, 11, ()

    def __init__(self, scores: object) -> None:
        self.scores = scores

    def __call__(self, *_: object) -> object:
        return self.scores


@pytest.mark.parametrize(
    "scores",
    [None, "high", np.zeros((20, 31)), np.zeros((19, 29)), np.zeros((18, 30)), np.zeros((22, 32)),
     np.zeros((20, 30, 1)), np.full((20, 30), np.nan), np.full((20, 30), np.inf), np.zeros((20, 30), complex),
     np.zeros((20, 30), object)],
)  # fmt: skip
def test_scores_that_are_none_are_refused(scores) -> None:
    with pytest.raises(ImageError, match=r"a\.png: makes mine return .* instead of finite scores of the shape \(H"):
        score_pair(Fixed(scores), "mine", IMAGE, PAIR)


def test_scores_with_a_frame_and_small_images() -> None:
    scores = np.ones((10, 20), np.bool_)
    assert score_pair(Fixed(scores), "mine", IMAGE, PAIR) is scores
    with pytest.raises(ImageError, match="is 10x10, smaller than the 11 px that mine needs"):
        score_pair(Fixed(scores), "mine", IMAGE, DetectorInputs(*[np.zeros((10, 10, 3), np.uint8)] * 2))


class Raising(Fixed):
    """Fails with two lines."""

    def __call__(self, *_: object) -> object:
        raise ValueError("one\ntwo")


def test_what_a_detector_raises_is_told_in_a_line() -> None:
    with pytest.raises(ImageError, match=r"a\.png: makes mine fail \(ValueError: one two\); mend the method"):
        score_pair(Raising(None), "mine", IMAGE, PAIR)


@pytest.mark.parametrize("asked", [(), ("lr",), ("labels",), ("labels", "lr")])
def test_a_detector_gets_what_it_asks_for_and_nothing_else(asked: tuple[str, ...]) -> None:
    inputs = PAIR._replace(lr=np.zeros((10, 15, 3), np.uint8), labels=np.zeros((20, 30), np.uint8))
    given: list[object] = []

    class Asking(Fixed):
        """Notes what it is given."""

        def __call__(self, *arguments: object) -> object:
            given.extend(arguments)
            return self.scores

    detector = Asking(np.zeros((20, 30)))
    detector.inputs = asked
    score_pair(detector, "mine", IMAGE, inputs)
    assert given[2] is (inputs.lr if "lr" in asked else None)
    assert given[3] is (inputs.labels if "labels" in asked else None)
    if asked:
        with pytest.raises(ImageError, match=r"a\.png: has no (LR photos|class labels), which mine needs; "):
            score_pair(detector, "mine", IMAGE, PAIR)
