"""The parts of a Markdown file that the evaluation wrote: headings, paragraphs, lists and tables, and nothing else."""

from __future__ import annotations

from typing import NamedTuple

from desra_core.evaluation.table import as_text


class Block(NamedTuple):
    """A part of a file: a heading or a paragraph (``text``), a list or a table (``rows`` of cells)."""

    kind: str
    text: str
    rows: list[list[str]]


def blocks_of(markdown: str) -> list[Block]:
    """The parts of a file, in their order."""
    blocks = []
    for text in markdown.strip().split("\n\n"):
        lines = text.split("\n")
        if text.startswith("#"):
            blocks.append(Block("heading", text.lstrip("# "), []))
        elif text.startswith("- "):
            blocks.append(Block("list", "", [[line.removeprefix("- ")] for line in lines]))
        elif text.startswith("|"):
            cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
            blocks.append(Block("table", "", [cells[0], *cells[2:]]))
        else:
            blocks.append(Block("paragraph", text, []))
    return blocks


def for_terminal(markdown: str) -> str:
    """The same with the columns of tables aligned."""
    return "\n\n".join(_told(block) for block in blocks_of(markdown))


def _told(block: Block) -> str:
    if block.kind == "table":
        head, *rows = block.rows
        return as_text([dict(zip(head, row, strict=True)) for row in rows])
    if block.kind == "list":
        return "\n".join(f"- {row[0]}" for row in block.rows)
    return block.text
