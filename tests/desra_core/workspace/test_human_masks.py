"""Human masks are preferred where they count: on mined and on detected workspaces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from desra_core.annotations.corrections import ImportSummary, publish_corrections, read_corrections
from desra_core.annotations.export import export_workspace
from desra_core.errors import UsageError
from desra_core.gate.comparison import plan_comparison
from desra_core.planning.plan import load_settings, make_plan
from desra_core.settings import Detection, Mining
from desra_core.settings.models import Comparing, Finetuning
from desra_core.training.plan import begin, plan_finetune
from desra_core.training.pools import Pools
from desra_core.workspace import DATASET, Workspace, human_masks
from desra_core.workspace.human_masks import read_human_masks
from tests.in_process import process

PHOTOS = 6


@pytest.fixture(scope="module")
def mined(make_models, make_photos, tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("human")
    mse, gan = make_models(root / "models")
    names = make_photos(root / "photos", PHOTOS)
    shutil.copy(root / f"photos/{names[1]}.png", root / "photos/twin.png")
    workspace = process(Mining(photos=root / "photos", mse_model=mse, gan_model=gan, workspace=root / "ws"))
    process(Mining(photos=root / "photos", mse_model=mse, gan_model=gan, workspace=root / "all", keep="all"))
    process(Detection(mse_sr=root / "all/dataset/mse_sr", gan_sr=root / "all/dataset/gan_sr", lr=root / "photos",
                      workspace=root / "detected"))  # fmt: skip
    marked = sorted({name for index, name in enumerate(names) if index % 3})
    clean = sorted(set(names) - set(marked))
    assert {row["image"] for row in pq.read_table(workspace.regions).to_pylist()} == {*marked, "twin"}
    return SimpleNamespace(root=root, photos=root / "photos", mse=mse, gan=gan, names=names, marked=marked, clean=clean)


@pytest.fixture
def copy(mined, tmp_path) -> Callable[[str], Workspace]:
    """A workspace of the module at a place of its own."""

    def make(kind: str = "ws", name: str = "ws") -> Workspace:
        workspace = Workspace(Path(shutil.copytree(mined.root / kind, tmp_path / name)))
        document = json.loads(workspace.settings.read_bytes())
        document["settings"]["workspace"] = str(workspace.root)
        workspace.settings.write_text(json.dumps(document))
        return workspace

    return make


def mask_with(*box: int, shape: tuple[int, int] = (200, 240)) -> np.ndarray:
    """A mask of one rectangle: left, top, right, bottom; or none."""
    mask = np.zeros(shape, bool)
    if box:
        mask[box[1] : box[3] + 1, box[0] : box[2] + 1] = True
    return mask


def draw(workspace: Workspace, boxes: dict[str, tuple[int, ...]]) -> ImportSummary:
    """Import rectangles, or empty masks, as a person has drawn them."""
    folder = workspace.root.with_name("drawn")
    shutil.rmtree(folder, ignore_errors=True)
    for name, box in boxes.items():
        points = [list(box[:2]), list(box[2:])]
        shapes = [{"label": "artifact", "shape_type": "rectangle", "points": points}] if box else []
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"shapes": shapes, "imageWidth": 240, "imageHeight": 200}))
    with workspace.locked():
        corrections, errors = read_corrections(workspace, "labelme", folder)
        assert not errors, errors
        return publish_corrections(workspace, corrections)


def again(workspace: Workspace, **changes: Any) -> None:
    """Mine with other settings; it ends with nothing left to do."""
    settings, _ = load_settings(workspace)
    process(settings.model_copy(update=changes))
    assert pending(workspace) == 0


def pending(workspace: Workspace) -> int:
    settings, target = load_settings(workspace)
    return make_plan(workspace, pq.read_table(workspace.manifest), target, limit=settings.limit).pending


def picture(workspace: Workspace, kind: str, name: str) -> np.ndarray:
    return cv2.imread(str(workspace.dataset(kind, name)), cv2.IMREAD_UNCHANGED)


def check_dataset(workspace: Workspace, human: dict[str, np.ndarray]) -> None:
    """Tables, files and masks agree; masks of the dataset are human masks where there are any."""
    rows = {row["image"]: row for row in pq.read_table(workspace.dataset_manifest).to_pylist()}
    on_disk = {path.relative_to(workspace.root / "dataset/mask").as_posix().removesuffix(".png")
               for path in (workspace.root / "dataset/mask").rglob("*.png")}  # fmt: skip
    assert rows.keys() == on_disk
    for name, row in rows.items():
        detected = cv2.imread(str(workspace.mask(name)), cv2.IMREAD_UNCHANGED) > 0
        expected = human.get(name, detected)
        parts = {kind: picture(workspace, kind, name) for kind in DATASET}
        assert np.array_equal(parts["mask"] > 0, expected)
        assert np.array_equal(parts["pseudo_gt"], np.where(expected[..., None], parts["mse_sr"], parts["gan_sr"]))
        assert row["mask_by"] == ("person" if name in human else "detector")
        assert row["artifact_pixels"] == expected.sum()
        assert row["regions"] == cv2.connectedComponents(expected.astype(np.uint8))[0] - 1
        assert (row["made_under"] is None) == (not expected.any())


def files(workspace: Workspace) -> dict[str, tuple[bytes, int]]:
    paths = [path for name in ("masks", "dataset", "human") for path in (workspace.root / name).rglob("*")]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths if path.is_file()}


def test_pseudo_gt_is_made_again_at_once(mined, copy) -> None:
    workspace = copy()
    changed, emptied = mined.names[1], mined.marked[0]
    detected = {name: workspace.mask(name).read_bytes() for name in mined.names}
    published = draw(workspace, {changed: (10, 20, 60, 50), emptied: (), mined.clean[0]: ()})
    human = {changed: mask_with(10, 20, 60, 50), "twin": mask_with(10, 20, 60, 50), emptied: mask_with()}
    assert published == ImportSummary(images=3, changed=2, clean=2, renewed=2, waiting=0)
    check_dataset(workspace, human)
    assert {name: workspace.mask(name).read_bytes() for name in mined.names} == detected
    assert pending(workspace) == 0
    before = files(workspace)
    assert draw(workspace, {changed: (10, 20, 60, 50), emptied: ()}).renewed == 0
    assert files(workspace) == before


@pytest.mark.parametrize("changes", [{"threshold": 0.9}, {"threshold": 0.3}, {"keep": "all"}, {"keep": "maps"}])
def test_human_masks_are_preferred_under_other_settings(mined, copy, changes: dict[str, Any]) -> None:
    workspace = copy()
    drawn, emptied, clean = mined.marked[0], mined.marked[1], mined.clean[0]
    draw(workspace, {drawn: (10, 20, 60, 50), emptied: (), clean: ()})
    human = {drawn: mask_with(10, 20, 60, 50), emptied: mask_with(), clean: mask_with()}
    again(workspace, **changes)
    check_dataset(workspace, human)
    # A person's word keeps what the detector would let go.
    assert workspace.dataset("pseudo_gt", drawn).exists()
    again(workspace, keep="artifacts", threshold=0.7)
    check_dataset(workspace, human)


def test_an_artifact_that_only_a_person_marked_waits_for_its_pictures(mined, copy) -> None:
    workspace = copy()
    clean = mined.clean[0]
    assert draw(workspace, {clean: (5, 5, 30, 40)}).waiting == 1
    check_dataset(workspace, {})
    assert pending(workspace) == 1
    again(workspace)
    check_dataset(workspace, {clean: mask_with(5, 5, 30, 40)})
    rows = pq.read_table(workspace.manifest).to_pylist()
    group = workspace.group(next(row["id"] for row in rows if row["name"] == clean))
    for lost in (group, group / "similarity", group / "mse_sr", workspace.dataset("lr", clean)):
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
        assert pending(workspace) == 1
        again(workspace)
        check_dataset(workspace, {clean: mask_with(5, 5, 30, 40)})
    draw(workspace, {clean: ()})
    assert pending(workspace) == 1
    again(workspace)
    check_dataset(workspace, {})


def test_an_artifact_that_only_a_person_marked_does_not_wait_with_keep_all(mined, copy) -> None:
    workspace = copy("all")
    clean = mined.clean[0]
    assert draw(workspace, {clean: (5, 5, 30, 40)}) == ImportSummary(1, 1, 0, 1, 0)
    check_dataset(workspace, {clean: mask_with(5, 5, 30, 40)})
    assert pending(workspace) == 0
    again(workspace, keep="artifacts")
    check_dataset(workspace, {clean: mask_with(5, 5, 30, 40)})


def test_masks_count_for_the_model_that_they_were_drawn_on(mined, copy, make_models, tmp_path) -> None:
    workspace = copy()
    human = {mined.marked[1]: mask_with(10, 20, 60, 50), mined.clean[0]: mask_with(5, 5, 30, 40)}
    draw(workspace, {mined.marked[1]: (10, 20, 60, 50), mined.clean[0]: (5, 5, 30, 40)})
    again(workspace)
    check_dataset(workspace, human)
    newer = make_models(tmp_path / "newer", strength=1.2)[1]
    again(workspace, gan_model=newer)
    check_dataset(workspace, {})
    assert read_human_masks(workspace, load_settings(workspace)[1].gan_sr_key) == {}
    again(workspace, gan_model=mined.gan)
    check_dataset(workspace, human)


def test_histories_end_like_fresh_workspaces(mined, copy, make_models, tmp_path) -> None:
    workspace = copy()
    draw(workspace, {mined.marked[2]: (10, 20, 60, 50), mined.marked[3]: (), mined.clean[0]: (5, 5, 30, 40)})
    newer = make_models(tmp_path / "newer", strength=0.7)[1]
    rng = np.random.default_rng(0)
    choices = {"threshold": [0.5, 0.7, 0.9], "keep": ["artifacts", "maps", "all"], "gan_model": [mined.gan, newer],
               "keep_mse": [False, True]}  # fmt: skip
    for _ in range(4):
        again(workspace, **{name: values[rng.integers(len(values))] for name, values in choices.items()})
    again(workspace, gan_model=mined.gan)
    settings, _ = load_settings(workspace)
    fresh = Workspace(tmp_path / "fresh")
    fresh.create()
    shutil.copytree(workspace.human, fresh.human)
    process(settings.model_copy(update={"workspace": fresh.root}))
    here, there = ({Path(path).relative_to(ws.root): data for path, (data, _) in files(ws).items()}
                   for ws in (workspace, fresh))  # fmt: skip
    assert here == there


def test_a_renamed_photo_keeps_its_mask(mined, copy, tmp_path) -> None:
    workspace = copy()
    photos = Path(shutil.copytree(mined.photos, tmp_path / "photos"))
    draw(workspace, {mined.marked[1]: (10, 20, 60, 50)})
    (photos / f"{mined.marked[1]}.png").rename(photos / "renamed.png")
    again(workspace, photos=photos)
    human = dict.fromkeys((mined.marked[1], "renamed"), mask_with(10, 20, 60, 50))
    check_dataset(workspace, human)


@pytest.mark.parametrize("written", [0, 1])
def test_an_import_that_was_killed_is_not_believed(mined, copy, monkeypatch, written: int) -> None:
    workspace = copy()
    name = mined.marked[0]
    publish, pictures = Workspace.publish, []

    class KilledError(BaseException):
        pass

    def killed_at_some_picture(self: Workspace, path: Path, *arguments: Any, **options: Any) -> None:
        pictures.extend([path] if "dataset" in path.parts else [])
        if len(pictures) > written:
            raise KilledError
        publish(self, path, *arguments, **options)

    monkeypatch.setattr(Workspace, "publish", killed_at_some_picture)
    with pytest.raises(KilledError):
        draw(workspace, {name: (10, 20, 60, 50)})
    monkeypatch.undo()
    assert pending(workspace) == 1
    again(workspace)
    check_dataset(workspace, {name: mask_with(10, 20, 60, 50)})


def test_a_damaged_picture_is_made_anew(mined, copy) -> None:
    workspace = copy()
    name = mined.marked[1]
    workspace.dataset("gan_sr", name).write_bytes(b"no picture")
    published = draw(workspace, {name: (10, 20, 60, 50)})
    assert (published.renewed, published.waiting) == (0, 1)
    assert pending(workspace) == 1
    again(workspace)
    check_dataset(workspace, {name: mask_with(10, 20, 60, 50)})


def images_of(workspace: Workspace) -> Pools:
    with workspace.locked():
        return Pools(workspace, *load_settings(workspace), "folder")


@pytest.mark.parametrize("kind", ["all", "detected"])
def test_pools_go_by_human_masks(mined, copy, kind: str) -> None:
    workspace = copy(kind)
    drawn, emptied, (overlooked, confirmed) = mined.marked[3], mined.marked[2], mined.clean[:2]
    draw(workspace, {drawn: (10, 20, 60, 50), emptied: (), overlooked: (5, 5, 30, 40), confirmed: ()})
    images = images_of(workspace)
    marked = [found for pool in ("training", "held_out") for found in images.with_artifacts(pool)]
    names = {found.image.names[0] for found in marked}
    first = {name for name in mined.marked if name != emptied} | {overlooked}
    assert names == first
    clean = {image.names[0] for pool in ("training", "held_out") for image in images.clean(pool, 99)}
    assert clean == set(mined.clean) - {overlooked}
    by_name = {found.image.names[0]: found for found in marked}
    assert by_name[overlooked].severity == 0
    assert by_name[drawn].severity > 0
    held_out = {found.image.names[0] for found in images.with_artifacts("held_out")}
    assert {image.names[0] for image in images.held_out_judges(99)} == held_out - {overlooked}
    for pool in ("training", "held_out"):
        found = list(images.with_artifacts(pool))
        by_people = [one.image.names[0] in (drawn, overlooked) for one in found]
        assert by_people == sorted(by_people, reverse=True)
        assert [one.human is not None for one in found] == by_people
        rest = [one.severity for one in found if one.human is None]
        assert rest == sorted(rest, reverse=True)


def finetuning(workspace: Workspace, mined: SimpleNamespace) -> Finetuning:
    return Finetuning(workspace=workspace.root, output=workspace.root.with_name("run"), gan_model=mined.gan,
                      group_by="folder", perceptual="off")  # fmt: skip


def plan_of(workspace: Workspace, mined: SimpleNamespace) -> Any:
    with workspace.locked():
        return plan_finetune(finetuning(workspace, mined))


def run_key(workspace: Workspace, mined: SimpleNamespace) -> str:
    """The name of the run's folder in the workspace."""
    with workspace.locked():
        return plan_finetune(finetuning(workspace, mined).model_copy(update={"output": None})).run.root.name


