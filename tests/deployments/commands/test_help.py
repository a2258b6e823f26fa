"""``desra`` alone, and ``--help``: the flags that everybody needs first, the others under headings, nothing cut off."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from deployments import cli
from desra_core.settings import Heading, Machine, heading_of
from desra_core.settings.models import SETTINGS
from tests.conftest import Desra

VERBS = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]


def sections(text: str) -> dict[str, str]:
    """Split a help text at its headings; the flags of each, as one line."""
    _, *parts = re.split(r"^(\S.*):$", text, flags=re.MULTILINE)
    return {heading: " ".join(part.split()) for heading, part in zip(parts[::2], parts[1::2], strict=True)}


@pytest.fixture
def help_of(desra_here: Desra, monkeypatch: pytest.MonkeyPatch):
    def told(*command: str, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        run = desra_here(*command, "--help")
        assert run.returncode == 0, run.stderr
        assert max(map(len, run.stdout.splitlines())) <= columns
        return run.stdout

    return told


def test_desra_alone_says_how_to_start(desra_here: Desra) -> None:
    run = desra_here()
    assert run.returncode == 0
    lines = run.stdout.splitlines()
    assert len(lines) == 5
    assert re.findall(r"  desra (\w+) ", run.stdout) == ["detect", "twin", "mine"]
    assert "ws/report.html" in lines[-1]
    assert "desra --help" in lines[-1]
    for words in (line.partition("  desra ")[2].split() for line in lines[1:4]):
        known = desra_here(words[0], "--help").stdout
        assert all(word in known for word in words if word.startswith("--"))


def test_the_commands_are_grouped(help_of) -> None:
    for columns in (80, 120):
        found = sections(help_of(columns=columns))
        assert list(found) == ["Find artifacts", "Delete them", "Judge", "Run and keep", "Options"]
        text = " ".join(found.values())
        for command in cli.app.registered_commands:
            assert command.callback is not None
            summary = " ".join((command.callback.__doc__ or "").partition("\n\n")[0].split())
            assert re.sub(r"\W", "", summary) in re.sub(r"\W", "", text), "the whole first paragraph"
    assert {words.split()[0] for words in found.values()} == {"mine", "twin", "evaluate", "serve", "--version"}


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("verb", VERBS)
def test_no_help_is_cut_off(help_of, verb: str, columns: int) -> None:
    text = help_of(*verb.split(), columns=columns)
    assert "…" not in text
    assert "..." not in text


@pytest.mark.parametrize("verb", SETTINGS)
def test_each_flag_stands_with_its_whole_text_under_its_heading(help_of, verb: str) -> None:
    kind, found = SETTINGS[verb], sections(help_of(*verb.split()))
    headings = [heading for heading in found if heading not in ("Arguments", "Options")]
    assert headings == [heading for heading in get_args(Heading) if heading in headings]
    assert headings[-1] == "Machine and log"
    fields = {*kind.model_fields, *Machine.model_fields, *(["labels"] if "segmenter" in kind.model_fields else [])}
    flags = {flag for part in found.values() for flag in re.findall(r"(--[\w-]+) <", part)}
    assert {flag.removeprefix("--").replace("-", "_") for flag in flags} <= fields | {"config"}
    for model in (kind, Machine):
        for name, field in model.model_fields.items():
            flag = "--" + name.replace("_", "-")
            where = heading_of(model, name) or ("Options" if flag in found["Options"] else "Arguments")
            told = found[where]
            assert flag in told or name.upper() in told
            # Words are also broken at hyphens.
            assert re.sub(r"\s", "", field.description or "") in re.sub(r"\s", "", told)


def test_what_everybody_needs_comes_first(help_of) -> None:
    found = sections(help_of("cycle"))
    usual = re.findall(r"(?<= )--[\w-]+(?= <| / )", " " + found["Options"])
    assert usual[:2] == ["--workspace", "--gan-model"]
    assert {"--twin-photos", "--preset", "--mse-model", "--config"} < set(usual)
    assert len(usual) < 13
    assert list(found)[2:] == ["Detection", "Networks", "Training", "Losses", "Gate", "Storage", "Machine and log"]
