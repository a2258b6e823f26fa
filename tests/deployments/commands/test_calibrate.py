"""``desra calibrate`` as a user meets it: artifact-free pairs in, a weights file and a page out."""

from __future__ import annotations

import shlex
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from desra_core import variance_similarity
from desra_core.calibration.counting import corpus_of, derive_calibration, plan_counting, read_exclusion
from desra_core.calibration.weights import weight_values
from desra_core.detection.class_weights import load_weights
from desra_core.settings import Detection, Mining
from desra_core.settings.models import Calibrating
from desra_core.workspace import Workspace
from tests.conftest import refusal
from tests.in_process import count_all, process

HEIGHT, WIDTH = 200, 240
ROLES = ("mse_sr", "gan_sr", "labels")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


@pytest.fixture(scope="module")
def pairs(make_pairs, tmp_path_factory) -> SimpleNamespace:
    """Six pairs with labels: class 2 on the left, class 9 on the right, and in the first a little of class 20."""
    root = tmp_path_factory.mktemp("calibrate")
    names = make_pairs(root, 6)
    for index, name in enumerate(names):
        labels = np.full((HEIGHT, WIDTH), 2, np.uint8)
        labels[:, 100:] = 9
        labels[:10, :20] = 20 if index == 0 else 2
        write(root / f"labels/{name}.png", labels)
    return SimpleNamespace(
        root=root, names=names, flags=[f"--{role.replace('_', '-')}={root / role}" for role in ROLES]
    )


@pytest.fixture(scope="module")
def counted(pairs, tmp_path_factory) -> Path:
    """A workspace where all is counted."""
    folder = tmp_path_factory.mktemp("counted") / "ws"
    corpus = Detection(mse_sr=pairs.root / "mse_sr", gan_sr=pairs.root / "gan_sr", workspace=folder, threshold=0.6,
                       segmenter=f"labels:{pairs.root / 'labels'}")  # fmt: skip
    process(corpus)
    calibrating = Calibrating(workspace=folder, output=folder.with_name("unused.toml"))
    process(corpus_of(calibrating))
    count_all(plan_counting(corpus_of(calibrating), read_exclusion(None)))
    return folder


@pytest.fixture
def workspace(counted, tmp_path) -> Path:
    return Path(shutil.copytree(counted, tmp_path / "ws"))


def slow_interval(pairs: SimpleNamespace, label: int, percentile: int, exclude: dict[str, np.ndarray]) -> int:
    """From the files alone, for one class."""
    values = []
    for name in pairs.names:
        similarity = variance_similarity(*(cv2.imread(str(pairs.root / f"{role}/{name}.png")) for role in ROLES[:2]))
        classes = cv2.imread(str(pairs.root / f"labels/{name}.png"), cv2.IMREAD_GRAYSCALE)
        chosen = (classes == label) & (exclude.get(name, np.zeros_like(classes)) == 0)
        values += similarity[chosen[5:-5, 5:-5]].tolist()
    held, count = 0, 0
    while 100 * held <= percentile * len(values):
        count += 1
        held = sum(min(int(20 * value), 19) >= 20 - count for value in values)
    return count - 1


