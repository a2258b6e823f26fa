"""Pools of images: an assignment never changes, whatever images come, go or are asked for later."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core.errors import UsageError
from desra_core.images.codec import encode_png
from desra_core.training.pools import TRAINING_SHARE, assign_pools, pool_of
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File, ImageRef


def photo(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (60, 80, 3)).astype(np.float32)
    return np.clip(128 + 5 * (cv2.GaussianBlur(noise, (0, 0), 3) - 128), 0, 255).astype(np.uint8)


def copy(pixels: np.ndarray, number: int) -> np.ndarray:
    """Copy a photo, darker by a few levels."""
    return pixels - np.minimum(pixels, 3 * number).astype(np.uint8)


def image(image_id: str, name: str, lr: Path) -> ImageRef:
    return ImageRef(image_id, 0, (name,), None, None, File(lr, ""), None)


class Photos:
    """Photos in a folder; `ids` are not in the order of names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def put(self, name: str, pixels: np.ndarray) -> ImageRef:
        path = self.folder / f"{name.replace('/', '-')}.png"
        path.write_bytes(encode_png(pixels))
        number = random.Random(name).getrandbits(128)
        return image(f"{number:032x}", name, path)


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    return Photos(tmp_path / "photos")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return made(tmp_path / "ws")


def made(root: Path) -> Workspace:
    workspace = Workspace(root)
    workspace.create()
    return workspace


def groups(workspace: Workspace) -> dict[str, str]:
    return {row["id"]: row["group"] for row in pq.read_table(workspace.split).to_pylist()}


def test_seven_of_ten_groups_are_for_training() -> None:
    share = np.mean([pool_of(f"{index:032x}") == "training" for index in range(10_000)])
    assert abs(share - TRAINING_SHARE) < 0.015


def test_the_pool_of_a_group_is_that_of_its_name() -> None:
    names = ["", "a", "set/photo", "über"]
    assert [pool_of(name) for name in names] == [pool_of(name) for name in names]
    assert {pool_of(name) for name in map(str, range(50))} == {"training", "held_out"}


def test_copies_stay_together_and_other_photos_do_not(photos: Photos, workspace: Workspace) -> None:
    members = [photos.put(f"{number}/{scene}", copy(photo(scene), number)) for scene in range(8) for number in range(3)]
    pools = assign_pools(workspace, members, "duplicates")
    assert set(pools) == {member.id for member in members}
    found = groups(workspace)
    by_scene = [{found[member.id] for member in members if member.names[0].endswith(f"/{scene}")} for scene in range(8)]
    assert all(len(names) == 1 for names in by_scene)
    assert len(set.union(*by_scene)) == 8
    assert pools == {key: pool_of(group) for key, group in found.items()}


@pytest.mark.parametrize("group_by", ["duplicates", "folder", r"\d+$"])
def test_the_order_in_a_call_does_not_matter(photos: Photos, tmp_path: Path, group_by: str) -> None:
    members = [photos.put(f"{number}/{scene}", copy(photo(scene), number)) for scene in range(6) for number in range(2)]
    found = []
    for index, order in enumerate((members, members[::-1], members[3:] + members[:3] + members[:2])):
        workspace = made(tmp_path / f"ws{index}")
        pools = assign_pools(workspace, order, group_by)
        assert list(pools) == list(dict.fromkeys(member.id for member in order))
        found.append((pools, workspace.split.read_bytes()))
    assert found[0] == found[1] == found[2]


def test_the_order_of_calls_does_not_matter_where_nothing_is_alike(photos: Photos, tmp_path: Path) -> None:
    members = [photos.put(str(scene), photo(scene)) for scene in range(9)]
    found = []
    for index, parts in enumerate(((members,), (members[5:], members), (members[:2], members[4:7], members[::-1]))):
        workspace = made(tmp_path / f"ws{index}")
        for part in parts:
            pools = assign_pools(workspace, part, "duplicates")
        found.append(pools)
    assert found[0] == found[1] == found[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRef]:
    """Make six scenes with three copies each."""
    photos = Photos(tmp_path_factory.mktemp("corpus") / "photos")
    return [photos.put(f"{number}/{scene}", copy(photo(scene), number)) for scene in range(6) for number in range(3)]


# What copies of a photo, or photos of a folder, have in common in their names.
ALIKE: dict[str, Callable[[str], str]] = {
    "duplicates": lambda name: name[2],
    r"/(\d)": lambda name: name[2],
    "folder": lambda name: name[0],
}


@given(st.lists(st.lists(st.integers(0, 17), max_size=8), min_size=1, max_size=6), st.sampled_from(list(ALIKE)))
@settings(deadline=None, max_examples=25)
def test_pools_never_change(
    corpus: list[ImageRef], tmp_path_factory: pytest.TempPathFactory, calls: list[list[int]], group_by: str
) -> None:
    """An assignment never changes, and near-duplicates share a pool, in any order of images."""
    workspace = made(tmp_path_factory.mktemp("ws") / "ws")
    settled: dict[str, str] = {}
    for call in calls:
        pools = assign_pools(workspace, [corpus[index] for index in call], group_by)
        assert set(pools) == {corpus[index].id for index in call}
        assert all(settled.get(key, pool) == pool for key, pool in pools.items())
        settled |= pools
    assert assign_pools(workspace, [member for member in corpus if member.id in settled], group_by) == settled
    together: dict[str, set[str]] = {}
    for member in corpus:
        if member.id in settled:
            together.setdefault(ALIKE[group_by](member.names[0]), set()).add(settled[member.id])
    assert all(len(pools) == 1 for pools in together.values())


