"""``desra finetune`` as a user meets it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import typer
from typer.testing import CliRunner

from deployments.commands.flags import with_flags
from desra_core import load_model
from desra_core.errors import UsageError
from desra_core.files import content_key, read_document
from desra_core.settings import Detection, Machine, Mining
from desra_core.settings.models import Finetuning
from desra_core.third_party import mend_torchvision
from desra_core.training import plan as planning
from desra_core.training.plan import RunFolder
from desra_core.workspace import Workspace
from tests.conftest import desra_command, photo, refusal
from tests.in_process import process, train

TINY = {"preset": "cpu", "iterations": 8, "checkpoint_every": 2, "patch": 64, "batch": 2, "discriminator_features": 4,
        "warmup": 1, "images": 5}  # fmt: skip


def flags(**changes: object) -> list[str]:
    settings = TINY | changes
    return [text for name, value in settings.items() for text in ("--" + name.replace("_", "-"), str(value))]


def weights(run: Path) -> dict[str, bytes]:
    """All saved models and discriminators, to the byte."""
    return {path.name: path.read_bytes() for path in sorted((run / "models").glob("*.pth"))}


def everything(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def mined(make_models, make_photos, tmp_path_factory) -> SimpleNamespace:
    """Photos, two models, and the workspace of their artifacts."""
    root = tmp_path_factory.mktemp("mined")
    mse, gan = make_models(root / "models")
    make_photos(root / "photos", 18)
    process(Mining(photos=root / "photos", mse_model=mse, gan_model=gan, workspace=root / "ws"))
    return SimpleNamespace(root=root, photos=root / "photos", mse=mse, gan=gan, ws=root / "ws")


def trained(mined: SimpleNamespace, output: Path, **changes: object) -> RunFolder:
    """Train without servers and workers, on all training images."""
    threads = len(os.sched_getaffinity(0))  # as many as the one worker has: last bits depend on it
    settings = TINY | {"images": 50} | changes
    return train(Finetuning(workspace=mined.ws, output=output, **settings), threads=threads)


@pytest.fixture(scope="module")
def undisturbed(mined) -> RunFolder:
    return trained(mined, mined.root / "undisturbed")


@pytest.fixture(scope="module")
def finetuned(mined, desra) -> SimpleNamespace:
    """A finetune whose settings are a TOML file."""
    config = mined.root / "tiny.toml"
    settings = {name.replace("_", "-"): value for name, value in (TINY | {"images": 50}).items()}
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    arguments = ("finetune", "--workspace", mined.ws, "--output", mined.root / "run", "--config", config)
    return SimpleNamespace(arguments=arguments, output=mined.root / "run", run=desra(*arguments))


def test_a_finetune_leaves_models_losses_and_pictures(mined, finetuned, undisturbed) -> None:
    run = RunFolder(finetuned.output)
    assert finetuned.run.returncode == 0, finetuned.run.stderr
    document = read_document(run.document)
    count = len(document["images"])
    assert f"{count} images to train on, fewer than the 50 asked for" in finetuned.run.stderr
    assert f"8 iterations on {count} images\n" in finetuned.run.stdout
    assert "people " not in finetuned.run.stdout
    assert f"next     desra compare --workspace {mined.ws} --after {run.root}\n" in finetuned.run.stdout
    assert weights(run.root) == weights(undisturbed.root)

    assert [path.name for path in run.models()] == [f"iteration_{number:06d}.pth" for number in (2, 4, 6, 8)]
    parent = torch.load(mined.gan)["params"]
    for number, path in zip((2, 4, 6, 8), run.models(), strict=True):
        kinds = torch.load(path, weights_only=True)
        assert kinds.keys() == {"params", "params_ema"}
        for kind in kinds.values():
            assert kind.keys() == parent.keys()
            assert any(not torch.equal(kind[name], parent[name]) for name in kind)
        assert load_model(path).scale == 4
        record = read_document(path.with_suffix(".json"))
        assert record.pop("loss") > 0
        assert record == document | {"iteration": number}
    assert document["parent"] == {"path": str(mined.gan), "key": content_key(mined.gan)}
    assert document["seed"] == 0
    assert re.fullmatch("[0-9a-f]{32}", document["data"])
    assert document["training"]["patch"] == 64
    assert document["training"]["perceptual"] == "off"
    assert document["versions"]["torch"] == version("torch")
    pools = {row["id"]: row["pool"] for row in pq.read_table(Workspace(mined.ws).split).to_pylist()}
    assert {pools[image["id"]] for image in document["images"]} == {"training"}
    severities = [image["severity"] for image in document["images"]]
    assert severities == sorted(severities, reverse=True)
    assert len(list(run.data.glob("[0-9]*"))) == count


def test_again_there_is_nothing_to_do_and_other_settings_are_refused(mined, finetuned, desra_here) -> None:
    before = everything(finetuned.output)
    again = desra_here(*finetuned.arguments)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    other = desra_here(*finetuned.arguments, "--learning-rate", "0.0002")
    line = "holds a training with --learning-rate 0.0001, not 0.0002; give the same again, name another --output"
    assert line in refusal(other)
    other = desra_here(*finetuned.arguments, "--gan-model", mined.mse)
    assert "holds a training with another parent" in refusal(other)
    assert everything(finetuned.output) == before


@pytest.mark.slow
def test_more_iterations_go_on(mined, undisturbed, desra, tmp_path) -> None:
    """And flags do what a TOML file does."""
    trained(mined, tmp_path / "run", iterations=4)
    first = {path: time for path, time in everything(tmp_path / "run/models").items() if path.endswith(".pth")}
    assert len(first) == 4
    run = desra("finetune", "--workspace", mined.ws, "--output", tmp_path / "run", *flags(images=50))
    assert run.returncode == 0, run.stderr
    assert first.items() <= everything(tmp_path / "run/models").items()
    assert weights(tmp_path / "run") == weights(undisturbed.root)


@pytest.mark.slow
def test_a_run_goes_on_in_the_number_format_that_it_began_in(mined, desra, tmp_path) -> None:
    """As one that a GPU began does on this CPU, and says so; what a machine has no say in may be given anew."""
    given = {"workspace": mined.ws, "output": tmp_path / "run", **TINY}
    run = RunFolder(tmp_path / "run")

    def planned(**changes: object) -> planning.FinetunePlan:
        with Workspace(mined.ws).locked():
            return planning.plan_finetune(Finetuning(**given | changes))

    for _ in range(2):  # the second time as after desra gc
        plan = planned(amp="auto")
        planning.begin(plan, 4)
        planning.settle_precision(run, plan.training, "cuda:0")
        assert json.loads(run.document.read_bytes())["precision"] == "bfloat16"
        shutil.rmtree(run.data)
    planning.begin(planned(amp="bfloat16"), 4)
    assert planned(accumulate=2).begun
    with pytest.raises(UsageError, match="holds a training with --amp bfloat16, not float32"):
        planned(amp="float32")
    told = desra("finetune", "--workspace", mined.ws, "--output", run.root, *flags())
    assert told.returncode == 0, told.stderr
    assert "this training was begun in bfloat16 and goes on in it, on the CPU too\n" in told.stderr
    assert json.loads(run.model(8).with_suffix(".json").read_bytes())["precision"] == "bfloat16"


def test_a_run_that_was_begun_before_it_had_fewer_steps_to_warm_up_goes_on(mined, tmp_path) -> None:
    settings = Finetuning(workspace=mined.ws, output=tmp_path / "run", preset="cpu", iterations=20)
    assert settings.warmup is None
    with Workspace(mined.ws).locked():
        planning.begin(planning.plan_finetune(settings), 4)
        document = json.loads((tmp_path / "run/run.json").read_bytes())
        document["training"]["warmup"] = 200
        (tmp_path / "run/run.json").write_text(json.dumps(document))
        assert planning.plan_finetune(settings).begun
        with pytest.raises(UsageError, match="holds a training with --warmup 200, not 5"):
            planning.plan_finetune(settings.model_copy(update={"warmup": 5}))


def kill_when(
    command: list[str], environment: dict[str, str], ready: Callable[[], bool], *, group: bool = True
) -> None:
    """SIGKILL a run, with its workers or alone, as soon as ``ready()`` holds."""
    run = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not ready():
        assert run.poll() is None
        time.sleep(0.001)
    (os.killpg if group else os.kill)(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_at_many_points_it_ends_as_if_undisturbed(mined, undisturbed, prefect_environment, tmp_path) -> None:
    run = RunFolder(tmp_path / "run")
    command = desra_command("finetune", "--workspace", mined.ws, "--output", run.root, *flags(images=50))
    points: list[tuple[Callable[[], bool], bool]] = [
        (run.data.exists, True),
        (run.document.exists, True),
        (run.model(2).exists, True),
        (run.model(4).exists, False),
        (lambda: run.state.exists() and run.model(6).exists(), True),
    ]
    for ready, group in points:
        kill_when(command, prefect_environment, ready, group=group)
    last = subprocess.run(command, env=prefect_environment, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    assert weights(run.root) == weights(undisturbed.root)
    assert run.losses.read_bytes() == undisturbed.losses.read_bytes()
    assert not list(run.root.rglob(".*.unfinished"))


@pytest.mark.slow
def test_a_finetune_that_diverges_names_the_last_good_model(mined, desra, tmp_path) -> None:
    run = desra("finetune", "--workspace", mined.ws, "--output", tmp_path / "run",
                *flags(iterations=40, checkpoint_every=1, learning_rate=0.1))  # fmt: skip
    models = RunFolder(tmp_path / "run").models()
    assert models
    assert f"the last good model is {models[-1]}; start another run with a lower" in refusal(run, server=True)
    for path in models:
        assert all(value.isfinite().all() for kind in torch.load(path).values() for value in kind.values())


def test_without_artifacts_nothing_is_trained(mined, desra_here, tmp_path) -> None:
    (tmp_path / "dark").mkdir()
    for index in range(2):
        cv2.imwrite(str(tmp_path / f"dark/{index}.png"), photo(index, bright=False))
    ws = tmp_path / "ws"
    process(Mining(photos=tmp_path / "dark", mse_model=mined.mse, gan_model=mined.gan, workspace=ws))
    run = desra_here("finetune", "--workspace", ws, "--output", tmp_path / "run", *flags())
    assert run.returncode == 0
    assert "no artifact in the training pool: nothing to train on, and nothing was trained" in run.stdout
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def detected(mined) -> Path:
    """The workspace of ``desra detect`` on what was mined."""
    dataset, ws = mined.ws / "dataset", mined.root / "detected"
    process(Detection(mse_sr=dataset / "mse_sr", gan_sr=dataset / "gan_sr", workspace=ws))
    return ws


def test_results_of_other_tools_need_the_photos_and_the_model(mined, detected, desra_here, tmp_path) -> None:
    run = ("finetune", "--workspace", detected, "--output", tmp_path / "run", *flags())
    model, lr = ("--gan-model", mined.gan), ("--lr", mined.photos)
    assert "records no GAN model: it belongs to desra detect; give --gan-model" in refusal(desra_here(*run, *lr))
    assert "records no LR photos; give --lr" in refusal(desra_here(*run, *model))
    other = desra_here(*run, *model, "--lr", mined.photos / "set0")
    assert "set0: holds no photo of any image of the workspace; " in refusal(other)
    assert not (tmp_path / "run").exists()

    train(Finetuning(workspace=detected, output=tmp_path / "run", gan_model=mined.gan, lr=mined.photos, **TINY))
    told = desra_here(*run, *model, *lr)
    assert told.returncode == 0, told.stderr
    assert f"--before {mined.gan} --lr {mined.photos}" in told.stdout
    images = json.loads((tmp_path / "run/run.json").read_bytes())["images"]
    assert len(images) == 5
    for index, image in enumerate(images):
        expected = cv2.imread(str(Workspace(mined.ws).dataset("pseudo_gt", image["name"])))[:, :, ::-1]
        assert np.array_equal(np.load(tmp_path / f"run/data/{index:04d}/pseudo_gt.npy"), expected)


def test_models_of_another_scale_are_named_once(mined, make_models, monkeypatch, tmp_path) -> None:
    other = make_models(tmp_path / "x2", scale=2)[1]
    settings = Finetuning(workspace=mined.ws, output=tmp_path / "run", gan_model=other, preset="cpu")
    with Workspace(mined.ws).locked():
        plan = planning.plan_finetune(settings)
    tried = []
    read_sample = planning.read_sample
    monkeypatch.setattr(planning, "read_sample", lambda *arguments: tried.append(0) or read_sample(*arguments))
    scale = planning.check_networks(plan.gan_model, plan.training)
    with pytest.raises(UsageError, match="its results are 240x200, but the model enlarges by 2"):
        planning.begin(plan._replace(samples=plan.samples * 100), scale)
    assert len(tried) == 20


def test_images_that_cannot_be_used_are_replaced_by_the_next(mined, tmp_path) -> None:
    settings = Finetuning(workspace=mined.ws, output=tmp_path / "run", preset="cpu", images=3)
    with Workspace(mined.ws).locked():
        plan = planning.plan_finetune(settings)
    broken = plan.samples[0]._replace(lr=tmp_path / "gone.png")
    images, errors = planning.begin(plan._replace(samples=[broken, *plan.samples[1:]]), 4)
    assert images == 3
    assert [error.subject for error in errors] == [str(tmp_path / "gone.png")]
    names = [image["name"] for image in json.loads((tmp_path / "run/run.json").read_bytes())["images"]]
    assert names == [sample.name for sample in plan.samples[1:4]]


def test_unusable_inputs_cost_one_line_and_no_server(mined, desra_here, monkeypatch, tmp_path) -> None:
    mend_torchvision()
    from spandrel.architectures.SPAN import SPAN

    torch.save({"params": SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8).state_dict()}, tmp_path / "span.pth")
    torch.save({"some.weight": torch.zeros(3, 3)}, tmp_path / "unknown.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/holiday.jpg").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing is downloaded
    before = everything(mined.ws)
    for arguments, reason in {
        ("--discriminator", mined.gan): "gan.pth: is no U-Net discriminator with spectral norm",
        ("--discriminator", tmp_path / "missing.pth"): "missing.pth: does not exist",
        ("--gan-model", tmp_path / "span.pth"): "span.pth: is a network that cannot be finetuned here (SPAN)",
        ("--gan-model", tmp_path / "unknown.pth"): "unknown.pth: is of no architecture that spandrel knows",
        ("--gan-model", tmp_path / "text.pth"): "text.pth: is not a checkpoint",
        ("--gan-model", tmp_path / "missing.pth"): "missing.pth: does not exist",
        ("--perceptual", "vgg19"): "--perceptual: vgg19, whose weights are not here and cannot be downloaded",
        ("--perceptual", mined.gan): "gan.pth: holds no weights of VGG19",
        ("--output", tmp_path / "full"): "full: is a folder with other things in it; name a new folder",
        ("--group-by", "["): "--group-by: ",
        ("--accumulate", "3"): "--accumulate: 3 is not accepted (a batch of 2 cannot be computed in so many equal",
        ("--workspace", tmp_path / "nowhere"): "nowhere: does not exist; name the workspace",
        ("--workspace", mined.photos): "photos: is no workspace; name the workspace of desra mine, detect or cycle",
    }.items():
        run = ("finetune", "--workspace", mined.ws, "--output", tmp_path / "run", *flags(), *arguments)
        assert reason in refusal(desra_here(*run))
    assert {path.name for path in tmp_path.iterdir()} <= {"span.pth", "unknown.pth", "text.pth", "full", "torch"}
    assert not (mined.photos / "lock").exists()
    assert {path for path, time in everything(mined.ws).items() if before.get(path) != time} <= {
        str(mined.ws), str(mined.ws / "split.parquet"), str(mined.ws / "lock"), str(mined.ws / "tmp")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "line", "expected"),
    [
        ("", [], {"patch": 256, "batch": 12, "discriminator_features": 64, "perceptual": "vgg19"}),
        ("", ["--preset", "cpu"], {"patch": 96, "batch": 8, "discriminator_features": 16, "perceptual": "off"}),
        ("", ["--preset", "cpu", "--batch", "12"], {"patch": 96, "batch": 12, "perceptual": "off"}),
        ("batch = 3", ["--preset", "cpu", "--patch", "256"], {"patch": 256, "batch": 3, "perceptual": "off"}),
        ('preset = "cpu"\nbatch = 3', ["--batch", "5"], {"patch": 96, "batch": 5, "perceptual": "off"}),
        ('preset = "cpu"', ["--preset", "paper"], {"patch": 256, "batch": 12, "perceptual": "vgg19"}),
    ],
)
def test_a_preset_gives_defaults_and_what_is_given_wins(config, line, expected, tmp_path) -> None:
    app, asked = typer.Typer(), []

    def finetune(settings: Finetuning, machine: Machine) -> None:
        asked.append(settings)

    app.command()(with_flags(finetune, Finetuning))
    (tmp_path / "c.toml").write_text(config)
    result = CliRunner().invoke(
        app, ["--workspace", "ws", "--output", "run", "--config", str(tmp_path / "c.toml"), *line]
    )
    assert result.exit_code == 0, result.output
    assert {name: getattr(asked[0], name) for name in expected} == expected
