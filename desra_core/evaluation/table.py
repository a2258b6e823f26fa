"""Format numbers and tables: for people (command line, Prefect UI, report) and for programs (CSV and JSON files)."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from desra_core.errors import ImageError, printable


class Section(NamedTuple):
    """A part of a document: a heading, a list, a paragraph and a table, in this order, without those that are empty."""

    heading: str = ""
    bullets: Sequence[str] = ()
    note: str = ""
    table: Sequence[dict[str, str]] = ()


def document_as_text(title: str, sections: Sequence[Section]) -> str:
    """Format sections for a terminal, with the columns of tables aligned."""
    return _joined(title, sections, "", as_text)


def document_as_markdown(title: str, sections: Sequence[Section]) -> str:
    """Format sections as Markdown: the title is a heading of level 1, the headings of sections are of level 2."""
    return _joined(f"# {title}", sections, "## ", as_markdown) + "\n"


def _joined(
    title: str, sections: Sequence[Section], mark: str, table: Callable[[Sequence[dict[str, str]]], str]
) -> str:
    parts = [title]
    for section in sections:
        parts += [
            f"{mark}{section.heading}" if section.heading else "",
            "\n".join(f"- {line}" for line in section.bullets),
            section.note,
            table(section.table) if section.table else "",
        ]
    return "\n\n".join(part for part in parts if part)


def as_text(rows: Sequence[dict[str, str]]) -> str:
    """Format rows as a table of aligned columns."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def as_markdown(rows: Sequence[dict[str, str]]) -> str:
    """Format rows as a Markdown table."""
    cells = [[printable(cell).replace("|", "\\|") for cell in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Format rows as CSV; undefined values are empty, flags are true or false."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: str(value).lower() if isinstance(value, bool) else value for key, value in row.items()})
    return text.getvalue()


def as_json(document: Any) -> str:
    """Format plain values as a JSON file."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_toml(values: Mapping[str, Any]) -> list[str]:
    """Format texts, numbers, flags and lists of these as lines of a TOML file; those that are None are left out."""
    # TOML spells such values as JSON does, but has no raw DEL.
    spelled = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items() if value is not None}
    return [f"{name} = {text}".replace("\x7f", "\\u007f") for name, text in spelled.items()]


def failure_rows(failures: Iterable[ImageError]) -> list[dict[str, str]]:
    """Describe failures in plain values for JSON."""
    return [{"file": error.subject, "reason": error.reason, "remedy": error.remedy} for error in failures]


def fixed(value: float | None, digits: int = 3) -> str:
    """Format a number with ``digits`` decimals; a dash where it is undefined."""
    return "–" if value is None else f"{value:.{digits}f}"


def in_percent(share: float | None, interval: tuple[float, float] | None = None, *, form: str = ".1f") -> str:
    """Format a share as ``98.5 %``, or with its interval as ``98.5 % (97–99)``; a dash where it is undefined."""
    if share is None:
        return "–"
    bounds = f" ({100 * interval[0]:.0f}–{100 * interval[1]:.0f})" if interval else ""
    return f"{100 * share:{form}} %{bounds}"


def counted(number: int, thing: str, things: str = "") -> str:
    """Format a count as ``1 image`` or ``12,345 images``; give ``things`` where the plural takes more than an s."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
