"""The Sphinx directive ``settings``: tables of the settings of all commands, made from the commands themselves."""

import inspect
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.models import ArgumentInfo

from deployments.cli import app
from desra_core.settings import Machine
from desra_core.settings.models import SETTINGS

_FIELDS = {verb: kind.model_fields | Machine.model_fields for verb, kind in SETTINGS.items()}
_TYPES = {int: "whole number", float: "number", Path: "path", str: "text", bool: "yes or no"}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


class Setting(NamedTuple):
    """A row of the tables; ``values`` are the type or the choices, with their limits."""

    flags: tuple[str, ...]
    values: str
    default: str
    meaning: str


class SettingsTables(SphinxDirective):
    """Insert a section with a table for each set of commands that share settings."""

    def run(self) -> list[nodes.Node]:
        """Return the sections."""
        lines = []
        for commands, settings in settings_by_commands().items():
            lines += [
                "",
                f"## {', '.join(commands)}",
                "",
                "| setting | value | default | meaning |",
                "|---|---|---|---|",
            ]
            for setting in settings:
                cells = (", ".join(f"`{flag}`" for flag in setting.flags), *setting[1:])
                lines.append(f"| {' | '.join(cell.replace('*', chr(92) + '*') for cell in cells)} |")
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> None:
    """Add the directive to Sphinx."""
    app.add_directive("settings", SettingsTables)


def settings_by_commands() -> dict[tuple[str, ...], list[Setting]]:
    """List each setting once, by the commands that take it with the same values, default and meaning."""
    commands: dict[Setting, list[str]] = defaultdict(list)
    for command in app.registered_commands:
        assert command.callback is not None
        verb = command.name or command.callback.__name__
        for parameter in inspect.signature(command.callback).parameters.values():
            if parameter.name != "context":
                commands[_setting(verb, parameter)].append(verb)
    grouped: dict[tuple[str, ...], list[Setting]] = defaultdict(list)
    for setting, verbs in commands.items():
        grouped[tuple(verbs)].append(setting)
    return dict(sorted(grouped.items(), key=lambda group: -len(group[0])))


def _setting(verb: str, parameter: inspect.Parameter) -> Setting:
    """Describe a parameter of a command, which is annotated with its type and with Typer's option or argument."""
    kind, info = get_args(parameter.annotation)
    name = parameter.name.replace("_", "-")
    # Typer takes the first flag of an option for its default.
    given = [flag for flag in (info.default, *(info.param_decls or ())) if str(flag).startswith("--")]
    flags = [f"--{name}", f"--no-{name}"] if kind is bool else [f"--{name}"]
    if isinstance(info, ArgumentInfo):
        flags = [info.metavar or name.upper()]
    elif given:
        flags = [one for flag in given for one in flag.split("/")]
    field = _FIELDS.get(verb, {}).get(parameter.name)
    limits = [("≥", info.min), ("≤", info.max)]
    for limit in field.metadata if field else ():
        limits += [(sign, getattr(limit, name, None)) for name, sign in _SIGNS.items()]
    values = [_values(kind), *(f"{sign}\N{NO-BREAK SPACE}{limit:,}" for sign, limit in limits if limit is not None)]
    return Setting(tuple(flags), ", ".join(values), _default(parameter.default), info.help or "")


def _values(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is list:
        return f"{_values(get_args(kind)[0])}; several"
    return _values(get_args(kind)[0]) if get_args(kind) else _TYPES[kind]  # Path of Path | None


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value in (None, ()) else f"`{value}`"
