"""``desra deliver`` as its users meet it: pictures whose artifacts are repaired, once, under the photos' paths."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pillow_heif
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from desra_core.detection.repair import repair
from desra_core.images.codec import read_image
from desra_core.images.scanning import image_files
from desra_core.networks.checkpoints import load_model
from desra_core.networks.super_resolution import super_resolve
from tests.conftest import desra_command, photo
from tests.object_store import BUCKET, object_store
from tests.profiles import ADOBE, P3

Array = npt.NDArray[np.generic]


@pytest.fixture
def models(make_models, tmp_path: Path) -> tuple[Path, Path]:
    return make_models(tmp_path / "models")


def pictures(output: Path) -> dict[str, bytes]:
    """Return all files of an output folder by relative path."""
    files = (path for path in output.rglob("*") if path.is_file())
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def expected(photo_path: Path, models: tuple[Path, Path], mask: Array | None) -> Array:
    """The GAN result of a photo, with the MSE result in the place of its mask."""
    mse_sr, gan_sr = (super_resolve(load_model(model), read_image(photo_path)).pixels for model in models)
    return gan_sr if mask is None else repair(mse_sr, gan_sr, mask).pixels


def test_photos_become_repaired_pictures(desra, make_photos, models, tmp_path) -> None:
    names = make_photos(tmp_path / "photos", 6)
    mse, gan = models
    output = tmp_path / "out"
    command = ("deliver", tmp_path / "photos", "--gan-model", gan, "--mse-model", mse, "--output", output)
    run = desra(*command)
    assert run.returncode == 0, run.stderr
    assert f"pictures {output} (6 pictures, 4 of them repaired)" in run.stdout
    workspace = output / ".desra"
    for name in names:
        mask = read_image(workspace / f"masks/{name}.png")[:, :, 0] > 0
        wanted = expected(tmp_path / f"photos/{name}.png", models, mask if mask.any() else None)
        assert (read_image(output / f"{name}.png") == wanted).all()
    table = pq.read_table(output / "delivered.parquet").to_pylist()
    assert [row["image"] for row in table] == sorted(names)
    assert all((output / row["path"]).stat().st_size == row["bytes"] for row in table)
    # Clean photos are delivered while they are mined, the others from what mining has kept.
    assert {(row["repaired"] > 0, row["results"]) for row in table} == {(True, "stored"), (False, "inferred")}

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    again = desra(*command)
    assert (again.returncode, "nothing to do: 6 of 6 images done" in again.stdout) == (0, True), again.stderr
    assert "starting Prefect" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.png")} == before

    # The workspace alone is enough; what was not kept is inferred again, and the pictures are the same.
    elsewhere = desra("deliver", "--workspace", workspace, "--output", tmp_path / "other", "--suffix", "_x4")
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert "results that were not kept, inferred again: 2" in elsewhere.stderr
    for name in names:
        assert (tmp_path / f"other/{name}_x4.png").read_bytes() == (output / f"{name}.png").read_bytes()
    assert desra("verify", "--workspace", workspace).returncode == 0

    # A photo that came, one that changed, and a picture that was lost.
    assert cv2.imwrite(str(tmp_path / "photos/new.png"), photo(7, bright=True))
    assert cv2.imwrite(str(tmp_path / f"photos/{names[0]}.png"), photo(8, bright=True))
    (output / f"{names[1]}.png").unlink()
    changed = desra(*command)
    assert (changed.returncode, f"pictures {output} (7 pictures, 6 of them repaired)" in changed.stdout) == (0, True), (
        changed.stderr + changed.stdout
    )
    written = {str(path.relative_to(output)) for path in output.rglob("*.png")
               if path.stat().st_mtime_ns != before.get(path) and ".desra" not in path.parts}  # fmt: skip
    assert written == {"new.png", f"{names[0]}.png", f"{names[1]}.png"}


def test_repairs_follow_people_strength_and_the_switch(desra, make_photos, models, tmp_path) -> None:
    (name, *_) = make_photos(tmp_path / "photos", 2)[1:]
    mse, gan = models
    workspace, photo_path = tmp_path / "ws", tmp_path / f"photos/{name}.png"
    mined = desra("mine", tmp_path / "photos", "--gan-model", gan, "--mse-model", mse, "--workspace", workspace)
    assert mined.returncode == 0, mined.stderr
    mask = read_image(workspace / f"masks/{name}.png")[:, :, 0] > 0
    mse_sr, gan_sr = (super_resolve(load_model(model), read_image(photo_path)).pixels for model in models)

    def delivered(*flags: object) -> Array:
        run = desra("deliver", "--workspace", workspace, "--output", tmp_path / "out", *flags)
        assert run.returncode == 0, run.stderr
        return read_image(tmp_path / f"out/{name}.png")

    assert (delivered("--repair", "off") == gan_sr).all()
    assert (delivered("--strength", 0.5) == repair(mse_sr, gan_sr, mask, strength=0.5).pixels).all()
    assert (delivered("--feather", 3) == repair(mse_sr, gan_sr, mask, feather=3).pixels).all()

    picture = delivered("--trust-map")
    share = repair(mse_sr, gan_sr, mask).share
    trust = read_image(tmp_path / f"out/trust_maps/{name}.png")
    assert (trust[:, :, 0] == np.rint(share * 255)).all()
    assert not trust[mask][:, 1].any()  # what is repaired is not in doubt
    assert (picture == repair(mse_sr, gan_sr, mask).pixels).all()

    shape = {"label": "artifact", "shape_type": "rectangle", "points": [[6, 4], [60, 40]], "flags": {}}
    size = {"imageHeight": mask.shape[0], "imageWidth": mask.shape[1]}
    drawn = tmp_path / f"drawn/{name}.json"
    drawn.parent.mkdir(parents=True)
    drawn.write_text(json.dumps({"imagePath": f"{name}.png", "imageData": None, "shapes": [shape], **size}))
    imported = desra("import", "labelme", tmp_path / "drawn", "--workspace", workspace)
    assert imported.returncode == 0, imported.stderr
    human = read_image(workspace / f"human/{name}.png")[:, :, 0] > 0
    assert (delivered() == repair(mse_sr, gan_sr, human).pixels).all()


def test_pairs_of_result_files_are_delivered(desra, make_pairs, tmp_path) -> None:
    make_pairs(tmp_path, 3)
    workspace = tmp_path / "ws"
    folders = ("--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr")
    assert desra("detect", *folders, "--workspace", workspace, "--min-area", "300").returncode == 0
    run = desra("deliver", "--workspace", workspace, "--output", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    masks = {str(path.relative_to(workspace / "masks")): read_image(path)[:, :, 0] > 0
             for path in (workspace / "masks").rglob("*.png")}  # fmt: skip
    assert len(masks) == 3
    assert any(mask.any() for mask in masks.values())
    for name, mask in masks.items():
        mse_sr, gan_sr = (read_image(tmp_path / role / name) for role in ("mse_sr", "gan_sr"))
        assert (read_image(tmp_path / "out" / name) == repair(mse_sr, gan_sr, mask).pixels).all()
    assert set(pq.read_table(tmp_path / "out/delivered.parquet")["results"].to_pylist()) == {"files"}

    refused = desra("deliver", tmp_path / "gan_sr", "--workspace", workspace, "--output", tmp_path / "out")
    assert (refused.returncode, "belongs to runs of desra detect" in refused.stderr) == (2, True)


def test_files_of_others_are_never_written_over(desra, make_photos, models, tmp_path) -> None:
    names = make_photos(tmp_path / "photos", 3)
    mse, gan = models
    output, workspace = tmp_path / "out", tmp_path / "ws"
    (output / "set0").mkdir(parents=True)
    mine = output / f"{names[0]}.png"
    mine.write_bytes(b"mine")
    given = (tmp_path / "photos", "--gan-model", gan, "--mse-model", mse)

    def deliver(*more: object) -> subprocess.CompletedProcess[str]:
        return desra("deliver", *more, "--workspace", workspace, "--output", output)

    run = deliver(*given)
    assert run.returncode == 1
    line = f"{mine}: is in the way: it is not as desra deliver has written it, if it did; move it, or name another"
    assert line in run.stderr
    assert "(2 pictures, 2 of them repaired)" in run.stdout  # no line tells of one that was not written
    assert mine.read_bytes() == b"mine"
    mine.unlink()
    assert (deliver().returncode, len(pictures(output))) == (0, 4)  # with the table

    # A picture that a person has changed, and a file in the place of a map.
    whole = pictures(output)
    mine.write_bytes(b"retouched")
    trust_map = output / f"trust_maps/{names[1]}.png"
    trust_map.parent.mkdir(parents=True)
    trust_map.write_bytes(b"mine too")
    run = deliver("--trust-map")
    assert (run.returncode, run.stderr.count("is in the way")) == (1, 2)
    assert (mine.read_bytes(), trust_map.read_bytes()) == (b"retouched", b"mine too")
    mine.write_bytes(whole[f"{names[0]}.png"])
    trust_map.unlink()
    assert deliver("--trust-map").returncode == 0

    # Another format, a copy of a photo, another strength, and back.
    assert deliver("--format", "jpeg").returncode == 0
    (tmp_path / "photos/copy.png").write_bytes((tmp_path / f"photos/{names[1]}.png").read_bytes())
    assert deliver("--strength", "0.5").returncode == 0
    assert deliver().returncode == 0
    found = pictures(output)
    assert {name: found[name] for name in whole if name.endswith(".png")} == {
        name: content for name, content in whole.items() if name.endswith(".png")
    }
    assert found["copy.png"] == found[f"{names[1]}.png"]


def test_one_photo_with_the_pictures_beside_it(desra, make_photos, models, tmp_path) -> None:
    (name,) = make_photos(tmp_path, 1)
    run = desra("deliver", tmp_path / f"{name}.png", "--gan-model", models[1], "--output", tmp_path / "set0/out")
    assert run.returncode == 0, run.stderr
    assert "against  bicubic enlargement" in run.stdout
    assert (read_image(tmp_path / "set0/out/photo000.png") == expected(tmp_path / f"{name}.png", models, None)).all()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a disk")
def test_a_full_output_costs_pictures_and_nothing_else(desra, make_photos, models, tmp_path) -> None:
    make_photos(tmp_path / "photos", 3)
    output, workspace = tmp_path / "out", tmp_path / "ws"
    output.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", output], check=True)
    command = ("deliver", tmp_path / "photos", "--gan-model", models[1], "--mse-model", models[0],
               "--workspace", workspace, "--output", output)  # fmt: skip
    try:
        run = desra(*command)
        assert run.returncode == 1
        assert "the disk is full" in run.stderr
        assert "3 of 3 images done" in run.stdout or "error: " in run.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", output], check=True)
        again = desra(*command)
        assert (again.returncode, len(pictures(output))) == (0, 4), again.stderr
    finally:
        subprocess.run(["umount", "-l", output], check=True)


def test_what_cannot_be_is_one_line(desra_here, make_photos, models, tmp_path) -> None:
    make_photos(tmp_path / "photos", 1)
    photos, output = tmp_path / "photos", ("--output", tmp_path / "out")
    for arguments, words in (
        ((photos, *output), "--gan-model: is not given"),
        (output, "PHOTOS: is not given"),
        ((photos, "--gan-model", models[1], "--output", photos / "out"), "the next run would take for photos"),
        ((photos, "--gan-model", models[1], "--output", photos), "the next run would take for photos"),
        ((photos, "--gan-model", models[1], *output, "--suffix", "a/b"), "--suffix"),
        ((photos, "--gan-model", models[1], *output, "--format", "gif"), "--format"),
        ((photos, "--gan-model", models[1], "--output", "s3://bucket/out"), "all else is on a file system"),
        ((photos, "--gan-model", models[1], "--output", "https://host/out"), "takes no files"),
    ):
        run = desra_here("deliver", *arguments)
        assert (run.returncode, words in run.stderr) == (2, True), run.stderr
    assert not (tmp_path / "out").exists()


def profile_of(path: Path) -> bytes | None:
    with Image.open(path) as image:
        return image.info.get("icc_profile")


def seen(path: Path) -> Array:
    """Read a picture as sRGB of 8 bits by Pillow alone, its plugins and LittleCMS."""
    with Image.open(path) as image:
        profile = image.info.get("icc_profile")
        image = image.convert("RGB")
        if profile:
            source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, source, srgb, ImageCms.Intent.RELATIVE_COLORIMETRIC)
        return np.asarray(image)


@pytest.mark.slow
def test_every_format_comes_in_and_goes_out(desra, models, tmp_path) -> None:
    pillow_heif.register_heif_opener()
    importlib.import_module("pillow_jxl")  # which Pillow then knows
    mse, gan = models
    photos, workspace = tmp_path / "photos", tmp_path / "ws"
    photos.mkdir()
    kinds = {"png": {}, "jpg": {"quality": 95}, "webp": {"lossless": True}, "tif": {}, "avif": {"quality": 95},
             "heic": {"quality": 95}, "jxl": {"lossless": True}, "bmp": {}}  # fmt: skip
    for number, (suffix, options) in enumerate(kinds.items()):
        colours = {} if suffix == "bmp" else {"icc_profile": (P3, ADOBE)[number % 2]}
        Image.fromarray(photo(number, bright=True)[:, :, ::-1]).save(
            photos / f"{suffix}.{suffix}", **options, **colours
        )
    given = ("--gan-model", gan, "--mse-model", mse, "--workspace", workspace)
    assert desra("mine", photos, *given).returncode == 0
    network = load_model(gan)
    wanted = {path.stem: super_resolve(network, seen(path)).pixels for path in photos.iterdir()}
    for kind, suffix in (("png", "png"), ("jpeg", "jpg"), ("webp", "webp"), ("tiff", "tif"), ("avif", "avif")):
        output = tmp_path / kind
        run = desra(
            "deliver",
            "--workspace",
            workspace,
            "--output",
            output,
            "--format",
            kind,
            "--quality",
            100,
            "--repair",
            "off",
        )
        assert run.returncode == 0, run.stderr
        assert {path.name for path in output.iterdir()} == {f"{name}.{suffix}" for name in wanted} | {
            "delivered.parquet"
        }
        for name, pixels in wanted.items():
            path = output / f"{name}.{suffix}"
            difference = np.abs(seen(path).astype(int) - pixels.astype(int)).mean()
            assert difference < (2.0 if kind in ("jpeg", "avif") else 1.0), (kind, name, difference)
            assert profile_of(path) == profile_of(photos / f"{name}.{name}"), (kind, name)


@pytest.mark.slow
def test_photos_and_pictures_may_be_in_object_storage(desra_alone, make_photos, models, tmp_path) -> None:
    names = make_photos(tmp_path / "photos", 4)
    mse, gan = models
    local = tmp_path / "local"
    given = ("--gan-model", gan, "--mse-model", mse, "--workspace")
    assert desra_alone("deliver", tmp_path / "photos", *given, tmp_path / "a", "--output", local).returncode == 0
    with object_store() as store:
        photos, output = store.put_folder(tmp_path / "photos", "photos"), f"s3://{BUCKET}/out"

        def deliver(*more: object) -> subprocess.CompletedProcess[str]:
            return desra_alone(
                "deliver", photos, *given, tmp_path / "b", "--output", output, *more, **store.environment
            )

        def stored() -> dict[str, bytes]:
            found = store.client.list_objects_v2(Bucket=BUCKET, Prefix="out/")["Contents"]
            keys = [each["Key"] for each in found]
            return {key[4:]: store.client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}

        run = deliver()
        assert (run.returncode, f"pictures {output} (4 pictures, 2 of them repaired)" in run.stdout) == (0, True), run
        found, wanted = stored(), pictures(local)
        assert {name: found[name] for name in wanted if name.endswith(".png")} == {
            name: content for name, content in wanted.items() if name.endswith(".png")
        }
        again = deliver()
        assert (again.returncode, "starting Prefect" in again.stderr) == (0, False), again.stderr

        store.delete(f"out/{names[1]}.png")
        store.put({f"out/{names[2]}_x4.png": b"mine"})
        run = deliver("--suffix", "_x4")
        assert run.returncode == 1
        assert f"{output}/{names[2]}_x4.png: is in the way" in run.stderr
        assert stored()[f"{names[2]}_x4.png"] == b"mine"
        assert deliver().returncode == 0
        assert stored()[f"{names[1]}.png"] == wanted[f"{names[1]}.png"]


@pytest.mark.slow
def test_killed_it_goes_on(make_photos, models, prefect_environment, tmp_path) -> None:
    make_photos(tmp_path / "photos", 12)
    mse, gan = models

    def command(output: Path) -> list[str]:
        given = ("--gan-model", gan, "--mse-model", mse, "--output", output)
        return desra_command("deliver", tmp_path / "photos", *given, "--workspace", output.with_suffix(".ws"))

    undisturbed = subprocess.run(command(tmp_path / "whole"), env=prefect_environment, capture_output=True, text=True)
    assert undisturbed.returncode == 0, undisturbed.stderr
    for pause, count in ((0.0, 1), (0.1, 10)):
        run = subprocess.Popen(command(tmp_path / "out"), env=prefect_environment, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        until = time.monotonic() + 120
        while run.poll() is None and len(pictures(tmp_path / "out")) < count and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(pause)
        os.killpg(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    last = subprocess.run(command(tmp_path / "out"), env=prefect_environment, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    found, wanted = pictures(tmp_path / "out"), pictures(tmp_path / "whole")
    table = found.pop("delivered.parquet"), wanted.pop("delivered.parquet")
    assert found == wanted
    (tmp_path / "tables").mkdir()
    rows = []
    for index, data in enumerate(table):
        (tmp_path / f"tables/{index}").write_bytes(data)
        rows.append(pq.read_table(tmp_path / f"tables/{index}").drop_columns(["results"]).to_pylist())
    assert rows[0] == rows[1]


def members(folder: Path) -> dict[str, bytes]:
    """Return what the tar files of a folder hold, all of it, by the names in them."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


