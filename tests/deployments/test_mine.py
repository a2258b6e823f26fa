"""``desra mine`` as a user meets it: real processes, server, workers and networks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from desra_core.images.codec import decode
from desra_core.planning.plan import IMAGES, REGIONS
from desra_core.workspace import DATASET, Workspace
from desra_core.workspace.products import read_records
from tests.conftest import photo, refusal


def files(folder: Path, pattern: str = "**/*.png") -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob(pattern))}


def mtimes(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def mine(desra, make_models, tmp_path):
    """Run ``desra mine`` on tmp_path/photos in tmp_path/ws with the models of tmp_path/models."""
    mse, gan = make_models(tmp_path / "models")

    def run(*arguments: object, mse=mse, gan=gan, photos=tmp_path / "photos", ws=tmp_path / "ws", by=desra):
        return by("mine", photos, "--mse-model", mse, "--gan-model", gan, "--workspace", ws, *arguments)

    return run


def test_awkward_photos_and_detect_on_the_exports(mine, desra, tmp_path) -> None:
    """Gray, 16 bits, alpha, EXIF and odd sizes come through; ``detect`` agrees on the exports bit for bit."""
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    bright = photo(1, bright=True)
    for name, pixels in {
        "gray": bright[:, :, :1],
        "sub/rgb16": bright.astype(np.uint16) * 257,
        "gray16": bright[:, :, 0].astype(np.uint16) * 257 - np.uint16(3000),
        "rgba": np.dstack([bright, bright[:, :, 0]]),
        "odd": photo(4, bright=True, height=47, width=61),
        "clean": photo(2, bright=False),
        "tiny": photo(2, bright=False, height=3, width=3),
    }.items():
        assert cv2.imwrite(str(photos / f"{name}.png"), pixels)
    assert cv2.imwrite(str(photos / "turned.jpg"), bright)
    jpeg = (photos / "turned.jpg").read_bytes()
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    (photos / "turned.jpg").write_bytes(jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:])

    mined = mine("--keep", "all")
    assert mined.returncode == 0, mined.stderr
    assert "8 of 8 images done, 0 failed" in mined.stdout
    workspace = Workspace(tmp_path / "ws")
    dataset = workspace.dataset_manifest.parent
    table = pq.read_table(workspace.dataset_manifest)
    assert table.schema.equals(IMAGES)
    assert table["image"].to_pylist() == sorted(table["image"].to_pylist())
    assert table.num_rows == 8
    for row in table.to_pylist():
        shapes = {kind: decode((dataset / row[kind]).read_bytes(), Path(kind)).pixels.shape for kind in DATASET}
        height, width = row["height"], row["width"]
        assert shapes["lr"][:2] == (height // 4, width // 4)
        assert all(shapes[kind][:2] == (height, width) for kind in DATASET if kind != "lr")
    by_name = {row["image"]: row for row in table.to_pylist()}
    assert by_name["turned"]["height"] == 240
    assert {name for name, row in by_name.items() if not row["regions"]} == {"clean", "tiny"}

    detected = desra("detect", "--mse-sr", dataset / "mse_sr", "--gan-sr", dataset / "gan_sr",
                     "--workspace", tmp_path / "detected")  # fmt: skip
    assert detected.returncode == 0, detected.stderr
    assert files(tmp_path / "detected/masks") == files(workspace.masks)
    columns = [name for name in REGIONS.names if name != "id"]
    mined_regions, regions = (pq.read_table(ws / "regions.parquet", columns=columns)
                              for ws in (workspace.root, tmp_path / "detected"))  # fmt: skip
    assert mined_regions.num_rows >= 6
    assert mined_regions.equals(regions)


def test_bicubic_enlargement_needs_no_second_checkpoint(mine, desra, make_photos, tmp_path) -> None:
    names = make_photos(tmp_path / "photos", 4)
    (tmp_path / "bicubic").write_text("a file of that name is another thing")
    mined = mine(mse="bicubic")
    assert mined.returncode == 0, mined.stderr
    assert "4 of 4 images done, 0 failed" in mined.stdout
    workspace = Workspace(tmp_path / "ws")
    marked = [name for index, name in enumerate(names) if index % 3]
    assert set(pq.read_table(workspace.dataset_manifest)["image"].to_pylist()) == set(marked)
    assert "nothing to do" in mine(mse="bicubic").stdout
    sentence = "bicubic enlargement, which draws no texture"
    assert f"\nagainst  {sentence}" in mined.stdout
    assert f"reference  {sentence}" in desra("status", "--workspace", workspace.root).stdout
    assert f"<dt>masks rest on</dt><dd>{sentence}" in workspace.report.read_text()
    settings = json.loads(workspace.settings.read_bytes())["settings"]
    assert settings["mse_model"] == "bicubic"
    assert "bicubic: is not a checkpoint" in refusal(mine(mse=tmp_path / "bicubic"))


@pytest.mark.slow
def test_only_changed_photos_are_redone(mine, make_models, make_photos, tmp_path) -> None:
    names = make_photos(tmp_path / "photos", 6)
    first = mine()
    assert first.returncode == 0, first.stderr
    workspace = Workspace(tmp_path / "ws")
    marked = {name for index, name in enumerate(names) if index % 3}
    assert set(pq.read_table(workspace.dataset_manifest)["image"].to_pylist()) == marked
    for kind in DATASET:
        assert set(files(workspace.root / "dataset" / kind)) == {f"{name}.png" for name in marked}
    assert str(workspace.dataset_manifest.parent) in first.stdout
    assert f"report   {workspace.report}" in first.stdout

    before = mtimes(workspace.root / "dataset") | mtimes(workspace.maps) | mtimes(workspace.masks)
    again = mine()
    assert "nothing to do: 6 of 6 images done" in again.stdout
    assert mtimes(workspace.root / "dataset") | mtimes(workspace.maps) | mtimes(workspace.masks) == before

    # a newer GAN model: the results of the other one stay
    newer = make_models(tmp_path / "newer", strength=1.2)[1]
    gan_sr = files(workspace.root / "dataset/gan_sr")
    assert mine(gan=newer).returncode == 0
    after = mtimes(workspace.maps)
    stored = [path for path in after if "/mse_sr/" in path]
    assert stored
    assert all(after[path] == before[path] for path in stored)
    renewed = files(workspace.root / "dataset/gan_sr")
    assert renewed.keys() == gan_sr.keys()
    assert all(renewed[name] != gan_sr[name] for name in gan_sr)

    # a dataset picture that is lost is made again from what is stored; a new photo joins
    workspace.dataset("pseudo_gt", names[1]).unlink()
    shutil.copy(tmp_path / "photos" / f"{names[1]}.png", tmp_path / "photos/twin.png")
    assert mine(gan=newer).returncode == 0
    assert workspace.dataset("pseudo_gt", names[1]).read_bytes() == workspace.dataset("pseudo_gt", "twin").read_bytes()

    # a looser setting, then a photo that has changed
    assert "computed again, since these settings need maps" in mine("--threshold", "0.9", gan=newer).stderr
    assert cv2.imwrite(str(tmp_path / "photos" / f"{names[1]}.png"), photo(9, bright=False))
    changed = mine("--threshold", "0.9", gan=newer)
    assert "changed, and computed again: 1 image\n" in changed.stderr
    assert not workspace.dataset("lr", names[1]).exists()
    assert workspace.dataset("lr", "twin").exists()
    assert names[1] not in pq.read_table(workspace.dataset_manifest)["image"].to_pylist()


@pytest.mark.slow
def test_maps_of_all_are_kept_and_spare_inference(mine, make_photos, tmp_path) -> None:
    make_photos(tmp_path / "photos", 6)
    assert mine("--keep", "maps").returncode == 0
    workspace = Workspace(tmp_path / "ws")
    arrays = [path.parent.name for path in workspace.maps.rglob("zarr.json") if "sr" in path.parent.name]
    assert sorted(arrays) == 4 * ["gan_sr"] + 4 * ["mse_sr"]
    assert len(list(workspace.maps.glob("*/*/similarity"))) == 6
    records = read_records(workspace, ["artifact_pixels", "seconds"]).to_pylist()
    seconds_of_clean_photos = {dict(row["seconds"])["inference"] for row in records if row["artifact_pixels"] == 0}
    assert len(records) == 6
    looser = mine("--keep", "maps", "--threshold", "0.75")
    assert looser.returncode == 0, looser.stderr
    records = read_records(workspace, ["artifact_pixels", "seconds"]).to_pylist()
    inference = {dict(row["seconds"])["inference"] for row in records if row["artifact_pixels"] == 0}
    assert inference == seconds_of_clean_photos
    fresh = mine("--keep", "maps", "--threshold", "0.75", ws=tmp_path / "fresh")
    assert fresh.returncode == 0
    assert files(workspace.masks) == files(tmp_path / "fresh/masks")
    assert files(workspace.root / "dataset") == files(tmp_path / "fresh/dataset")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_bad_input_costs_one_line(mine, desra_here, make_models, make_photos, make_pairs, tmp_path) -> None:
    photos = tmp_path / "photos"
    make_photos(photos, 3)
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    other = make_models(tmp_path / "x2", scale=2)[1]
    torch.save({"params": Evil()}, tmp_path / "evil.pth")
    weights = torch.load(other)
    weights["params"]["body.0.bias"][0] = torch.nan
    torch.save(weights, tmp_path / "nan.pth")
    for gan, reason in {
        other: "enlarges by 2, but",
        tmp_path / "evil.pth": "evil.pth: ",
        tmp_path / "nan.pth": "nan.pth: ",
        tmp_path / "missing.pth": "missing.pth: does not exist",
    }.items():
        assert reason in refusal(mine(gan=gan, by=desra_here))
    assert not Path("evil").exists()

    run = mine()
    assert run.returncode == 1
    assert "3 of 4 images done, 1 failed" in run.stdout
    assert [line for line in run.stderr.splitlines() if "broken.jpg" in line]
    make_pairs(tmp_path, 1)
    pairs = ("--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr")
    assert "belongs to runs of desra mine" in refusal(desra_here("detect", *pairs, "--workspace", tmp_path / "ws"))
    assert "is no folder" in refusal(mine(photos=tmp_path / "nowhere", by=desra_here))
    assert "x.png: does not exist" in refusal(mine(photos=tmp_path / "photos/x.png", by=desra_here))
    assert "x*.png: matches no file" in refusal(mine(photos=tmp_path / "photos/x*.png", by=desra_here))
    several = refusal(mine("b.png", "c.png", by=desra_here))
    assert "PHOTOS: 3 of them are given, as by a shell that fills in a glob; put the glob in quotes" in several
    assert "nothing to do" in mine(by=desra_here).stdout