def test_weights_of_ones_own_models(pairs, desra, desra_here, tmp_path) -> None:
    output = tmp_path / "out/mine.toml"
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[40:140, 60:180] = 255
    write(tmp_path / f"exclude/{pairs.names[1]}.png", mask[5:-5, 5:-5])
    write(tmp_path / "exclude/nothing.png", mask)
    flags = ("--workspace", tmp_path / "ws", "--output", output, "--min-images=2", "--min-pixels=1000")
    exclude = ("--exclude", tmp_path / "exclude")
    run = desra("calibrate", *pairs.flags, *flags, *exclude, "--workers", 1)
    assert run.returncode == 0, run.stderr
    assert f"warning: 1 mask of --exclude belongs to no image, the first is {tmp_path / 'exclude/nothing.png'}" in (
        run.stderr
    )
    assert "6 of 6 images, 0 failed" in run.stderr
    assert f"{6 * 190 * 230 - 100 * 120:,} pixels of 6 images counted, 12,000 pixels excluded" in run.stdout
    assert "classes: 2 calibrated, 1 thin, 147 unseen" in run.stdout
    assert "fewer than 1,000 pixels or 2 images: car (75 px in 1)" in run.stderr
    document = tomllib.loads(output.read_text())
    intervals = {entry["index"]: entry["interval"] for entry in document["class"]}
    for label in (2, 9):
        assert intervals[label] == slow_interval(pairs, label, 85, {pairs.names[1]: mask})
        assert load_weights(str(output)).values[label] == 20 / (20 - intervals[label])
    assert sorted(entry["index"] for entry in document["class"] if entry["source"] == "calibrated") == [2, 9]
    assert document["origin"]["images"] == 6
    assert document["origin"]["excluded_pixels"] == 12_000
    assert document["origin"]["mse_sr"] == str(pairs.root / "mse_sr")
    assert document["suggestion"]["rate"] == 0.001
    assert sorted(files(output.parent)) == ["mine.html", "mine.svg", "mine.toml"]

    before = files(output.parent), files(tmp_path / "ws/calibration"), files(tmp_path / "ws/masks")
    again = desra_here("calibrate", *flags, *exclude)
    assert again.returncode == 0, again.stderr
    assert again.stdout == "nothing to do: all was counted before\n" + run.stdout
    assert (files(output.parent), files(tmp_path / "ws/calibration"), files(tmp_path / "ws/masks")) == before

    command = again.stdout.splitlines()[-1].removeprefix("next ").split(maxsplit=1)
    assert command[0] == "desra"
    assert shlex.split(command[1])[-2:] == ["--weights", str(output)]
    next_run = desra_here(*shlex.split(command[1]), "--limit", 1, "--workspace", tmp_path / "ws")
    assert "Prefect" in next_run.stderr  # accepted, and there is something to do


def test_the_settings_of_the_latest_run_stay(counted) -> None:
    corpus = corpus_of(Calibrating(workspace=counted, output=Path("a.toml")))
    assert isinstance(corpus, Detection)
    assert (corpus.threshold, corpus.keep) == (0.6, "maps")
    other = corpus_of(Calibrating(workspace=counted, output=Path("a.toml"), segmenter="mmseg:a,b",
                                  mse_sr=Path("c"), gan_sr=Path("d")))  # fmt: skip
    assert isinstance(other, Detection)
    assert (other.threshold, other.segmenter, other.mse_sr, other.gan_sr) == (0.6, "mmseg:a,b", Path("c"), Path("d"))


def test_rules_and_formats(workspace, desra_here, tmp_path) -> None:
    def weights(name: str, *flags: str) -> tuple[np.ndarray, str]:
        run = desra_here("calibrate", "--workspace", workspace, "--output", tmp_path / name, "--min-pixels=100", *flags)
        assert run.returncode == 0, run.stderr
        return load_weights(str(tmp_path / name)).values, run.stdout

    published, told = weights("a.csv", "--percentile=60")
    quantile, _ = weights("a.toml", "--percentile=60", "--rule=quantile", "--fallback=one")
    # An interval is a twentieth, rounded so that the published rule never lifts more.
    assert published[9] <= quantile[9] <= 1 / (1 / published[9] - 0.05 - 1e-9)
    assert quantile[0] == 1 != published[0]
    strict, told_strict = weights("b.csv", "--percentile=99", "--rule=quantile", "--false-alarm-rate=0.02")
    assert strict[9] > quantile[9]
    assert "at most 0.1 % of the counted" in told
    assert "at most 2 % of the counted" in told_strict
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "a.csv", "a.html", "a.svg", "a.toml", "b.csv", "b.html", "b.svg"
    ]  # fmt: skip


