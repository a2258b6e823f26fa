"""Workspaces of other detectors: scores are shown as scores."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from desra_core.detection.detectors import applied
from desra_core.errors import ImageError
from desra_core.images.codec import encode_png
from desra_core.images.parts import Rectangle
from desra_core.report import write_report
from desra_core.report.pictures import StoredImage, heat_map
from desra_core.settings import Detection
from desra_core.workspace import Workspace
from tests.desra_core.report.pages import words
from tests.in_process import process

OWN = """
import numpy as np

class Constant:
    threshold, smallest, inputs = 0.25, 1, ("lr",)

    def __call__(self, mse_sr, gan_sr, lr, labels):
        return np.where(np.abs(gan_sr.astype(float) - mse_sr).max(axis=2) > 0, 0.375, 0.0)

detector = Constant()
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, make_pairs) -> Path:
    """A folder with three pairs, the detector of a user's own, and the workspace ``ws`` of a run with it."""
    folder = tmp_path_factory.mktemp("own")
    make_pairs(folder, 3)
    shutil.copytree(folder / "gan_sr", folder / "lr")
    (folder / "mine.py").write_text(OWN)
    process(Detection(workspace=folder / "ws", mse_sr=folder / "mse_sr", gan_sr=folder / "gan_sr", lr=folder / "lr",
                      method=str(folder / "mine.py"), keep="all"))  # fmt: skip
    return folder


def test_a_report_about_scores(own: Path, tmp_path: Path) -> None:
    page = write_report(Workspace(own / "ws"), output=tmp_path / "r.html").read_text()
    text = words(page)
    assert "found with mine.py score above 0.25" in text
    assert "0 mine.py score 0.5 suspect above 0.25, which is marked" in text
    assert "how far the score lies above the threshold" in text
    assert re.search(r"mean score 0\.3\d", text)
    assert "similarity below" not in text
    assert "mean similarity" not in page
    assert "1 − D" not in page
    row = page.split('<article class="region">')[1]
    figure = re.search(r'<figure data-kind="difference">.*?</figure>', row, re.DOTALL)
    assert figure is not None
    assert "<img" in figure[0]  # scores of 0 are no damage
    assert "mine.py score</figcaption>" in figure[0]


def test_a_stored_d_of_zero_is_damage_and_a_score_of_zero_is_not(own: Path) -> None:
    workspace = Workspace(own / "ws")
    paths = sorted(workspace.maps.rglob("similarity"))
    assert len(paths) == 3
    window = Rectangle(20, 10, 40, 30)
    for path in paths:
        assert StoredImage({}, path.parent, (200, 240), applied("own", 0.25)).scores(window).shape == (40, 30)
        with pytest.raises(ImageError, match="D: is damaged"):
            StoredImage({}, path.parent, (200, 240)).scores(window)


def test_classes_by_score(own: Path, tmp_path: Path) -> None:
    """The run's own labels do not matter for its scores, only for the chart."""
    folder = Path(shutil.copytree(own, tmp_path / "own"))
    labels = np.full((200, 240), 4, np.uint8)
    for path in (folder / "gan_sr").rglob("*.png"):
        target = folder / "labels" / path.relative_to(folder / "gan_sr")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encode_png(labels))
    process(Detection(workspace=folder / "ws", mse_sr=folder / "mse_sr", gan_sr=folder / "gan_sr", lr=folder / "lr",
                      method=str(folder / "mine.py"), segmenter=f"labels:{folder / 'labels'}", keep="all"))  # fmt: skip
    text = words(write_report(Workspace(folder / "ws")).read_text())
    assert re.search(r"pixels mean score tree 2 100 % 2 [\d,]+ 0\.3", text)


def test_heat_maps_span_the_scale() -> None:
    colours = heat_map(np.array([[0.0, 0.5, 1.0, np.nan]]))
    brightness = colours.astype(int).sum(axis=2)[0]
    assert brightness[0] < 20 < brightness[1] < brightness[2]
    assert colours[0, 3].tolist() == [128, 128, 128]


def test_a_detector_file_that_is_gone(own: Path, tmp_path: Path) -> None:
    workspace = Workspace(Path(shutil.copytree(own / "ws", tmp_path / "ws")))
    document = json.loads(workspace.settings.read_bytes())
    document["settings"]["method"] = "/gone/<b>.py"
    workspace.settings.write_text(json.dumps(document))
    write_report(workspace, pages=1)
    (page,) = (workspace.root / "pages").rglob("*.html")
    assert "<b>.py score" in words(page.read_text())
    assert "detector: " in words(page.read_text())
