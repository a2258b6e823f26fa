"""What rounds save in the gate of the experiment on real models, and whether they keep its verdicts.

Goes through the rounds with the judgements that ``experiment.py`` has left in a workspace, for those finetunes whose
candidates were all judged on all images: in the order of the gate, and in random orders of the images, since the first
images decide whom the rounds drop. Prints a table.

    python -m docs.real.rounds FOLDER/realesr-general-x4v3/workspace
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from desra_core.evaluation.table import as_markdown
from desra_core.gate import rounds
from desra_core.gate.judge import Candidate, read_judgement
from desra_core.settings.models import Gate
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File, ImageRef

ORDERS = 200


class Judged:
    """The candidates of a comparison, the images that judged the control, and whether all of them judged all."""

    def __init__(self, workspace: Workspace, note: Path) -> None:
        document = json.loads(note.read_text())
        self.finetune = Path(document["after"]).name
        self.candidates = [Candidate(each["name"], None, each["judgements"]) for each in document["candidates"]]
        self.read = cache(lambda candidate, image: read_judgement(workspace, candidate, image))
        control = self.candidates[-1]
        files = sorted((workspace.gate / "judgements" / control.key).glob("*.json"))
        images = [ImageRef(path.stem, 0, (path.stem,), None, File(path, ""), None, None) for path in files]
        self.complete = all(self.read(candidate, image) for candidate in self.candidates for image in images)
        self.marked = [image for image in images if self.read(control, image).regions]
        self.clean = [image for image in images if not self.read(control, image).regions]

    def verdict(
        self, marked: list[ImageRef], clean: list[ImageRef], *, in_rounds: bool = True
    ) -> tuple[tuple[Any, ...], int]:
        """Return what must not depend on rounds, and the number of judgements of candidates that the verdict needs."""
        gone_through = rounds.Rounds(self.read, self.candidates, marked, clean, Gate(rounds=in_rounds))
        assert list(gone_through) == []
        verdict = gone_through.verdict()
        best = [(score.gone, score.images_added) for score in verdict.scores if score.candidate == verdict.best]
        return (verdict.outcome, verdict.best, best, verdict.reasons), sum(score.images for score in verdict.scores)


def main(workspace: Workspace) -> None:
    """Print a row for each finetune and number of standard deviations."""
    rows = []
    for note in sorted((workspace.gate / "compared").glob("*.json")):
        judged = Judged(workspace, note)
        if not judged.complete:
            continue
        expected, whole = judged.verdict(judged.marked, judged.clean, in_rounds=False)
        in_order, calls = judged.verdict(judged.marked, judged.clean)
        for deviations in (1.96, 3.0, 4.0, 5.0):
            rounds.DEVIATIONS = deviations
            draw = np.random.default_rng(0)
            found = []
            for _ in range(ORDERS):
                marked, clean = (
                    [kind[i] for i in draw.permutation(len(kind))] for kind in (judged.marked, judged.clean)
                )
                found.append(judged.verdict(marked, clean))
            rows.append({
                "finetune": judged.finetune,
                "without rounds": f"{expected[1]}, {expected[0]}: {whole} judgements",
                "in rounds": f"{'the same' if in_order == expected else in_order[1]}: {calls} ({calls / whole:.0%})",
                "deviations": f"{deviations:g}",
                "the same in random orders": f"{sum(other == expected for other, _ in found)} of {ORDERS}",
                "judgements, mean": f"{sum(made for _, made in found) / whole / ORDERS:.0%}",
                "most": f"{max(made for _, made in found) / whole:.0%}",
            })  # fmt: skip
    sys.stdout.write(as_markdown(rows) + "\n")


if __name__ == "__main__":
    main(Workspace(Path(sys.argv[1])))
