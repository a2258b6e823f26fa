"""Arrows run one way: deployments → flows → tasks → desra_core; and planning stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("desra_core", "tasks", "flows", "deployments")
HEAVY = {
    "prefect",
    "dask",
    "distributed",
    "torch",
    "numba",
    "mmseg",
    "mmcv",
    "zarr",
    "spandrel",
    "matplotlib",
    "jinja2",
}
FORBIDDEN = {
    "desra_core": {"prefect", "dask", "distributed", "tasks", "flows", "deployments"},
    "tasks": {"flows", "deployments"},
    "flows": {"deployments"},
    "deployments": set(),
}
# Which packages of desra_core a package may import, besides its modules; the lower ones come first.
ARROWS = {
    "images": "",
    "networks": "images",
    "detection": "images networks",
    "workspace": "images detection",
    "settings": "detection networks workspace",
    "planning": "images detection networks workspace settings",
    "stages": "images detection networks workspace settings planning",
    "evaluation": "images detection workspace planning",
    "annotations": "images detection workspace planning evaluation",
    "calibration": "images detection workspace settings planning stages evaluation",
    "benchmarking": "images detection networks workspace settings stages evaluation",
    "learning": "images detection workspace planning evaluation annotations benchmarking",
    "training": "images detection networks workspace settings planning evaluation",
    "gate": "images detection networks workspace settings planning stages evaluation training",
    "delivery": "images detection networks workspace settings planning stages evaluation gate",
    "housekeeping": "images workspace settings planning calibration training gate",
    "report": "images detection workspace settings planning stages evaluation calibration benchmarking learning gate",
}
MODULES = {"errors", "files", "gpu", "remote", "third_party"}
DASK = {"dask", "distributed"}
TALK_TO_DASK = tuple(
    Path("tasks") / f"{name}.py" for name in ("cluster_file", "dask_cluster", "dask_map", "lost_workers", "question")
)


def imported(path: Path) -> set[str]:
    """Top-level packages that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            found.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.add(ast.unparse(node.args[0]).strip("'").partition(".")[0])
    return found


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    relative = path.relative_to(ROOT)
    found = imported(path)
    assert not found & FORBIDDEN[relative.parts[0]]
    if relative not in TALK_TO_DASK:
        assert not found & DASK, f"only {', '.join(map(str, TALK_TO_DASK))} talk to Dask"


def rooms(path: Path) -> set[str]:
    """Packages and modules of desra_core that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("desra_core.")}
    return found - {"__version__"}


def test_arrows_of_desra_core() -> None:
    core = ROOT / "desra_core"
    assert {path.stem for path in core.glob("*.py")} == MODULES | {"__init__"}
    assert {path.parent.name for path in core.glob("*/__init__.py")} == ARROWS.keys()
    for package, allowed in ARROWS.items():
        found = set().union(*(rooms(path) for path in (core / package).rglob("*.py")))
        assert found - MODULES - {package} == set(allowed.split()), package
        higher = list(ARROWS)[list(ARROWS).index(package) :]
        assert not set(allowed.split()) & set(higher), f"{package}: an arrow runs up"
    for module in MODULES:
        assert not rooms(core / f"{module}.py") - MODULES


def test_the_floor_plan_is_the_code() -> None:
    """The table of docs/design.md: a row for each package, its sentence, and its arrows."""
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `desra_core/")]
    drawn = {room.strip("`").split("/")[1]: (sentence, arrows) for room, sentence, arrows in rows}
    assert list(drawn) == list(ARROWS)
    for package, (sentence, arrows) in drawn.items():
        doc = ast.get_docstring(ast.parse((ROOT / "desra_core" / package / "__init__.py").read_text("utf-8")))
        assert sentence == str(doc).partition("\n")[0]
        assert arrows.replace("–", "") == ARROWS[package].replace(" ", ", ")


def test_public_classes_have_names_of_their_own() -> None:
    places: dict[str, list[str]] = {}
    for path in modules():
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_every_package_is_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in modules()} == set(PACKAGES)
    assert set().union(*(imported(ROOT / path) for path in TALK_TO_DASK)) >= DASK


def loaded_after(*lines: str) -> set[str]:
    """Top-level modules in a fresh process after it has run some lines."""
    code = "\n".join([*lines, "import sys", "print('loaded', *{name.partition('.')[0] for name in sys.modules})"])
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    word, *names = run.stdout.splitlines()[-1].split()
    assert word == "loaded", run.stdout
    return set(names)


def test_help_is_light() -> None:
    loaded = loaded_after(
        "import sys, contextlib",
        "from deployments.cli import main",
        "for arguments in (['--help'], ['status', '--help'], ['detect', '--help'], ['--version']):",
        "    sys.argv = ['desra', *arguments]",
        "    with contextlib.suppress(SystemExit):",
        "        main()",
    )
    assert not HEAVY & loaded


def test_completion_is_light() -> None:
    loaded = loaded_after(
        "import os, sys, contextlib",
        "from deployments.cli import main",
        "os.environ |= {'_DESRA_COMPLETE': 'complete_bash', 'COMP_WORDS': 'desra\\nmine\\n--ke', 'COMP_CWORD': '2'}",
        "sys.argv = ['desra']",
        "with contextlib.suppress(SystemExit):",
        "    main()",
        "assert 'typer._completion_classes' in sys.modules",
    )
    assert not HEAVY & loaded


def test_planning_and_status_are_light(tmp_path: Path) -> None:
    """The whole way of `desra status`, on a workspace with a plan in it."""
    for role in ("mse", "gan"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "a.png").write_bytes(role.encode())
    plan = [
        "from pathlib import Path",
        "from desra_core.planning.plan import prepare",
        "from desra_core.settings import Detection",
        "from desra_core.workspace import Workspace",
        f"root = Path({str(tmp_path)!r})",
        "Workspace(root / 'ws').create()",
        "prepare(Detection(mse_sr=root / 'mse', gan_sr=root / 'gan', workspace=root / 'ws'))",
    ]
    status = [
        "import contextlib, sys",
        "from deployments.cli import main",
        f"sys.argv = ['desra', 'status', '--workspace', {str(tmp_path / 'ws')!r}]",
        "with contextlib.suppress(SystemExit):",
        "    main()",
    ]
    assert not HEAVY & loaded_after(*plan, *status)
