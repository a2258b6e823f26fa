"""The verdict in Markdown, for the Prefect UI: outcome, table, some regions before and after, the pixel loss."""

from __future__ import annotations

import base64

from desra_core.evaluation.table import as_markdown
from desra_core.gate.verdict import read_verdict, score_rows
from desra_core.report import plots
from desra_core.report.cards import make_card
from desra_core.workspace import Workspace

# Each picture is some 20 kB, which the server's database keeps.
_CARDS = 3
_KINDS = ("before", "after")


def verdict_markdown(workspace: Workspace) -> str:
    """Tell the latest verdict of a workspace.

    Raises
    ------
    UsageError
        It is damaged.
    """
    read = read_verdict(workspace)
    if read is None:
        return "There is no verdict yet.\n"
    document, verdict = read[0], read[0].verdict
    told = f"**{verdict.outcome.capitalize()}.** " + " ".join(verdict.reasons)
    parts = [f"**{verdict.best} passes.**" if verdict.passed else told, as_markdown(score_rows(verdict))]
    cards = [make_card(workspace.gate, picture) for picture in document.pictures[:_CARDS]]
    rows = []
    for card in cards:
        cells = {cell.kind: f"![{cell.kind}]({cell.uri})" if cell.uri else cell.reason for cell in card.cells}
        fate = "gone" if card.region.gone else "still there"
        rows.append({"region of": f"{card.image}, {fate}"} | {kind: cells[kind] for kind in _KINDS})
    if rows:
        parts.append(as_markdown(rows))
    points = [(row["iteration"], row["pixel"]) for row in document.losses if {"iteration", "pixel"} <= row.keys()]
    curve = plots.loss_curves("pixel loss", {"pixel": points}, best=None)
    if curve:
        parts.append(f"![pixel loss](data:image/svg+xml;base64,{base64.b64encode(curve.encode()).decode()})")
    return "\n\n".join(parts) + "\n"
