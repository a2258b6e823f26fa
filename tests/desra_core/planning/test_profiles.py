"""Workspaces from before colour profiles were honoured: what changes is computed again, and nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from desra_core.images import codec
from desra_core.planning import plan as planning
from desra_core.planning.plan import done_images, images_to_mention, load_settings, prepare
from desra_core.settings import Detection, Mining
from desra_core.workspace import DATASET, Workspace
from desra_core.workspace.products import gather_shard, read_records, read_shard
from tests.conftest import photo
from tests.in_process import process
from tests.profiles import ADOBE, CMYK, P3, VIPS_SRGB

PROFILES = {"p3": P3, "srgb": VIPS_SRGB, "none": None, "damaged": b"nonsense" * 50}


@pytest.fixture
def mining(tmp_path: Path, make_models: Callable[..., tuple[Path, Path]]) -> Mining:
    """Photos of the same kind, each with another profile."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, (name, profile) in enumerate(PROFILES.items()):
        options = {"icc_profile": profile} if profile else {}
        Image.fromarray(photo(number, bright=True)).save(folder / f"{name}.png", **options)
    mse, gan = make_models(tmp_path / "models")
    return Mining(photos=folder, mse_model=mse, gan_model=gan, workspace=tmp_path / "ws", keep="all", shard_size=3)


def as_before(workspace: Workspace) -> None:
    """Take out of the records what an older version has not written."""
    for shard in (0, 1):
        records = [replace(one, colour_profile=None) for one in read_shard(workspace, shard).values()]
        with workspace.locked() as held:
            gather_shard(held, shard, records)


def outcome(workspace: Workspace) -> dict[str, bytes]:
    kinds = [(kind, name) for kind in DATASET for name in PROFILES]
    return {f"{kind}/{name}": workspace.dataset(kind, name).read_bytes() for kind, name in kinds}


def test_only_photos_that_their_profile_changes_are_computed_again(
    mining: Mining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as ignoring:
        ignoring.setattr(codec, "treatment", lambda *_: "unusable")
        workspace = process(mining)
    as_before(workspace)
    ignored = outcome(workspace)
    target = load_settings(workspace)[1]
    assert done_images(workspace, target)["name"].to_pylist() == ["none"], "of the others it is not known yet"
    with workspace.locked():
        plan = prepare(mining).plan
    assert (plan.pending, plan.done) == (1, 3)
    pending = [image for shard in plan.shards for image in plan.image_refs(shard)]
    assert [image.names for image in pending] == [("p3",)]
    with workspace.locked():
        assert prepare(mining).plan.pending == 1, "a run that was killed here has lost nothing"
    process(mining)
    honoured = outcome(workspace)
    changed = {path.rpartition("/")[2] for path in ignored if ignored[path] != honoured[path]}
    assert changed == {"p3"}
    fresh = mining.model_copy(update={"workspace": tmp_path / "fresh"})
    assert outcome(process(fresh)) == honoured
    names = pq.read_table(workspace.manifest, columns=["id", "name"]).to_pylist()
    records = {row["id"]: row["colour_profile"] for row in read_records(workspace).to_pylist()}
    told = {row["name"]: records[row["id"]] for row in names}
    assert told == {"p3": "converted", "srgb": "srgb", "none": None, "damaged": "unusable"}
    assert images_to_mention(workspace) == {
        "read as sRGB, because its colour profile cannot be used:": ["damaged"],
    }
    lr = np.asarray(Image.open(workspace.dataset("lr", "p3")))
    assert np.array_equal(lr, codec.read_image(tmp_path / "photos" / "p3.png"))
    assert not np.array_equal(lr, photo(0, bright=True))
    with workspace.locked():
        assert prepare(mining).plan.pending == 0


def test_a_photo_that_cannot_be_read_now_is_computed_again(mining: Mining) -> None:
    workspace = process(mining)
    as_before(workspace)
    (mining.sources.main / "srgb.png").write_bytes(b"")
    with workspace.locked():
        plan = prepare(mining, rescan=False).plan
    assert plan.pending == 2, "the photo with the profile of P3, and this one"


def test_a_failure_that_a_newer_version_or_a_package_overcomes_is_tried_again(
    mining: Mining, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = io.BytesIO()
    inks = Image.fromarray(photo(9, bright=True)).convert("CMYK")
    inks.save(sink, "JPEG")
    for name in ("cmyk", "heic", "other"):
        (mining.sources.main / f"{name}.jpg").write_bytes(sink.getvalue() + name.encode())
    workspace = process(mining)
    reasons = {"cmyk": "has the colour model CMYK", "heic": "is HEIC, which needs another package", "other": "is odd"}
    names = {row["id"]: row["name"] for row in pq.read_table(workspace.manifest).to_pylist()}
    for shard in (0, 1, 2):
        records = read_shard(workspace, shard).values()
        with workspace.locked() as held:
            gather_shard(held, shard, [replace(one, reason=reasons.get(names[one.id], one.reason)) for one in records])
    monkeypatch.setattr(planning, "readable_now", lambda: ["is JPEG XL, which needs another package"])
    assert pending_of(mining) == {"cmyk"}
    monkeypatch.setattr(planning, "readable_now", lambda: [reasons["heic"]])
    assert pending_of(mining) == {"cmyk", "heic"}
    (mining.sources.main / "cmyk.jpg").unlink()
    Image.fromarray(photo(9, bright=True)).convert("CMYK").save(mining.sources.main / "cmyk.jpg", icc_profile=CMYK)
    process(mining)
    assert "cmyk" in done_images(workspace, load_settings(workspace)[1])["name"].to_pylist()
    assert pending_of(mining) == set(), "it failed again for good"


def pending_of(mining: Mining) -> set[str]:
    with Workspace(mining.workspace).locked():
        plan = prepare(mining).plan
    return {name for shard in plan.shards for image in plan.image_refs(shard) for name in image.names}


def test_results_in_files_are_compared_as_they_are_stored(tmp_path: Path, make_pairs) -> None:
    make_pairs(tmp_path, 2)
    plain = process(Detection(mse_sr=tmp_path / "mse_sr", gan_sr=tmp_path / "gan_sr", workspace=tmp_path / "plain"))
    for role in ("mse_sr", "gan_sr"):
        for path in (tmp_path / role).rglob("*.png"):
            with Image.open(path) as image:
                image.load()
            image.save(path, icc_profile=ADOBE)
    tagged = process(Detection(mse_sr=tmp_path / "mse_sr", gan_sr=tmp_path / "gan_sr", workspace=tmp_path / "tagged"))
    masks = [{path.name: path.read_bytes() for path in one.masks.rglob("*.png")} for one in (plain, tagged)]
    assert masks[0] == masks[1]
    records = read_records(tagged).to_pylist()
    assert {(one["icc_profile"], one["colour_profile"]) for one in records} == {(True, "stored")}
