"""Measuring detectors: on data sets with human masks, and on artifacts that are injected into clean pairs.

`plan` finds the images and the work that is left, for a benchmark of either kind.
"""

from typing import Any

from desra_core.benchmarking.annotated import plan_annotated
from desra_core.benchmarking.benchmark import Benchmark
from desra_core.benchmarking.synthetic import plan_synthetic
from desra_core.settings.models import Benchmarking

__all__ = ["AnyBenchmark", "plan"]

AnyBenchmark = Benchmark[Any]


def plan(settings: Benchmarking) -> AnyBenchmark:
    """Plan a benchmark of either kind, and write nothing (raises `desra_core.errors.UsageError`)."""
    return plan_synthetic(settings) if settings.synthetic else plan_annotated(settings)