def test_pairs_with_artifacts_are_warned_about(workspace, desra_here, tmp_path) -> None:
    """By the detector's word, unless a mask takes them out of the count."""
    flags = ("--workspace", workspace, "--output", tmp_path / "out.toml", "--min-pixels=100")
    masks = {
        path.stem: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) > 0 for path in (workspace / "masks").rglob("*.png")
    }
    marked = [mask for mask in masks.values() if mask.any()]
    assert 0 < len(marked) < len(masks)
    told = f"warning: the detector finds artifacts in {len(marked)} of {len(masks)} images, " \
           f"{sum(map(np.sum, marked)):,} pixels, which count as normal: calibrate on pairs without any"  # fmt: skip
    run = desra_here("calibrate", *flags)
    assert told in run.stderr
    assert "people " not in run.stdout
    place = Workspace(workspace)
    corpus = corpus_of(Calibrating(workspace=workspace, output=tmp_path / "out.toml"))
    assert plan_counting(corpus, read_exclusion(None)).suspect() == (len(marked), sum(map(np.sum, marked)))
    assert plan_counting(corpus, read_exclusion(place.masks)).suspect() == (0, 0)


def test_shares_and_thresholds_are_those_of_all_counted_pixels(counted, pairs) -> None:
    settings = Calibrating(workspace=counted, output=Path("a.toml"), rule="quantile", percentile=99, min_pixels=100,
                           false_alarm_rate=0.02)  # fmt: skip
    corpus = corpus_of(settings)
    found = derive_calibration(settings, corpus, plan_counting(corpus, read_exclusion(None)))
    read = [[cv2.imread(str(pairs.root / f"{role}/{name}.png")) for role in ROLES] for name in pairs.names]
    maps = [(variance_similarity(mse_sr, gan_sr), labels[5:-5, 5:-5, 0]) for mse_sr, gan_sr, labels in read]
    ours, published = weight_values(found.rows), load_weights("published").values
    assert ours[9] > 1.2 * published[9]
    thresholds = (found.suggested.threshold, found.suggested.published_threshold)
    for weights, below, threshold in zip((ours, published), found.below, thresholds, strict=True):
        adjusted = np.sort(np.concatenate([(weights[labels] * similarity).ravel() for similarity, labels in maps]))
        assert below == pytest.approx((adjusted < 0.7).mean(), abs=1e-3)
        assert threshold == pytest.approx(min(1, adjusted[int(0.02 * adjusted.size)]), abs=3e-4)


def test_an_image_that_cannot_be_counted_is_named(workspace, pairs, desra_here, tmp_path) -> None:
    path = tmp_path / f"exclude/{pairs.names[2]}.png"
    write(path, np.zeros((5, 5), np.uint8))
    exclude = tmp_path / "exclude"
    counting = plan_counting(corpus_of(Calibrating(workspace=workspace, output=tmp_path / "a.toml")),
                             read_exclusion(exclude))  # fmt: skip
    count_all(counting)
    run = desra_here("calibrate", "--workspace", workspace, "--output", tmp_path / "a.toml", "--exclude", exclude)
    assert run.returncode == 1
    assert f"failed: {path}: is 5x5 but its image is 240x200" in run.stderr
    assert "of 5 images counted" in run.stdout
    assert "left out 1 image that failed\n" in run.stdout


