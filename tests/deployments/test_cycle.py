"""``desra cycle`` as a user meets it: mine, finetune, judge, promote, and back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import httpx
import pytest
from pydantic import TypeAdapter

import flows.cycle
from deployments.commands.models import run_cycle
from deployments.serving.server import ServerLostError
from desra_core import load_model
from desra_core.files import content_key
from desra_core.gate.comparison import finetuning_of, mining_of
from desra_core.gate.criteria import Verdict
from desra_core.gate.model_registry import current_model, history
from desra_core.settings import Machine, Mining
from desra_core.settings.models import Cycling
from desra_core.training.plan import plan_finetune
from desra_core.workspace import Workspace
from tests.conftest import client_of, desra_command, keyed, photo, refusal
from tests.in_process import process

PHOTOS = 18
# So few steps leave the artifacts where they are.
TINY = {"preset": "cpu", "iterations": 4, "checkpoint_every": 2, "patch": 64, "batch": 2, "discriminator_features": 4,
        "warmup": 1, "images": 5}  # fmt: skip
OPEN_GATE = ("--min-removal", "0", "--max-detail-loss", "1")


@pytest.fixture(scope="module")
def place(make_models, make_photos, tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("cycle")
    make_photos(root / "photos", PHOTOS)
    mse, gan = make_models(root / "models")
    return SimpleNamespace(root=root, photos=root / "photos", mse=mse, gan=gan)


def arguments(place: SimpleNamespace, workspace: Path, *more: object) -> list[object]:
    flags = [text for name, value in TINY.items() for text in ("--" + name.replace("_", "-"), value)]
    models = ("--mse-model", place.mse, "--gan-model", place.gan)
    return ["cycle", place.photos, *models, "--workspace", workspace, "--workers", 1, *flags, *more]


@pytest.fixture(scope="module")
def judged(place, desra) -> SimpleNamespace:
    """A cycle whose finetune did not pass the gate."""
    ws = place.root / "ws"
    return SimpleNamespace(ws=ws, run=desra(*arguments(place, ws)))


@pytest.fixture(scope="module")
def promoted(place, judged, desra) -> SimpleNamespace:
    """The same again, with a gate that lets anything through."""
    ws = copy(judged.ws, place.root / "promoted")
    return SimpleNamespace(ws=ws, run=desra(*arguments(place, ws, *OPEN_GATE)))


def copy(workspace: Path, target: Path) -> Path:
    return Path(shutil.copytree(workspace, target, symlinks=True))


def status(folder: Path, pattern: str = "**/*") -> dict[str, tuple[int, int]]:
    found = {str(path.relative_to(folder)): path.stat() for path in folder.glob(pattern) if path.is_file()}
    return {path: (file.st_ino, file.st_mtime_ns) for path, file in found.items()}


def models(workspace: Path) -> dict[str, bytes]:
    """All that the finetunes of a workspace saved."""
    return {str(path.relative_to(workspace)): path.read_bytes() for path in workspace.glob("finetunes/*/models/*.pth")}


def verdict_of(workspace: Path) -> tuple[Verdict, dict[str, Any]]:
    document = json.loads(Workspace(workspace).verdict.read_bytes())
    return TypeAdapter(Verdict).validate_python(document["verdict"]), document


def test_a_model_that_does_not_pass_is_not_promoted(place, judged, desra_here) -> None:
    """And the same command again has nothing to do."""
    assert judged.run.returncode == 3, judged.run.stderr
    reason = "failed   0 of 4 artifact regions are gone, 0 % (95 % interval: 0 to 49 %), where 75 % are asked for."
    assert reason in judged.run.stdout
    assert f"finding the artifacts of --gan-model, {place.gan}" in judged.run.stderr
    assert not (judged.ws / "models").exists()
    assert len(models(judged.ws)) == 4
    verdict, document = verdict_of(judged.ws)
    assert reason == f"failed   {verdict.reasons[0]}"
    assert document["before"]["key"] == content_key(place.gan)

    before = status(judged.ws)
    again = desra_here(*arguments(place, judged.ws))
    assert again.returncode == 3
    assert f"nothing to do: {PHOTOS} of {PHOTOS} images done, 0 failed before" in again.stdout
    assert reason in again.stdout
    after = status(judged.ws)
    assert {path for path in after if after[path] != before.get(path)} <= {"lock"}


@pytest.mark.slow
def test_a_server_that_goes_after_the_promotion_begins_no_other_turn(
    place, judged, prefect_environment, monkeypatch, capsys
) -> None:
    """The command would start anew else, and take the model that was just promoted as the one to finetune."""
    ws = copy(judged.ws, place.root / "lost")
    turn = flows.cycle.cycle

    def losing(*arguments: Any, **named: Any) -> None:
        turn(*arguments, **named)
        raise httpx.ConnectError("All connection attempts failed")

    monkeypatch.setattr(flows.cycle, "cycle", losing)
    monkeypatch.setenv("PREFECT_API_URL", prefect_environment["PREFECT_API_URL"])
    settings = Cycling(
        photos=place.photos, mse_model=place.mse, gan_model=place.gan, workspace=ws, min_removal=0, max_detail_loss=1,
        **TINY,
    )  # fmt: skip
    with client_of(prefect_environment), pytest.raises(ServerLostError) as lost:
        run_cycle(settings, Machine(workers=1))
    assert lost.value.code == 0
    current = current_model(Workspace(ws))
    assert f"promoted {current}; desra rollback" in capsys.readouterr().out
    assert [event["kind"] for event in history(Workspace(ws))] == ["origin", "promotion"]


def test_what_the_server_knows_of_it(judged, prefect_environment) -> None:
    assert judged.run.returncode == 3, judged.run.stderr
    url = keyed(prefect_environment)

    def ask(kind: str, **query: Any) -> list[dict[str, Any]]:
        return list(httpx.post(f"{url}/{kind}/filter", json=query).raise_for_status().json())

    names = {flow["id"]: flow["name"] for flow in ask("flows")}
    runs = {
        names[run["flow_id"]]: run
        for run in ask("flow_runs")
        if any(isinstance(value, dict) and value.get("workspace") == str(judged.ws)
               for value in run["parameters"].values())
    }  # fmt: skip
    assert {name: run["state"]["name"] for name, run in runs.items()} == dict.fromkeys(
        ("cycle", "mine", "finetune", "compare"), "Completed"
    )
    task_runs, artifacts = {}, {}
    for name, run in runs.items():
        query = {"flow_runs": {"id": {"any_": [run["id"]]}}}
        found = ask("task_runs", **query)
        assert {task_run["state"]["name"] for task_run in found} == {"Completed"}
        task_runs[name] = sorted(task_run["name"].rsplit("-", 1)[0] for task_run in found)
        artifacts[name] = {artifact["key"]: artifact for artifact in ask("artifacts", **query)}
    assert task_runs["finetune"] == ["images", "losses", "train"]
    assert task_runs["compare"] == ["judge", "report", "verdict"]
    assert task_runs["cycle"] == ["compare", "finetune", "mine", "report"]
    assert "super_resolution" in task_runs["mine"]
    assert "**Failed.** 0 of 4 artifact regions are gone" in artifacts["compare"]["verdict"]["data"]
    assert "Mean losses of 4 iterations on 5 images." in artifacts["finetune"]["losses"]["description"]
    assert artifacts["finetune"]["progress"]["data"] == 100
    for name, run in runs.items():
        assert run["state"]["message"] in artifacts[name]["outcome"]["data"]
    for name in ("mine", "finetune", "compare"):
        assert "[Dask dashboard](http" in artifacts[name]["overview"]["data"]


@pytest.mark.slow
def test_a_model_that_passes_becomes_current(place, promoted) -> None:
    assert promoted.run.returncode == 0, promoted.run.stderr
    current = Workspace(promoted.ws).current
    assert f"promoted {promoted.ws / 'models/0001/model.pth'}" in promoted.run.stdout
    verdict, document = verdict_of(promoted.ws)
    assert verdict.passed
    assert f"passed   {verdict.best}\n" in promoted.run.stdout
    assert len(verdict.scores) == 4
    assert document["best"]["key"] == content_key(Path(document["best"]["path"]))
    assert Path(document["best"]["file"]).read_bytes() == (current / "model.pth").read_bytes()
    assert load_model(current / "model.pth").scale == 4
    assert {image["name"] for image in document["finetune"]["images"]}.isdisjoint(document["images"])
    assert json.loads((current / "model.json").read_bytes())["source"] == document["best"]["path"]
    assert [event["kind"] for event in history(Workspace(promoted.ws))] == ["origin", "promotion"]
    assert Workspace(promoted.ws).report.stat().st_mtime_ns >= (current / "model.pth").stat().st_mtime_ns


@pytest.mark.slow
def test_the_next_turn_starts_from_the_current_model(place, promoted, desra, desra_here, tmp_path) -> None:
    """It infers what the new model makes of each photo, and nothing else; and two turns can be rolled back."""
    workspace = Workspace(copy(promoted.ws, tmp_path / "ws"))
    first = current_model(workspace)
    stored = status(workspace.maps, "*/*/mse_sr/**/*")
    assert len({Path(path).parts[1] for path in stored}) == PHOTOS
    run = desra(*arguments(place, workspace.root, *OPEN_GATE))
    assert run.returncode == 0, run.stderr
    assert f"finding the artifacts of the workspace's current model, {first}" in run.stderr
    assert status(workspace.maps, "*/*/mse_sr/**/*") == stored
    process(Mining(photos=place.photos, mse_model=place.mse, gan_model=first, workspace=tmp_path / "fresh"))
    masks = {path.relative_to(workspace.masks): path.read_bytes() for path in workspace.masks.rglob("*.png")}
    assert len(masks) == PHOTOS
    assert all((tmp_path / "fresh/masks" / name).read_bytes() == content for name, content in masks.items())

    document = verdict_of(workspace.root)[1]
    assert document["before"]["key"] == content_key(first)
    assert document["finetune"]["parent"]["key"] == content_key(first)
    source = Path(json.loads((first.parent / "model.json").read_bytes())["source"])
    assert document["finetune"]["discriminator"]["path"] == str(source.with_suffix(".discriminator.pth"))
    second = current_model(workspace)
    assert f"promoted {second}" in run.stdout
    assert second.read_bytes() != first.read_bytes()

    for earlier in (first, place.gan):
        back = desra_here("rollback", "--workspace", workspace.root)
        assert back.returncode == 0, back.stderr
        assert back.stdout == f"current  {current_model(workspace)}\n"
        assert current_model(workspace).read_bytes() == earlier.read_bytes()
        if earlier == first:
            check_that_it_stays_rolled_back(desra_here(*arguments(place, workspace.root, *OPEN_GATE)), workspace)
    refused = desra_here("rollback", "--workspace", workspace.root)
    assert "there is no earlier model" in refusal(refused)


def check_that_it_stays_rolled_back(run: subprocess.CompletedProcess[str], workspace: Workspace) -> None:
    assert run.returncode == 3, run.stderr
    assert "passed   0000" in run.stdout
    after = verdict_of(workspace.root)[1]["after"]
    line = run.stdout.splitlines()[-1]
    assert line.startswith(
        f"not promoted again, because it was rolled back; desra compare --workspace {workspace.root}"
    )
    assert line.endswith(f"--after {after} --before {current_model(workspace)} --promote promotes it")
    assert history(workspace)[-1]["kind"] == "rollback"


@pytest.mark.slow
def test_a_rolled_back_model_is_not_promoted_again_by_itself(place, promoted, desra_here, tmp_path) -> None:
    """Not even after the first promotion, when the model that was given is current again."""
    workspace = Workspace(copy(promoted.ws, tmp_path / "ws"))
    assert desra_here("rollback", "--workspace", workspace.root).returncode == 0
    for _ in range(2):
        check_that_it_stays_rolled_back(desra_here(*arguments(place, workspace.root, *OPEN_GATE)), workspace)
    unpromoted = desra_here(*arguments(place, workspace.root, *OPEN_GATE, "--no-promote"))
    assert unpromoted.returncode == 0
    assert "not promoted" not in unpromoted.stdout


def test_nothing_is_promoted_where_that_was_not_asked_for(place, judged, desra_here, tmp_path) -> None:
    ws = copy(judged.ws, tmp_path / "ws")
    run = desra_here(*arguments(place, ws, *OPEN_GATE, "--no-promote"))
    assert run.returncode == 0, run.stderr
    assert verdict_of(ws)[0].passed
    assert not (ws / "models").exists()


def test_a_finetune_is_known_by_its_inputs(place, judged, desra_here, tmp_path) -> None:
    """Not by where the models lie; and with more iterations the same one goes on."""
    ws = copy(judged.ws, tmp_path / "ws")
    moved = SimpleNamespace(photos=place.photos, mse=place.mse, gan=Path(shutil.copy(place.gan, tmp_path / "g.pth")))
    run = desra_here(*arguments(moved, ws))
    assert run.returncode == 3, run.stderr
    assert "nothing to do" in run.stdout
    given = {"photos": place.photos, "mse_model": place.mse, "gan_model": place.gan, "workspace": ws} | TINY
    [folder] = (ws / "finetunes").iterdir()
    with Workspace(ws).locked():
        for changes, same in (({"iterations": 9}, True), ({"patience": 9}, True), ({"seed": 9}, False)):
            cycling = Cycling(**(given | changes))
            assert (plan_finetune(finetuning_of(cycling, mining_of(cycling))).run.root == folder) == same


def test_without_artifacts_nothing_is_trained(place, desra_here, tmp_path) -> None:
    dark = tmp_path / "dark"
    dark.mkdir()
    for index in range(2):
        cv2.imwrite(str(dark / f"{index}.png"), photo(index, bright=False))
    ws = tmp_path / "ws"
    process(Mining(photos=dark, mse_model=place.mse, gan_model=place.gan, workspace=ws, keep_mse=True))
    run = desra_here(*arguments(SimpleNamespace(photos=dark, mse=place.mse, gan=place.gan), ws))
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("no artifact in the training pool: nothing to train on, and nothing was trained\n")
    assert not (ws / "finetunes").exists()


@pytest.mark.slow
def test_without_held_out_images_a_warning_comes_first_and_the_verdict_is_undecided(
    place, desra, desra_here, tmp_path
) -> None:
    """All photos are bright, so none is clean."""
    (tmp_path / "bright").mkdir()
    for index in range(9):
        cv2.imwrite(str(tmp_path / f"bright/{index}.png"), photo(index, bright=True))
    bright = SimpleNamespace(photos=tmp_path / "bright", mse=place.mse, gan=place.gan)
    ws = tmp_path / "ws"
    run = desra(*arguments(bright, ws, *OPEN_GATE))
    assert run.returncode == 3, run.stderr
    line = "warning: the gate will be undecided: there is no photo without artifacts; at least 1 of them must be held "
    assert line + "out, so add 4 or more: about 30 % of them will be\n" in run.stderr
    assert run.stderr.index(line) < run.stderr.index("iterations")
    assert "undecided No clean image with detail was judged, so nothing shows that detail was kept.\n" in run.stdout
    assert "failed   " not in run.stdout
    verdict, document = verdict_of(ws)
    assert (verdict.passed, verdict.undecided, document["verdict"]["undecided"]) == (False, True, True)
    assert not (ws / "models").exists()
    assert "<strong>Undecided.</strong>" in Workspace(ws).report.read_text()
    again = desra_here(*arguments(bright, ws, *OPEN_GATE))
    assert again.returncode == 3
    assert "undecided No clean image" in again.stdout


def test_unusable_inputs_are_named_before_hours_of_mining(place, desra_here, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing is downloaded
    for more, reason in {
        ("--discriminator", place.gan): "gan.pth: is no U-Net discriminator",
        ("--perceptual", "vgg19"): "--perceptual: vgg19, whose weights are not here",
        ("--lpips", place.gan): "gan.pth: has no features.0.weight, so it is no AlexNet",
        ("--batch", "3", "--accumulate", "2"): "--accumulate: 2 is not accepted (a batch of 3 cannot",
    }.items():
        assert reason in refusal(desra_here(*arguments(place, tmp_path / "ws", *more)))
    assert not (tmp_path / "ws/masks").exists()


def kill_when(command: list[str], environment: dict[str, str], workspace: Path, *patterns: str) -> None:
    """SIGKILL a run and its workers as soon as there are files of all patterns in the workspace."""
    run = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not all(any(workspace.glob(pattern)) for pattern in patterns):
        assert run.poll() is None
        time.sleep(0.002)
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_at_many_points_it_ends_as_if_undisturbed(place, judged, prefect_environment, tmp_path) -> None:
    ws = tmp_path / "ws"
    command = desra_command(*arguments(place, ws))
    points = [
        ("journal/*/*.json", "masks/**/*.png"),  # mining
        ("finetunes/*/data/0001",),  # freezing
        ("finetunes/*/models/iteration_000002.pth",),  # training
        ("gate/candidates/*.pth",),
        ("gate/judgements/*/*.json",),  # judging
        ("gate/verdict.json",),
    ]
    for patterns in points:
        kill_when(command, prefect_environment, ws, *patterns)
        assert not (ws / "models").exists()
    last = subprocess.run(command, env=prefect_environment, capture_output=True, text=True, check=False)
    assert last.returncode == 3, last.stderr
    assert models(ws) == models(judged.ws)
    assert verdict_of(ws)[0] == verdict_of(judged.ws)[0]
    assert {path.relative_to(ws): path.read_bytes() for path in ws.glob("masks/**/*.png")} == {
        path.relative_to(judged.ws): path.read_bytes() for path in judged.ws.glob("masks/**/*.png")
    }
    assert not list((ws / "gate").rglob(".*.unfinished"))

    # With an open gate, the link appears last of all.
    command = desra_command(*arguments(place, ws, *OPEN_GATE))
    kill_when(command, prefect_environment, ws, "models/current/model.pth")
    assert verdict_of(ws)[0].passed
    assert current_model(Workspace(ws)).read_bytes() == Path(verdict_of(ws)[1]["best"]["file"]).read_bytes()
