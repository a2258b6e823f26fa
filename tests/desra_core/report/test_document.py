"""Numbers and texts in words."""

from __future__ import annotations

import math

import pytest

from desra_core.report import document


@pytest.mark.parametrize(
    ("share", "words"),
    [(None, "–"), (0, "0 %"), (1, "100 %"), (0.375, "37.5 %"), (0.0212, "2.1 %"), (0.00034, "0.034 %"),
     (1e-9, "below 0.0001 %"), (0.0995, "10.0 %")],
)  # fmt: skip
def test_shares_in_words(share: float | None, words: str) -> None:
    assert document.percent(share) == words


def test_numbers_in_words() -> None:
    assert [document.decimal(number) for number in (0, 0.0123, 1.234, 12.34, 1234.5, None, math.inf)] == [
        "0", "0.0123", "1.23", "12.3", "1,234", "–", "–",
    ]  # fmt: skip
    assert [document.duration(number) for number in (3.0, 600, 7300, 864_000)] == [
        "3.00 s",
        "10.0 min",
        "2.03 h",
        "10.0 d",
    ]
    assert [document.severity(number) for number in (1234.56, -0.25, 0)] == ["1,234.6", "−0.2", "0.0"]
    assert [document.tick(number) for number in (10_000, 3e6, -0.5, 0)] == ["10 k", "3 M", "−0.5", "0"]


def test_long_texts_keep_both_ends() -> None:
    text = document.shortened("a" * 300 + "\n" + "b" * 300)
    assert len(text) < 250
    assert text.startswith("aaa")
    assert text.endswith("bbb")
    assert document.shortened("a\nb") == "a\\nb"
    assert document.shortened(None) == ""
