"""``desra mine`` with photos in object storage and in tar files, as a user meets it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from tests.conftest import refusal
from tests.object_store import BUCKET, ObjectStore, Proxy, object_store


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


def outputs(workspace: Path) -> dict[str, bytes]:
    files = [*workspace.glob("masks/**/*.png"), *workspace.glob("dataset/**/*"), workspace / "regions.parquet"]
    return {str(path.relative_to(workspace)): path.read_bytes() for path in files if path.is_file()}


@pytest.mark.slow
def test_photos_of_s3_are_mined_by_workers_as_local_ones_are(
    desra, desra_alone, make_models, make_photos, store: ObjectStore, tmp_path: Path
) -> None:
    models = make_models(tmp_path / "models")
    make_photos(tmp_path / "photos", 6)

    def mine(photos: object, workspace: str, *more: str, by=desra_alone, **environment: str):
        return by("mine", photos, "--mse-model", models[0], "--gan-model", models[1], "--workspace",
                  tmp_path / workspace, *more, **environment)  # fmt: skip

    assert mine(tmp_path / "photos", "here", by=desra).returncode == 0
    url = store.put_folder(tmp_path / "photos", "corpus")
    store.put({"corpus/@eaDir/x.png": b"x", "corpus/note.txt": b"x"})
    mined = mine(url, "there", "--workers", "2", **store.environment)
    assert mined.returncode == 0, mined.stderr
    assert "6 of 6 images done, 0 failed" in mined.stdout
    assert outputs(tmp_path / "there") == outputs(tmp_path / "here")
    assert len(outputs(tmp_path / "here")) > 6
    reads = store.reads()
    again = mine(url, "there", **store.environment)
    assert "nothing to do" in again.stdout, again.stderr
    assert store.reads() == reads
    status = desra("status", "--workspace", tmp_path / "there")
    assert "1 .txt, 1 @eaDir/" in status.stdout, status.stdout

    store.delete("corpus/set0/photo000.png")
    store.put({"corpus/set1/photo001.png": b"no picture"})
    gone = mine(url, "there", **store.environment)
    assert gone.returncode == 1
    assert "changed, and computed again: 1 image" in gone.stderr + gone.stdout
    assert "vanished: 1 image" in gone.stderr + gone.stdout
    assert f"failed: {url}/set1/photo001.png: " in gone.stderr

    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for path in sorted((tmp_path / "photos").rglob("*.png")):
            member = tarfile.TarInfo(path.relative_to(tmp_path / "photos").as_posix())
            member.size = path.stat().st_size
            tar.addfile(member, io.BytesIO(path.read_bytes()))
    packed = mine(tmp_path / "shard.tar", "packed", by=desra)
    assert packed.returncode == 0, packed.stderr
    assert outputs(tmp_path / "packed") == outputs(tmp_path / "here")
    assert desra("report", "--workspace", tmp_path / "packed", "--pages", "2").returncode == 0


def test_what_is_refused_before_anything_starts(desra_here, make_models, store: ObjectStore, monkeypatch, tmp_path):
    _, gan = make_models(tmp_path / "models")

    def refused(photos: str, workspace: object = tmp_path / "ws") -> str:
        return refusal(
            desra_here("mine", photos, "--mse-model", "bicubic", "--gan-model", gan, "--workspace", workspace)
        )

    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    line = refused(f"s3://{BUCKET}/corpus", "s3://bucket/ws")
    assert line.startswith("error: --workspace: s3://bucket/ws is not accepted (is a URL; only pictures are read from")
    assert "secret" not in refused("s3://me:secret@bucket/corpus")
    assert "abcdef" not in refused("https://host/corpus?X-Amz-Signature=abcdef")
    for flag in ("--workspace", "--output"):
        given = {"--workspace": tmp_path / "ws", "--output": tmp_path / "out"} | {flag: "s3://bucket/x"}
        line = refusal(desra_here("export", "--format", "coco", *(part for pair in given.items() for part in pair)))
        assert line == "error: s3://bucket/x: is a URL, which this command does not take; give a path on a file system"
    assert refused(f"s3://{BUCKET}/nothing-here").startswith(f"error: s3://{BUCKET}/nothing-here: does not exist")
    assert refused("gs://bucket/corpus") == (
        "error: gs://bucket/corpus: needs a driver that is not installed; pip install 'desra[gs]'"
    )
    with Proxy(store.port) as proxy:
        proxy.expired = True
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        S3FileSystem.clear_instance_cache()
        line = refused(f"s3://{BUCKET}/corpus")
        assert "access is refused (" in line
        assert "expired" in line
    S3FileSystem.clear_instance_cache()
    assert not (tmp_path / "ws/manifest.parquet").exists()