@pytest.mark.slow
def test_pictures_are_packed_into_tar_files(desra, make_photos, models, tmp_path) -> None:
    names = make_photos(tmp_path / "photos", 6)
    (tmp_path / "photos/a.b.png").write_bytes((tmp_path / f"photos/{names[0]}.png").read_bytes() + b"x")
    mse, gan = models
    workspace, output = tmp_path / "ws", tmp_path / "out"
    given = ("--gan-model", gan, "--mse-model", mse, "--workspace", workspace)
    assert desra("mine", tmp_path / "photos", *given, "--shard-size", 4).returncode == 0

    def deliver(place: Path, *flags: object) -> subprocess.CompletedProcess[str]:
        return desra("deliver", "--workspace", workspace, "--output", place, *flags)

    run = deliver(output / "all.tar", "--trust-map")
    assert run.returncode == 0, run.stderr
    assert f"pictures {output / 'all.tar'} (7 pictures, " in run.stdout
    assert f"table    {output / 'all.parquet'}" in run.stdout
    assert {path.name for path in output.iterdir()} == {"all-000000.tar", "all-000001.tar", "all.parquet"}
    assert deliver(tmp_path / "folder", "--trust-map").returncode == 0
    folder = pictures(tmp_path / "folder")
    wanted = {name: data for name, data in folder.items() if not name.startswith(("trust_maps/", "delivered"))}
    wanted |= {f"{name[11:-4]}.trust_map.png": data for name, data in folder.items() if name.startswith("trust_maps/")}
    wanted = {name.replace("a.b", "a_b"): data for name, data in wanted.items()}
    assert members(output) == wanted
    assert len(wanted) == 14
    table = pq.read_table(output / "all.parquet").to_pylist()
    assert [row["image"] for row in table] == sorted([*names, "a.b"])
    for row in table:
        tar, _, member = row["path"].partition("/")
        assert tar in {"all-000000.tar", "all-000001.tar"}
        assert len(wanted[member]) == row["bytes"]
    assert not list(workspace.glob("deliveries/*/unpacked"))
    # They are photos to desra, the trust maps are not.
    found = image_files(output / "*.tar").files
    assert {path.partition("/")[2] for path in found["path"].to_pylist()} == {
        name for name in wanted if "trust_map" not in name
    }

    before = {path: path.read_bytes() for path in output.iterdir()}
    again = deliver(output / "all.tar", "--trust-map")
    assert (again.returncode, "starting Prefect" in again.stderr) == (0, False), again.stderr
    assert {path: path.read_bytes() for path in output.iterdir()} == before
    assert desra("verify", "--workspace", workspace).returncode == 0

    # A photo that changed, which may be in another shard then, and a tar file that is gone.
    assert cv2.imwrite(str(tmp_path / f"photos/{names[0]}.png"), photo(8, bright=True))
    (output / "all-000001.tar").unlink()
    changed = deliver(output / "all.tar", "--trust-map")
    assert changed.returncode == 0, changed.stderr
    assert deliver(tmp_path / "folder", "--trust-map").returncode == 0
    there, folder = members(output), pictures(tmp_path / "folder")
    assert there.keys() == wanted.keys()
    assert there[f"{names[0]}.png"] == folder[f"{names[0]}.png"] != wanted[f"{names[0]}.png"]
    assert {name for name in wanted if there[name] != wanted[name]} == {
        f"{names[0]}.png", f"{names[0]}.trust_map.png"
    }  # fmt: skip

    # Again: the shard in which it was alone is left with an empty tar file.
    assert cv2.imwrite(str(tmp_path / f"photos/{names[0]}.png"), photo(10, bright=True))
    assert deliver(output / "all.tar", "--trust-map").returncode == 0
    assert deliver(tmp_path / "folder", "--trust-map").returncode == 0
    there = members(output)
    assert there.keys() == wanted.keys()
    assert there[f"{names[0]}.png"] == (tmp_path / f"folder/{names[0]}.png").read_bytes() != folder[f"{names[0]}.png"]

    (output / "all-000000.tar").write_bytes(b"mine")
    refused = deliver(output / "all.tar", "--trust-map")
    assert refused.returncode == 2
    assert f"error: {output}/all-000000.tar: is in the way" in refused.stderr
    assert (output / "all-000000.tar").read_bytes() == b"mine"