@pytest.mark.parametrize("kind", ["all", "detected"])
def test_a_finetune_trains_on_human_masks(mined, copy, kind: str, tmp_path) -> None:
    workspace = copy(kind)
    before = plan_of(workspace, mined)
    key = run_key(workspace, mined)
    training = [sample.name for sample in before.samples]
    assert all(sample.human is None for sample in before.samples)
    name = training[-1]
    draw(workspace, {name: (10, 20, 60, 50), training[0]: ()})
    plan = plan_of(workspace, mined)
    assert [sample.name for sample in plan.samples] == [name, *training[1:-1]]
    assert plan.samples[0].human is not None
    keys = {key, run_key(workspace, mined)}
    assert len(keys) == 2
    begin(plan, 4)
    frozen = np.load(plan.run.data / "0000/mask.npy")
    assert np.array_equal(frozen, mask_with(10, 20, 60, 50))
    pictures = {kind: cv2.imread(str(mined.root / f"all/dataset/{kind}/{name}.png"))[:, :, ::-1]
                for kind in ("mse_sr", "gan_sr")}  # fmt: skip
    expected = np.where(frozen[..., None], pictures["mse_sr"], pictures["gan_sr"])
    assert np.array_equal(np.load(plan.run.data / "0000/pseudo_gt.npy"), expected)
    images = json.loads(plan.run.document.read_bytes())["images"]
    assert [row["mask_by"] for row in images] == ["person"] + ["detector"] * (len(images) - 1)
    shutil.rmtree(plan.run.root)
    draw(workspace, {name: (10, 20, 60, 51)})
    assert run_key(workspace, mined) not in keys


