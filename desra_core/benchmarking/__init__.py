"""Measuring detectors: on data sets with human masks, and on artifacts that are injected into clean pairs.

`plan` finds the images and the work that is left, for a benchmark of either kind.
"""

from typing import Any

from desra_core.benchmarking.annotated import plan_annotated
from desra_core.benchmarking.benchmark import Benchmark
from desra_core.benchmarking.synthetic import plan_synthetic
from desra_core.settings.models import Benchmarking, SyntheticBenchmarking

__all__ = ["AnyBenchmark", "plan"]

AnyBenchmark = Benchmark[Any]


def plan(settings: Benchmarking | SyntheticBenchmarking) -> AnyBenchmark:
    """Plan a benchmark of either kind, and write nothing (raises `desra_core.errors.UsageError`)."""
    return plan_annotated(settings) if isinstance(settings, Benchmarking) else plan_synthetic(settings)
