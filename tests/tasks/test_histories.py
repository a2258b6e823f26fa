"""Whatever a workspace has been through, it ends like a fresh one of the same settings.

Real planning, stages, shards and tables in this process; only the scheduling is left out, which has tests of its own.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from desra_core.errors import UsageError
from desra_core.planning.plan import load_settings
from desra_core.settings import Mining
from desra_core.workspace import DATASET, Workspace
from desra_core.workspace.products import held_by
from tests.conftest import photo
from tests.in_process import process


class Corpus:
    """Eight photos, two of them alike, and two GAN models."""

    def __init__(self, root: Path, make_models: Callable[..., tuple[Path, Path]]) -> None:
        self.root, self.photos = root, root / "photos"
        self.photos.mkdir()
        self.mse, self.gan = make_models(root / "models")
        self.newer = make_models(root / "newer", strength=0.7)[1]
        for index in range(7):
            # A third is dark; the others are texture of another strength and size each.
            pixels = photo(index, bright=bool(index % 3))
            pixels[: 6 * index] = np.minimum(pixels[: 6 * index], 150)
            assert cv2.imwrite(str(self.photos / f"{'abcdefg'[index]}.png"), pixels)
        shutil.copy(self.photos / "b.png", self.photos / "twin.png")

    def settings(self, workspace: str, **changes: Any) -> Mining:
        given = {"mse_model": self.mse, "gan_model": self.gan, "photos": self.photos, "min_area": "300"} | changes
        return Mining(workspace=self.root / workspace, **given)

    def run(self, name: str = "ws", **changes: Any) -> Workspace:
        workspace = process(self.settings(name, **changes))
        check(workspace)
        return workspace


def results(workspace: Workspace) -> dict[str, bytes]:
    folders = [path for name in ("masks", "dataset") for path in (workspace.root / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(workspace.root)): path.read_bytes() for path in [*folders, workspace.regions]}


def check(workspace: Workspace) -> None:
    """Tables and files agree."""
    rows = pq.read_table(workspace.dataset_manifest).to_pylist()
    root = workspace.dataset_manifest.parent
    for row in rows:
        mask = cv2.imread(str(root / row["mask"]), cv2.IMREAD_UNCHANGED)
        assert (mask > 0).sum() == row["artifact_pixels"], row["image"]
        assert all((root / row[kind]).exists() for kind in DATASET)
    pictures = {path.relative_to(root).as_posix() for path in root.rglob("*.png") if path.is_file()}
    assert pictures == {row[kind] for row in rows for kind in DATASET}


@pytest.fixture
def corpus(tmp_path: Path, make_models) -> Corpus:
    return Corpus(tmp_path, make_models)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_random_histories(corpus: Corpus, seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices = {
        "threshold": [0.5, 0.7, 0.9],
        "min_area": ["0", "300", "4000"],
        "keep": ["artifacts", "maps", "all"],
        "gan_model": [corpus.gan, corpus.newer],
        "precision": ["float32", "float32", "bfloat16"],
        "window": [11, 11, 7],
        "keep_mse": [False, True],
    }
    for step in range(7):
        changes = {name: values[rng.integers(len(values))] for name, values in choices.items()}
        if rng.integers(4) == 0 and step:
            shutil.rmtree(corpus.root / "ws" / ("maps", "dataset", "masks")[rng.integers(3)], ignore_errors=True)
        workspace = corpus.run(**changes)
    assert results(workspace) == results(corpus.run("fresh", **changes))


def test_a_run_killed_while_it_overwrites_is_not_believed(corpus: Corpus, monkeypatch) -> None:
    expected = results(corpus.run())

    class KilledError(BaseException):
        pass

    publish, published = Workspace.publish, []

    def killed_at_some_picture(self: Workspace, path: Path, *arguments: Any, **options: Any) -> None:
        publish(self, path, *arguments, **options)
        published.append(path)
        if sum("pseudo_gt" in str(path) or "masks" in str(path) for path in published) == 4:
            raise KilledError

    monkeypatch.setattr(Workspace, "publish", killed_at_some_picture)
    with pytest.raises(KilledError):
        corpus.run(threshold=0.95)
    monkeypatch.undo()
    workspace = Workspace(corpus.root / "ws")
    assert any(
        path.read_bytes() != expected[str(path.relative_to(workspace.root))] for path in workspace.masks.iterdir()
    )
    assert results(corpus.run()) == expected


def test_renamed_and_vanished_photos(corpus: Corpus) -> None:
    corpus.run()
    (corpus.photos / "b.png").rename(corpus.photos / "z.png")
    (corpus.photos / "c.png").unlink()
    corpus.run(threshold=0.9, min_area="0")
    corpus.run(limit=2)
    workspace = corpus.run(threshold=0.5)
    assert workspace.mask("b").read_bytes() == workspace.mask("twin").read_bytes() == workspace.mask("z").read_bytes()


def test_clean_photos_leave_the_dataset_when_not_all_is_kept(corpus: Corpus) -> None:
    everything = pq.read_table(corpus.run(keep="all").dataset_manifest)
    assert everything.num_rows == 8
    assert all((row["made_under"] is None) == (row["artifact_pixels"] == 0) for row in everything.to_pylist())
    workspace = corpus.run(keep="artifacts")
    assert 0 < pq.read_table(workspace.dataset_manifest).num_rows < 8
    groups = {path.name for path in workspace.maps.glob("*/*")}
    assert len(groups) == len(set(pq.read_table(workspace.dataset_manifest)["id"].to_pylist()))


@pytest.mark.parametrize(
    "keep", ["artifacts", *(pytest.param(keep, marks=pytest.mark.slow) for keep in ("maps", "all"))]
)
def test_kept_mse_results_serve_a_new_gan_model(corpus: Corpus, keep: str) -> None:
    workspace = corpus.run(keep_mse=True, keep=keep)
    stored = mse_results(workspace)
    assert len(stored) == len(list(workspace.maps.glob("*/*"))) == 7
    for changes in ({"gan_model": corpus.newer}, {"gan_model": corpus.newer, "threshold": 0.9}, {}):
        corpus.run(keep_mse=True, keep=keep, **changes)
        assert mse_results(workspace) == stored
    assert results(workspace) == results(corpus.run("fresh", keep=keep))


@pytest.mark.parametrize(
    ("role", "keep"),
    [
        ("mse_sr", "artifacts"),
        ("gan_sr", "all"),
        ("similarity", "artifacts"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("mse_sr", "all"), ("gan_sr", "artifacts"), ("similarity", "all"))
        ),
    ],
)
def test_a_damaged_array_is_mended_by_the_second_run_at_the_latest(corpus: Corpus, role: str, keep: str) -> None:
    workspace = corpus.run(keep=keep)
    for array in workspace.maps.glob(f"*/*/{role}"):
        for chunk in (path for path in array.rglob("*") if path.is_file() and path.name != "zarr.json"):
            chunk.write_bytes(chunk.read_bytes()[:-100])
    with contextlib.suppress(AssertionError):  # the first one may end with images that are still to be done
        corpus.run(threshold=0.6, keep=keep)
    assert results(corpus.run(threshold=0.6, keep=keep)) == results(corpus.run("fresh", threshold=0.6, keep=keep))


def mse_results(workspace: Workspace) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in workspace.maps.glob("*/*/mse_sr")}


def test_a_bad_model_leaves_a_finished_workspace_alone(corpus: Corpus) -> None:
    before = results(corpus.run())
    settings = load_settings(Workspace(corpus.root / "ws"))
    shutil.copy(corpus.photos / "a.png", corpus.photos / "b.png")
    for gan, reason in ((corpus.photos / "a.png", "a.png: "), (corpus.mse, "is the same as")):
        with pytest.raises(UsageError, match=reason):
            corpus.run(gan_model=gan)
    assert results(Workspace(corpus.root / "ws")) == before
    assert load_settings(Workspace(corpus.root / "ws")) == settings


def test_other_workspaces_and_the_own_one_are_no_photos(corpus: Corpus) -> None:
    other = corpus.run()
    shutil.copytree(other.root, corpus.photos / "other")
    assert pq.read_table(corpus.run("next").manifest).num_rows == 8
    with pytest.raises(UsageError, match="lies inside the workspace"):
        corpus.run("next", photos=corpus.root / "next/dataset/lr")


def test_a_photo_beside_a_folder_of_its_masks_name(corpus: Corpus) -> None:
    (corpus.photos / "a.png").rename(corpus.photos / "x.jpg")
    (corpus.photos / "x.png").mkdir()
    (corpus.photos / "b.png").rename(corpus.photos / "x.png/b.png")
    workspace = corpus.run()
    [row] = pq.read_table(workspace.failures).to_pylist()
    assert row["subject"] == "x"
    assert workspace.mask("x.png/b").exists()


def test_both_ways_to_look_for_pictures_agree(corpus: Corpus) -> None:
    workspace = corpus.run()
    workspace.dataset("lr", "b").unlink()
    rows = pq.read_table(workspace.manifest)
    listed, looked = (held_by(workspace, rows, None, each=each).pictures for each in (False, True))
    assert listed.tolist() == looked.tolist()
    assert 0 < (listed == len(DATASET)).sum() < (listed > 0).sum() < rows.num_rows