def test_a_finetune_leaves_out_images_that_wait_for_their_pictures(mined, copy) -> None:
    workspace = copy()
    before = plan_of(workspace, mined)
    draw(workspace, dict.fromkeys(mined.clean, (5, 5, 30, 40)))
    assert plan_of(workspace, mined)._replace(warning=None) == before
    again(workspace)
    after = [sample.name for sample in plan_of(workspace, mined).samples]
    assert set(after) - {sample.name for sample in before.samples} <= set(mined.clean)
    assert len(after) > len(before.samples)


def test_the_gate_judges_by_masks_of_the_detector(mined, copy) -> None:
    workspace = copy("all")
    held_out = [found.image.names[0] for found in images_of(workspace).with_artifacts("held_out")]
    overlooked = images_of(workspace).clean("held_out", 1)[0].names[0]
    draw(workspace, {overlooked: (5, 5, 30, 40), held_out[0]: ()})
    settings = Comparing(workspace=workspace.root, after=mined.mse, group_by="folder")
    with workspace.locked():
        judged = {image.names[0] for image in plan_comparison(settings).images}
    assert not {overlooked, held_out[0]} & judged
    assert set(held_out[1:]) <= judged


def test_workspaces_of_earlier_versions_have_no_human_masks(mined, copy) -> None:
    workspace = copy()
    assert not workspace.human.exists()
    assert read_human_masks(workspace, None) == {}
    assert pq.read_table(workspace.dataset_manifest)["mask_by"].unique().to_pylist() == ["detector"]


