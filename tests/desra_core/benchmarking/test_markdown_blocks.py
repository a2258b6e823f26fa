"""Markdown that the evaluation wrote, taken apart again."""

from __future__ import annotations

from desra_core.benchmarking.markdown_blocks import Block, blocks_of, for_terminal
from desra_core.evaluation.table import as_markdown

ROWS = [{"method": "a", "recall": "10 % (7–13) of 3"}, {"method": "desra, weight 1", "recall": "–"}]
FILE = f"# Title\n\nA paragraph\nof two lines.\n\n## More\n\n- one\n- two - three\n\n{as_markdown(ROWS)}\n"


def test_its_parts() -> None:
    assert blocks_of(FILE) == [
        Block("heading", "Title", []),
        Block("paragraph", "A paragraph\nof two lines.", []),
        Block("heading", "More", []),
        Block("list", "", [["one"], ["two - three"]]),
        Block("table", "", [["method", "recall"], *(list(row.values()) for row in ROWS)]),
    ]


def test_it_is_readable_in_a_terminal() -> None:
    table = "method           recall\na                10 % (7–13) of 3\ndesra, weight 1  –"
    assert for_terminal(FILE) == f"Title\n\nA paragraph\nof two lines.\n\nMore\n\n- one\n- two - three\n\n{table}"
