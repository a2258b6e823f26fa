from __future__ import annotations

import ast
import html
import importlib
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest

from deployments import cli
from deployments.commands import models
from desra_core.annotations.corrections import _REPLACED
from desra_core.calibration.weights import HISTOGRAM
from desra_core.evaluation import evaluation
from desra_core.housekeeping import contents
from desra_core.planning.plan import IMAGES, REGIONS
from desra_core.training.pools import SPLIT
from desra_core.workspace.human_masks import EXPORTED, HUMAN_MASKS
from desra_core.workspace.manifest import MANIFEST
from desra_core.workspace.matching import FAILURES, ROLES
from desra_core.workspace.products import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from docs.settings_tables import Setting

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
PACKAGES = ("desra_core", "tasks", "flows", "deployments")

TABLES = {
    "regions.parquet": REGIONS,
    "failures.parquet": FAILURES,
    "dataset/manifest.parquet": IMAGES,
    "manifest.parquet": MANIFEST,
    "split.parquet": SPLIT,
    "human/manifest.parquet": HUMAN_MASKS,
    "imports/*.parquet": _REPLACED,
    "exported/*.parquet": EXPORTED,
    "outcomes/*.parquet": SCHEMA,
    "calibration/*/*.parquet": HISTOGRAM,
}
_REGION, _IMAGE, _CLASS = evaluation._REGION_COLUMNS, evaluation._IMAGE_COLUMNS, evaluation._CLASS_COLUMNS
# Calls of commands that do not take a workspace that is there.
USED_WRONGLY = {
    "mine": ["none", "--gan-model", "none.pth", "--workspace", "none"],
    "cycle": ["none", "--gan-model", "none.pth", "--workspace", "none"],
    "twin": ["none", "--gan-model", "none.pth", "--output", "none.pth"],
    "serve": ["none.toml"],
    "benchmark": ["none", "--output", "bench"],
    "detect": ["--mse-sr", "none", "--gan-sr", "none", "--workspace", "none"],
    "compare": ["--workspace", "none", "--after", "none.pth"],
    "calibrate": ["--workspace", "none", "--output", "weights.toml"],
    "export": ["--workspace", "none", "--format", "coco", "--output", "out"],
    "import": ["coco", "none.json", "--workspace", "none"],
    "benchmark synthetic": ["--mse-sr", "none", "--gan-sr", "none", "--output", "bench"],
    "review": ["--workspace", "none", "--rater", "ann"],
    "config": ["--from-workspace", "none"],
    "doctor": ["--workspace"],
    "inspect": ["none"],
}
# The columns that the page lists, and those that it takes over from another table.
CSV = {
    "regions.csv": ((*_REGION, "found", "noticed"), ()),
    "detections.csv": ((*_REGION, "right"), _REGION),
    "images.csv": (_IMAGE, ()),
    "classes.csv": (_CLASS, _IMAGE[3:-2]),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as by ``make docs``: every warning is an error, such as a page that no toctree names."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", folder / "doctrees"]
    run = subprocess.run([*command, DOCS, folder / "html"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder / "html"


def text_of(path: Path) -> str:
    return re.sub(r"<[^>]+>", "", path.read_text("utf-8"))


def tables_of(page: Path) -> dict[str, list[list[str]]]:
    """The first table below each heading of a Markdown page: its rows as cells, without the two rows on top."""
    parts = re.split(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)[1:]
    found = {}
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        rows = re.findall(r"^\|(.*)\|$", text.partition("\n\n#")[0], re.MULTILINE)
        found[heading.strip("`")] = [[cell.strip(" `") for cell in row.split("|")] for row in rows[2:]]
    return found


def test_the_site_has_every_page(site: Path) -> None:
    pages = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md") if "_build" not in path.parts}
    assert {page for page in pages if not (site / page).exists()} == set()
    assert "\\sqrt" not in text_of(site / "method.html")  # equations are MathML


def test_the_site_loads_nothing_from_the_network(site: Path) -> None:
    loaded = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*")
    assert [found for page in site.rglob("*.html") for found in loaded.findall(page.read_text("utf-8"))] == []


COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands]


@pytest.fixture(scope="module")
def listed() -> dict[str, dict[str, Setting]]:
    """The settings of the site by command and first flag."""
    sys.path.append(str(DOCS))
    try:
        groups = importlib.import_module("settings_tables").settings_by_commands()
    finally:
        sys.path.remove(str(DOCS))
    found: dict[str, dict[str, Setting]] = {command: {} for command in COMMANDS}
    for commands, settings in groups.items():
        for command in commands:
            found[command] |= {setting.flags[0]: setting for setting in settings}
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_the_settings_of_a_command_are_those_of_its_help(command: str, listed, desra_here, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    said = re.findall(r"^  (--[a-z-]+)", desra_here(*command.split(), "--help").stdout, re.MULTILINE)
    assert {*said} - {"--help"} == {flag for flag in listed[command] if flag.startswith("--")}


def test_settings_are_listed_with_choices_limits_and_defaults(listed, site: Path) -> None:
    assert listed["mine"]["--keep"][1:3] == ("`artifacts`, `maps`, `all`", "`artifacts`")
    assert listed["cycle"]["--window"][1:3] == ("whole number, ≥\N{NO-BREAK SPACE}3, ≤\N{NO-BREAK SPACE}255", "`11`")
    assert listed["report"]["--worst"][1:3] == ("whole number, ≥\N{NO-BREAK SPACE}0, ≤\N{NO-BREAK SPACE}500", "`24`")
    assert listed["detect"]["--gan-sr"][2] == "required"
    assert listed["gc"]["--list"].flags == ("--list",)
    assert (listed["mine"]["--keep-mse"][2], listed["cycle"]["--keep-mse"][2]) == ("no", "yes")
    assert {"PHOTOS", "CONFIG", "FORMAT"} & {*listed["import"], *listed["mine"], *listed["serve"]} == {
        "PHOTOS",
        "CONFIG",
        "FORMAT",
    }
    page = html.unescape(text_of(site / "reference" / "settings.html"))
    assert all(flag in page for settings in listed.values() for setting in settings.values() for flag in setting.flags)


def typed(columns: pa.Schema) -> Iterator[tuple[str, str]]:
    """The names of columns, and the types without those of their parts."""
    return ((field.name, re.sub(r"<.*", "", str(field.type))) for field in columns)


@pytest.mark.parametrize("table", TABLES)
def test_tables_have_the_columns_that_are_described(table: str) -> None:
    described = [
        (column.replace("ROLE", role), kind)
        for role in ROLES
        for column, kind, _ in tables_of(REFERENCE / "files.md")[table]
        if "ROLE" in column or role == ROLES[0]
    ]
    assert sorted(described) == sorted(typed(TABLES[table]))


@pytest.mark.parametrize("table", CSV)
def test_csv_files_have_the_columns_that_are_described(table: str) -> None:
    columns, elsewhere = CSV[table]
    described = [column for column, _ in tables_of(REFERENCE / "files.md")[table]]
    assert sorted([*described, *elsewhere]) == sorted(columns)


def test_the_tree_of_a_workspace_has_all_its_files_and_folders() -> None:
    tree = (REFERENCE / "files.md").read_text("utf-8").partition("```text")[2].partition("```")[0]
    names = {re.split(r"[/ ,]", line.strip())[0] for line in tree.splitlines()} | set(re.findall(r", (\w+)", tree))
    assert {*contents.FOLDERS, *contents._FILES} - names == set()


def test_the_exit_codes_are_those_of_the_command_line() -> None:
    codes, commands = (tables_of(REFERENCE / "exit-codes.md")[heading] for heading in ("Exit codes", "By command"))
    promised = str(cli.main.__doc__).partition("Exit codes:")[2]
    assert [row[0] for row in codes] == re.findall(r"\b\d+\b", promised)
    assert sorted(row[0] for row in commands) == sorted(COMMANDS)
    # Where the gate or a twin decides: the commands whose modules return this code.
    assert str(models.GATE_FAILED) in [row[0] for row in codes]
    assert {row[0] for row in commands if row[2]} == {"twin", "compare", "cycle", "serve"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_cannot_be_used_ends_with_the_code_for_it(command: str, desra_here, tmp_path) -> None:
    run = desra_here(*command.split(), *USED_WRONGLY.get(command, ["--workspace", tmp_path / "none"]))
    assert run.returncode == 2
    assert run.stdout == ""


def messages(tree: ast.Module) -> Iterator[str]:
    """The lines that some code may print, with … for each part that varies.

    These are all texts in it, and the lines of errors: a subject, a reason and a remedy, each a text, a choice of
    texts, or a variable that the same function or the module has assigned one to.
    """
    constants = assigned(ast.Module([node for node in tree.body if isinstance(node, ast.Assign)], []))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            yield from forms(node, {})
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = constants | assigned(node)
            for call in ast.walk(node):
                match call:
                    case ast.Call(func=ast.Name(id=error), args=[_, _, _] as parts) if error.endswith("Error"):
                        for subject, reason, remedy in product(*(forms(part, names) for part in parts)):
                            yield f"{subject}: {reason}; {remedy}"


def assigned(scope: ast.AST) -> dict[str, set[str]]:
    """The texts that are assigned to each variable."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(scope):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found[name] = found.get(name, set()) | forms(value, {})
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                for name, value in zip(names, values, strict=True):
                    if isinstance(name, ast.Name):
                        found[name.id] = found.get(name.id, set()) | forms(value, {})
    return found


def forms(node: ast.expr, names: Mapping[str, set[str]]) -> set[str]:
    """The texts that an expression may have."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.JoinedStr(values=parts):
            return {"".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts)}
        case ast.IfExp(body=one, orelse=other):
            return forms(one, names) | forms(other, names)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return {first + second for first, second in product(forms(left, names), forms(right, names))}
        case ast.Name(id=name) if name in names:
            return names[name]
    return {"…"}


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    said = {
        message
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for message in messages(ast.parse(path.read_bytes()))
    }
    page = (REFERENCE / "troubleshooting.md").read_text("utf-8")
    quoted = [
        quote for line in re.findall(r"^- (`.*`)\\$", page, re.MULTILINE) for quote in re.findall(r"`(.+?)`", line)
    ]
    assert len(quoted) == page.count("`\\\n") + page.count("`, or `") >= 40
    assert [quote for quote in quoted if quote not in said] == []
    assert all(len(re.sub(r"\W", "", quote)) > 10 for quote in quoted)  # else it would be any message


def test_the_tests_that_show_what_survives_are_there() -> None:
    named = re.findall(r"`(tests/\S+)::(\w+)`", (DOCS / "reliability.md").read_text("utf-8"))
    assert named
    assert [name for path, name in named if f"def {name}(" not in (ROOT / path).read_text("utf-8")] == []


def test_links_of_the_readme_lead_to_files() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text("utf-8"))
    relative = [target.partition("#")[0] for target in targets if not re.match(r"\w+:|#", target)]
    assert relative
    assert [target for target in relative if not (ROOT / target).exists()] == []
