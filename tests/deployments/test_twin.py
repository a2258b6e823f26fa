"""``desra twin`` as a user meets it, and ``desra cycle`` with one checkpoint from an empty folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest

from desra_core import load_model
from desra_core.workspace import Workspace
from tests.conftest import MODELS, refusal

TINY = ("--preset", "cpu", "--iterations", 8, "--checkpoint-every", 4, "--patch", 32, "--batch", 2)


@pytest.fixture(scope="module")
def place(sharp_photos: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("twin")
    return SimpleNamespace(root=root, photos=sharp_photos(root / "sharp", 6, 160), gan=MODELS / "gan.pth")


def test_a_twin_is_written_with_its_origin_and_its_scores(place, desra, desra_here) -> None:
    output = place.root / "models/twin.pth"
    command = ("twin", place.photos, "--gan-model", place.gan, "--output", output, *TINY)
    run = desra(*command)
    assert run.returncode == 0, run.stderr
    assert "5 photos to train on, 1 held out\n" in run.stderr
    assert run.stdout.endswith(f"\ntwin     {output}\n")
    assert re.search(r"\ntexture  mean similarity of twin and sharp photo 0\.\d{3}\n", run.stdout)
    assert re.findall(r"^(twin|gan|bicubic) +\d", run.stdout, re.MULTILINE) == ["twin", "gan", "bicubic"]
    document = json.loads(output.with_suffix(".json").read_bytes())
    assert document["parent"]["path"] == str(place.gan)
    assert document["training"]["degradation"] == "real"
    assert document["verdict"]["psnr"]["twin"] > document["verdict"]["psnr"]["gan"]
    assert load_model(output).scale == 4
    again = desra_here(*command)
    assert again.returncode == 0
    assert again.stdout == "nothing to do: this twin was trained before\n" + run.stdout
    other = refusal(desra_here(*command, "--loss", "l2"))
    assert (
        "twin.training/run: holds a training with --loss l1, not l2; give the same again, name another --output"
        in other
    )


@pytest.mark.slow
def test_a_twin_that_is_no_better_is_not_written(place, desra, desra_here) -> None:
    output = place.root / "bad.pth"
    command = ("twin", place.photos, "--gan-model", MODELS / "mse.pth", "--output", output, *TINY)
    run = desra(*command, "--learning-rate", "1e-12")
    assert run.returncode == 3, run.stderr
    assert f"failed   the twin is no better than the GAN model in PSNR, so {output} is not written\n" in run.stdout
    assert not output.exists()
    again = desra_here(*command, "--learning-rate", "1e-12")
    assert (again.returncode, again.stdout.splitlines()[0]) == (3, "nothing to do: this twin was trained before")


def test_unusable_inputs_cost_one_line_and_no_server(place, desra_here, sharp_photos, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    for photos, model, more, reason in (
        (tmp_path / "none", place.gan, (), "none: is no folder"),
        (tmp_path / "empty", place.gan, (), "empty: holds no images"),
        (place.photos, tmp_path / "none.pth", (), "none.pth: does not exist"),
        (place.photos, broken, (), "broken.pth: is not a checkpoint, or only a part of one"),
        (
            place.photos,
            place.gan,
            ("--lr", place.photos, "--self"),
            "--self: True is not accepted (--lr is given, too)",
        ),
    ):
        flags = ("--gan-model", model, "--output", tmp_path / "twin.pth", *TINY, *more)
        assert reason in refusal(desra_here("twin", photos, *flags))
    flags = ("--gan-model", place.gan, "--output", tmp_path / "twin.onnx")
    assert "has another suffix than .pth" in refusal(desra_here("twin", place.photos, *flags))


def test_what_a_cycle_lacks_is_named_before_its_twin_is_trained(place, desra_here, tmp_path) -> None:
    workspace = tmp_path / "ws"
    common = ("--gan-model", place.gan, "--workspace", workspace, "--twin-photos", place.photos, *TINY[:2])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    for photos, more, reason in (
        (tmp_path / "none", (), "none: is no folder"),
        (tmp_path / "empty", (), "empty: holds no images"),
        (place.photos, ("--exclude", "*"), "holds no images, but"),
        (place.photos, ("--labels", tmp_path / "empty"), "empty: holds no images"),
        (place.photos, ("--weights", "published"), "--weights: published needs class labels"),
        (place.photos, ("--perceptual", tmp_path / "vgg.pth"), "vgg.pth: does not exist"),
        (place.photos, ("--self",), "--self: True is not accepted (--twin-photos is given, too)"),
        (place.photos, ("--workspace", foreign), "foreign: is a folder with other things in it"),
    ):
        assert reason in refusal(desra_here("cycle", photos, *common, *more))
        assert not workspace.exists()
    config = tmp_path / "serve.toml"
    config.write_text(f"photos = {json.dumps(str(place.photos))}")
    for more, reason in (
        (("--weights", "published"), "--weights: published needs class labels"),
        (("--workspace", foreign), "foreign: is a folder with other things in it"),
    ):
        assert reason in refusal(desra_here("serve", config, *common, *more))
    assert [path.name for path in foreign.iterdir()] == ["notes.txt"]


def test_no_file_is_overwritten(place, desra_here, tmp_path) -> None:
    model = tmp_path / "gan.pth"
    model.write_bytes(place.gan.read_bytes())
    line = refusal(desra_here("twin", place.photos, "--gan-model", model, "--output", model, *TINY))
    assert line == f"error: {model}: exists, and no training of it is beside it; name another --output"
    assert model.read_bytes() == place.gan.read_bytes()


def test_without_an_mse_model_the_way_to_one_is_named(place, desra_here, tmp_path) -> None:
    workspace = tmp_path / "ws"
    for verb in ("mine", "cycle", "serve"):
        photos = ("--photos", place.photos) if verb == "serve" else (place.photos,)
        config = tmp_path / "serve.toml"
        config.write_text("")
        photos = (*photos, config) if verb == "serve" else photos
        line = refusal(desra_here(verb, *photos, "--gan-model", place.gan, "--workspace", workspace))
        assert (
            "--mse-model: is not given, and the workspace has no twin of the GAN model; train one: desra twin" in line
        )
        assert f"--output {workspace / 'twin/twin.pth'}" in line
        assert not workspace.exists()


@pytest.mark.slow
def test_one_checkpoint_is_enough_for_a_cycle(place, desra_alone, desra_here, tmp_path) -> None:
    """From an empty folder, by two Prefect servers of its own; then the twin is there for desra mine, too."""
    photos, workspace = tmp_path / "photos", Workspace(tmp_path / "ws")
    photos.mkdir()
    for path in place.photos.iterdir():
        assert cv2.imwrite(str(photos / path.name), cv2.imread(str(path))[:60, :60])
    common = (photos, "--gan-model", place.gan, "--workspace", workspace.root)
    short = ("--preset", "cpu", "--iterations", 4, "--images", 2)
    run = desra_alone("cycle", *common, "--twin-photos", place.photos, *short, PREFECT_API_URL="")
    assert run.returncode in (0, 3), run.stderr  # three photos cannot be promised to have artifacts
    assert f"training the MSE twin of {place.gan} first, since there is none\n" in run.stderr
    assert "the Prefect server does not answer" not in run.stderr.replace("the Prefect server does not answer yet", "")
    assert "6 of 6 images done, 0 failed\n" in run.stdout
    twin = json.loads(workspace.twin.with_suffix(".json").read_bytes())
    assert twin["iteration"] <= 250
    assert twin["verdict"]["psnr"]["twin"] > twin["verdict"]["psnr"]["gan"]
    again = desra_here("mine", *common)
    assert again.returncode == 0, again.stderr
    assert "nothing to do: 6 of 6 images done, 0 failed before" in again.stdout
    kept = desra_here("gc", "--workspace", workspace.root)
    assert kept.returncode == 0
    assert workspace.twin.exists()
