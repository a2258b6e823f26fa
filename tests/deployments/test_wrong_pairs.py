"""Models and folders that are no pair, as a user meets them: said after the first images, before hours are spent."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from desra_core import load_pair, super_resolve
from desra_core.detection.agreement import FIRST
from desra_core.images.codec import Pixels, encode_png
from desra_core.settings import Mining
from desra_core.workspace import Workspace
from desra_core.workspace.products import read_records
from tests.conftest import MODELS, refusal
from tests.in_process import process
from tests.wrong_pairs import real_photos

COUNT = FIRST + 8


def write(folder: Path, pictures: list[Pixels]) -> Path:
    folder.mkdir(parents=True)
    for index, pixels in enumerate(pictures):
        (folder / f"{index:02d}.png").write_bytes(encode_png(pixels))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[Pixels]]:
    """Photos and their results by the trained pair."""
    photos = real_photos(COUNT, side=48)
    models = load_pair(MODELS / "mse.pth", MODELS / "gan.pth")
    return {"lr": photos} | {
        role: [super_resolve(model, photo).pixels for photo in photos]
        for role, model in zip(("mse_sr", "gan_sr"), models, strict=True)
    }


def biased(folder: Path, value: float) -> Path:
    """The trained GAN model with a value added to all that it gives."""
    content = torch.load(MODELS / "gan.pth", weights_only=True)
    weights = next(iter(content.values()))
    last = sorted((name for name in weights if name.endswith(".bias")), key=lambda name: int(name.split(".")[1]))[-1]
    weights[last] = weights[last] + value
    torch.save({"params": weights}, folder / "biased.pth")
    return folder / "biased.pth"


def doubts(desra, workspace: Path) -> list[str]:
    status = desra("status", "--workspace", workspace, "--json")
    assert status.returncode == 0, status.stderr
    found: list[str] = json.loads(status.stdout)["doubts"]
    return found


def test_an_exchanged_pair_is_told_early_and_stays_visible(desra, results, tmp_path) -> None:
    photos, workspace = write(tmp_path / "photos", results["lr"]), tmp_path / "ws"
    models = "--mse-model", MODELS / "gan.pth", "--gan-model", MODELS / "mse.pth"
    run = desra("mine", photos, *models, "--workspace", workspace)
    assert run.returncode == 0, run.stderr
    said = f"warning: {MODELS / 'gan.pth'}: has more fine texture than {MODELS / 'mse.pth'} in "
    (warning,) = (line for line in run.stderr.splitlines() if line.startswith(said))
    assert f"of {FIRST} images" in warning
    (line,) = doubts(desra, workspace)
    assert f"of {COUNT} images" in line
    assert f"doubt    {line}\n" in run.stdout
    assert f"doubt      {line}\n" in desra("status", "--workspace", workspace).stdout
    assert "as if the two were exchanged" in Workspace(workspace).report.read_text("utf-8")
    again = desra("mine", photos, *models, "--workspace", workspace)
    assert f"doubt    {line}\n" in again.stdout


def test_what_is_made_of_an_exchanged_pair_says_so(desra, desra_here, results, tmp_path) -> None:
    """Weights and finetunes, long after the run that found it; the weights file keeps the line."""
    photos, workspace, output = write(tmp_path / "photos", results["lr"]), tmp_path / "ws", tmp_path / "weights.toml"
    labels = write(tmp_path / "labels", [np.zeros(result.shape[:2], np.uint8) for result in results["gan_sr"]])
    mse, gan = MODELS / "gan.pth", MODELS / "mse.pth"
    process(Mining(photos=photos, mse_model=str(mse), gan_model=gan, workspace=workspace, min_area="100",
                   segmenter=f"labels:{labels}"))  # fmt: skip
    said = f"{mse}: has more fine texture than {gan} in "
    for command in (desra, desra_here):  # the second has nothing to do
        run = command("calibrate", "--workspace", workspace, "--output", output)
        assert run.returncode == 0, run.stderr
        told = "warning: these weights may be of no real pair: "
        (line,) = (line for line in run.stderr.splitlines() if line.startswith(told + said))
        assert f"of {COUNT} images" in line
        assert [line.removeprefix(told)] == tomllib.loads(output.read_text("utf-8"))["origin"]["doubts"]
    assert "as if the two were exchanged" in output.with_suffix(".html").read_text("utf-8")
    quick = "--preset", "cpu", "--iterations", 2, "--patch", 32, "--gan-weight", 0
    run = desra_here("finetune", "--workspace", workspace, *quick)
    assert f"warning: the pseudo ground truths may be of no real pair: {said}" in run.stderr


def test_the_real_pair_is_not_doubted(desra, results, tmp_path) -> None:
    photos, workspace = write(tmp_path / "photos", results["lr"]), tmp_path / "ws"
    models = "--mse-model", MODELS / "mse.pth", "--gan-model", MODELS / "gan.pth"
    run = desra("mine", photos, *models, "--workspace", workspace)
    assert run.returncode == 0, run.stderr
    assert "doubt" not in run.stdout + run.stderr
    assert doubts(desra, workspace) == []


def test_a_model_that_makes_photos_black_ends_the_run(desra, results, tmp_path) -> None:
    photos = write(tmp_path / "photos", [part for lr in results["lr"] for part in (lr, lr[::-1], lr[:, ::-1])])
    model = biased(tmp_path, -5)
    command = "mine", photos, "--mse-model", MODELS / "mse.pth", "--gan-model", model, "--workspace", tmp_path / "ws"
    error = refusal(desra(*command), server=True)
    assert error.startswith(f"error: {model}: has practically one colour in {FIRST} of {FIRST} images; ")
    seen = read_records(Workspace(tmp_path / "ws"), ["id"]).num_rows
    assert FIRST <= seen < 3 * COUNT
    # Nothing is computed in vain a second time.
    again = refusal(desra(*command), server=True)
    assert again.startswith(f"error: {model}: has practically one colour in ")
    assert read_records(Workspace(tmp_path / "ws"), ["id"]).num_rows == seen
    run = desra(*command[:4], *("--gan-model", MODELS / "gan.pth"), *command[6:])
    assert run.returncode == 0, run.stderr
    assert doubts(desra, tmp_path / "ws") == []


@pytest.mark.parametrize(
    ("value", "reason"),
    [(3e38, "gives values that are not finite"), (0.0, "gives back the pixels of a picture as they are")],
)
def test_a_model_that_sees_nothing_is_refused_before_anything_starts(desra, results, tmp_path, value, reason) -> None:
    """This network adds what it finds to the photo: without weights, it finds nothing."""
    photos = write(tmp_path / "photos", results["lr"][:2])
    content = torch.load(MODELS / "gan.pth", weights_only=True)
    weights = next(iter(content.values()))
    for name in weights:
        if value == 0 or name == "body.0.weight":
            weights[name] = torch.full_like(weights[name], value)
    torch.save({"params": weights}, tmp_path / "gan.pth")
    models = "--mse-model", MODELS / "mse.pth", "--gan-model", tmp_path / "gan.pth"
    error = refusal(desra("mine", photos, *models, "--workspace", tmp_path / "ws"))
    assert error.startswith(f"error: {tmp_path / 'gan.pth'}: {reason}; ")


def test_the_same_weights_in_another_file_are_no_twin(desra, results, tmp_path) -> None:
    photos = write(tmp_path / "photos", results["lr"][:2])
    weights = next(iter(torch.load(MODELS / "gan.pth", weights_only=True).values()))
    torch.save(weights, tmp_path / "twin.pth")
    models = "--mse-model", tmp_path / "twin.pth", "--gan-model", MODELS / "gan.pth"
    error = refusal(desra("mine", photos, *models, "--workspace", tmp_path / "ws"))
    assert error.startswith(f"error: {MODELS / 'gan.pth'}: gives the very results of {tmp_path / 'twin.pth'}; ")


def test_folders_that_are_no_pairs(desra, results, tmp_path) -> None:
    """Exchanged, shifted by a pixel, and of other photos; in one folder each, since the names fit."""
    folders = {role: write(tmp_path / role, results[role]) for role in results}
    shifted = write(tmp_path / "shifted", [np.roll(pixels, 1, 1) for pixels in results["gan_sr"]])
    others = write(tmp_path / "others", results["gan_sr"][1:] + results["gan_sr"][:1])
    some = [*results["gan_sr"][:-2], *results["gan_sr"][:2]]
    mixed = write(tmp_path / "mixed", some)

    def detect(mse_sr: Path, gan_sr: Path, *arguments: object):
        workspace = tmp_path / "ws" / f"{gan_sr.name}{len(arguments)}"
        return desra("detect", "--mse-sr", mse_sr, "--gan-sr", gan_sr, "--workspace", workspace, *arguments), workspace

    run, workspace = detect(folders["mse_sr"], folders["gan_sr"])
    assert run.returncode == 0, run.stderr
    assert doubts(desra, workspace) == []
    for arguments in ((), ("--lr", folders["lr"])):
        run, workspace = detect(folders["gan_sr"], folders["mse_sr"], *arguments)
        assert run.returncode == 0, run.stderr
        (line,) = doubts(desra, workspace)
        assert line.startswith(f"{folders['gan_sr']}: has more fine texture than {folders['mse_sr']} in ")
        assert f"warning: {folders['gan_sr']}: has more fine texture" in run.stderr
    run, workspace = detect(folders["mse_sr"], shifted)
    (line,) = doubts(desra, workspace)
    assert line.startswith(f"{shifted}: lies 1.0 px to the right of {folders['mse_sr']}") or "1.1 px" in line
    run, workspace = detect(folders["mse_sr"], mixed)
    (line,) = doubts(desra, workspace)
    assert line.startswith(f"2 images: show other things in both results: {COUNT - 2}, {COUNT - 1}; ")
    run, workspace = detect(folders["mse_sr"], others)
    assert refusal(run, server=True).startswith(f"error: {others}: does not show what {folders['mse_sr']} shows ")
    # When the folder has been put right, nothing is held against it.
    for path in folders["gan_sr"].iterdir():
        (others / path.name).write_bytes(path.read_bytes())
    run, workspace = detect(folders["mse_sr"], others)
    assert run.returncode == 0, run.stderr
    assert doubts(desra, workspace) == []
