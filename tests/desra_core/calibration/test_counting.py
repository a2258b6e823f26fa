"""A count of similarity by class over a workspace: its pixels, the images left to do, and changes that void a count."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from desra_core import variance_similarity
from desra_core.calibration.counting import Counting, plan_counting, read_exclusion, unused_masks
from desra_core.calibration.weights import BINS, ClassHistogram
from desra_core.errors import UsageError
from desra_core.settings import Detection, Mining
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.human_masks import HUMAN_MASKS
from desra_core.workspace.manifest import ImageRef
from tests.in_process import count_all, count_shard, process

HEIGHT, WIDTH = 200, 240


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def labels(seed: int) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 3, (10, 12)).astype(np.uint8)
    return np.kron(blocks, np.ones((20, 20), np.uint8)) * np.uint8(60)


def square(y: int, x: int, *, frame: int = 0) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y : y + 50, x : x + 70] = 255
    return mask[frame : HEIGHT - frame, frame : WIDTH - frame]


def look_at(workspace: Workspace, name: str, mask: np.ndarray, gan_sr_key: str | None = None) -> Path:
    """Give an image a human mask, drawn on files or on the results of a model."""
    write(workspace.human_mask(name), mask)
    ids = {row["name"]: row["id"] for row in pq.read_table(workspace.manifest).to_pylist()}
    rows = read_table(workspace.human_manifest, HUMAN_MASKS).to_pylist()
    rows.append({"name": name, "id": ids[name], "gan_sr_key": gan_sr_key, "pixels": 1, "regions": 1})
    workspace.publish_table(workspace.human_manifest, pa.Table.from_pylist(rows, HUMAN_MASKS))
    return workspace.human_mask(name)


@pytest.fixture(scope="module")
def corpus(make_pairs, tmp_path_factory) -> SimpleNamespace:
    """Seven pairs in three shards; the last is that of another name again."""
    root = tmp_path_factory.mktemp("counting")
    names = make_pairs(root / "pairs", 7)
    for seed, name in enumerate(names[:-1]):
        write(root / f"labels/{name}.png", labels(seed))
    for role in ("pairs/mse_sr", "pairs/gan_sr", "labels"):
        shutil.copy(root / role / f"{names[0]}.png", root / role / f"{names[-1]}.png")
    settings = Detection(mse_sr=root / "pairs/mse_sr", gan_sr=root / "pairs/gan_sr", workspace=root / "ws", keep="maps",
                         segmenter=f"labels:{root / 'labels'}", shard_size=2)  # fmt: skip
    process(settings)
    return SimpleNamespace(root=root, names=names, settings=settings)


@pytest.fixture
def place(corpus, tmp_path) -> SimpleNamespace:
    """The same images, and a copy of the workspace, to be changed."""
    shutil.copytree(corpus.root / "ws", tmp_path / "ws")
    for folder in ("pairs", "labels"):
        (tmp_path / folder).symlink_to(corpus.root / folder)
    settings = corpus.settings.model_copy(update={"workspace": tmp_path / "ws"})
    return SimpleNamespace(root=tmp_path, names=corpus.names, settings=settings, workspace=Workspace(tmp_path / "ws"))


def change_labels(place: SimpleNamespace, name: str, changed: np.ndarray) -> None:
    """Run again with other labels of an image."""
    folder = place.root / "labels"
    original = folder.resolve()
    folder.unlink()
    shutil.copytree(original, folder)
    write(folder / f"{name}.png", changed)
    place.settings = place.settings.model_copy(update={"segmenter": f"labels:{folder}"})
    process(place.settings)


def plan(place: SimpleNamespace, exclude: Path | None = None) -> Counting:
    return plan_counting(place.settings, read_exclusion(exclude))


def slow(place: SimpleNamespace, excluded: dict[str, list[np.ndarray]]) -> np.ndarray:
    """Counts by class and bin, from the files alone; masks are of the image's size."""
    counts = np.zeros((150, BINS), np.int64)
    for name in place.names[:-1]:
        pair = [cv2.imread(str(place.root / f"pairs/{role}/{name}.png")) for role in ("mse_sr", "gan_sr")]
        similarity = variance_similarity(*pair)
        classes = cv2.imread(str(place.root / f"labels/{name}.png"), cv2.IMREAD_GRAYSCALE)
        counted = np.ones((HEIGHT, WIDTH), bool)
        for mask in excluded.get(name, []):
            counted &= mask == 0
        for y in range(5, HEIGHT - 5):
            for x in np.flatnonzero(counted[y, 5:-5]):
                index = min(int(np.floor(BINS * np.float64(similarity[y - 5, x]))), BINS - 1)
                counts[classes[y, x + 5], index] += 1
    return counts


def total(histogram: ClassHistogram) -> tuple[int, int, int]:
    return int(histogram.pixels.sum()), histogram.seen, histogram.excluded


