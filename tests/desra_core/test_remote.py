"""Photos at URLs and in tar files: the same listing, reading and outputs as in local folders."""

from __future__ import annotations

import functools
import http.server
import io
import pickle
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest

from desra_core import remote
from desra_core.delivery.plan import sizes_at
from desra_core.errors import AbsentError, DesraError, TransientError, UsageError
from desra_core.files import content_key, read_bytes, storage_errors, write_output
from desra_core.images.codec import most_pixels
from desra_core.images.scanning import image_files, paths_of
from desra_core.remote import Remote, check_url, place_of
from desra_core.settings import CorpusSettings, Detection, Mining
from desra_core.stages import read_content
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import image_refs, read_manifest, scan
from desra_core.workspace.matching import Sources
from desra_core.workspace.products import read_records
from tasks import question
from tests.in_process import process
from tests.object_store import BUCKET, ObjectStore, Proxy, object_store


@pytest.fixture(scope="module")
def running_store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(running_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """The server, empty, in the environment of this process."""
    for item in running_store.client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        running_store.delete(item["Key"])
    connect(running_store.environment, monkeypatch)
    yield running_store
    forget()


def connect(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    forget()


def forget() -> None:
    """Let fsspec connect anew."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server, with short patience."""
    monkeypatch.setattr(remote, "_STALL_SECONDS", 0.3)
    monkeypatch.setattr(remote, "_PAUSES", (0.01, 0.01))
    with Proxy(store.port) as between:
        connect({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{between.port}"}, monkeypatch)
        yield between


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def tar_of(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def picture(seed: int, side: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def test_a_url_is_a_path() -> None:
    url = place_of("s3://bucket/a folder/b.v2.png")
    assert str(url) == f"{url}" == "s3://bucket/a folder/b.v2.png"
    assert place_of(Path("s3://bucket/a folder/b.v2.png")) == url
    assert (str(url.parent), url.name, url.suffix) == ("s3://bucket/a folder", "b.v2.png", ".png")
    assert str(url.parent / "x/y.jpg") == "s3://bucket/a folder/x/y.jpg"
    assert str(url.relative_to(place_of("s3://bucket"))) == "a folder/b.v2.png"
    assert str(pickle.loads(pickle.dumps(url))) == str(url)
    assert url.is_absolute()
    assert url.absolute() is url
    assert url != place_of("s3://other/a folder/b.v2.png")
    assert type(place_of("/photos/s3:/x")) is type(Path())


TREE = {
    "set0/a1.png": b"1", "set0/a2.JPG": b"22", "set1/deep/b.tif": b"333", "set1/note.txt": b"4", "c.webp": b"55555",
    "@eaDir/c.webp/SYNOPHOTO_THUMB_M.jpg": b"6", "set0/.thumbnails/a1.png": b"7", "set1/._b.tif": b"8",
    "set1/SYNOPHOTO_THUMB_XL.jpg": b"9", "cat Previews.lrdata/0/x.jpg": b"10", "set1/Thumbs.db": b"11",
    "K\u00f6ln #1?/%20.png": b"12",
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "exclude", "include"),
    [
        ("", [], []),
        ("", ["a1*", "deep"], []),
        ("", [], ["set0", "c.*"]),
        ("", ["a2*"], ["set0/*", "*.tiff"]),
        ("set*", [], []),
        ("**/*.png", [], []),
        ("set[1]/d*", [], []),
        ("set0/a1.png", [], []),
        ("shards/*.tar", [], []),
        ("shards/t-0.tar", [], ["*.png"]),
        ("shards/t-?.tar/*.gan.png", [], []),
    ],
)
def test_the_listing_of_a_url_is_that_of_the_same_folder(
    store: ObjectStore, tmp_path: Path, place: str, exclude: list[str], include: list[str]
) -> None:
    write(tmp_path, TREE)
    for number in range(2):
        members = {f"./{number}{name}": b"x" * size for size, name in enumerate(
            ("0.png", "0.json", "d/1.jpg", "d/1.gan.png", "d/1.mse.png", ".hid.png", "@eaDir/2.png"))}  # fmt: skip
        tar_of(tmp_path / f"shards/t-{number}.tar", members)
    url = store.put_folder(tmp_path, "corpus")
    here = image_files(tmp_path / place, exclude=exclude, include=include)
    there = image_files(place_of(f"{url}/{place}"), exclude=exclude, include=include)
    columns = ["name", "path", "size", "offset"]
    assert here.files.num_rows
    assert there.files.select(columns).sort_by("path").equals(here.files.select(columns).sort_by("path"))
    assert there.passed_over == here.passed_over
    assert not there.problems
    contents = [[path.read_bytes() for path in paths_of(root, files.sort_by("path"))]
                for root, (files, *_) in ((tmp_path / place, here), (place_of(f"{url}/{place}"), there))]  # fmt: skip
    assert contents[0] == contents[1]


def test_members_are_named_by_the_rules_of_webdataset(tmp_path: Path) -> None:
    members = {"a.jpg": b"1", "a.json": b"2", "a.seg.png": b"3", "b/c.JPG": b"4", "b/c.cls": b"5", "../up.png": b"6",
               "/abs.png": b"7"}  # fmt: skip
    tar = tar_of(tmp_path / "train-000.tar", members)
    found = image_files(tar)
    assert sorted(found.files["name"].to_pylist()) == ["a", "b/c"]
    assert found.passed_over == {".json": 1, ".seg.png": 1, ".cls": 1}
    assert [error.reason for error in found.problems] == ["has a name that no file here can have"] * 2
    chosen = image_files(tmp_path / "*.tar" / "*.seg.png").files
    assert chosen["name"].to_pylist() == ["train-000.tar/a"]
    assert [read_bytes(path) for path in paths_of(tmp_path / "*.tar" / "*.seg.png", chosen)] == [b"3"]


def test_a_damaged_tar_file_leaves_the_others(tmp_path: Path) -> None:
    content = tar_of(tmp_path / "a.tar", {"x.png": b"x" * 5000, "y.png": b"y"}).read_bytes()
    (tmp_path / "b.tar").write_bytes(content[:2000])
    (tmp_path / "c.tar").write_bytes(b"no tar" * 200)
    second = content.index(b"y.png")
    (tmp_path / "e.tar").write_bytes(content[:second] + b"Y" + content[second + 1 :])
    negative = tarfile.TarInfo("x.png")
    negative.size = -512
    header = negative.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "f.tar").write_bytes(header * 3)
    (tmp_path / "g.tar").write_bytes(content[: second + 1024])
    found = image_files(tmp_path / "*.tar")
    assert sorted(found.files["path"].to_pylist()) == ["a.tar/x.png", "a.tar/y.png"]
    assert {Path(error.subject).name for error in found.problems} == {f"{name}.tar" for name in "bcefg"}
    assert all("is no whole tar file" in error.reason for error in found.problems)
    (tmp_path / "d.tar").mkdir()
    write(tmp_path / "d.tar", {"z.png": b"z"})
    assert image_files(tmp_path / "d.tar").files["path"].to_pylist() == ["z.png"], "a folder of that name"


def scanned(photos: Path, workspace: Workspace) -> Any:
    return scan(Sources(lr=photos), workspace, shard_size=10)


def test_a_scan_reads_only_what_is_new_or_changed(store: ObjectStore, tmp_path: Path) -> None:
    store.put({f"p/{name}.png": name.encode() for name in "abc"})
    tar_of(tmp_path / "t.tar", {"x.png": b"x", "y.png": b"y"})
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    photos = place_of(f"s3://{BUCKET}/p")
    assert scanned(photos, workspace).added == 3
    assert sorted(store.reads()[-3:]) == ["p/a.png", "p/b.png", "p/c.png"]
    before = len(store.reads())
    assert scanned(photos, workspace).added == 0
    assert len(store.reads()) == before, "nothing is read twice"
    store.put({"p/b.png": b"B"})  # of the same size
    store.delete("p/c.png")
    again = scanned(photos, workspace)
    assert (again.added, again.replaced, again.vanished) == (1, 1, 1)
    assert store.reads()[before:] == ["p/b.png"]
    image = next(image for image in image_refs(read_manifest(workspace)) if image.names == ("a",))
    assert image.lr is not None
    assert read_content(image.lr) == b"a"
    store.put({"p/a.png": b"A"})
    with pytest.raises(TransientError, match=r"^s3://photos/p/a\.png: changed after the run had started; run again$"):
        read_content(image.lr)
    store.delete("p/a.png")
    with pytest.raises(TransientError, match=r"^s3://photos/p/a\.png: there is no such file"):
        read_content(image.lr)


@pytest.mark.parametrize("at_url", [False, True], ids=["local", "S3"])
def test_members_keep_their_ids_while_their_tar_file_grows(store: ObjectStore, tmp_path: Path, at_url: bool) -> None:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()

    def put(files: Mapping[str, bytes]) -> Path:
        tar = tar_of(tmp_path / "shards/t.tar", files)
        return place_of(f"{store.put_folder(tar.parent, 'shards')}/t.tar") if at_url else tar

    photos = put({"x.png": b"x", "y.png": b"y"})
    assert scanned(photos, workspace).added == 2
    reads = len(store.reads())
    assert scanned(photos, workspace).added == 0
    assert len(store.reads()) == reads, "an unchanged tar file is not read at all"
    put({"a.png": b"a" * 3000, "x.png": b"x", "y.png": b"Y"})
    again = scanned(photos, workspace)
    assert (again.added, again.replaced, again.vanished) == (2, 1, 0)
    contents = {image.names: read_content(image.lr) for image in image_refs(read_manifest(workspace)) if image.lr}
    assert contents == {("a",): b"a" * 3000, ("x",): b"x", ("y",): b"Y"}


def test_a_server_that_stalls_or_cuts_off_is_asked_again(store: ObjectStore, proxy: Proxy) -> None:
    store.put({"p/a.png": b"a" * 10_000})
    file = place_of(f"s3://{BUCKET}/p/a.png")
    proxy.stalls = 1
    assert len(file.read_bytes()) == 10_000
    forget()
    proxy.cuts = 1
    assert len(file.read_bytes()) == 10_000


@pytest.mark.slow
def test_a_server_that_stalls_for_good_is_named(store: ObjectStore, proxy: Proxy) -> None:
    file = place_of(f"s3://{BUCKET}/p/token-expired.png")
    proxy.stalls = 1000
    with pytest.raises(
        TransientError, match=r"^s3://photos/p/token-expired\.png: cannot be read \(.*[Tt]imeout.*check"
    ):
        file.read_bytes()
    with pytest.raises(AbsentError, match=r"^s3://photos/p: cannot be read \(.*[Tt]imeout"):
        image_files(file.parent)


def test_the_size_of_a_picture_takes_its_header_alone(store: ObjectStore, proxy: Proxy, tmp_path: Path) -> None:
    store.put({"p/a.png": picture(0, 900), "p/b.jpg": cv2.imencode(".jpg", np.zeros((70, 50), np.uint8))[1].tobytes()})
    tar_of(tmp_path / "t.tar", {"c.png": picture(1, 950), "d.png": picture(2, 100)})
    store.put_folder(tmp_path, "shards")
    for place, most in (("p", 900**2), ("shards/t.tar", 950**2)):
        url = place_of(f"s3://{BUCKET}/{place}")
        files = paths_of(url, image_files(url).files)
        proxy.bytes = 0
        assert most_pixels(files) == most
        assert proxy.bytes < 60_000


def test_output_is_written_below_a_folder_or_a_url(store: ObjectStore, tmp_path: Path) -> None:
    for root in (tmp_path / "out", place_of(f"s3://{BUCKET}/out")):
        write_output(root, "a b/c#.png", b"content")
        assert (root / "a b/c#.png").read_bytes() == b"content"
        assert (root / "a b/c#.png").exists()
        assert not (root / "a b/d.png").exists()
    with pytest.raises(UsageError, match="is no place to write to; name a folder, or one at s3://"):
        write_output(place_of("https://host/out"), "a.png", b"content")
    with pytest.raises(TransientError, match=r"^s3://none/a\.png: "):
        write_output(place_of("s3://none"), "a.png", b"content")


def test_large_files_are_sent_and_fetched(store: ObjectStore, tmp_path: Path) -> None:
    """In several parts, which S3 shows as one file when the last one is there."""
    content = np.random.default_rng(0).bytes(110_000_000)
    (tmp_path / "here").write_bytes(content)
    place = place_of(f"s3://{BUCKET}/out/large.tar")
    place.upload(tmp_path / "here")
    assert store.client.head_object(Bucket=BUCKET, Key="out/large.tar")["ETag"].endswith('-3"')
    place.download(tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == content
    with pytest.raises(TransientError, match=r"^s3://none/a\.tar: cannot be written \(there is no such place\)"):
        place_of("s3://none/a.tar").upload(tmp_path / "here")
    with pytest.raises(TransientError, match=r"^s3://photos/out/none\.tar: there is no such file; check its path"):
        place_of(f"s3://{BUCKET}/out/none.tar").download(tmp_path / "there")


def test_tar_files_are_found_without_a_listing_of_all_that_lies_beside_them(store: ObjectStore) -> None:
    other = ("x/all-000001.tar", "all-000000/deep", "all.parquet", "small-000000.tar")
    for folder in ("", "p/"):
        store.put({f"{folder}{name}": b"abc" for name in ("all-000000.tar", "all-000002.tar", *other)})
        place = place_of(f"s3://{BUCKET}/{folder}")
        assert sizes_at(place, "all-") == {"all-000000.tar": 3, "all-000002.tar": 3}
        assert sizes_at(place, "none-") == {}
    assert sizes_at(place) == dict.fromkeys(("all-000000.tar", "all-000002.tar", *other), 3)
    assert sizes_at(place_of(f"s3://{BUCKET}/none"), "all-") == {}


def test_a_full_disk_is_not_taken_for_a_failing_network(store: ObjectStore) -> None:
    store.put({"a.tar": b"content"})
    full = Path("/dev/full")
    with pytest.raises(TransientError, match=r"^/dev/full: the disk is full; free some space"), storage_errors(full):
        place_of(f"s3://{BUCKET}/a.tar").download(full)


def test_a_worker_is_asked_whether_it_reads_the_same_photos(store: ObjectStore, tmp_path: Path) -> None:
    store.put({"p/a.png": b"a"})
    tar = tar_of(tmp_path / "t.tar", {"x.png": b"x", "y.png": b"y"})
    for place in (place_of(f"s3://{BUCKET}/p"), tar):
        file = list(paths_of(place, image_files(place).files))[-1]
        asked = str(file), content_key(file), pickle.dumps(file)
        assert question._has_another(*asked) is None
        assert question._has_another(asked[0], "0" * 32, asked[2]) == (
            f"this worker sees another file as {file}", "have photos and models there under the same paths"
        )  # fmt: skip
    tar.unlink()
    store.delete("p/a.png")
    assert "this worker cannot read" in str(question._has_another(*asked))


def test_tar_files_in_a_folder_are_pointed_to(tmp_path: Path) -> None:
    tar_of(tmp_path / "photos/t.tar", {"x.png": b"x"})
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    with pytest.raises(
        UsageError, match=r"holds no images, but 1 \.tar; .*; name tar files by a glob, like '.*/\*\.tar'"
    ):
        scanned(tmp_path / "photos", workspace)


def test_access_that_is_refused_is_one_line(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_of(f"s3://{BUCKET}/p")
    remedy = "renew or mend the credentials, and run again$"
    proxy.expired = True
    with pytest.raises(UsageError, match=rf"^s3://photos/p: access is refused \(.*expired.*\); {remedy}"):
        image_files(place)
    with pytest.raises(TransientError, match=rf"^s3://photos/p/a\.png: access is refused \(.*expired.*\); {remedy}"):
        (place / "a.png").read_bytes()
    proxy.expired = False
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    forget()
    with pytest.raises(UsageError, match=rf"access is refused \(NoCredentialsError.*\); {remedy}"):
        image_files(place)


def test_wrong_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with object_store(INITIAL_NO_AUTH_ACTION_COUNT="1") as strict:  # the first action made the bucket
        connect(strict.environment, monkeypatch)
        with pytest.raises(UsageError, match=r"^s3://photos/p: access is refused \(PermissionError: .*; renew or mend"):
            image_files(place_of(f"s3://{BUCKET}/p"))
    forget()


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("s3://other/p", "s3://other/p: does not exist; check the address"),
        (f"s3://{BUCKET}/none", "s3://photos/none: does not exist; check the address"),
        (f"s3://{BUCKET}/p/x*.png", r"x\*\.png: matches no file; see that its folder is there"),
        (f"s3://{BUCKET}/p/x.png", r"x\.png: does not exist"),
    ],
)
def test_a_place_that_is_not_there(store: ObjectStore, place: str, reason: str) -> None:
    store.put({"p/a.png": b"a"})
    with pytest.raises(UsageError, match=reason):
        image_files(place_of(place))


def mining(photos: object, workspace: Path, models: tuple[Path, Path], **more: Any) -> Mining:
    return Mining(photos=photos, workspace=workspace, mse_model=str(models[0]), gan_model=models[1], **more)


def test_settings_refuse_secrets_other_urls_and_missing_drivers(
    make_models: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    models = make_models(tmp_path / "models")
    for photos in ("s3://key:secret@bucket/p", "https://host/p?X-Amz-Signature=abc"):
        with pytest.raises(ValueError, match="holds a password, key or signature, which belongs into"):
            mining(photos, tmp_path, models)
    with pytest.raises(ValueError, match="is a URL; only pictures are read from URLs"):
        mining(tmp_path, Path("s3://bucket/ws"), models)
    with pytest.raises(
        UsageError, match=r"^gs://bucket/p: needs a driver that is not installed; pip install 'desra\[gs\]'$"
    ):
        mining("gs://bucket/p", tmp_path, models)
    with pytest.raises(ValueError, match="names no bucket"):
        mining("s3://", tmp_path, models)
    assert str(mining("s3://bucket/p?/[ab]*.png", tmp_path, models).photos) == "s3://bucket/p?/[ab]*.png"
    settings = mining(f"s3://{BUCKET}/p", tmp_path, models, segmenter="labels:s3://other/labels")
    assert isinstance(settings.photos, Remote)
    assert str(settings.labels) == "s3://other/labels"
    stored = settings.model_dump(mode="json")
    assert stored["photos"] == f"s3://{BUCKET}/p"
    assert Mining.model_validate(stored) == settings
    check_url(tmp_path)


def published(settings: CorpusSettings) -> dict[str, bytes]:
    """Return the masks and tables of a run, and its dataset."""
    root = process(settings).root
    files = [*root.rglob("masks/**/*.png"), *root.rglob("dataset/**/*"), root / "regions.parquet"]
    assert not (root / "failures.parquet").exists() or not read_records(Workspace(root))["reason"].drop_null()
    return {str(path.relative_to(root)): path.read_bytes() for path in files if path.is_file()}


def test_mining_photos_of_s3_and_of_tar_files_gives_the_very_outputs_of_local_photos(
    store: ObjectStore,
    tmp_path: Path,
    make_models: Callable[..., tuple[Path, Path]],
    make_photos: Callable[[Path, int], list[str]],
) -> None:
    models, photos = make_models(tmp_path / "models"), tmp_path / "photos"
    names = make_photos(photos, 4)
    here = published(mining(photos, tmp_path / "here", models))
    assert sum(name.startswith("masks/") for name in here) == 4
    url = store.put_folder(photos, "corpus")
    there = mining(url, tmp_path / "there", models)
    assert published(there) == here
    reads = len(store.reads())
    assert published(there) == here
    assert len(store.reads()) == reads, "the second run reads nothing"
    tar_of(tmp_path / "shards/t.tar", {f"{name}.png": (photos / f"{name}.png").read_bytes() for name in names})
    assert published(mining(tmp_path / "shards/t.tar", tmp_path / "tar", models)) == here
    store.put_folder(tmp_path / "shards", "shards")
    assert published(mining(f"s3://{BUCKET}/shards/t.tar", tmp_path / "far", models)) == here


def test_detection_of_results_at_urls(
    store: ObjectStore, tmp_path: Path, make_pairs: Callable[[Path, int], list[str]]
) -> None:
    make_pairs(tmp_path / "pairs", 3)
    url = store.put_folder(tmp_path / "pairs", "pairs")
    here = Detection(mse_sr=tmp_path / "pairs/mse_sr", gan_sr=tmp_path / "pairs/gan_sr", workspace=tmp_path / "here")
    there = Detection(mse_sr=f"{url}/mse_sr", gan_sr=f"{url}/gan_sr", workspace=tmp_path / "there")
    assert published(there) == published(here)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def test_the_html_index_of_a_web_server(tmp_path: Path) -> None:
    write(tmp_path / "corpus", TREE)
    write(tmp_path, {"above.png": b"0"})
    tar_of(tmp_path / "corpus/t.tar", {"x.png": picture(0), "y.png": b"y"})
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/corpus"
        for place in ("", "t.tar", "set0/*", "set0/a1.png"):
            here, there = image_files(tmp_path / "corpus" / place), image_files(place_of(f"{url}/{place}"))
            columns = ["name", "path", "size", "offset"]
            assert there.files.select(columns).sort_by("path").equals(here.files.select(columns).sort_by("path"))
            assert there.passed_over == here.passed_over
            paths = paths_of(place_of(f"{url}/{place}"), there.files.sort_by("path"))
            local = paths_of(tmp_path / "corpus" / place, here.files.sort_by("path"))
            assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in local]
        shutil.rmtree(tmp_path / "corpus")
        with pytest.raises(DesraError, match="does not exist; check the address"):
            image_files(place_of(url))
        server.shutdown()


class Busy(Quiet):
    """Refuses the first requests for each path, with these codes, HEAD and GET each; then it answers."""

    codes: ClassVar[list[int]] = []
    asked: ClassVar[Counter[tuple[str, str]]] = Counter()

    def send_head(self) -> Any:
        self.asked[self.command, self.path] += 1
        number = self.asked[self.command, self.path]
        if number <= len(self.codes):
            self.send_error(self.codes[number - 1])
            return None
        return super().send_head()


def test_a_web_server_that_is_busy_is_asked_again_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PAUSES", (0.01, 0.01))
    write(tmp_path / "corpus", {"a.png": b"1", "set/b.png": b"22"})
    handler = functools.partial(Busy, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = place_of(f"http://127.0.0.1:{server.server_port}/corpus")
        for codes in ([503], [429, 503]):
            monkeypatch.setattr(Busy, "codes", codes)
            Busy.asked.clear()
            files = image_files(url).files.sort_by("path")
            assert [row["size"] for row in files.to_pylist()] == [1, 2], "the sizes are told, too"
            Busy.asked.clear()
            assert [path.read_bytes() for path in paths_of(url, files)] == [b"1", b"22"]
            assert Busy.asked["GET", "/corpus/a.png"] == len(codes) + 1
        monkeypatch.setattr(Busy, "codes", [503] * 1000)
        for place in (url, url / "a.png"):  # a listing, and the one file that is asked for by itself
            with pytest.raises(AbsentError, match=r"cannot be read \(ClientResponseError: 503.*check the network"):
                image_files(place)
        with pytest.raises(TransientError, match=r"a\.png: cannot be read \(ClientResponseError: 503"):
            (url / "a.png").read_bytes()
        monkeypatch.setattr(Busy, "codes", [410] * 1000)
        Busy.asked.clear()
        with pytest.raises(UsageError, match="does not exist; check the address"):
            image_files(url / "a.png")
        assert Busy.asked["GET", "/corpus/a.png"] == 1, "what is gone is not asked for again"
        server.shutdown()
