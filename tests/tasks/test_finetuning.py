"""One finetune per device."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow

from deployments.serving.schedules import deployments_of, register
from desra_core.errors import UsageError
from desra_core.gate.comparison import finetuning_with_current, mining_with_current
from desra_core.gate.model_registry import promote
from desra_core.planning.plan import load_settings
from desra_core.settings import Detection, Machine, Mining
from desra_core.settings.models import FinetuneTrigger, Finetuning, Serving
from desra_core.training.plan import plan_finetune
from desra_core.training.pools import Pools, count_new, note_trained
from desra_core.workspace import Workspace
from flows.finetune import finetune
from tasks.finetuning import start_finetune, training_slot
from tests.conftest import client_of, held, keyed
from tests.in_process import process, train

HOLD = """
import functools, sys
from tasks.finetuning import training_slot
with training_slot(sys.argv[1:], on_wait=functools.partial(print, flush=True)) as device:
    print(device, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def holding(*devices: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, *devices], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.slow
def test_each_finetune_gets_its_own_device_and_the_next_one_waits() -> None:
    first = holding("0", "1")
    assert line_of(first) == "0"
    second = holding("0", "1")
    assert line_of(second) == "1"
    third = holding("0", "1")
    said = line_of(third)
    assert said.startswith("another training is on 0, 1, whose process holds /")
    assert said.endswith("-1.lock: waiting until it has ended")
    second.kill()  # however it ends, its device is free
    assert line_of(third) == "1"
    other = holding("cpu")
    assert line_of(other) == "cpu"
    for holder in (first, second, third, other):
        holder.kill()
        holder.communicate()


def test_a_finetune_that_fails_frees_its_device() -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), training_slot(["cpu"], print):
            raise ZeroDivisionError


def test_other_users_can_wait_too(tmp_path) -> None:
    before = os.umask(0o077)
    try:
        with training_slot(["cpu"], print):
            [file] = tmp_path.iterdir()
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


GROUP_BY = "folder"
TINY = {"group_by": GROUP_BY, "preset": "cpu", "iterations": 2, "checkpoint_every": 1, "patch": 64, "batch": 2,
        "discriminator_features": 4, "warmup": 1, "images": 1}  # fmt: skip


