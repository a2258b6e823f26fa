"""Scanning folders: names, twins, identity and shards. Scanning decodes no file, so any bytes do."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import tracemalloc
import unicodedata
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from desra_core.errors import UsageError
from desra_core.workspace import DATASET, Workspace
from desra_core.workspace.human_masks import HUMAN_MASKS, read_human_masks
from desra_core.workspace.manifest import (
    CHANGED,
    MANIFEST,
    Corpus,
    asked_for,
    image_refs,
    read_manifest,
    read_passed_over,
    scan,
)
from desra_core.workspace.matching import FAILURES, Sources, with_twins_summed_up
from desra_core.workspace.products import Record, gather_shard

BOTH = ("mse_sr", "gan_sr")


class Folders:
    """The source folders and the workspace of a test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.workspace = Workspace(root / "ws")
        self.workspace.create()
        for role in BOTH:
            (root / role).mkdir()

    def put(self, name: str, content: str = "", roles: tuple[str, ...] = BOTH) -> None:
        for role in roles:
            path = self.root / role / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{role} {content or name}")

    def sources(self) -> Sources:
        optional = {role: self.root / role for role in ("lr", "labels") if (self.root / role).exists()}
        return Sources(self.root / "mse_sr", self.root / "gan_sr", **optional)

    def scan(self, *, shard_size: int = 2, limit: int | None = None) -> Corpus:
        return scan(self.sources(), self.workspace, shard_size=shard_size, limit=limit)

    def tree(self) -> dict[str, int]:
        paths = [path for path in self.root.rglob("*") if self.workspace.root not in (path, *path.parents)]
        return {str(path): path.stat().st_mtime_ns for path in paths}


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def rows(corpus: Corpus) -> dict[str, dict]:
    return {row["name"]: row for row in corpus.manifest.to_pylist()}


def present(corpus: Corpus) -> list[str]:
    return [row["name"] for row in corpus.manifest.to_pylist() if row["present"]]


def reasons(corpus: Corpus) -> dict[str, str]:
    found = {row["name"]: row["reason"] for row in corpus.failures.to_pylist()}
    assert len(found) == corpus.failures.num_rows, "one row per file"
    return found


def test_nested_folders_and_any_spelling_of_suffixes(folders: Folders) -> None:
    folders.put("b.PNG")
    folders.put("deep/er/a.JPeG")
    folders.put("deep/a.b.tif")
    folders.put("notes.txt")
    folders.put("README")
    corpus = folders.scan()
    assert present(corpus) == ["b", "deep/a.b", "deep/er/a"]
    assert corpus.failures.num_rows == 0
    assert corpus.passed_over == {".txt": 2, "without a suffix": 2}
    assert read_passed_over(folders.workspace) == corpus.passed_over
    assert (corpus.added, corpus.replaced, corpus.vanished) == (3, 0, 0)


def test_twins_match_without_suffix(folders: Folders) -> None:
    folders.put("a.png", roles=("mse_sr",))
    folders.put("a.jpg", roles=("gan_sr",))
    folders.put("a.webp", roles=("lr",))
    folders.put("a.bmp", roles=("labels",))
    (ref,) = image_refs(folders.scan().manifest)
    assert ref.mse_sr.path == folders.root / "mse_sr/a.png"
    assert ref.gan_sr.path == folders.root / "gan_sr/a.jpg"
    assert ref.labels is not None
    assert ref.labels.path == folders.root / "labels/a.bmp"
    assert ref.names == ("a",)


def test_two_candidates_in_one_folder_fail_alone(folders: Folders) -> None:
    folders.put("x.png")
    folders.put("x.jpg", roles=("gan_sr",))
    folders.put("y.png")
    corpus = folders.scan()
    assert present(corpus) == ["y"]
    assert reasons(corpus) == {"x": "has two candidates among the gan_sr files: x.jpg and x.png"}


def test_the_same_two_candidates_everywhere_keep_their_suffix(folders: Folders) -> None:
    folders.put("x.png")
    folders.put("x.jpg")
    folders.put("y.png")
    corpus = folders.scan()
    assert present(corpus) == ["x.jpg", "x.png", "y"]
    assert corpus.failures.num_rows == 0
    assert folders.workspace.mask("x.jpg").name == "x.jpg.png"


