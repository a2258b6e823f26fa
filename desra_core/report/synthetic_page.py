"""One page about the synthetic benchmark: what detectors do not see, operating curves, and all tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from desra_core.benchmarking.benchmark import Benchmark
from desra_core.benchmarking.injection import KINDS
from desra_core.benchmarking.synthetic import SyntheticJob
from desra_core.benchmarking.synthetic_summary import SyntheticSummary
from desra_core.benchmarking.synthetic_tables import curves, sections_of, title_of
from desra_core.errors import ImageError
from desra_core.report.charts import heat_table, line_chart
from desra_core.report.document import render_page
from desra_core.report.plots import inline

_CURVES, _FAILURES = 8, 100


def render(benchmark: Benchmark[SyntheticJob], summary: SyntheticSummary, failures: Sequence[ImageError]) -> str:
    """The page as text: one HTML file that needs no other file and no network; the same for the same results."""
    return render_page(
        "synthetic.html.j2",
        title=title_of(benchmark),
        sections=sections_of(summary),
        charts=_charts(summary) if summary.injected else [],
        mse_sr=benchmark.settings.mse_sr,
        gan_sr=benchmark.settings.gan_sr,
        failures=failures[:_FAILURES],
        all_failures=len(failures),
    )


def _charts(summary: SyntheticSummary) -> list[Markup]:
    drawn: dict[str, Any] = dict(list(curves(summary).items())[:_CURVES])
    figure = line_chart(drawn, xlabel="share of the clean pixels that is marked", ylabel="recall", log_x=True)
    recall = [
        [np.nan if (share := method.recall(kind=kind).share) is None else share for kind in KINDS]
        for method in summary.methods
    ]
    kinds = [kind.replace("_", " ") for kind in KINDS]
    table = heat_table([method.method for method in summary.methods], kinds, recall)
    return [inline(figure, "Recall by false alarms"), inline(table, "Recall by method and kind")]