@pytest.fixture(scope="module")
def models(make_models, tmp_path_factory) -> tuple[Path, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def mining(models, make_photos, tmp_path) -> Mining:
    make_photos(tmp_path / "photos", 6)
    return Mining(photos=tmp_path / "photos", mse_model=models[0], gan_model=models[1], workspace=tmp_path / "ws")


def gathered(workspace: Workspace, group_by: str = GROUP_BY) -> int:
    with workspace.locked():
        return count_new(workspace, group_by)


def training_ids(workspace: Workspace) -> list[str]:
    corpus, target = load_settings(workspace)
    return [marked.image.id for marked in Pools(workspace, corpus, target, GROUP_BY).with_artifacts("training")]


def test_the_workspace_counts_the_gathered_images(mining, make_photos) -> None:
    workspace = process(mining)
    before = training_ids(workspace)
    assert before
    assert gathered(workspace) == len(before)
    with workspace.locked():
        note_trained(workspace, GROUP_BY)
    assert gathered(workspace) == 0
    # Photos that come later count, those that were there do not, whatever has become of them.
    make_photos(mining.photos, 12)
    process(mining)
    after = training_ids(workspace)
    assert set(before) < set(after)
    assert gathered(workspace) == len(set(after) - set(before))


@pytest.mark.slow
def test_a_finetune_that_has_ended_before_resets_the_count(mining, make_photos, url) -> None:
    """Else a finetune that nothing new would change would be started again every night."""
    workspace = process(mining)
    finetuning = Finetuning(workspace=workspace.root, output=workspace.root / "finetunes" / "given", **TINY)
    train(finetuning)
    make_photos(mining.photos, 12)
    process(mining)
    assert gathered(workspace) >= 1
    assert finetune(finetuning, Machine(workers=1)).in_one_line.startswith("2 iterations on ")
    assert gathered(workspace) == 0


def test_a_finetune_that_dies_is_started_again(mining, url, tmp_path) -> None:
    """Its images still count as gathered."""
    workspace = process(mining)
    count = gathered(workspace)
    diverging = Finetuning(workspace=workspace.root, learning_rate=1e30, output=tmp_path / "run", **TINY)
    with pytest.raises(UsageError):
        finetune(diverging, Machine(workers=1))
    assert (tmp_path / "run" / "run.json").exists()  # it had begun
    assert gathered(workspace) == count


def test_a_finetune_on_results_of_other_tools_counts_nothing(mining, tmp_path) -> None:
    dataset = process(mining).root / "dataset"
    detected = process(Detection(mse_sr=dataset / "mse_sr", gan_sr=dataset / "gan_sr", workspace=tmp_path / "detected"))
    with detected.locked():
        note_trained(detected, GROUP_BY)
    assert not detected.gathered.exists()


def test_nothing_to_count_in_a_workspace_of_nothing(tmp_path) -> None:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    with pytest.raises(UsageError):
        gathered(workspace)


def test_the_default_folder_of_a_finetune_is_named_by_its_inputs(mining, models) -> None:
    workspace = process(mining)
    given = Finetuning(workspace=workspace.root, preset="cpu", group_by=GROUP_BY)
    with workspace.locked():
        plan = plan_finetune(given)
        assert plan.samples
        assert plan.run.root.parent == workspace.root / "finetunes"
        assert plan_finetune(given).run.root == plan.run.root
        assert plan_finetune(given.model_copy(update={"seed": 1})).run.root != plan.run.root
        assert plan_finetune(given.model_copy(update={"iterations": 9})).run.root == plan.run.root


def test_scheduled_runs_start_from_the_current_model(mining, make_models, tmp_path) -> None:
    workspace = process(mining)
    finetuning = Finetuning(workspace=workspace.root, gan_model=mining.gan_model, discriminator=mining.mse_model)
    assert mining_with_current(mining) == mining
    assert finetuning_with_current(finetuning) == finetuning
    better = make_models(tmp_path / "better", strength=0.7)[1]
    with workspace.locked():
        current = promote(workspace, better, parent=mining.gan_model, record={"source": str(better)}, verdict={})
    assert mining_with_current(mining).gan_model == current / "model.pth"
    with pytest.raises(UsageError, match=f"holds the artifacts of {mining.gan_model}, which is not the current model"):
        finetuning_with_current(finetuning)
    process(mining_with_current(mining))
    # The discriminator of the old model is not that of the new one.
    assert finetuning_with_current(finetuning).discriminator is None
    assert finetuning_with_current(finetuning).gan_model == current / "model.pth"
    own = better.with_suffix(".discriminator.pth")
    own.write_bytes(b"weights")
    assert finetuning_with_current(finetuning).discriminator == own


@pytest.fixture
def url(prefect_environment) -> Iterator[str]:
    with client_of(prefect_environment):
        yield keyed(prefect_environment)


def test_enough_gathered_images_start_one_finetune(mining, models, url, monkeypatch) -> None:
    from prefect.client.orchestration import get_client

    workspace = process(mining)
    count = gathered(workspace)
    serving = Serving(**mining.model_dump(), name="following", group_by=GROUP_BY, cycle_at="never", mine_at="never")
    with get_client(sync_client=True) as client:
        register(deployments_of(serving, Machine()), client)

    @flow
    def mined(artifacts: int) -> int:
        return start_finetune(workspace, FinetuneTrigger(artifacts=artifacts, group_by=GROUP_BY))

    def finetunes() -> list[dict[str, Any]]:
        query = {"deployments": {"name": {"any_": ["following"]}}, "flows": {"name": {"any_": ["finetune"]}}}
        return httpx.post(f"{url}/flow_runs/filter", json=query).json()

    assert mined(count) == count  # no deployment, so there is nothing to start
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "3f1ba9c2-0000-4000-8000-000000000000")
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__NAME", "following")
    mined(count + 1)
    assert finetunes() == []
    mined(count)
    [run] = finetunes()
    assert run["state"]["type"] == "SCHEDULED"
    assert "gathered" in run["tags"]
    assert run["parent_task_run_id"] is None
    mined(count)
    assert len(finetunes()) == 1  # that one is waiting
    with held(workspace):
        assert mined(count) == 0
    assert len(finetunes()) == 1
    with get_client(sync_client=True) as client:  # other tests look at all deployments of this server
        for deployment in client.read_deployments():
            if deployment.name == "following":
                client.delete_deployment(deployment.id)
