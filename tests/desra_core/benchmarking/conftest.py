"""Benchmarks whose pages are not drawn: that takes longer than to judge a small data set, and has tests of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def undrawn_pages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("desra_core.report.benchmark_page.render", lambda benchmark, results: f"{results}")
        yield
