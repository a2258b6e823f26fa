"""What a detector may return, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from desra_core.detection.scoring import score_pair
from desra_core.errors import ImageError

IMAGE = Path("a.png")
PIXELS = np.zeros((20, 30, 3), np.uint8)


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
    with pytest.raises(ImageError, match=r"a\.png: gets no finite scores of its size less an even frame from mine"):
        score_pair(Fixed(scores), "mine", IMAGE, PIXELS, PIXELS, None, None)


def test_scores_with_a_frame_and_small_images() -> None:
    scores = np.ones((10, 20), np.bool_)
    assert score_pair(Fixed(scores), "mine", IMAGE, PIXELS, PIXELS, None, None) is scores
    with pytest.raises(ImageError, match="is 10x10, smaller than the 11 px that mine needs"):
        score_pair(Fixed(scores), "mine", IMAGE, PIXELS[:10, :10], PIXELS[:10, :10], None, None)


class Raising(Fixed):
    """Fails with two lines."""

    def __call__(self, *_: object) -> object:
        raise ValueError("one\ntwo")


def test_what_a_detector_raises_is_told_in_a_line() -> None:
    with pytest.raises(ImageError, match=r"a\.png: makes mine fail \(ValueError: one two\); mend the method"):
        score_pair(Raising(None), "mine", IMAGE, PIXELS, PIXELS, None, None)
