"""Scores as a table that a person reads: on the command line, in the Prefect UI and in the report."""

from __future__ import annotations

from collections.abc import Sequence


def as_text(rows: Sequence[dict[str, str]]) -> str:
    """A table of aligned columns."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def as_markdown(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
