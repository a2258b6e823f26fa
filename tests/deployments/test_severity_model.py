"""``desra calibrate severity`` from ratings to a run that ranks and drops regions by it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from desra_core.detection.severity import REGION_FEATURES, SeverityModel, as_document
from desra_core.files import write_json
from desra_core.images.codec import encode_png
from desra_core.planning.plan import load_settings
from desra_core.workspace import Workspace
from desra_core.workspace.answers import Answer, open_answers
from tests.conftest import Desra, refusal

IMAGES = 12


def succeed(run) -> str:
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Pairs with two artifacts each, one of strong and one of weak noise."""
    root = tmp_path_factory.mktemp("results")
    for number in range(IMAGES):
        rng = np.random.default_rng(number)
        mse_sr = np.clip(120 + np.cumsum(rng.normal(0, 0.3, (160, 260, 3)), axis=1), 0, 255).astype(np.uint8)
        noise = np.zeros(mse_sr.shape)
        noise[30:100, 20 : 90 + number] = 60
        noise[50:110, 160 : 220 + number] = 12
        gan_sr = np.clip(mse_sr + rng.normal(0, 1, mse_sr.shape) * noise, 0, 255).astype(np.uint8)
        for folder, pixels in (("mse", mse_sr), ("gan", gan_sr)):
            (root / folder).mkdir(exist_ok=True)
            (root / folder / f"{number:02d}.png").write_bytes(encode_png(pixels))
    return ["--mse-sr", str(root / "mse"), "--gan-sr", str(root / "gan"), "--min-area", "1000"]


def regions_of(workspace: Path) -> list[dict]:
    return pq.read_table(Workspace(workspace).regions).to_pylist()


@pytest.fixture(scope="module")
def rated(results: list[str], tmp_path_factory: pytest.TempPathFactory, desra: Desra) -> Path:
    """A workspace whose strong artifacts nine of ten raters notice, and whose weak ones one of ten."""
    workspace = tmp_path_factory.mktemp("rated") / "ws"
    succeed(desra("detect", *results, "--workspace", str(workspace)))
    regions = regions_of(workspace)
    assert len(regions) == 2 * IMAGES
    _, target = load_settings(Workspace(workspace))
    for rater in range(10):
        with open_answers(Workspace(workspace), f"rater{rater}") as answers:
            for region in regions:
                answer = "yes" if (region["x"] < 100) != (rater == 0) else "no"
                box = (region["x"], region["y"], region["width"], region["height"])
                answers.append(Answer(f"rater{rater}", "rating", region["id"], region["image"], None, target.mask_key,
                                      box, region["area"], answer))  # fmt: skip
    return workspace


def test_regions_are_ranked_and_dropped_by_what_viewers_notice(results, rated, tmp_path, desra) -> None:
    model = tmp_path / "severity.json"
    numbers = json.loads(succeed(desra("calibrate", "severity", "--workspace", rated, "--output", model, "--json")))
    assert (numbers["images"], numbers["regions"], numbers["ratings"]) == (IMAGES, 2 * IMAGES, 20 * IMAGES)
    assert numbers["noticed"] == 0.5
    assert numbers["brier"] < 0.12 < 0.2 < numbers["brier_of_mean"]
    assert numbers["gone"] == 0
    page = (tmp_path / "severity.html").read_text()
    assert "mean squared error" in page
    assert "<svg" in page

    workspace = tmp_path / "ws"
    command = ("detect", *results, "--workspace", workspace)
    told = succeed(desra(*command, "--severity-model", model))
    assert re.search(r"noticed by +\d\d % ", told)
    assert re.search(r"noticed by <b>\d\d %</b>", (workspace / "report.html").read_text())
    for region in regions_of(workspace):
        strong = region["x"] < 100
        assert (60 < region["severity"] < 100) if strong else (0 < region["severity"] < 40)
    succeed(desra(*command, "--severity-model", model, "--min-noticed", "50"))
    kept = regions_of(workspace)
    assert len(kept) == IMAGES
    assert all(region["x"] < 100 for region in kept)
    # An image whose regions were all dropped is not taken for clean under other settings.
    succeed(desra(*command, "--severity-model", model, "--min-noticed", "100"))
    assert regions_of(workspace) == []
    succeed(desra(*command))
    again = regions_of(workspace)
    assert [{**one, "id": ""} for one in again] == [{**one, "id": ""} for one in regions_of(rated)]
    assert "nothing to do" in desra(*command).stdout


def test_ratings_of_regions_that_are_gone_are_left_out(results, rated, tmp_path, desra) -> None:
    succeed(desra("detect", *results[:-1], "5000", "--workspace", rated))
    try:
        run = desra("calibrate", "severity", "--workspace", rated, "--output", tmp_path / "a.json")
        assert "warning: ratings of" in run.stderr
        assert "the ratings: are " in refusal(run)
    finally:
        succeed(desra("detect", *results, "--workspace", rated))


def test_bad_input(results, rated, tmp_path, desra) -> None:
    empty = tmp_path / "empty"
    detect = ("detect", *results, "--workspace", empty)
    assert "needs --severity-model" in desra(*detect, "--min-noticed", "50").stderr
    (tmp_path / "other.json").write_text("{}")
    assert "other.json: is no severity model" in refusal(desra(*detect, "--severity-model", tmp_path / "other.json"))
    assert "gone.json: does not exist" in refusal(desra(*detect, "--severity-model", tmp_path / "gone.json"))
    fit = ("calibrate", "severity", "--workspace")
    assert "has another suffix" in refusal(desra(*fit, rated, "--output", "a.toml"))
    assert refusal(desra(*fit, empty, "--output", "a.json"))


def test_mined_regions_have_it_too(make_photos, make_models, tmp_path, desra) -> None:
    make_photos(tmp_path / "photos", 3)
    mse, gan = make_models(tmp_path / "models")
    mine = ("mine", tmp_path / "photos", "--mse-model", mse, "--gan-model", gan, "--workspace", tmp_path / "ws")
    succeed(desra(*mine))
    plain = regions_of(tmp_path / "ws")
    assert plain
    features = len(REGION_FEATURES)
    model = SeverityModel(np.zeros(features), np.ones(features), np.zeros(features), float(np.log(3)))
    write_json(tmp_path / "severity.json", as_document(model, {}))
    succeed(desra(*mine, "--severity-model", tmp_path / "severity.json"))
    assert regions_of(tmp_path / "ws") == [region | {"severity": pytest.approx(75)} for region in plain]
    succeed(desra(*mine, "--severity-model", tmp_path / "severity.json", "--min-noticed", "80"))
    assert regions_of(tmp_path / "ws") == []
    assert not list((tmp_path / "ws" / "dataset").rglob("*.png"))
    succeed(desra(*mine))
    assert regions_of(tmp_path / "ws") == plain