def test_a_tar_file_of_somebody_else_is_refused_before_photos_are_mined(
    desra_here, make_photos, models, tmp_path
) -> None:
    make_photos(tmp_path / "photos", 1)
    (tmp_path / "all-000000.tar").write_bytes(b"mine")
    run = desra_here("deliver", tmp_path / "photos", "--gan-model", models[1], "--workspace", tmp_path / "ws",
                     "--output", tmp_path / "all.tar")  # fmt: skip
    assert (run.returncode, "all-000000.tar: is in the way" in run.stderr) == (2, True), run.stderr
    assert "starting Prefect" not in run.stderr
    assert not list(tmp_path.glob("ws/masks/*"))


@pytest.mark.slow
def test_tar_files_that_are_photos_are_no_place_for_pictures(desra_here, make_photos, models, tmp_path) -> None:
    make_photos(tmp_path / "photos", 1)
    with tarfile.open(tmp_path / "p-000000.tar", "w") as tar:
        tar.add(tmp_path / "photos", "")
    command = ("deliver", tmp_path / "p-*.tar", "--gan-model", models[1], "--workspace", tmp_path / "ws", "--output")
    run = desra_here(*command, tmp_path / "p-new.tar")
    assert (run.returncode, "the next run would take for photos" in run.stderr) == (2, True), run.stderr