def test_photos_that_have_vanished_keep_their_pools(photos: Photos, workspace: Workspace) -> None:
    members = [photos.put(str(scene), photo(scene)) for scene in range(4)]
    pools = assign_pools(workspace, members, "duplicates")
    for member in members:
        member.lr.path.unlink()
    table = workspace.split.read_bytes()
    assert assign_pools(workspace, members, "duplicates") == pools
    assert assign_pools(workspace, [], "duplicates") == {}
    assert workspace.split.read_bytes() == table
    late = photos.put("late", copy(photo(2), 1))
    assert assign_pools(workspace, [late], "duplicates") == {late.id: pools[members[2].id]}


def test_photos_that_cannot_be_decoded_have_no_pool_yet(photos: Photos, workspace: Workspace) -> None:
    whole, broken, gone = (photos.put(str(scene), photo(scene)) for scene in range(3))
    content = broken.lr.path.read_bytes()
    broken.lr.path.write_bytes(content[:100])
    gone.lr.path.unlink()
    pools = assign_pools(workspace, [whole, broken, gone], "duplicates")
    assert list(pools) == [whole.id]
    broken.lr.path.write_bytes(content)
    assert set(assign_pools(workspace, [whole, broken, gone], "duplicates")) == {whole.id, broken.id}
    # Names need no decoding.
    assert set(assign_pools(made(workspace.root.with_name("other")), [whole, gone], "folder")) == {whole.id, gone.id}


def test_copies_find_each_other_in_any_order(photos: Photos, workspace: Workspace) -> None:
    members = [photos.put(f"{number}/{scene}", copy(photo(scene), number)) for scene in range(3) for number in range(3)]
    assign_pools(workspace, members, "duplicates")
    assert len(set(groups(workspace).values())) == 3


NAMES = ["burst/a_1", "burst/a_2", "burst/b_1", "single", "other/c", "other/"]


@pytest.mark.parametrize(("group_by", "expected"), [
    ("folder", ["burst", "burst", "burst", ".", "other", "."]),
    (r"^[^/]+/._", ["burst/a_", "burst/a_", "burst/b_", "single", "other/c", "other/"]),
    (r"/(.)_", ["a", "a", "b", "single", "other/c", "other/"]),
    (r"(\d)?$", ["1", "2", "1", "single", "other/c", "other/"]),
    (r"(burst)/(.)", ["burst", "burst", "burst", "single", "other/c", "other/"]),
    (r"x*", NAMES),
])  # fmt: skip
def test_groups_by_name(photos: Photos, workspace: Workspace, group_by: str, expected: list[str]) -> None:
    members = [image(f"{index}", name, photos.folder / "nowhere") for index, name in enumerate(NAMES)]
    pools = assign_pools(workspace, members, group_by)
    assert groups(workspace) == {str(index): group for index, group in enumerate(expected)}
    assert pools == {str(index): pool_of(group) for index, group in enumerate(expected)}


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "a{9999999999999999}", "(?P<1>a)"])
def test_an_invalid_pattern(photos: Photos, workspace: Workspace, pattern: str) -> None:
    with pytest.raises(UsageError, match="is no regular expression") as caught:
        assign_pools(workspace, [photos.put("a", photo(0))], pattern)
    assert str(caught.value).startswith(f"--group-by: {pattern} is no")
    assert "\n" not in str(caught.value)
    assert not workspace.split.exists()


@pytest.mark.parametrize(
    ("before", "now"), [("duplicates", "folder"), ("folder", "duplicates"), ("a", "b"), ("a", "(")]
)
@pytest.mark.parametrize("again", [True, False])
def test_a_workspace_keeps_its_grouping(
    photos: Photos, workspace: Workspace, before: str, now: str, again: bool
) -> None:
    first, second = photos.put("a/1", photo(0)), photos.put("b/1", photo(1))
    pools = assign_pools(workspace, [first], before)
    table = workspace.split.read_bytes()
    with pytest.raises(UsageError) as caught:
        assign_pools(workspace, [first] if again else [second], now)
    assert str(caught.value).startswith(f"--group-by: {now}, but this workspace was split by {before}; keep to it")
    assert workspace.split.read_bytes() == table
    assert assign_pools(workspace, [first, second], before).items() >= pools.items()


def test_no_images_assign_nothing(photos: Photos, workspace: Workspace) -> None:
    assert assign_pools(workspace, [], "duplicates") == {}
    assert not workspace.split.exists()
    assert len(assign_pools(workspace, [photos.put("a", photo(0))], "folder")) == 1


def test_a_damaged_table(photos: Photos, workspace: Workspace) -> None:
    member = photos.put("a", photo(0))
    assign_pools(workspace, [member], "duplicates")
    workspace.split.write_bytes(workspace.split.read_bytes()[:-20])
    with pytest.raises(UsageError, match=r"split\.parquet: cannot be read"):
        assign_pools(workspace, [member], "duplicates")