def test_a_second_file_of_the_same_stem_leaves_no_row_behind(folders: Folders) -> None:
    """``a`` is renamed ``a.jpg``, with its outputs, once there is ``a.png``, and ``a`` when that has vanished."""
    folders.put("a.jpg")
    folders.put("b.png")
    before, ws = rows(folders.scan()), folders.workspace
    outputs = [ws.mask, ws.human_mask, *(partial(ws.dataset, kind) for kind in DATASET)]
    for output in outputs:
        ws.publish(output("a"), f"{output('a')} of a.jpg".encode())
    human = {"name": "a", "id": before["a"]["id"], "gan_sr_key": None, "pixels": 1, "regions": 1}
    ws.publish_table(ws.human_manifest, pa.Table.from_pylist([human], HUMAN_MASKS))
    files = {path: path.stat().st_mtime_ns for path in ws.root.rglob("*.png")}

    folders.put("a.png")
    joined = folders.scan()
    assert [row["name"] for row in joined.manifest.to_pylist()] == ["a.jpg", "a.png", "b"]
    assert (joined.added, joined.replaced, joined.vanished) == (1, 0, 0)
    assert rows(joined)["a.jpg"]["id"] == before["a"]["id"]
    assert all(output("a.jpg").exists() and not output("a").exists() for output in outputs)
    assert read_human_masks(ws, None)[before["a"]["id"]].path == ws.human_mask("a.jpg")

    for role in BOTH:
        (folders.root / role / "a.png").unlink()
    alone = folders.scan()
    assert present(alone) == ["a", "b"]
    assert alone.vanished == 1
    moved = {path: path.stat().st_mtime_ns for path in ws.root.rglob("*.png")}
    assert moved.keys() == files.keys()
    assert {path for path in files if moved[path] != files[path]} == {ws.human_mask("a")}
    assert read_human_masks(ws, None)[before["a"]["id"]].path == ws.human_mask("a")


def test_a_new_name_may_be_the_old_name_of_another_file(folders: Folders) -> None:
    for name in ("x.jpg", "x.jpg.png"):
        folders.put(name)
    before, ws = rows(folders.scan()), folders.workspace
    for name in ("x", "x.jpg"):
        ws.publish(ws.mask(name), name.encode())
    for name in ("x.tif", "x.jpg.tif"):
        folders.put(name)
    after = folders.scan()
    assert present(after) == ["x.jpg", "x.jpg.png", "x.jpg.tif", "x.tif"]
    assert (after.added, after.replaced, after.vanished) == (2, 0, 0)
    assert rows(after)["x.jpg"]["id"] == before["x"]["id"]
    assert {path.name: path.read_bytes() for path in ws.masks.iterdir()} == {
        "x.jpg.png": b"x", "x.jpg.png.png": b"x.jpg"
    }  # fmt: skip


