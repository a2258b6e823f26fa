"""Shard numbers in few words."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tasks.overview import ranges


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_each_number_once(numbers: set[int]) -> None:
    told = ranges(sorted(numbers))
    count, _, named = told.removesuffix(")").partition(" (")
    found: list[int] = []
    for part in named.split(", ") if numbers else []:
        first, _, last = part.partition("–")
        found += range(int(first), int(last or first) + 1)
    assert found == sorted(numbers)
    assert count == (str(len(numbers)) if numbers else "none")
