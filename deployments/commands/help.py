"""Help in plain text: verbs and flags under headings, wrapped to the terminal, with nothing cut off.

Typer's own tables of five columns leave a third of a line of 80 characters to the text.
"""

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

# Wider lines are hard to read.
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class PlainCommand(TyperCommand):
    """A command whose help has its flags under their ``rich_help_panel``, those without one first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and flags."""
        _write_sections(formatter, _parameters(self, ctx))


class Verbs(TyperGroup):
    """The group of all commands, whose help has them under their ``rich_help_panel``; a name may have two words."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command of some arguments: its name, the command, and the other arguments."""
        name = " ".join(args[:2])
        return (name, self.commands[name], args[2:]) if name in self.commands else super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """List the commands that a word may be the beginning of; shells complete one word at a time."""
        return [item for item in super().shell_complete(ctx, incomplete) if " " not in item.value]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, each with the first paragraph of its help, and the flags."""
        commands: list[tuple[str, Any]] = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        rows = [(each.rich_help_panel, (name, _first_paragraph(each))) for name, each in commands]
        _write_sections(formatter, [*rows, *_parameters(self, ctx)])


Row = tuple[str, str]


def _parameters(command: Any, ctx: Any) -> list[tuple[str, Row]]:
    rows = []
    for parameter in command.get_params(ctx):
        usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
        if record := parameter.get_help_record(ctx):
            rows.append((getattr(parameter, "rich_help_panel", None) or usual, record))
    return sorted(rows, key=lambda row: (row[0] != "Arguments", row[0] != "Options"))


def _write_sections(formatter: Any, rows: Iterable[tuple[str, Row]]) -> None:
    sections: dict[str, list[Row]] = {}
    for heading, row in rows:
        sections.setdefault(heading, []).append(row)
    for heading, section in sections.items():
        with formatter.section(heading):
            formatter.write_dl(section)


def _first_paragraph(command: Any) -> str:
    return " ".join((command.help or "").partition("\n\n")[0].split())
