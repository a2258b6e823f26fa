"""The tutorial's commands, run from top to bottom, print what the page shows.

A block marked `shell` is run; a block marked `text` right below it shows what it prints on stdout. A line `...` stands
for any lines. Spaces may differ in number. Where the comment `<!-- numbers vary -->` stands above a block, any number
will do for a number: speeds, dates, and what another CPU rounds differently.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
# Where the page's reader types.
SHOWN_FOLDER = "/home/you/tutorial"

BLOCK = re.compile(
    r"^```shell\n(.*?)^```\n(?:\n(<!-- numbers vary -->\n)?```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE
)
NUMBER = re.compile(r"-?\d[\d.,:]*")


class Step(NamedTuple):
    """A command of a page, and the output that is shown below it; None where none is shown."""

    command: str
    shown: str | None
    numbers_vary: bool


def steps_of(page: str) -> list[Step]:
    """Find the commands of a page, in their order."""
    return [Step(command, shown, bool(vary)) for command, vary, shown in
            (found.group(1, 2, 3) for found in BLOCK.finditer(page))]  # fmt: skip


def run(step: Step, folder: Path) -> str:
    """Type a command in a folder; returns what it prints on stdout, as if in the page's folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    ended = subprocess.run(
        ["bash", "-ec", step.command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, f"{step.command}\n{ended.stdout}{ended.stderr}"
    return ended.stdout.replace(str(folder), SHOWN_FOLDER)


def agrees(step: Step, printed: str) -> bool:
    """Check whether an output is the one that is shown."""
    patterns = []
    for line in (step.shown or "").splitlines():
        if line.strip() == "...":
            patterns.append(r"(.*\n)*?")
            continue
        words = r"\s+".join(map(re.escape, line.split()))
        if step.numbers_vary:
            words = NUMBER.sub("NUMBER", " ".join(line.split()))
            words = re.escape(words).replace(r"\ ", r"\s+").replace("NUMBER", NUMBER.pattern)
        patterns.append(rf"\s*{words}\s*\n")
    return step.shown is None or re.fullmatch("".join(patterns), printed) is not None


@pytest.mark.slow
def test_the_commands_print_what_the_page_shows(tmp_path: Path) -> None:
    steps = steps_of(PAGE.read_text("utf-8"))
    assert len(steps) >= 8
    for step in steps:
        printed = run(step, tmp_path)
        assert agrees(step, printed), f"{step.command}\nprints\n{printed}\nthe page shows\n{step.shown}"


def test_every_command_is_found() -> None:
    text = PAGE.read_text("utf-8")
    steps = steps_of(text)
    assert len(steps) == text.count("```shell\n")
    assert sum(step.shown is not None for step in steps) == text.count("```text\n")


def test_other_outputs_differ() -> None:
    shown = Step("desra", "1 of 2 done\n...\nreport   /home/you/tutorial/ws\n", numbers_vary=False)
    assert agrees(shown, "1 of 2 done\nreport  /home/you/tutorial/ws\n")
    assert agrees(shown, "1 of 2 done\nmore\nand more\nreport /home/you/tutorial/ws\n")
    assert not agrees(shown, "2 of 2 done\nreport /home/you/tutorial/ws\n")
    assert not agrees(shown, "1 of 2 done\nreport /home/you/tutorial/ws\nand more\n")
    vary = shown._replace(numbers_vary=True)
    assert agrees(vary, "19 of -2.5 done\nreport /home/you/tutorial/ws\n")
    assert not agrees(vary, "19 of 2 failed\nreport /home/you/tutorial/ws\n")
