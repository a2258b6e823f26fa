"""Benchmarks without pages: drawing takes longer than judging a small data set, and has its own tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def undrawn_pages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("desra_core.report.benchmark_page.render", lambda benchmark, results: f"{results}")
        yield
