"""Labelled benchmarks without pages: drawing takes longer than judging a small data set, and has its own tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from desra_core.report import pages
from desra_core.settings.models import SyntheticBenchmarking


@pytest.fixture(autouse=True, scope="module")
def undrawn_pages() -> Iterator[None]:
    drawn = pages.render_benchmark

    def undrawn(benchmark, results, *more) -> str:
        return (
            drawn(benchmark, results, *more) if isinstance(benchmark.settings, SyntheticBenchmarking) else f"{results}"
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "render_benchmark", undrawn)
        yield