def test_a_mask_whose_file_is_gone_does_not_count(mined, copy) -> None:
    workspace = copy("all")
    key = load_settings(workspace)[1].gan_sr_key
    draw(workspace, {mined.clean[0]: (5, 5, 30, 40), mined.marked[1]: ()})
    assert len(read_human_masks(workspace, key)) == 2
    workspace.human_mask(mined.clean[0]).unlink()
    assert [mask.name for mask in read_human_masks(workspace, key).values()] == [mined.marked[1]]
    assert read_human_masks(workspace, None) == {}


def test_exports_at_once_are_all_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, write = Workspace(tmp_path), human_masks.replace_file
    first, second = {("0" * 32, "a"), ("1" * 32, "b")}, {("1" * 32, "c"), ("0" * 32, "a")}

    def meanwhile(*arguments: Any, **options: Any) -> None:
        monkeypatch.undo()
        human_masks.remember_exported(workspace, second)
        write(*arguments, **options)

    monkeypatch.setattr(human_masks, "replace_file", meanwhile)
    human_masks.remember_exported(workspace, first)
    assert human_masks.exported_masks(workspace, ["0" * 32, "1" * 32]) == first | second
    assert human_masks.exported_masks(workspace, ["1" * 32]) == {("1" * 32, "b"), ("1" * 32, "c")}
    before = len(list(workspace.exported.iterdir()))
    human_masks.remember_exported(workspace, first)
    assert len(list(workspace.exported.iterdir())) == before