def test_all_pixels_that_no_mask_excludes_are_counted_once(place, tmp_path) -> None:
    first, second, third, fourth, *_, twin = place.names
    workspace = place.workspace
    look_at(workspace, twin, square(30, 20))
    look_at(workspace, second, np.zeros((HEIGHT, WIDTH), np.uint8))
    look_at(workspace, fourth, square(0, 0), "a model's")
    write(tmp_path / f"exclude/{twin}.png", square(60, 50))
    write(tmp_path / f"exclude/{first}.png", square(100, 100, frame=5))
    write(tmp_path / f"exclude/{third}.png", np.dstack([square(0, 0)] * 3))
    counting = plan(place, tmp_path / "exclude")
    assert (counting.images, counting.shards, counting.missing()) == (6, [0, 1, 2], {0: 2, 1: 2, 2: 2})
    assert set(count_all(counting)) == set(place.names[:-1])
    histogram = counting.histogram()
    masks = {first: [square(30, 20), square(60, 50), square(100, 100)], third: [square(0, 0)]}
    assert np.array_equal(histogram.counts, slow(place, masks))
    assert histogram.images[[0, 60, 120]].tolist() == [6, 6, 6]
    union = [np.max([mask[5:-5, 5:-5] for mask in found], axis=0) for found in masks.values()]
    excluded = sum(np.count_nonzero(mask) for mask in union)
    assert excluded > 3 * 3000
    assert total(histogram) == (6 * 190 * 230 - excluded, 6, excluded)
    assert count_all(plan(place, tmp_path / "exclude")) == []
    assert not list(counting.workspace.root.glob("calibration/*/*/*"))


def test_a_killed_run_loses_only_what_was_not_added(place) -> None:
    counting = plan(place)
    assert len(count_shard(counting, 0)) == 2
    (first,) = count_shard(counting, 1, limit=1)
    assert plan(place).missing() == {1: 1, 2: 2}
    assert [shard.number for shard in counting.counted()] == [0, 1]
    assert counting.histogram().seen == 3
    leftover = counting.shard(1).file.with_suffix("") / "0123.parquet"
    leftover.parent.mkdir()  # an older desra kept a file per image there
    leftover.touch()
    assert len(set(count_all(plan(place))) - {first}) == 3
    again = plan(place)
    assert again.missing() == {}
    assert total(again.histogram()) == (6 * 190 * 230, 6, 0)
    assert np.array_equal(again.histogram().counts, slow(place, {}))
    assert not leftover.parent.exists()


def test_a_file_that_a_power_cut_has_emptied_is_counted_again(place) -> None:
    counting = plan(place)
    count_all(counting)
    counting.shard(0).file.write_bytes(b"")
    counting.shard(1).file.write_bytes(b"PAR1 and no more")
    assert counting.missing() == {0: 2, 1: 2}
    count_all(counting)
    assert total(counting.histogram()) == (6 * 190 * 230, 6, 0)


def test_new_images_are_added_to_the_count(place, make_pairs) -> None:
    limited = SimpleNamespace(**vars(place))
    limited.settings = place.settings.model_copy(update={"limit": 3})
    assert len(count_all(plan(limited))) == 3
    assert sum(len(shard.tokens) for shard in plan(limited).counted()) == 3
    assert len(count_all(plan(place))) == 3
    assert np.array_equal(plan(place).histogram().counts, slow(place, {}))
    # Fewer again: a shard that has too many is counted anew, and nothing is counted twice.
    again = count_all(plan(limited))
    assert plan(limited).histogram().seen == 3
    assert len(again) < 3


def test_a_mask_that_comes_changes_or_goes_voids_its_shard_only(place) -> None:
    count_all(plan(place))
    before = plan(place).histogram()
    third = place.names[2]
    path = place.root / f"exclude/{third}.png"

    def looked_at() -> tuple[int, int]:
        counting = plan(place, place.root / "exclude")
        shards = set(counting.missing())
        return len(count_all(counting)), len(shards)

    write(path, square(50, 50))
    assert looked_at() == (2, 1)
    one = plan(place, place.root / "exclude").histogram()
    assert np.array_equal(one.counts, slow(place, {third: [square(50, 50)]}))
    write(path, square(50, 50, frame=5))
    assert looked_at() == (2, 1)
    assert np.array_equal(plan(place, place.root / "exclude").histogram().counts, one.counts)
    assert looked_at() == (0, 0)
    assert len(count_all(plan(place))) == 2
    assert np.array_equal(plan(place).histogram().counts, before.counts)


