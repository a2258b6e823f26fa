"""Markdown tables of measurements."""

from collections.abc import Sequence

Cell = str | float


def print_table(headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print a table, its first column to the left and the numbers to the right."""
    cells = [list(headings)] + [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(headings))]
    rule = [":" + "-" * (width - 1) if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    for line in [cells[0], rule, *cells[1:]]:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("| " + " | ".join(padded) + " |")


def _text(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):
        return str(cell)
    return f"{cell:.2f}" if abs(cell) >= 0.1 else f"{cell:.4f}"