def test_exports_of_mined_images(mined, copy, tmp_path) -> None:
    workspace = copy()
    exported = export_workspace(workspace, tmp_path / "out", "coco", everything=True, pictures=False)
    assert (exported.images, exported.unpictured) == (len(mined.marked), len(mined.clean))
    assert exported.pictures == workspace.root / "dataset/gan_sr"
    export_workspace(workspace, tmp_path / "plain", "folder")
    name = mined.marked[0]
    for kind in ("lr", "mse_sr", "gan_sr", "pseudo_gt"):
        assert (tmp_path / f"plain/{kind}/{name}.png").read_bytes() == workspace.dataset(kind, name).read_bytes()


def test_a_photo_of_the_same_name_joins(mined, copy, tmp_path) -> None:
    """Names get their suffix: nothing is counted twice or made again, and an earlier export is imported rightly."""
    workspace, photos = copy(), Path(shutil.copytree(mined.photos, tmp_path / "photos"))
    mining = Mining(photos=photos, mse_model=mined.mse, gan_model=mined.gan, workspace=workspace.root)
    one, clean = mined.marked[-1], mined.clean[0]
    assert cv2.imwrite(str(photos / f"{one}.bmp"), cv2.imread(str(photos / f"{one}.png")))
    (photos / f"{one}.png").unlink()
    process(mining)
    for form in ("labelme", "coco"):
        export_workspace(workspace, tmp_path / form, form)
    before = {path.name: pq.read_table(path) for path in (workspace.regions, workspace.dataset_manifest)}
    mask = workspace.mask(one).read_bytes(), workspace.mask(one).stat().st_mtime_ns
    bright = cv2.imread(str(photos / f"{mined.marked[0]}.png"))
    # As the picture is called that was exported of the other one.
    assert cv2.imwrite(str(photos / f"{one}.png"), bright[::-1])

    process(mining)
    manifest = pq.read_table(workspace.manifest)
    assert manifest["present"].to_pylist() == [True] * (PHOTOS + 2)
    assert {f"{one}.png", f"{one}.bmp", clean} <= set(manifest["name"].to_pylist())
    assert one not in manifest["name"].to_pylist()
    moved = workspace.mask(f"{one}.bmp")
    assert (moved.read_bytes(), moved.stat().st_mtime_ns) == mask
    assert not workspace.mask(one).exists()
    for path in (workspace.regions, workspace.dataset_manifest):
        rows = [row for row in pq.read_table(path).to_pylist() if row["image"] != f"{one}.png"]
        images = [one if row["image"] == f"{one}.bmp" else row["image"] for row in rows]
        assert sorted(images) == sorted(before[path.name]["image"].to_pylist())

    drawn = json.loads((tmp_path / f"labelme/{one}.json").read_text())
    drawn["shapes"] = []
    (tmp_path / f"labelme/{one}.json").write_text(json.dumps(drawn))
    with workspace.locked():
        for form, path in (("coco", tmp_path / "coco/annotations.json"), ("labelme", tmp_path / "labelme")):
            corrections, errors = read_corrections(workspace, form, path)
            assert not errors
            assert {correction.name for correction in corrections} & {one, f"{one}.png", f"{one}.bmp"} == {f"{one}.bmp"}
        assert {correction.name for correction in corrections if not correction.pixels} == {f"{one}.bmp"}
        publish_corrections(workspace, corrections)
    assert workspace.human_mask(f"{one}.bmp").exists()

    (photos / f"{one}.png").unlink()
    process(mining)
    assert workspace.human_mask(one).exists()
    assert not workspace.human_mask(f"{one}.bmp").exists()
    _, target = load_settings(workspace)
    assert [mask.name for mask in read_human_masks(workspace, target.gan_sr_key).values() if not mask.pixels] == [one]
    assert not pq.read_table(workspace.dataset_manifest, filters=[("image", "=", one)])["artifact_pixels"][0].as_py()


def test_masks_whose_table_is_gone_are_not_forgotten_silently(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert read_human_masks(workspace, None) == {}
    workspace.human_mask("set/a").parent.mkdir(parents=True)
    workspace.human_mask("set/a").write_bytes(b"mask")
    with pytest.raises(UsageError, match=r"human/manifest\.parquet: is not there, so no mask in .*human counts; bring"):
        read_human_masks(workspace, None)
