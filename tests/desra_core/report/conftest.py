"""Workspaces to report on: a detected corpus with everything odd in it, and its likeness as a mined one."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import jinja2
import numpy as np
import pyarrow.parquet as pq
import pytest

from desra_core.planning.plan import prepare, publish_tables
from desra_core.report import charts, finetuning, workspace_page, write_report
from desra_core.settings import Detection
from desra_core.stages import StageJob, run_stage
from desra_core.stages.mask import mask_stage
from desra_core.stages.similarity import similarity_stage
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import image_refs
from desra_core.workspace.products import Record, gather_shard
from tests.browser import Page, opened

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "{{ 7*7 }} {% raw %}",
    "a&amp;b 'c' `d` ${e}",
    "two\nlines \u202egnp",
)
SIZE = (200, 240)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A browser for all tests of pages."""
    with opened("about:blank", tmp_path_factory.mktemp("browser")) as page:
        yield page


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make each result once, and give it again for equal arguments."""
    made: dict[bytes, Any] = {}

    def give(*arguments: Any, **named: Any) -> Any:
        key = pickle.dumps((arguments, named))
        if key not in made:
            made[key] = make(*arguments, **named)
        return made[key]

    return give


@pytest.fixture(scope="session")
def parts_of_pages(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, str, object]]:
    """What compiles each template once and draws each chart once, with the place where it stands."""
    cache = jinja2.FileSystemBytecodeCache(str(tmp_path_factory.mktemp("templates")))
    environment = jinja2.Environment

    class Compiled(environment):
        def __init__(self, **options: Any) -> None:
            super().__init__(bytecode_cache=cache, **options)

    drawn: dict[tuple[int, str], tuple[Any, Any]] = {}

    def inline(figure: Any, title: str) -> Any:
        if (id(figure), title) not in drawn:
            drawn[id(figure), title] = figure, charts.inline(figure, title)
        return drawn[id(figure), title][1]

    makers = ("histogram", "line_chart", "distributions", "bar_chart")
    once = {name: kept(getattr(charts, name)) for name in makers} | {"inline": inline}
    return [
        (jinja2, "Environment", Compiled),
        (workspace_page, "charts", SimpleNamespace(**(vars(charts) | once))),
        (finetuning, "line_chart", kept(charts.line_chart)),
        (finetuning, "inline", inline),
    ]


@pytest.fixture(autouse=True, scope="module")
def quick_pages(parts_of_pages: list[tuple[object, str, object]]) -> Iterator[None]:
    """Keep templates and charts: the reports of these tests are mostly of one corpus."""
    with pytest.MonkeyPatch.context() as patch:
        for place, name, part in parts_of_pages:
            patch.setattr(place, name, part)
        yield


@pytest.fixture
def drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw each chart of each report, as everywhere but in these tests."""
    monkeypatch.setattr(workspace_page, "charts", charts)
    monkeypatch.setattr(finetuning, "line_chart", charts.line_chart)
    monkeypatch.setattr(finetuning, "inline", charts.inline)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = cv2.imencode(".png", pixels)[1]  # imwrite would take % in a name as a pattern
    path.write_bytes(encoded.tobytes())


def read(path: Path) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)


def make_corpus(folder: Path, make_pairs) -> None:
    """Thirteen pairs under hostile names, of odd kinds, one LR missing, and three that cannot be processed."""
    plain = make_pairs(folder, 13)
    marked = [name for index, name in enumerate(plain) if index % 3]
    for old, new in zip(marked, HOSTILE, strict=False):
        for role in ("mse_sr", "gan_sr"):
            path = folder / role / f"{new}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            (folder / role / f"{old}.png").rename(path)
    gray, deep, clear = marked[5:8]
    for role in ("mse_sr", "gan_sr"):
        pixels = {name: read(folder / role / f"{name}.png") for name in (gray, deep, clear)}
        write(folder / role / f"{gray}.png", cv2.cvtColor(pixels[gray], cv2.COLOR_BGR2GRAY))
        write(folder / role / f"{deep}.png", pixels[deep].astype(np.uint16) * 257)
        write(folder / role / f"{clear}.png", np.dstack([pixels[clear], np.full(SIZE, 9, np.uint8)]))
        shutil.copytree(folder / role / "set0", folder / role / "again")  # the same content at other names
    for path in (folder / "gan_sr").rglob("*.png"):
        write(folder / "lr" / path.relative_to(folder / "gan_sr"), cv2.resize(read(path), None, fx=0.25, fy=0.25))
    (folder / "lr" / f"{HOSTILE[1]}.png").unlink()
    (folder / "gan_sr" / "broken <b>.png").write_bytes(b"no image")
    (folder / "mse_sr" / "broken <b>.png").write_bytes(b"no image")
    write(folder / "gan_sr" / "other size.png", np.zeros((64, 64, 3), np.uint8))
    write(folder / "mse_sr" / "other size.png", np.zeros((32, 32, 3), np.uint8))
    write(folder / "gan_sr" / "no twin.png", np.zeros((64, 64, 3), np.uint8))


def detect(folder: Path, *roles: str) -> Workspace:
    """Run the stages on the corpus in a folder, one after the other; the workspace is its ``ws``."""
    detection = Detection(workspace=folder / "ws", **{role: folder / role for role in roles})
    Workspace(detection.workspace).create()
    workspace, plan, weights, _ = prepare(detection)
    job = StageJob(detection, plan.target, weights, key="", device="cpu", tile=256, threads=1, max_pixels=2**24)
    for image in image_refs(plan.rows(0).replace_schema_metadata(pq.read_schema(workspace.manifest).metadata)):
        record = run_stage(similarity_stage, image, Record(image.id), workspace, job)
        if not record.failed:
            run_stage(mask_stage, image, record, workspace, job)
    gather_shard(workspace, 0)
    publish_tables(workspace, plan.target)
    return workspace


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, make_pairs) -> Path:
    """A folder with a corpus, and in ``ws`` its workspace."""
    folder = tmp_path_factory.mktemp("corpus & <i>")
    make_corpus(folder, make_pairs)
    detect(folder, "mse_sr", "gan_sr", "lr")
    return folder


@pytest.fixture(scope="session")
def page(corpus) -> str:
    """The report of that workspace."""
    return write_report(Workspace(corpus / "ws")).read_text("utf-8")


@pytest.fixture
def workspace(corpus, tmp_path) -> Workspace:
    """A copy of that workspace to be changed."""
    return Workspace(Path(shutil.copytree(corpus / "ws", tmp_path / "ws", ignore=shutil.ignore_patterns("prefect"))))


@pytest.fixture
def mined(corpus, workspace) -> Workspace:
    """A workspace as ``desra mine`` leaves it: pictures in the dataset, each pseudo-GT a plain colour."""
    for path in (corpus / "gan_sr").rglob("*.png"):
        name = str(path.relative_to(corpus / "gan_sr"))[:-4]
        for kind in ("lr", "mse_sr", "gan_sr"):
            if (corpus / kind / f"{name}.png").exists():
                target = workspace.dataset(kind, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(corpus / kind / f"{name}.png", target)
        write(workspace.dataset("pseudo_gt", name), np.full((*SIZE, 3), (10, 200, 30), np.uint8))
    document = json.loads(workspace.settings.read_bytes())
    settings = {"photos": "/photos", "workspace": str(workspace.root), "mse_model": "/m/mse.pth",
                "gan_model": "/m/gan.pth", "threshold": 0.7}  # fmt: skip
    workspace.settings.write_text(json.dumps(document | {"verb": "mine", "settings": settings}))
    return workspace
