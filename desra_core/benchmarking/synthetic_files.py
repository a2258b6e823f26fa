"""What the synthetic benchmark found, as files: Markdown for people, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json

from desra_core import __version__
from desra_core.benchmarking.synthetic_benchmark import SyntheticBenchmark
from desra_core.benchmarking.synthetic_table import Summary, as_markdown, to_rows
from desra_core.errors import ImageError, printable

STEM = "synthetic"


def as_files(benchmark: SyntheticBenchmark, summary: Summary, failures: list[ImageError]) -> dict[str, str]:
    """Markdown, CSV and JSON by file name.

    The CSV file has the recall by method, kind, strength and size; the JSON file has all tables.
    """
    tables = to_rows(summary)
    document = {
        "desra": __version__,
        "settings": benchmark.settings.model_dump(mode="json"),
        **tables,
        "failures": [{"file": error.subject, "reason": error.reason, "remedy": error.remedy} for error in failures],
    }
    told = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    return {
        f"{STEM}.md": told_summary(benchmark, summary),
        f"{STEM}.csv": _csv(tables["recall"]),
        f"{STEM}.json": f"{told}\n",
    }


def told_summary(benchmark: SyntheticBenchmark, summary: Summary) -> str:
    """All tables as Markdown, under what they were made from."""
    gan_sr = benchmark.settings.gan_sr
    title = f"# Synthetic benchmark on {printable(gan_sr.name if gan_sr else '')}"
    return f"{title}\n\n{as_markdown(summary).strip()}\n"


def _csv(rows: list[dict[str, object]]) -> str:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]) if rows else ["method"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()
