"""``desra inspect`` as a user meets it: tables and JSON of the same numbers, of folders, tar files and URLs."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deployments.commands.workspace import bytes_in_words
from desra_core.images.codec import encode_png
from tests.conftest import MODELS, Desra, assert_told_in_help, refusal
from tests.object_store import BUCKET, Proxy, object_store
from tests.profiles import P3


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "@eaDir").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)
    Image.fromarray(noise).save(folder / "a.png", icc_profile=P3)
    Image.fromarray(noise[:, :90]).save(folder / "b.jpg")
    Image.fromarray(noise[:60, :50, 0]).save(folder / "c.tif")
    (folder / "b2.jpg").write_bytes((folder / "b.jpg").read_bytes())
    (folder / "note.txt").write_text("x")
    return folder


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first heading this is."""
    part = next(part for part in text.split("\n\n") if part.startswith(f"{heading}  "))
    return [[cell for cell in line.split("  ") if cell] for line in part.splitlines()[1:]]


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_what_is_printed_is_what_json_has(desra_here: Desra, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    before = files(photos.parent)
    run = desra_here("inspect", photos)
    assert run.returncode == 0, run.stderr
    found = json.loads(desra_here("inspect", photos, "--json").stdout)
    assert files(photos.parent) == before, "nothing is written"
    assert [found[key] for key in ("photos", "bytes", "megapixels")] == [
        4, sum(path.stat().st_size for path in photos.glob("*.*") if path.suffix != ".txt"), 0.036
    ]  # fmt: skip
    assert run.stdout.startswith(f"4 photos, {bytes_in_words(found['bytes'])}, 0.0 MP in {photos}\n")
    for heading, name in (("format", "formats"), ("size", "sizes"), ("depth", "depths"), ("profile", "profiles")):
        cells = [
            [*(value for value in row.values() if isinstance(value, str)), str(row["photos"]),
             bytes_in_words(row["bytes"]), f"{row['megapixels']:.2f}"]
            for row in found[name]
        ]  # fmt: skip
        assert [[cell.strip() for cell in row] for row in rows_of(run.stdout, heading)] == cells, name
    assert [row["format"] for row in found["formats"]] == ["JPEG", "PNG", "TIFF"]
    assert [row["photos"] for row in found["formats"]] == [2, 1, 1]
    assert {row["treatment"]: row["photos"] for row in found["profiles"]} == {
        "counts as sRGB": 3, "is converted to sRGB": 1
    }  # fmt: skip
    assert found["smallest"] == {"path": "c.tif", "width": 50, "height": 60}
    assert "smallest 50x60  c.tif\nlargest  150x100  a.png" in run.stdout
    assert found["copies"] == {"photos": 1, "bytes": (photos / "b.jpg").stat().st_size, "example": "b2.jpg"}
    assert "1 photo has the content of another one and will be computed once, such as b2.jpg" in run.stdout
    assert [(row["what"], row["files"], row["example"]) for row in found["left_out"]] == [
        (".txt", 1, "note.txt"), ("@eaDir/", 1, "@eaDir")
    ]  # fmt: skip
    assert found["sample"]["photos"] == 3
    assert [found["estimate"][key] for key in ("inference", "seconds", "mine", "png")] == [None] * 4
    assert "not measured: inference and files, for which give --gan-model and --mse-model" in run.stdout
    keys = {*found, *found["sample"], *found["estimate"], *found["copies"], *found["left_out"][0], "remedy"}
    assert_told_in_help(desra_here, "inspect", keys)


def test_with_models_a_mine_is_estimated(desra_here: Desra, photos: Path) -> None:
    models = ("--gan-model", MODELS / "gan.pth", "--mse-model", "bicubic", "--workers", "3")
    found = json.loads(desra_here("inspect", photos, *models, "--json").stdout)
    sample, made = found["sample"], found["estimate"]
    assert (sample["photos"], sample["crops"], made["workers"]) == (3, 3, 3)
    least = (made["decoding"] + made["inference"] + made["comparison"]) / 3
    assert made["seconds"] == [pytest.approx(least), pytest.approx(least + made["keeping"] / 3)]
    assert made["mine"] == [pytest.approx(sample["mask"]), pytest.approx(sample["mask"] + sample["kept"])]
    run = desra_here("inspect", photos, *models)
    assert "measured on 3 photos (0.03 MP), decoded, and on a crop of 3 photos (0.03 MP), inferred" in run.stdout
    kept, png, jpeg = (bytes_in_words(round(each)) for each in (made["mine"][1], made["png"], made["jpeg"]))
    assert f"to {kept}, from no photo with artifacts to all of them" in run.stdout
    assert f"pictures   {png} as PNG or {jpeg} as JPEG of quality 95" in run.stdout
    assert "3 workers" in run.stdout


def test_files_that_cannot_be_read_are_named(desra_here: Desra, photos: Path) -> None:
    (photos / "d.png").write_bytes(b"")
    cut = encode_png(np.random.default_rng(1).integers(0, 256, (80, 80, 3), np.uint8))
    (photos / "e.png").write_bytes(cut[: len(cut) // 2])
    run = desra_here("inspect", photos, "--json")
    found = json.loads(run.stdout)
    assert (run.returncode, found["photos"]) == (1, 5)
    assert sorted(Path(row["example"]).name for row in found["unreadable"]) == ["d.png", "e.png"]
    text = desra_here("inspect", photos)
    assert text.returncode == 1
    assert [row[0] for row in rows_of(text.stdout, "cannot be read because it")] == [
        row["reason"] for row in found["unreadable"]
    ]


def test_photos_that_no_worker_has_memory_for_are_named(desra_here: Desra, photos: Path) -> None:
    Image.new("L", (5000, 4000)).save(photos / "large.png")
    run = desra_here("inspect", photos, "--workers", "1", "--memory", "1GB", "--json")
    found = json.loads(run.stdout)
    assert (run.returncode, found["photos"], found["sample"]["photos"]) == (1, 5, 3)
    assert found["unreadable"] == [
        {"reason": "has more pixels than fit into a worker's memory", "files": 1, "example": str(photos / "large.png"),
         "remedy": "raise --memory or use fewer --workers"}
    ]  # fmt: skip
    for path in photos.glob("?.*"):
        path.unlink()
    (photos / "b2.jpg").unlink()
    alone = desra_here("inspect", photos, "--workers", "1", "--memory", "1GB")
    assert (alone.returncode, "1 photo, " in alone.stdout) == (1, True)
    assert "measured on 0 photos" in alone.stdout


def test_long_tables_are_cut_and_say_so(desra_here: Desra, photos: Path) -> None:
    for index in range(24):  # each with a reason of its own: the sizes that they claim
        (photos / f"{index}.bmp").write_bytes(b"BM" + bytes(12) + struct.pack("<IiiHH", 40, 10**5, 10**5 + index, 1, 24)
                                              + bytes(24))  # fmt: skip
    run = desra_here("inspect", photos)
    found = json.loads(desra_here("inspect", photos, "--json").stdout)
    assert (run.returncode, len(found["unreadable"])) == (1, 24)
    assert "and 4 more: --json lists them all" in run.stdout


def test_what_cannot_be_used_is_refused(desra_here: Desra, photos: Path) -> None:
    gan = MODELS / "gan.pth"
    assert "--mse-model: is not given; give both" in refusal(desra_here("inspect", photos, "--gan-model", gan))
    assert "--gan-model: is not given; give both" in refusal(desra_here("inspect", photos, "--mse-model", gan))
    assert "is of no use here" in refusal(desra_here("inspect", photos, "--scheduler", "tcp://host:1"))
    assert "matches no file" in refusal(desra_here("inspect", photos / "none*.png"))
    for path in photos.glob("*.[pjt][npi]*"):
        path.unlink()
    assert "holds no images, but 1 .txt, 1 @eaDir/" in refusal(desra_here("inspect", photos)).replace(
        "1 @eaDir/, 1 .txt", "1 .txt, 1 @eaDir/"
    )


def without_place(document: dict[str, Any]) -> dict[str, Any]:
    timed = {"place", "sample", "estimate"}
    return {key: value for key, value in document.items() if key not in timed}


def test_a_folder_at_a_url_and_a_tar_file_are_the_same(
    desra_here: Desra, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = without_place(json.loads(desra_here("inspect", photos, "--json").stdout))
    tar = photos.parent / "photos.tar"
    with tarfile.open(tar, "w") as file:
        for path in sorted(photos.glob("*.*")):
            file.add(path, path.name)
    packed = json.loads(desra_here("inspect", tar, "--json").stdout)
    assert {
        key: packed[key] for key in ("formats", "sizes", "depths", "profiles", "copies", "smallest", "largest")
    } == {key: here[key] for key in ("formats", "sizes", "depths", "profiles", "copies", "smallest", "largest")}
    with object_store() as store, Proxy(store.port) as proxy:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        from s3fs import S3FileSystem

        S3FileSystem.clear_instance_cache()
        url = store.put_folder(photos, "corpus")
        store.put({"corpus/@eaDir/x.png": b"x"})  # folders alone are not stored
        there = json.loads(desra_here("inspect", url, "--json").stdout)
        assert without_place(there) == here

        rng, size = np.random.default_rng(2), 0
        for index in range(14):
            sink = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (600, 600, 3), np.uint8)).save(sink, "PNG")
            store.put({f"large/{index}.png": sink.getvalue()})
            size = len(sink.getvalue())
        proxy.bytes = 0
        large = json.loads(desra_here("inspect", f"s3://{BUCKET}/large", "--json").stdout)
        assert (large["photos"], large["sample"]["photos"]) == (14, 12)
        assert proxy.bytes < 12 * size + 14 * 80_000 < 14 * size, "of the photos beyond the sample, the headers"
        S3FileSystem.clear_instance_cache()
