"""Each `desra` command line in the documentation has a verb and flags that exist, and no argument too many."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from deployments.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]

CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)
# A command begins a piece of code, a line, or what follows another command; or it is what `next` proposes in an output.
CALL = re.compile(r"(?:^|[;&|]|^`|^next )\s*(?:\$ )?(?:\w+=\S+ )*(?:ExecStart=)?(?:[\w./~-]*/)?desra (.*)")
END = re.compile(r"\s#|\sundoes it|;|&|\||`|\s…|\s\.\.\.|\s>|\s<")


def command_lines(text: str) -> Iterator[str]:
    """Find what follows the word desra in the code of a Markdown page."""
    for code in CODE.findall(text):
        for line in code.replace("\\\n", " ").splitlines():
            if found := CALL.search(line):
                yield END.split(found[1], maxsplit=1)[0].strip()


def problem(line: str) -> str:
    """Check a command line without the word desra; returns what is wrong with it, or nothing."""
    root: Any = typer.main.get_command(app)
    verb, *words = shlex.split(line)
    if words and f"{verb} {words[0]}" in root.commands:
        verb, words = f"{verb} {words[0]}", words[1:]
    if verb == "COMMAND" or verb in {flag for parameter in root.params for flag in parameter.opts} | {"--help", "-h"}:
        return ""
    command = root.commands.get(verb)
    if command is None:
        return f"no verb {verb}"
    options = {flag: option for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    arguments, pending = 0, iter(words)
    for word in pending:
        if not word.startswith("-"):
            arguments += 1
            continue
        flag, equals, _ = word.partition("=")
        if flag in ("--help", "-h"):
            continue
        if flag not in options:
            return f"desra {verb} has no flag {flag}"
        if not options[flag].is_flag and not equals:
            next(pending, None)  # the value, which a page leaves out where it speaks of the flag
    most = sum(parameter.param_type_name == "argument" for parameter in command.params)
    return f"desra {verb} takes {most} arguments, not {arguments}" if arguments > most else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_verbs_and_flags_of_a_page_exist(page: Path) -> None:
    lines = command_lines(page.read_text("utf-8"))
    assert [f"{wrong}: desra {line}" for line in lines if (wrong := problem(line))] == []


def test_command_lines_are_found() -> None:
    text = "Run `desra gc --list` or\n```\n$ .venv/bin/desra mine PHOTOS \\\n  --workspace ws  # as desra does\n```"
    assert list(command_lines(text)) == ["gc --list", "mine PHOTOS    --workspace ws"]
    for page in ("README.md", "docs/tutorial.md"):
        assert len(list(command_lines((ROOT / page).read_text("utf-8")))) > 5


@pytest.mark.parametrize(
    "line",
    ["mien PHOTOS", "mine PHOTOS --worksapce ws", "mine PHOTOS MORE --workspace ws", "gc all --workspace ws"],
)
def test_what_does_not_exist_is_found(line: str) -> None:
    assert problem(line)