def test_nothing_is_counted_where_masks_cover_all(workspace, pairs, desra_here, tmp_path) -> None:
    for name in pairs.names:
        write(tmp_path / f"exclude/{name}.png", np.full((HEIGHT, WIDTH), 255, np.uint8))
    exclude = tmp_path / "exclude"
    count_all(plan_counting(corpus_of(Calibrating(workspace=workspace, output=tmp_path / "a.toml")),
                            read_exclusion(exclude)))  # fmt: skip
    run = desra_here("calibrate", "--workspace", workspace, "--output", tmp_path / "a.toml", "--exclude", exclude)
    assert refusal(run).startswith(f"error: {workspace}: holds no pixel to be counted")
    assert not (tmp_path / "a.toml").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--output", "{tmp}/a.txt"], "--output: {tmp}/a.txt is not accepted"),
        (["--output", "{tmp}/folder.toml"], "--output: {tmp}/folder.toml is not accepted"),
        (["--percentile", "100"], "--percentile: 100.0 is not accepted"),
        (["--percentile", "0"], "--percentile: 0.0 is not accepted"),
        (["--false-alarm-rate", "0"], "--false-alarm-rate: 0.0 is not accepted"),
        (["--min-pixels", "0"], "--min-pixels: 0 is not accepted"),
        (["--exclude", "{tmp}/nowhere"], "{tmp}/nowhere: is no folder"),
        (["--exclude", "{tmp}/folder.toml"], "{tmp}/folder.toml: holds no mask of any image"),
        (["--mse-sr", "{tmp}"], "--gan-sr: is not given; give both folders"),
        (["--gan-sr", "{tmp}"], "--mse-sr: is not given; give both folders"),
        (["--labels", "{tmp}/nowhere"], "{tmp}/nowhere: is no folder"),
        (["--segmenter", "guess"], "--segmenter: guess is not accepted"),
        (["--exclude", "{tmp}/folder.toml", "--mse-sr", "{tmp}", "--gan-sr", "{tmp}/none"], "{tmp}/none: is no folder"),
        (["--workspace", "{tmp}/new"], "{tmp}/new: is no workspace with a run in it"),
        (["--workspace", "{tmp}/new", "--mse-sr", "{tmp}", "--gan-sr", "{tmp}"], "--labels: are needed"),
    ],
)
def test_bad_input_changes_nothing(workspace, desra_here, tmp_path, flags: list[str], reason: str) -> None:
    (tmp_path / "folder.toml").mkdir()
    before = files(tmp_path)
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    run = desra_here("calibrate", "--workspace", workspace, "--output", tmp_path / "a.toml", *flags)
    assert refusal(run).startswith(f"error: {reason.format(tmp=tmp_path)}")
    assert files(tmp_path) == before


def test_runs_that_have_no_similarity(make_models, make_photos, pairs, desra_here, tmp_path) -> None:
    output = ("--output", tmp_path / "a.toml")
    corpus = {"mse_sr": pairs.root / "mse_sr", "gan_sr": pairs.root / "gan_sr"}
    process(Detection(**corpus, workspace=tmp_path / "plain", limit=1))
    run = desra_here("calibrate", "--workspace", tmp_path / "plain", *output)
    assert "--labels: are needed, because each class has its own weight" in refusal(run)
    labelled = {"segmenter": f"labels:{pairs.root / 'labels'}", "limit": 1}
    process(Detection(**corpus, **labelled, workspace=tmp_path / "ldl", method="ldl"))
    run = desra_here("calibrate", "--workspace", tmp_path / "ldl", *output)
    assert "is of desra detect --method ldl, which weighs no classes" in refusal(run)


def test_a_mining_workspace_takes_no_pairs(make_models, make_photos, pairs, desra_here, tmp_path) -> None:
    mse, gan = make_models(tmp_path / "models")
    make_photos(tmp_path / "photos", 1)
    process(Mining(photos=tmp_path / "photos", mse_model=mse, gan_model=gan, workspace=tmp_path / "ws"))
    output = ("--workspace", tmp_path / "ws", "--output", tmp_path / "a.toml")
    run = desra_here("calibrate", *pairs.flags, *output)
    assert "belongs to runs of desra mine" in refusal(run)
    labels = np.zeros((200, 240), np.uint8)
    write(tmp_path / "labels/set0/photo000.png", labels)
    calibrating = Calibrating(workspace=tmp_path / "ws", output=tmp_path / "a.toml",
                              segmenter=f"labels:{tmp_path / 'labels'}")  # fmt: skip
    process(corpus_of(calibrating))
    count_all(plan_counting(corpus_of(calibrating), read_exclusion(None)))
    run = desra_here("calibrate", *output, "--labels", tmp_path / "labels")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith(f"next     desra mine {tmp_path / 'photos'} --workspace ")
    origin = tomllib.loads((tmp_path / "a.toml").read_text())["origin"]
    assert (origin["gan_model"], origin["run"], origin["images"]) == (str(gan), "desra mine", 1)
    assert len(origin["gan_model_key"]) == 32