@pytest.mark.parametrize("moves", range(3))
def test_renaming_that_was_cut_off_goes_on(folders: Folders, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    """The scan is killed after any rename, and while files are hashed after the last."""
    for name in ("x.jpg", "x.jpg.png", "z.png"):
        folders.put(name)
    before, ws = rows(folders.scan()), folders.workspace
    drawn = [
        {"name": name, "id": row["id"], "gan_sr_key": None, "pixels": 1, "regions": 1} for name, row in before.items()
    ]
    for name in before:
        ws.publish(ws.mask(name), name.encode())
        ws.publish(ws.human_mask(name), name.encode())
    ws.publish_table(ws.human_manifest, pa.Table.from_pylist(drawn, HUMAN_MASKS))
    for name in ("x.tif", "x.jpg.tif"):
        folders.put(name)
    left, rename = moves, Workspace.rename

    def cut_off(workspace: Workspace, old: str, new: str) -> None:
        nonlocal left
        rename(workspace, old, new)
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "rename", cut_off)
        patch.setattr("desra_core.workspace.manifest._with_ids", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            folders.scan()
    after = folders.scan()
    assert {name: row["id"] for name, row in rows(after).items()}.items() >= {
        new: before[old]["id"] for old, new in (("x", "x.jpg"), ("x.jpg", "x.jpg.png"), ("z", "z"))
    }.items()
    for place in (ws.mask, ws.human_mask):
        assert [place(name).read_bytes() for name in ("x.jpg", "x.jpg.png", "z")] == [b"x", b"x.jpg", b"z"]
    assert {mask.name for mask in read_human_masks(ws, None).values()} == {"x.jpg", "x.jpg.png", "z"}


def test_a_file_beyond_the_limit_changes_names_too(folders: Folders) -> None:
    folders.put("z.png")
    folders.scan()
    folders.put("z.tif")
    corpus = folders.scan(limit=1)
    assert present(corpus) == ["z.png"]
    assert read_manifest(folders.workspace).equals(corpus.manifest, check_metadata=True)


def test_a_vanished_image_gives_way_to_a_file_that_has_its_name_now(folders: Folders) -> None:
    for name in ("x.jpg", "x.jpg.png"):
        folders.put(name)
    folders.scan()
    for role in BOTH:
        (folders.root / role / "x.jpg.png").unlink()
    assert folders.scan().vanished == 1
    ws = folders.workspace
    ws.publish(ws.mask("x.jpg"), b"vanished")
    folders.put("x.tif")
    after = folders.scan()
    assert present(after) == ["x.jpg", "x.tif"]
    assert after.vanished == 0
    assert not ws.mask("x.jpg").exists()


def test_names_of_the_same_output_fail(folders: Folders) -> None:
    for name in ("x.png", "x.jpg", "x.jpg.png", "y.png"):
        folders.put(name)
    corpus = folders.scan()
    assert present(corpus) == ["x.png", "y"]
    assert {row["name"] for row in corpus.failures.to_pylist()} == {"x.jpg"}


def test_missing_twins_and_labels_fail_and_missing_lr_does_not(folders: Folders) -> None:
    folders.put("whole.png", roles=(*BOTH, "labels", "lr"))
    folders.put("no_lr.png", roles=(*BOTH, "labels"))
    folders.put("no_labels.png", roles=(*BOTH, "lr"))
    folders.put("no_gan.png", roles=("mse_sr", "labels"))
    folders.put("no_mse.png", roles=("gan_sr", "labels"))
    folders.put("only_lr.png", roles=("lr",))
    folders.put("only_labels.png", roles=("labels",))
    corpus = folders.scan()
    assert present(corpus) == ["no_lr", "whole"]
    subjects = {row["name"]: (row["subject"], row["reason"]) for row in corpus.failures.to_pylist()}
    assert set(subjects) == {"no_gan", "no_mse", "no_labels"}
    for name, has, lacks in (("no_gan", "mse_sr", "gan_sr"), ("no_mse", "gan_sr", "mse_sr")):
        assert subjects[name][0] == str(folders.root / has / f"{name}.png")
        assert subjects[name][1].endswith(str(folders.root / lacks))
    assert str(folders.root / "labels") in subjects["no_labels"][1]
    assert pq.read_table(folders.workspace.scan_failures).equals(corpus.failures)
    assert corpus.failures.schema.equals(FAILURES)


def test_equal_content_is_one_image_at_several_names(folders: Folders) -> None:
    for name, content in (("a.png", "1"), ("b.png", "2"), ("c.png", "3"), ("sub/d.png", "1")):
        folders.put(name, content)
    corpus = folders.scan()
    table = rows(corpus)
    assert table["a"]["id"] == table["sub/d"]["id"] != table["b"]["id"]
    assert [table[name]["shard"] for name in ("a", "b", "c", "sub/d")] == [0, 0, 1, 0]
    assert corpus.added == 3
    refs = image_refs(corpus.manifest)
    assert [ref.names for ref in refs] == [("a", "sub/d"), ("b",), ("c",)]
    folders.put("e.png", "2")
    assert rows(folders.scan())["e"]["shard"] == 0


def test_equal_images_with_other_labels_are_other_images(folders: Folders) -> None:
    """They have masks of their own. Names of equal labels still share an image."""
    for name, label in (("a", "1"), ("b", "2"), ("c", "1"), ("d", "2"), ("e", "3")):
        folders.put(f"{name}.png", "same", roles=BOTH)
        folders.put(f"{name}.png", label, roles=("labels",))
    corpus = folders.scan()
    assert [ref.names for ref in image_refs(corpus.manifest)] == [("a", "c"), ("b", "d"), ("e",)]
    assert corpus.failures.num_rows == 0
    again = folders.scan()
    assert again.manifest.equals(corpus.manifest)
    assert again.replaced == 0


def test_a_grown_folder_adds_shards_and_changes_none(folders: Folders) -> None:
    for name in "bcf":
        folders.put(f"{name}.png")
    before = rows(folders.scan())
    assert [row["shard"] for row in before.values()] == [0, 0, 1]
    for name in "adeg":
        folders.put(f"{name}.png")
    corpus = folders.scan(shard_size=3)
    after = rows(corpus)
    assert {name: after[name] for name in before} == before
    assert [after[name]["shard"] for name in "adeg"] == [2, 2, 2, 3]
    assert corpus.added == 4


def test_a_changed_file_is_a_new_image_and_its_mask_goes(folders: Folders) -> None:
    for name in ("a", "b"):
        folders.put(f"{name}.png")
    before = rows(folders.scan())
    for name in ("a", "b"):
        folders.workspace.publish(folders.workspace.mask(name), b"mask")
    folders.put("a.png", "changed", roles=("mse_sr",))
    corpus = folders.scan()
    after = rows(corpus)
    assert after["a"]["id"] != before["a"]["id"]
    assert after["a"]["shard"] not in {row["shard"] for row in before.values()}
    assert after["b"] == before["b"]
    assert corpus.replaced == 1
    assert not folders.workspace.mask("a").exists()
    assert folders.workspace.mask("b").exists()


def test_changed_labels_or_lr_are_the_same_image(folders: Folders) -> None:
    folders.put("a.png", roles=(*BOTH, "lr", "labels"))
    before = rows(folders.scan())["a"]
    folders.put("a.png", "changed", roles=("lr", "labels"))
    after = rows(folders.scan())["a"]
    assert (after["id"], after["shard"]) == (before["id"], before["shard"])
    assert after["labels_hash"] != before["labels_hash"]
    assert after["lr_hash"] != before["lr_hash"]


def test_touched_files_keep_their_id(folders: Folders) -> None:
    folders.put("a.png")
    before = rows(folders.scan())["a"]
    folders.workspace.publish(folders.workspace.mask("a"), b"mask")
    os.utime(folders.root / "gan_sr/a.png", ns=(1, 1))
    corpus = folders.scan()
    after = rows(corpus)["a"]
    assert after["gan_sr_mtime"] == 1
    assert after["id"] == before["id"]
    assert corpus.replaced == 0
    assert folders.workspace.mask("a").exists()


def test_a_vanished_file_keeps_row_and_mask_and_comes_back(folders: Folders) -> None:
    folders.put("a.png")
    folders.put("b.png")
    before = folders.scan()
    folders.workspace.publish(folders.workspace.mask("a"), b"mask")
    (folders.root / "gan_sr/a.png").rename(folders.root / "away")
    gone = folders.scan()
    assert rows(gone)["a"] == rows(before)["a"] | {"present": False}
    assert gone.vanished == 1
    assert folders.workspace.mask("a").exists()
    (folders.root / "away").rename(folders.root / "gan_sr/a.png")
    assert folders.scan().manifest.equals(before.manifest, check_metadata=True)


def test_unchanged_files_are_not_read_again(folders: Folders) -> None:
    folders.put("a.png")
    before = rows(folders.scan())
    path = folders.root / "mse_sr/a.png"
    status, size = path.stat(), len(path.read_bytes())
    path.write_bytes(b"!" * size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert rows(folders.scan()) == before
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert rows(folders.scan())["a"]["id"] != before["a"]["id"]


def test_another_folder_is_hashed_anew(folders: Folders) -> None:
    folders.put("a.png", "1")
    before = rows(folders.scan())["a"]
    (folders.root / "gan_sr").rename(folders.root / "other")
    path = folders.root / "other/a.png"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_text("gan_sr 2")
    os.utime(path, ns=times)
    sources = Sources(folders.root / "mse_sr", folders.root / "other")
    after = rows(scan(sources, folders.workspace, shard_size=2))["a"]
    assert after["id"] != before["id"]


def test_a_workspace_inside_a_source_folder_is_left_out(tmp_path: Path) -> None:
    for name in ("mse/a.png", "gan/a.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    workspace = Workspace(tmp_path / "gan/results/ws")
    workspace.create()
    workspace.publish(workspace.mask("a"), b"mask")
    corpus = scan(Sources(tmp_path / "mse", tmp_path / "gan"), workspace, shard_size=2)
    assert present(corpus) == ["a"]
    assert corpus.failures.num_rows == 0


def test_links_are_followed_but_not_in_circles(folders: Folders) -> None:
    folders.put("sub/a.png")
    for role in BOTH:
        (folders.root / role / "sub/up").symlink_to(folders.root / role)
        (folders.root / role / "twin").symlink_to("sub")
        (folders.root / role / "linked.png").symlink_to("sub/a.png")
    corpus = folders.scan()
    assert present(corpus) == ["linked", "sub/a", "twin/a"]
    assert corpus.failures.num_rows == 0


@pytest.mark.parametrize("target", ["nowhere.png", "broken.png"], ids=["dangling", "to itself"])
def test_a_broken_link_fails_alone(folders: Folders, target: str) -> None:
    folders.put("a.png")
    (folders.root / "gan_sr/broken.png").symlink_to(target)
    corpus = folders.scan()
    assert present(corpus) == ["a"]
    (row,) = corpus.failures.to_pylist()
    assert row["subject"] == str(folders.root / "gan_sr/broken.png")


def test_a_pipe_with_the_name_of_an_image_fails_alone(folders: Folders) -> None:
    folders.put("a.png")
    folders.put("b.png", roles=("mse_sr",))
    pipe = folders.root / "gan_sr/b.png"
    os.mkfifo(pipe)
    # Without a writer, opening the pipe for reading does not return.
    writer = os.fdopen(os.open(pipe, os.O_RDWR), "wb", buffering=0)
    release = threading.Timer(1, writer.close)
    release.start()
    corpus = folders.scan()
    release.cancel()
    writer.close()
    assert present(corpus) == ["a"]
    assert str(pipe) in corpus.failures["subject"].to_pylist()


def test_names_that_are_not_utf8_fail_alone(folders: Folders) -> None:
    folders.put("a.png")
    (folders.root / "gan_sr" / os.fsdecode(b"\xff.png")).write_text("x")
    corpus = folders.scan()
    assert present(corpus) == ["a"]
    (row,) = corpus.failures.to_pylist()
    assert row["reason"] == "has a name that is not UTF-8"
    row["subject"].encode()


def test_awkward_names_are_kept(folders: Folders) -> None:
    names = ["line\nbreak", "quote'", "über/ñandú 日本", "with space", "x" * 200]
    for name in names:
        folders.put(f"{name}.png")
    assert present(folders.scan()) == sorted(names, key=str.encode)


def test_hidden_files_are_left_out(folders: Folders) -> None:
    folders.put("a.png")
    folders.put("._a.png", roles=("gan_sr",))
    folders.put(".png")
    corpus = folders.scan()
    assert present(corpus) == ["a"]
    assert corpus.failures.num_rows == 0


def test_limit_takes_the_first_by_name_and_keeps_the_others_rows(folders: Folders) -> None:
    for name in "cab":
        folders.put(f"{name}.png")
    assert present(folders.scan(limit=2)) == ["a", "b"]
    whole = folders.scan()
    assert present(whole) == ["a", "b", "c"]
    assert folders.scan(limit=1).manifest.equals(whole.manifest)
    assert folders.scan(limit=99).manifest.equals(whole.manifest)


def test_no_images_at_all(folders: Folders) -> None:
    folders.put("notes.txt")
    with pytest.raises(UsageError, match="holds no images") as caught:
        folders.scan()
    assert caught.value.subject == str(folders.root / "mse_sr")
    assert caught.value.reason == "holds no images, but 1 .txt"
    assert not folders.workspace.manifest.exists()


@pytest.mark.parametrize("role", ["mse_sr", "gan_sr", "lr", "labels"])
def test_a_missing_folder(folders: Folders, role: str) -> None:
    folders.put("a.png")
    given = {each: folders.root / each for each in BOTH} | {role: folders.root / "nowhere"}
    with pytest.raises(UsageError, match="nowhere: is no folder"):
        scan(Sources(**given), folders.workspace, shard_size=2)


@pytest.mark.parametrize("role", ["gan_sr", "lr", "labels"])
def test_folders_that_do_not_belong_together_cost_one_line(folders: Folders, role: str) -> None:
    for number in range(20):
        folders.put(f"photo{number}.png", roles=tuple(each for each in BOTH if each != role))
        folders.put(f"other/{number}.png", roles=(role,))
    with pytest.raises(UsageError, match=r"has no file of the same relative path, suffix aside, as any in") as caught:
        folders.scan()
    assert str(folders.root / role) in str(caught.value)
    assert not folders.workspace.manifest.exists()


@pytest.mark.parametrize("role", ["mse_sr", "gan_sr", "lr", "labels"])
def test_an_empty_folder_costs_one_line(folders: Folders, role: str) -> None:
    for number in range(20):
        folders.put(f"photo{number}.png", roles=tuple(each for each in BOTH if each != role))
    (folders.root / role).mkdir(exist_ok=True)
    (folders.root / role / "photo1.exr").touch()
    with pytest.raises(UsageError, match=f"/{role}: holds no images, but 1 .exr;"):
        folders.scan()


def test_files_without_a_twin_are_summed_up_for_people(folders: Folders) -> None:
    for number in range(9):
        folders.put(f"here{number}.png", roles=("mse_sr",))
        folders.put(f"there{number}.png", roles=("gan_sr",))
    folders.put("a.png")
    folders.put("b.png", roles=("mse_sr",))
    failures = folders.scan().failures
    assert failures.num_rows == 19
    reasons = {row["subject"].removeprefix(f"{folders.root}/"): row["reason"] for row in
            with_twins_summed_up(failures).to_pylist()}  # fmt: skip
    assert [subject.partition("/")[0] for subject in reasons] == ["gan_sr", "mse_sr"]
    assert [subject.partition(" and ")[2] for subject in reasons] == ["8 more", "9 more"]
    assert with_twins_summed_up(failures.slice(0, 1)).equals(failures.slice(0, 1))


def test_names_that_a_mac_has_spelled_match(folders: Folders) -> None:
    composed, apart = (unicodedata.normalize(form, "Größe/Köln") for form in ("NFC", "NFD"))
    folders.put(f"{apart}.png", roles=("gan_sr", "lr"))
    folders.put(f"{composed}.png", roles=("mse_sr", "labels"))
    folders.put("b.png", roles=(*BOTH, "labels"))
    (ref,) = [one for one in image_refs(folders.scan().manifest) if one.names != ("b",)]
    assert ref.names == (apart,), "as the GAN results are called"
    assert ref.mse_sr.path == folders.root / "mse_sr" / f"{composed}.png"
    assert ref.labels.path == folders.root / "labels" / f"{composed}.png"
    assert ref.lr.path.exists()


def test_two_photos_whose_names_look_alike_stay_two(folders: Folders) -> None:
    for form in ("NFC", "NFD"):
        folders.put(unicodedata.normalize(form, "ö.png"), form)
    corpus = folders.scan()
    assert corpus.failures.num_rows == 0
    assert [[file.path.stem for file in (ref.mse_sr, ref.gan_sr)] for ref in image_refs(corpus.manifest)] == [
        [unicodedata.normalize(form, "ö")] * 2 for form in ("NFD", "NFC")
    ]


def test_a_name_without_room_for_a_suffix_fails_alone(folders: Folders) -> None:
    long, fits = "x" * 251, "y" * 251
    for name in (f"{long}.jpg", f"{long}.png", f"{fits}.png", "a.png"):
        folders.put(name)
    corpus = folders.scan()
    assert present(corpus) == ["a", fits]
    assert reasons(corpus) == {
        f"{long}{suffix}": "has too long a name for its mask, NAME.png" for suffix in (".jpg", ".png")
    }


def test_some_files_of_a_folder(folders: Folders) -> None:
    """A single file and a glob: the others of both folders are not asked for, and stay part of the workspace."""
    for name in ("a1.png", "a2.png", "b.png", "deep/a3.png"):
        folders.put(name)
    whole = folders.scan()
    mse_sr, gan_sr, ws = folders.root / "mse_sr", folders.root / "gan_sr", folders.workspace
    for given, names in (
        (Sources(mse_sr, gan_sr / "a1.png"), ["a1"]),
        (Sources(mse_sr / "a1.png", gan_sr), ["a1"]),
        (Sources(mse_sr, gan_sr / "a*.png"), ["a1", "a2"]),
        (Sources(mse_sr / "**/a*.png", gan_sr), ["a1", "a2", "deep/a3"]),
        (Sources(mse_sr / "a1.png", gan_sr / "a1.png"), ["a1"]),
        (Sources(mse_sr, gan_sr, exclude=("b.*", "deep")), ["a1", "a2"]),
        (Sources(mse_sr, gan_sr), ["a1", "a2", "b", "deep/a3"]),
    ):
        corpus = scan(given, ws, shard_size=2)
        assert asked_for(corpus.manifest)["name"].to_pylist() == names
        assert corpus.failures.num_rows == corpus.added == corpus.replaced == 0
        there = names if given.exclude else ["a1", "a2", "b", "deep/a3"]
        assert present(corpus) == there
        assert corpus.vanished == 4 - len(there)
    assert corpus.manifest.equals(whole.manifest, check_metadata=True)


def test_a_vanished_image_counts_as_vanished_whatever_is_asked_for(folders: Folders) -> None:
    for name in "abc":
        folders.put(f"{name}.png")
    folders.scan()
    (folders.root / "gan_sr/c.png").unlink()
    corpus = scan(Sources(folders.root / "mse_sr", folders.root / "gan_sr/a.png"), folders.workspace, shard_size=2)
    assert present(corpus) == ["a", "b"]
    assert corpus.vanished == 1


def test_a_manifest_of_an_earlier_version_asks_for_all(folders: Folders) -> None:
    folders.put("a.png")
    manifest = folders.scan().manifest
    pq.write_table(manifest.drop_columns("asked"), folders.workspace.manifest)
    earlier = read_manifest(folders.workspace)
    assert asked_for(earlier)["name"].to_pylist() == ["a"]
    assert folders.scan().manifest.equals(manifest, check_metadata=True)


def test_a_file_that_a_glob_asks_for_may_lack_its_twin(folders: Folders) -> None:
    for name in "ac":
        folders.put(f"{name}.png")
    folders.put("b.png", roles=("gan_sr",))
    mse_sr, gan_sr = folders.root / "mse_sr", folders.root / "gan_sr"
    for given, failures_of_b in (
        (Sources(mse_sr, gan_sr), True),
        (Sources(mse_sr / "*.png", gan_sr / "*.png"), True),
        (Sources(mse_sr, gan_sr / "*.png"), True),
        (Sources(mse_sr / "a.png", gan_sr), False),
        (Sources(mse_sr, gan_sr / "[ac].png"), False),
    ):
        failures = scan(given, folders.workspace, shard_size=2).failures
        assert failures["subject"].to_pylist() == [f"{gan_sr}/b.png"] * failures_of_b


@pytest.mark.parametrize("place", ["{}/gan_sr/b.png", "./gan_sr/b.png", "./mse_sr/b*", "../{}/mse_sr/b.png", "/b.png"])
def test_an_exclude_glob_may_be_relative_to_another_folder(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    for name in ("a.png", "b.png", "deep/b.png"):
        folders.put(name)
    monkeypatch.chdir(folders.root)
    place = place.format(folders.root.name if place.startswith("..") else folders.root)
    corpus = scan(Sources(*(folders.root / role for role in BOTH), exclude=(place,)), folders.workspace, shard_size=2)
    assert present(corpus) == ["a", "deep/b"]
    assert corpus.failures.num_rows == 0
    assert list(corpus.passed_over.values()) == [2]


def test_two_single_files_are_twins_whatever_they_are_called(folders: Folders) -> None:
    folders.put("x_mse.png", roles=("mse_sr",))
    folders.put("x_gan.png", roles=("gan_sr",))
    given = Sources(folders.root / "mse_sr/x_mse.png", folders.root / "gan_sr/x_gan.png")
    corpus = scan(given, folders.workspace, shard_size=2)
    assert present(corpus) == ["x_gan"]
    assert corpus.failures.num_rows == 0


def test_nothing_but_failures(folders: Folders) -> None:
    folders.put("a.png")
    folders.put("a.jpg", roles=("mse_sr",))
    corpus = folders.scan()
    assert corpus.manifest.num_rows == 0
    assert list(reasons(corpus)) == ["a"]


def test_sources_are_never_written(folders: Folders) -> None:
    folders.put("a.png", roles=(*BOTH, "lr", "labels"))
    folders.put("sub/b.png")
    before = folders.tree()
    folders.scan()
    folders.scan(limit=1)
    assert folders.tree() == before


def test_the_manifest_is_sorted_and_a_second_scan_leaves_it_alone(folders: Folders) -> None:
    for name in ("z", "a/b", "a", "é", "B"):
        folders.put(f"{name}.png")
    corpus = folders.scan()
    stored = pq.read_table(folders.workspace.manifest)
    assert stored.schema.remove_metadata().equals(MANIFEST)
    names = stored["name"].to_pylist()
    assert names == sorted(names, key=str.encode)
    assert stored.equals(corpus.manifest, check_metadata=True)
    assert stored.equals(read_manifest(folders.workspace))
    before = folders.workspace.manifest.stat()
    again = folders.scan()
    assert (again.added, again.replaced, again.vanished) == (0, 0, 0)
    after = folders.workspace.manifest.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_scanning_does_not_depend_on_the_order_of_the_directory(tmp_path: Path) -> None:
    manifests = []
    for number, order in enumerate((1, -1)):
        folders = Folders(tmp_path / str(number) if (tmp_path / str(number)).mkdir() is None else tmp_path)
        for index in list(range(40))[::order]:
            folders.put(f"{index % 7}/{index}.png", str(index % 30))
        manifests.append(folders.scan(shard_size=4).manifest.select(["name", "id", "shard", "present"]))
    assert manifests[0].equals(manifests[1])


def test_progress_of_hashing(folders: Folders) -> None:
    for name in "abc":
        folders.put(f"{name}.png")
    seen: list[tuple[int, int]] = []
    scan(folders.sources(), folders.workspace, shard_size=2, on_hashed=lambda *counts: seen.append(counts))
    assert seen[-1] == (6, 6)
    seen.clear()
    scan(folders.sources(), folders.workspace, shard_size=2, on_hashed=lambda *counts: seen.append(counts))
    assert seen == []


def test_memory_of_a_large_corpus(folders: Folders) -> None:
    """5,000 files; a second scan keeps no Python objects per image beyond its batches and columns."""
    for index in range(2_500):
        folders.put(f"{index % 10}/{index}.png", str(index))
    assert folders.scan(shard_size=250).added == 2_500
    tracemalloc.start()
    corpus = folders.scan(shard_size=250)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.manifest.num_rows == 2_500
    assert peak < 5e6


@pytest.fixture
def plain_user() -> Iterator[Path]:
    """A folder of a user without root's right to read everything, and for as long that user."""
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    if root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


def test_unreadable_files_are_named_and_the_others_are_scanned(plain_user: Path) -> None:
    for role in ("mse", "gan"):
        for name in ("a", "secret/b", "c"):
            path = plain_user / role / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        (plain_user / role / "secret").chmod(0)
    (plain_user / "gan" / "c.png").chmod(0)
    workspace = Workspace(plain_user / "ws")
    workspace.create()
    corpus = scan(Sources(plain_user / "mse", plain_user / "gan"), workspace, shard_size=10)
    for role in ("mse", "gan"):
        (plain_user / role / "secret").chmod(0o700)
    assert corpus.manifest["name"].to_pylist() == ["a"]
    reasons = {Path(row["subject"]).name: row["reason"] for row in corpus.failures.to_pylist()}
    assert reasons == {
        "secret": "cannot be opened (Permission denied)",
        "c.png": "may not be read (permission denied)",
    }


# --- a manifest that is damaged ---


def flipped(text: str) -> str:
    return f"{'0' if text[0] != '0' else '1'}{text[1:]}"


def damage(folders: Folders, name: str, column: str) -> dict[str, str]:
    """Flip a bit of a column of the manifest; returns the row as it was."""
    manifest = read_manifest(folders.workspace)
    changed = manifest.to_pylist()
    (row,) = (row for row in changed if row["name"] == name)
    before = dict(row)
    row[column] = flipped(row[column])
    table = pa.Table.from_pylist(changed, MANIFEST).replace_schema_metadata(manifest.schema.metadata)
    pq.write_table(table, folders.workspace.manifest)
    return before


@pytest.mark.parametrize("column", ["id", "mse_sr_hash", "gan_sr_hash", "labels_hash"])
@pytest.mark.parametrize("name", ["a", "twin", "z"])
def test_a_flipped_bit_of_a_hash_takes_nothing_away(folders: Folders, name: str, column: str) -> None:
    for image in "amz":
        folders.put(f"{image}.png")
    folders.put("twin.png", content="a.png")
    (folders.root / "labels").mkdir()
    for image in ("a", "m", "twin", "z"):
        folders.put(f"{image}.png", "the same", roles=("labels",))
    good = rows(folders.scan())
    for image, row in good.items():
        folders.workspace.publish(folders.workspace.mask(image), b"mask")
        folders.workspace.publish(folders.workspace.group(row["id"]) / "similarity", b"array")
    damage(folders, name, column)
    corpus = folders.scan()
    assert corpus.replaced == corpus.added == 0
    assert all(folders.workspace.mask(image).exists() for image in good)
    assert all(folders.workspace.group(row["id"]).exists() for row in good.values())
    if column == "labels_hash" and name == "z":
        # Nothing in the manifest contradicts it: a run finds out, and says so in the record.
        record = Record(good["z"]["id"], failed_stage="mask", transient=True, reason=CHANGED)
        gather_shard(folders.workspace, 0, [record])
        corpus = folders.scan()
    assert rows(corpus) == good
    assert read_manifest(folders.workspace).equals(corpus.manifest, check_metadata=True)
    assert folders.scan().manifest.equals(corpus.manifest, check_metadata=True)


def test_files_that_have_changed_are_replaced_whatever_the_manifest_says(folders: Folders) -> None:
    folders.put("a.png", "one")
    folders.put("b.png", "two")
    good = rows(folders.scan())
    damage(folders, "a", "gan_sr_hash")
    for name in "ab":
        folders.workspace.publish(folders.workspace.mask(name), b"mask")
        folders.put(f"{name}.png", "other")
    corpus = folders.scan()
    assert corpus.replaced == 2
    assert not list(folders.workspace.masks.iterdir())
    assert {row["id"] for row in good.values()}.isdisjoint(row["id"] for row in rows(corpus).values())


def test_a_broken_string_of_the_manifest_is_one_line(folders: Folders) -> None:
    folders.put("straße.png")
    folders.scan()
    data = folders.workspace.manifest.read_bytes()
    pq.write_table(pq.read_table(folders.workspace.manifest), folders.workspace.manifest)  # as an older desra did
    for written, reason in ((data, "checksum does not fit"), (folders.workspace.manifest.read_bytes(), "UTF8")):
        assert "straße".encode() in written
        folders.workspace.manifest.write_bytes(written.replace("straße".encode(), "straß".encode() + b"\xff"))
        with pytest.raises(UsageError, match=rf"manifest\.parquet: cannot be read \(.*{reason}.*; delete it: the next"):
            folders.scan()
    folders.workspace.manifest.unlink()
    assert present(folders.scan()) == ["straße"]


def test_broken_folders_of_the_manifest_are_one_line(folders: Folders) -> None:
    folders.put("a.png")
    manifest = folders.scan().manifest
    metadata = manifest.schema.metadata | {b"gan_sr": b"/photos/\xff"}
    pq.write_table(manifest.replace_schema_metadata(metadata), folders.workspace.manifest)
    with pytest.raises(UsageError, match=r"manifest\.parquet: cannot be read"):
        folders.scan()