@pytest.mark.slow
def test_tar_files_in_object_storage_and_killed(make_photos, models, prefect_environment, tmp_path) -> None:
    make_photos(tmp_path / "photos", 8)
    mse, gan = models

    def command(output: object) -> list[str]:
        given = ("--gan-model", gan, "--mse-model", mse, "--workspace", tmp_path / "ws", "--output", output)
        return desra_command("deliver", tmp_path / "photos", *given)

    with object_store() as store:
        environment = prefect_environment | store.environment
        target = f"s3://{BUCKET}/out/all.tar"

        def stored() -> dict[str, bytes]:
            found = store.client.list_objects_v2(Bucket=BUCKET, Prefix="out/").get("Contents", [])
            bodies = {each["Key"]: store.client.get_object(Bucket=BUCKET, Key=each["Key"]) for each in found}
            return {key: answer["Body"].read() for key, answer in bodies.items()}

        run = subprocess.Popen(command(target), env=environment, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        until = time.monotonic() + 120
        while run.poll() is None and not list(tmp_path.glob("ws/deliveries/*/unpacked/**/*.png")):
            assert time.monotonic() < until
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert stored() == {}
        last = subprocess.run(command(target), env=environment, capture_output=True, text=True)
        assert last.returncode == 0, last.stderr
        here = subprocess.run(command(tmp_path / "here/all.tar"), env=environment, capture_output=True, text=True)
        assert here.returncode == 0, here.stderr
        tars = {f"out/{path.name}": path.read_bytes() for path in (tmp_path / "here").glob("*.tar")}
        found = stored()
        found.pop("out/all.parquet")
        assert found == tars
        again = subprocess.run(command(target), env=environment, capture_output=True, text=True)
        assert (again.returncode, "starting Prefect" in again.stderr) == (0, False), again.stderr
        # Another name for each picture: the tar file is written anew, without those before. A new photo: another shard.
        assert cv2.imwrite(str(tmp_path / "photos/new.png"), photo(9, bright=True))
        more = subprocess.run([*command(target), "--suffix", "_x4"], env=environment, capture_output=True, text=True)
        assert more.returncode == 0, more.stderr
        old = members(tmp_path / "here")
        for key in ("all-000000.tar", "all-000001.tar"):
            (tmp_path / key).write_bytes(stored()[f"out/{key}"])
        new = members(tmp_path)
        assert new.pop("new_x4.png")
        assert new == {name.replace(".png", "_x4.png"): content for name, content in old.items()}
        assert not list(tmp_path.glob("ws/deliveries/*/.*")), "no copy is left"
