"""``desra detect`` as its users meet it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from desra_core.workspace import Workspace
from tasks.metrics import read_samples
from tests.conftest import refusal

SETTINGS = [
    ("plain", 0.7, 400),
    ("plain", 0.7, 4000),
    ("plain", 0.85, 400),
    ("semantic", 0.7, 400),
    ("semantic", 0.7, 4000),
    ("semantic", 0.85, 400),
]


def read_masks(workspace: Path) -> dict[str, bytes]:
    masks = workspace / "masks"
    return {str(path.relative_to(masks)): path.read_bytes() for path in sorted(masks.rglob("*.png"))}


def mtimes(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("settings", "images"), [(SETTINGS[1:5:3], 3), pytest.param(SETTINGS, 8, marks=pytest.mark.slow)]
)
def test_every_reference_mask_in_one_workspace(settings, images, shared_data, desra, tmp_path) -> None:
    """The settings one after the other: each run meets the products of the others."""
    pairs, workspace = shared_data / "pairs", tmp_path / "ws"
    for kind, threshold, min_area in settings:
        labels = ["--labels", pairs / "labels"] if kind == "semantic" else []
        run = desra(
            "detect", "--mse-sr", pairs / "mse_sr", "--gan-sr", pairs / "gan_sr", "--workspace", workspace,
            "--threshold", threshold, "--min-area", min_area, "--limit", images, *labels,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        reference = pairs / "reference_mask" / f"{kind}_t{threshold}_a{min_area}"
        masks = sorted((workspace / "masks").iterdir())
        assert len(masks) == images
        for path in masks:
            mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            expected = cv2.imread(str(reference / path.name), cv2.IMREAD_UNCHANGED)
            assert np.array_equal(mask[5:-5, 5:-5], expected), (path.name, kind, threshold, min_area)
            assert not mask[:5].any()
            assert not mask[:, -5:].any()


def test_a_run_and_then_nothing_to_do(make_pairs, desra, tmp_path) -> None:
    names = make_pairs(tmp_path, 6)
    workspace = tmp_path / "ws"
    command = ("detect", "--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr", "--workspace", workspace)
    (tmp_path / "gan_sr/@eaDir").mkdir()
    (tmp_path / "gan_sr/set0/a.psd").touch()
    sources = mtimes(tmp_path / "mse_sr") | mtimes(tmp_path / "gan_sr")
    first = desra(*command)
    assert first.returncode == 0, first.stderr
    assert "6 of 6 images done, 0 failed\npassed over 1 .psd, 1 @eaDir/\n" in first.stdout
    assert "weight 1" in first.stdout
    assert "these were passed over: 1 .psd, 1 @eaDir/." in (workspace / "report.html").read_text()
    assert first.stderr.count("warning:") == 1
    assert set(read_masks(workspace)) == {f"{name}.png" for name in names}
    regions = pq.read_table(workspace / "regions.parquet").to_pylist()
    assert {region["image"] for region in regions} == {name for index, name in enumerate(names) if index % 3}
    assert len(list((workspace / "maps").glob("*/*.zarr/similarity/zarr.json"))) == 4
    before = mtimes(workspace)
    again = desra(*command)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout
    after = {path: time for path, time in mtimes(workspace).items() if "/prefect/" not in path}
    assert after.items() <= (before | {str(workspace / "lock"): after[str(workspace / "lock")]}).items()
    assert sources == mtimes(tmp_path / "mse_sr") | mtimes(tmp_path / "gan_sr")

    status = desra("status", "--workspace", workspace)
    assert status.returncode == 0
    assert "done       6" in status.stdout
    assert "pending    0" in status.stdout
    assert "passed over 1 .psd, 1 @eaDir/" in status.stdout

    some = desra(*command, "--gan-sr", tmp_path / "gan_sr/set?/*00[012].png", "--exclude", "photo001.*", "--exclude=x")
    assert some.returncode == 0, some.stderr
    assert "not among those asked for: 1 image, whose outputs stay" in some.stderr
    assert "nothing to do: 2 of 2 images done, 0 failed before\n" in some.stdout
    assert "passed over 2 excluded by --exclude photo001.*, nothing excluded by --exclude x\n" in some.stdout
    (tmp_path / "some.toml").write_text(f"gan-sr = '{tmp_path}/gan_sr/set1/photo001.png'\nexclude = 'photo002.png'")
    one = desra("detect", "--config", tmp_path / "some.toml", *command[1:3], *command[5:])
    assert one.returncode == 2, one.stderr
    assert "mse_sr: has no file of the same relative path" in one.stderr


@pytest.mark.slow
def test_changes_redo_only_dependent_products(make_pairs, desra, tmp_path) -> None:
    names = make_pairs(tmp_path, 6)
    workspace = tmp_path / "ws"
    command = ("detect", "--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr", "--workspace", workspace)
    assert desra(*command).returncode == 0
    maps = mtimes(workspace / "maps")

    stricter = desra(*command, "--threshold", "0.6")
    assert stricter.returncode == 0
    assert "4 of 4 images" in stricter.stderr  # those with artifacts; from the maps that were kept
    assert mtimes(workspace / "maps") == maps

    looser = desra(*command, "--threshold", "0.8")
    assert looser.returncode == 0
    assert "that were not kept: 2 images\n" in looser.stderr
    assert "6 of 6 images" in looser.stderr
    assert {path: time for path, time in mtimes(workspace / "maps").items() if path in maps} == maps

    changed = tmp_path / "gan_sr" / f"{names[1]}.png"
    shutil.copyfile(tmp_path / "mse_sr" / f"{names[1]}.png", changed)
    (workspace / "masks" / f"{names[4]}.png").unlink()
    others = {path: time for path, time in mtimes(workspace / "masks").items() if names[1] not in path}
    redone = desra(*command, "--threshold", "0.8")
    assert redone.returncode == 0
    assert "2 of 2 images" in redone.stderr
    assert others.items() <= mtimes(workspace / "masks").items()
    assert not cv2.imread(str(workspace / "masks" / f"{names[1]}.png"), cv2.IMREAD_UNCHANGED).any()
    assert names[1] not in pq.read_table(workspace / "regions.parquet")["image"].to_pylist()


@pytest.fixture
def bad_folder(make_pairs, tmp_path) -> Path:
    """Good pairs, and one of each kind of trouble."""
    from PIL import Image

    names = make_pairs(tmp_path, 3)
    mse, gan = tmp_path / "mse_sr", tmp_path / "gan_sr"
    good = cv2.imread(str(gan / f"{names[1]}.png"))
    gray = np.full((200, 240), 90, np.uint8)

    def both(name: str, write) -> None:
        for folder in (mse, gan):
            write(folder / name)

    both("small1.png", lambda path: cv2.imwrite(str(path), gray[:1, :1]))
    both("small10.png", lambda path: cv2.imwrite(str(path), gray[:10, :10]))
    both("cmyk.jpg", lambda path: Image.new("CMYK", (64, 64)).save(path))
    both("empty.png", lambda path: path.write_bytes(b""))
    both("text.png", lambda path: path.write_text("not an image\n"))
    jpeg = cv2.imencode(".jpg", good)[1].tobytes()
    both("truncated.jpg", lambda path: path.write_bytes(jpeg[: len(jpeg) // 2]))
    png = bytearray(cv2.imencode(".png", gray)[1].tobytes()[:1000])
    png[16:24] = (40_000).to_bytes(4, "big") * 2
    import zlib

    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    both("gigapixel.png", lambda path: path.write_bytes(png))
    cv2.imwrite(str(mse / "sizes.png"), gray)
    cv2.imwrite(str(gan / "sizes.png"), gray[:100])
    cv2.imwrite(str(gan / "lonely.png"), gray)
    both("double.png", lambda path: cv2.imwrite(str(path), gray))
    cv2.imwrite(str(gan / "double.jpg"), gray)
    labels = tmp_path / "labels"
    for path in gan.rglob("*.*"):
        target = (labels / path.relative_to(gan)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), np.zeros((200, 240), np.uint8))
    both("labelsize.png", lambda path: cv2.imwrite(str(path), gray))
    cv2.imwrite(str(labels / "labelsize.png"), np.zeros((20, 20), np.uint8))
    both("label150.png", lambda path: cv2.imwrite(str(path), gray))
    cv2.imwrite(str(labels / "label150.png"), np.full((200, 240), 150, np.uint8))
    return tmp_path


def test_bad_input_costs_one_line_each_and_nothing_else(bad_folder, desra, desra_here) -> None:
    sources = {role: mtimes(bad_folder / role) for role in ("mse_sr", "gan_sr", "labels")}
    workspace = bad_folder / "ws"
    command = (
        "detect", "--mse-sr", bad_folder / "mse_sr", "--gan-sr", bad_folder / "gan_sr",
        "--labels", bad_folder / "labels", "--workspace", workspace,
    )  # fmt: skip
    run = desra(*command)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr + run.stdout
    troubles = {
        "small1": "results of 1x1", "small10": "results of 10x10", "cmyk": "CMYK", "empty": "is empty",
        "text": "is not an image",
        "truncated": "truncated", "gigapixel": "40000x40000", "sizes": "is 240x100", "lonely": "no twin",
        "double": "two candidates", "labelsize": "is 20x20", "label150": "the label 150",
    }  # fmt: skip
    lines = [line for line in run.stderr.splitlines() if line.startswith("failed: ")]
    assert len(lines) == len(troubles), run.stderr
    for name, reason in troubles.items():
        [line] = [line for line in lines if f"{name}." in line or f"{name}:" in line]
        assert reason in line
        assert "; " in line
    failures = pq.read_table(workspace / "failures.parquet").to_pylist()
    assert {row["name"].split(".")[0] for row in failures} == set(troubles)
    assert len(read_masks(workspace)) == 3
    assert sources == {role: mtimes(bad_folder / role) for role in sources}

    again = desra_here(*command)  # images that failed for good are named again, and not tried again
    assert again.returncode == 1
    assert "nothing to do" in again.stdout
    assert sorted(line for line in again.stderr.splitlines() if line.startswith("failed: ")) == sorted(lines)

    for role in ("mse_sr", "gan_sr"):  # a mended file is taken in
        cv2.imwrite(str(bad_folder / role / "empty.png"), np.full((200, 240), 91, np.uint8))
    mended = desra(*command)
    assert mended.returncode == 1
    assert "1 of 1 images" in mended.stderr
    assert len(read_masks(workspace)) == 4


def test_bad_usage_exits_2_with_one_line(make_pairs, desra_here, tmp_path) -> None:
    make_pairs(tmp_path, 1)
    inputs = ("--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr")
    workspace = ("--workspace", tmp_path / "ws")
    bad = tmp_path / "bad.toml"
    bad.write_text('treshold = 0.6\nworkspace = "x"\n')
    for arguments, expected in [
        (("--mse-sr", tmp_path / "none", "--gan-sr", tmp_path / "gan_sr", *workspace), "is no folder"),
        ((*inputs, *workspace, "--threshold", "1.5"), "--threshold"),
        ((*inputs, *workspace, "--window", "10"), "odd"),
        ((*inputs, *workspace, "--weights", "published"), "needs class labels"),
        ((*inputs, *workspace, "--min-area", "many"), "--min-area"),
        ((*inputs, *workspace, "--segmenter", "magic"), "--segmenter"),
        ((*inputs, *workspace, "--memory", "lots"), "--memory"),
        ((*inputs, *workspace, "--segmenter", "mmseg:/nowhere.py,/nowhere.pth"), "/nowhere.py"),
        ((*inputs, *workspace, "--config", bad), "treshold"),
        ((*inputs, "--workspace", tmp_path), "other things"),
        (inputs, "--workspace"),
    ]:
        run = desra_here("detect", *arguments)
        assert run.returncode == 2, (arguments, run.stderr)
        assert expected in run.stderr, (arguments, run.stderr)
        assert "Traceback" not in run.stderr
    down = refusal(desra_here("detect", *inputs, *workspace), server=True)
    assert "PREFECT_API_URL=http://127.0.0.1:9/api: no Prefect server answers" in down


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_named(make_pairs, desra, tmp_path) -> None:
    make_pairs(tmp_path, 1)
    run = desra("detect", "--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr",
                "--workspace", tmp_path / "ws", "--scheduler", "tcp://127.0.0.1:9")  # fmt: skip
    assert "no Dask scheduler answers" in refusal(run, server=True)


@pytest.mark.slow
def test_failures_that_may_pass_are_tried_again(make_pairs, desra_alone, desra_here, tmp_path) -> None:
    names = make_pairs(tmp_path, 3)
    workspace = tmp_path / "ws"
    command = ("detect", "--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr", "--workspace", workspace)
    large = np.zeros((3000, 3000), np.uint8)
    for role in ("mse_sr", "gan_sr"):
        cv2.imwrite(str(tmp_path / role / "large.png"), large)
    tight = desra_alone(*command, "--memory", "600MB")
    assert tight.returncode == 1
    assert "large.png: has 3000x3000 pixels, more than fit" in tight.stderr
    assert "--memory" in tight.stderr
    status = desra_here("status", "--workspace", workspace)
    assert "pending    1, 1 of them failed and will be tried again" in status.stdout
    assert "large.png" in status.stderr
    again = desra_alone(*command)
    assert again.returncode == 0, again.stderr
    assert len(read_masks(workspace)) == len(names) + 1


def test_a_damaged_workspace_is_named_or_mended(make_pairs, desra, desra_here, tmp_path) -> None:
    make_pairs(tmp_path, 3)
    workspace = tmp_path / "ws"
    command = ("detect", "--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr", "--workspace", workspace)
    assert desra(*command).returncode == 0
    masks = read_masks(workspace)
    for path in (workspace / "outcomes" / "00000000.parquet", workspace / "manifest.parquet"):
        whole = path.read_bytes()
        path.write_bytes(b"garbage")
        for verb in (command, ("status", "--workspace", workspace)):
            told = refusal(desra_here(*verb))
            assert f"{path}: cannot be read" in told
            assert "delete it" in told
        path.write_bytes(whole)
    (workspace / "lock").unlink()
    (workspace / "outcomes" / "00000000 (copy).parquet").write_bytes(b"")
    (workspace / "maps" / ".DS_Store").write_bytes(b"")
    (workspace / "outcomes" / "00000000.parquet").unlink()
    mended = desra(*command)
    assert mended.returncode == 0, mended.stderr
    assert read_masks(workspace) == masks


def test_config_file_gives_flags_and_the_command_line_wins(make_pairs, desra, tmp_path) -> None:
    make_pairs(tmp_path, 2)
    config = tmp_path / "desra.toml"
    config.write_text(
        f'mse-sr = "{tmp_path}/mse_sr"\ngan_sr = "{tmp_path}/gan_sr"\nworkspace = "{tmp_path}/ws"\n'
        'threshold = 0.5\nmin-area = "0.1%"\nkeep = "maps"\nworkers = 1\n'
    )
    run = desra("detect", "--config", config, "--threshold", "0.6", "--limit", "1")
    assert run.returncode == 0, run.stderr
    settings = json.loads((tmp_path / "ws" / "settings.json").read_text())["settings"]
    assert (settings["threshold"], settings["min_area"], settings["keep"]) == (0.6, "0.1%", "maps")
    assert len(read_masks(tmp_path / "ws")) == 1


def test_equal_content_is_computed_once_and_masked_at_each_path(make_pairs, desra, tmp_path) -> None:
    [name, other] = make_pairs(tmp_path, 2)
    for role in ("mse_sr", "gan_sr"):
        shutil.copyfile(tmp_path / role / f"{other}.png", tmp_path / role / "copy.png")
    workspace = tmp_path / "ws"
    run = desra("detect", "--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr", "--workspace", workspace)
    assert run.returncode == 0, run.stderr
    masks = read_masks(workspace)
    assert masks["copy.png"] == masks[f"{other}.png"] != masks[f"{name}.png"]
    assert len(pq.read_table(workspace / "outcomes" / "00000000.parquet")) == 2


def test_an_error_as_json_has_its_level_and_workspace(desra_here, tmp_path) -> None:
    paths = {"--mse-sr": tmp_path / "nowhere", "--gan-sr": tmp_path, "--workspace": tmp_path / "ws"}
    run = desra_here("detect", *(part for pair in paths.items() for part in pair), "--log-format", "json")
    warning, error = (json.loads(line) for line in run.stderr.splitlines())
    assert (warning["level"], error["level"]) == ("warning", "error")
    assert error["workspace"] == str(tmp_path / "ws")
    assert error["message"].startswith(f"{tmp_path / 'nowhere'}: is no folder; ")


def test_a_run_writes_its_metrics(make_pairs, desra, tmp_path) -> None:
    """One photo of four cannot be read; the next run adds to the counters."""
    make_pairs(tmp_path, 4)
    broken = tmp_path / "gan_sr/set1/photo003.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:500])
    command = ["detect", "--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr", "--workspace",
               tmp_path / "ws", "--min-area", "100"]  # fmt: skip
    assert desra(*command).returncode == 1
    workspace = Workspace(tmp_path / "ws")
    found = read_samples(workspace.metrics)
    stages = {key: value for key, value in found.items() if key[0] == "desra_images_total"}
    assert stages == {
        ("desra_images_total", ("similarity", "done")): 3,
        ("desra_images_total", ("similarity", "failed")): 1,
        ("desra_images_total", ("mask", "done")): 3,
        ("desra_images_total", ("mask", "failed")): 0,
    }
    assert {key[1][0]: value for key, value in found.items() if key[0] == "desra_corpus_images"} == {
        "done": 3, "failed": 1, "todo": 0,
    }  # fmt: skip
    assert found["desra_artifact_images", ()] == 2
    assert found["desra_artifact_regions", ()] == pq.read_metadata(workspace.regions).num_rows
    assert found["desra_stage_seconds_total", ("similarity",)] > 0
    ended = "desra_last_run_end_timestamp_seconds", ("detect", "completed")
    broken.write_bytes(whole)
    assert desra(*command).returncode == 0
    again = read_samples(workspace.metrics)
    assert again["desra_images_total", ("mask", "done")] == 4
    assert again["desra_corpus_images", ("done",)] == 4
    assert again[ended] > found[ended]