def test_other_labels_are_counted_anew(place) -> None:
    count_all(plan(place))
    change_labels(place, place.names[1], np.full((HEIGHT, WIDTH), 7, np.uint8))
    assert len(count_all(plan(place))) == 2
    histogram = plan(place).histogram()
    assert np.array_equal(histogram.counts, slow(place, {}))
    assert histogram.images[7] == 1


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.zeros((HEIGHT, WIDTH - 1), np.uint8), "is 239x200 but its image is 240x200; masks have the size"),
        (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8), "is not binary"),
    ],
)
def test_an_image_whose_mask_is_unusable_is_left_out(place, mask: np.ndarray, reason: str) -> None:
    path = look_at(place.workspace, place.names[3], mask)
    counting = plan(place)
    assert len(count_all(counting)) == 6
    failures = [str(error) for shard in counting.counted() for error in shard.failures]
    assert len(failures) == 1
    assert failures[0].startswith(f"{path}: {reason}")
    assert counting.missing() == {}
    assert counting.histogram().seen == 5
    write(path, square(0, 0))
    assert count_all(plan(place)) == [place.names[3]]
    assert plan(place).histogram().seen == 6
    assert not [error for shard in plan(place).counted() for error in shard.failures]


def test_a_mask_that_changes_meanwhile_is_tried_again(place) -> None:
    path = look_at(place.workspace, place.names[3], square(0, 0))
    counting = plan(place)
    write(path, square(1, 0))
    assert len(count_all(counting)) == 6
    assert sum(counting.missing().values()) == 1
    assert count_all(plan(place)) == [place.names[3]]


def test_images_without_map_or_labels_are_not_counted(place) -> None:
    change_labels(place, place.names[2], np.zeros((HEIGHT, WIDTH + 1), np.uint8))
    counting = plan(place)
    assert counting.images == 5
    assert place.names[2] not in count_all(counting)
    assert counting.histogram().seen == 5
    without = plan_counting(place.settings.model_copy(update={"window": 13}), read_exclusion(None))
    assert (without.images, without.missing()) == (0, {})


def test_a_lost_map_is_a_failure_that_is_tried_again(place) -> None:
    counting = plan(place)
    image = next(iter(counting.shard(0).wanted.values()))[0]
    assert isinstance(image, ImageRef)
    shutil.rmtree(place.workspace.group(image.id) / "similarity")
    assert len(count_all(counting)) == 6
    assert counting.missing() == {0: 1}
    assert counting.histogram().seen == 5


def test_a_damaged_file_of_a_shard(place) -> None:
    count_all(plan(place))
    counting = plan(place)
    file = counting.shard(0).file
    metadata = pq.read_schema(file).metadata
    file.write_bytes(b"PAR1")
    assert plan(place).missing() == {0: 2}
    count_all(plan(place))
    table = pq.read_table(file).rename_columns(["class", "bin", "number"])
    pq.write_table(table.replace_schema_metadata(metadata), file)
    with pytest.raises(UsageError, match="delete it"):
        plan(place).histogram()


def test_mined_photos_are_counted(make_models, make_photos, tmp_path) -> None:
    mse, gan = make_models(tmp_path / "models")
    names = make_photos(tmp_path / "photos", 3)
    for name in names:
        write(tmp_path / f"labels/{name}.png", labels(0))
    settings = Mining(photos=tmp_path / "photos", mse_model=mse, gan_model=gan, workspace=tmp_path / "ws", keep="maps",
                      segmenter=f"labels:{tmp_path / 'labels'}")  # fmt: skip
    process(settings)
    counting = plan(SimpleNamespace(settings=settings))
    count_all(counting)
    assert total(counting.histogram()) == (3 * 190 * 230, 3, 0)
    models = settings.model_copy(update={"gan_model": make_models(tmp_path / "other", strength=0.7)[1]})
    assert plan(SimpleNamespace(settings=models)).images == 0


def unused(folder: Path, names: list[str]) -> list[Path]:
    return unused_masks(folder, read_exclusion(folder), names)


def test_folders_of_masks(place) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        read_exclusion(place.root / "nowhere")
    write(place.root / "two/a.png", square(0, 0))
    assert unused(place.root / "two", ["a", "b"]) == []
    write(place.root / "two/c.png", square(0, 0))
    assert unused(place.root / "two", ["a", "b"]) == [place.root / "two/c.png"]
    with pytest.raises(UsageError, match="holds no mask of any image"):
        unused(place.root / "two", ["set/a"])
    write(place.root / "two/a.jpg", square(0, 0))
    with pytest.raises(UsageError, match="is a mask of the same image as"):
        read_exclusion(place.root / "two")
    # The masks of a workspace can be excluded too.
    assert unused(place.workspace.masks, place.names) == []


def test_a_map_that_is_lost_is_made_anew_by_the_next_run(place) -> None:
    expected = counted(place)
    shutil.rmtree(place.workspace.root / "calibration")
    arrays = sorted(place.workspace.maps.glob("*/*/similarity"))
    for chunk in (path for path in arrays[0].rglob("*") if path.is_file() and path.name != "zarr.json"):
        chunk.write_bytes(chunk.read_bytes()[:-100])
    assert counted(place) != expected
    assert arrays[0].exists()
    process(place.settings)
    assert counted(place) == expected


def counted(place: SimpleNamespace) -> tuple[int, int, int]:
    count_all(plan(place))
    return total(plan(place).histogram())
