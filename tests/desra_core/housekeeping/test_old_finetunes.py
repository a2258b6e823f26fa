"""Finetunes that others have replaced go; a later cycle, comparison or rollback finds all that it would have found."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from desra_core.files import read_json
from desra_core.gate.comparison import (
    comparing_of,
    decide_and_publish,
    finetuning_of,
    is_to_promote,
    mining_of,
    plan_comparison,
)
from desra_core.gate.criteria import Verdict
from desra_core.gate.model_registry import current_model, promote, rollback
from desra_core.housekeeping.garbage import _old_finetunes, find_garbage, sweep
from desra_core.settings import Mining
from desra_core.settings.models import Cycling
from desra_core.training.plan import RunFolder, plan_finetune
from desra_core.workspace import Workspace
from tests.in_process import judge_all, process, train

PHOTOS = 9
TINY = {"preset": "cpu", "iterations": 2, "checkpoint_every": 2, "patch": 64, "batch": 2, "discriminator_features": 4,
        "warmup": 1, "images": 2, "held_out": 2, "clean": 1}  # fmt: skip
OPEN = {"min_removal": 0.0, "max_detail_loss": 1.0}


class Turn(NamedTuple):
    """The outcome of a cycle: the key and the weights of its finetune, and the verdict."""

    finetune: str
    was_ended: bool
    judged: int
    verdict: Verdict
    to_promote: bool
    weights: bytes


def turn(cycling: Cycling) -> Turn:
    """A cycle without servers, up to the promotion."""
    workspace = Workspace(cycling.workspace)
    mining = mining_of(cycling)
    process(mining)
    with workspace.locked():
        finetuning = finetuning_of(cycling, mining)
        plan = plan_finetune(finetuning)
        ended = plan.ended
        if not ended:
            train(finetuning)
        comparison = plan_comparison(comparing_of(cycling, mining, plan.run.root))
        judged = judge_all(comparison)
        verdict = decide_and_publish(comparison)
        to_promote = is_to_promote(cycling, comparison, verdict)
        if to_promote:
            best = comparison.best(verdict)
            record = {"source": str(best.source), "weights": best.weights}
            promote(workspace, best.model, parent=comparison.before, record=record, verdict={})
        weights = plan.run.models()[-1].read_bytes()
    return Turn(plan.run.root.name, ended, judged, verdict, to_promote, weights)


@pytest.fixture(scope="module")
def place(make_models, make_photos, tmp_path_factory) -> SimpleNamespace:
    """A workspace in which a finetune did not pass, one did, and so did one of its model."""
    root = tmp_path_factory.mktemp("superseded")
    make_photos(root / "photos", PHOTOS)
    mse, gan = make_models(root / "models")

    def cycling(workspace: Path, **changes: Any) -> Cycling:
        given = {"photos": root / "photos", "mse_model": mse, "gan_model": gan, "workspace": workspace} | TINY
        return Cycling(**(given | {"seed": 1} | OPEN | changes))

    turns = [turn(cycling(root / "ws", **changes)) for changes in ({"seed": 0, "min_removal": 1.0}, {}, {})]
    assert [each.to_promote for each in turns] == [False, True, True]
    assert len({each.finetune for each in turns}) == 3
    return SimpleNamespace(root=root, mse=mse, gan=gan, photos=root / "photos", cycling=cycling, turns=turns)


@pytest.fixture
def workspace(place: SimpleNamespace) -> Workspace:
    """The workspace, to be changed; it is where it was, as finetunes and models name each other by path."""
    kept = place.root / "kept"
    if not kept.exists():
        shutil.copytree(place.root / "ws", kept, symlinks=True)
    shutil.rmtree(place.root / "ws")
    return Workspace(Path(shutil.copytree(kept, place.root / "ws", symlinks=True)))


def candidates(workspace: Workspace) -> set[str]:
    return {path.name for path in (workspace.gate / "candidates").iterdir()}


def test_the_files_that_are_deleted_after_three_cycles(place, workspace: Workspace) -> None:
    failed, first, second = (workspace.finetune(each.finetune) for each in place.turns)
    judged, made = len(list((workspace.gate / "judgements").iterdir())), candidates(workspace)
    assert (judged, len(made)) == (3 * 2 + 2, 3 * 2)  # the first two have a control in common
    promoted = {Path(event["source"]).name for event in json.loads((workspace.current / "history.json").read_bytes())}
    latest = {each["file"] for each in read_json(workspace.compared(second))["candidates"]} - {None}
    before = find_garbage(workspace).table.to_pylist()
    sweep(workspace)
    assert not find_garbage(workspace).table.num_rows
    assert not failed.exists()
    assert sorted(path.name for path in first.iterdir()) == sorted(
        {path.name for path in second.iterdir()} - {"data", "state.pth"}
    )
    assert len(list((workspace.gate / "judgements").iterdir())) == 2 * 3
    assert candidates(workspace) == made & (promoted | latest)
    assert len(candidates(workspace)) == 3
    assert len(list((workspace.gate / "compared").iterdir())) == 2
    assert len(list((workspace.root / "models").glob("*/model.pth"))) == 4  # `current` is one more
    kinds = {(row["path"].rsplit("/", 1)[0] if row["kind"] == "gate" else row["path"]) for row in before}
    assert kinds == {
        f"finetunes/{failed.name}", f"finetunes/{first.name}/data", f"finetunes/{first.name}/state.pth",
        "gate/judgements", "gate/candidates", "gate/compared",
    }  # fmt: skip


@pytest.mark.parametrize("sweeps", [pytest.param(False, marks=pytest.mark.slow), True])
def test_cycle_and_rollback_find_all_that_they_need(place, workspace: Workspace, sweeps: bool, desra_here) -> None:
    """The same with and without a sweep: nothing is trained or judged again, and nothing is promoted again."""
    cycling = place.cycling(workspace.root)
    for back in (2, 1):
        if sweeps:
            sweep(workspace)
        with workspace.locked():
            rollback(workspace)
        found, then = turn(cycling), place.turns[back]
        assert found == then._replace(was_ended=True, judged=0, to_promote=False)
        if back == 2:
            flags = [text for name, value in (TINY | OPEN | {"seed": 1}).items()
                     for text in ("--" + name.replace("_", "-"), value)]  # fmt: skip
            models = ("--mse-model", place.mse, "--gan-model", place.gan)
            again = desra_here("cycle", place.photos, *models, "--workspace", workspace.root, *flags)
            assert again.returncode == 3, again.stderr
            assert f"nothing to do: {PHOTOS} of {PHOTOS} images done" in again.stdout
            assert again.stdout.splitlines()[-1].startswith("not promoted again, because it was rolled back")


def test_an_older_finetune_that_is_to_go_on_ends_with_the_very_weights(place, workspace: Workspace) -> None:
    def twice_rolled_back() -> Turn:
        with workspace.locked():
            rollback(workspace)
            rollback(workspace)
        return turn(place.cycling(workspace.root, iterations=4, min_removal=1.0))

    swept = Path(shutil.copytree(workspace.root, place.root / "swept", symlinks=True))
    expected = twice_rolled_back()
    shutil.rmtree(workspace.root)
    swept.rename(workspace.root)
    sweep(workspace)
    assert twice_rolled_back() == expected
    assert (expected.finetune, expected.was_ended) == (place.turns[1].finetune, False)


def test_an_older_finetune_does_not_go_on_with_other_images(place, workspace: Workspace) -> None:
    from desra_core.errors import UsageError
    from desra_core.training.plan import begin

    sweep(workspace)
    run = workspace.finetune(place.turns[1].finetune)
    with workspace.locked():
        mining = mining_of(place.cycling(workspace.root))
        finetuning = finetuning_of(place.cycling(workspace.root, iterations=4), mining)
        finetuning = finetuning.model_copy(update={"output": run, "gan_model": place.gan, "discriminator": None})
        plan = plan_finetune(finetuning)
        assert not plan.begun
        with pytest.raises(UsageError, match="has lost its training images, and the workspace has others by now"):
            begin(plan, 4)
    assert not (run / "data").exists()
    assert plan_finetune(finetuning.model_copy(update={"iterations": 2})).ended


KEYS = [str(number) * 32 for number in range(10)]


class Fake:
    """Finetunes as folders, without networks; their times follow the order in which they are made."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.gan = root / "gan.pth"
        self.gan.write_bytes(b"gan")
        self.workspace = Workspace(root / "ws")
        self.settings = Mining(
            photos=root, mse_model=root / "mse.pth", gan_model=self.gan, workspace=self.workspace.root
        )
        self.workspace.create()
        self._time = 1_600_000_000

    def finetune(self, key: str, *, parent: str = "other", ended: bool = True, **document: Any) -> RunFolder:
        run = RunFolder(self.workspace.finetune(key))
        for path in (run.data / "0000/lr.npy", run.state, run.losses, run.model(2), run.tensorboard / "events"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"1234567")
        content = {"parent": {"key": parent}, "training": {"iterations": 2 if ended else 4, "patience": 4}} | document
        run.document.write_text(json.dumps(content))
        run.progress.write_text(json.dumps({"iteration": 2, "iterations": 2 if ended else 4, "worse": 0}))
        self._time += 10
        for path in (run.document, run.progress):
            os.utime(path, (self._time, self._time))
        return run

    def compared(self, after: Path, key: str, *, verdict: bool = False) -> None:
        workspace = self.workspace
        candidates = [
            {"name": "x", "judgements": key, "file": f"{key}-ema.pth"},
            {"name": "control", "judgements": key[::-1], "file": None},
        ]
        workspace.publish(
            workspace.compared(after), json.dumps({"after": str(after), "candidates": candidates}).encode()
        )
        workspace.publish(workspace.judgement(key, "image"), b"{}")
        workspace.publish(workspace.gate / "candidates" / f"{key}-ema.pth", b"model")
        if verdict:
            workspace.publish(workspace.verdict, json.dumps({"after": str(after)}).encode())
        self._time += 10
        for path in (workspace.compared(after), workspace.verdict):
            if path.exists():
                os.utime(path, (self._time, self._time))

    def going(self) -> set[str]:
        return {found.path for found in _old_finetunes(self.workspace, self.settings) if found.kind != "unknown"}

    def strangers(self) -> set[str]:
        return {found.path for found in _old_finetunes(self.workspace, self.settings) if found.kind == "unknown"}


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path / "fake")


def test_the_latest_finetune_stays_and_the_others_are_deleted(fake: Fake) -> None:
    for key in KEYS[:3]:
        fake.finetune(key)
    assert fake.going() == {f"finetunes/{key}" for key in KEYS[:2]}
    time = fake.workspace.finetune(KEYS[2]).stat().st_mtime + 1000
    os.utime(RunFolder(fake.workspace.finetune(KEYS[0])).progress, (time, time))  # it went on
    assert fake.going() == {f"finetunes/{key}" for key in KEYS[1:3]}


def test_an_unfinished_finetune_stays_while_its_parent_is_in_use(fake: Fake) -> None:
    from desra_core.files import content_key

    fake.finetune(KEYS[0], ended=False, parent=content_key(fake.gan))
    fake.finetune(KEYS[1], ended=False, parent="another")
    fake.finetune(KEYS[2])
    shutil.rmtree(fake.workspace.finetune(KEYS[3]), ignore_errors=True)
    (fake.workspace.finetune(KEYS[3]) / "data/0000").mkdir(parents=True)  # cut off while it began
    assert fake.going() == {f"finetunes/{KEYS[1]}", f"finetunes/{KEYS[3]}"}
    fake.gan.unlink()  # so the key of the model in use cannot be known
    assert fake.going() == {f"finetunes/{KEYS[3]}"}


@pytest.mark.parametrize("place", ["settings", "verdict", "model", "discriminator", "after"])
def test_a_finetune_that_a_document_names_stays_without_data_and_state(fake: Fake, place: str) -> None:
    named, latest = fake.finetune(KEYS[0]), KEYS[1]
    path = str(named.model(2))
    documents = {
        "settings": fake.workspace.settings,
        "verdict": fake.workspace.verdict,
        "model": fake.workspace.root / "models/0001/model.json",
    }
    if place in documents:
        fake.workspace.publish(documents[place], json.dumps({"after": "x", "some": {"where": [path]}}).encode())
    if place == "after":
        fake.compared(named.root, KEYS[5])
    fake.finetune(latest, **({"discriminator": {"path": path}} if place == "discriminator" else {}))
    assert fake.going() == {f"finetunes/{KEYS[0]}/data", f"finetunes/{KEYS[0]}/state.pth"}


def test_an_unfinished_finetune_that_a_document_names_can_go_on(fake: Fake) -> None:
    named = fake.finetune(KEYS[0], ended=False)
    fake.finetune(KEYS[1], discriminator={"path": str(named.model(2))})
    assert fake.going() == set()


def test_a_finetune_that_a_staying_finetune_names_stays(fake: Fake) -> None:
    oldest = fake.finetune(KEYS[0])
    middle = fake.finetune(KEYS[1], discriminator={"path": str(oldest.model(2))})
    fake.finetune(KEYS[2], discriminator={"path": str(middle.model(2))})
    assert {path.split("/")[-1] for path in fake.going()} == {"data", "state.pth"}
    fake.finetune(KEYS[3])
    assert fake.going() == {f"finetunes/{key}" for key in KEYS[:3]}


def test_a_finetune_with_unknown_files_or_in_progress_stays(fake: Fake) -> None:
    noted, models, running, dropped = (fake.finetune(key) for key in KEYS[:4])
    (noted.root / "notes.md").touch()
    (models.root / "models/best.pth").touch()
    for run in (running, dropped):
        (run.root / "lock").touch()
    fake.finetune(KEYS[4])
    (fake.workspace.finetune("mine")).mkdir()
    with (running.root / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert fake.going() == {f"finetunes/{KEYS[3]}"}
    assert fake.going() == {f"finetunes/{key}" for key in KEYS[2:4]}
    assert fake.strangers() == {
        f"finetunes/{KEYS[0]}/notes.md", f"finetunes/{KEYS[1]}/models/best.pth", "finetunes/mine",
    }  # fmt: skip


def test_half_written_files_go(fake: Fake) -> None:
    run = fake.finetune(KEYS[0])
    scratch = [run.root / ".0f.unfinished", run.root / "models/.1f.unfinished"]
    fake.compared(run.root, KEYS[5])
    scratch.append(fake.workspace.gate / "candidates/.2f.unfinished")
    for path in scratch:
        path.touch()
    scratch.append(fake.workspace.gate_results)
    fake.workspace.publish(fake.workspace.gate_results / "maps/ab/ab.zarr/zarr.json", b"{}")
    assert fake.going() == {str(path.relative_to(fake.workspace.root)) for path in scratch}


def test_judgements_stay_with_the_finetunes_that_they_judge(fake: Fake, tmp_path: Path) -> None:
    """They stay, too, with the latest verdict, and with later comparisons that have no verdict yet."""
    outside = tmp_path / "net_g.pth"
    fake.finetune(KEYS[0])
    latest = fake.finetune(KEYS[1])
    fake.compared(fake.workspace.finetune(KEYS[0]), KEYS[5], verdict=True)
    fake.compared(latest.root, KEYS[6], verdict=True)
    fake.compared(outside, KEYS[7], verdict=True)
    fake.workspace.publish(fake.workspace.gate / "judgements/readme", b"")
    gone = {f"gate/judgements/{KEYS[5]}", f"gate/candidates/{KEYS[5]}-ema.pth", f"finetunes/{KEYS[0]}",
            "gate/compared/" + fake.workspace.compared(fake.workspace.finetune(KEYS[0])).name}  # fmt: skip
    assert fake.going() == gone
    assert fake.strangers() == {"gate/judgements/readme"}
    stays = json.dumps({"source": f"/elsewhere/gate/candidates/{KEYS[5]}-ema.pth"})
    fake.workspace.publish(fake.workspace.root / "models/0000/history.json", stays.encode())
    assert fake.going() == gone - {f"gate/candidates/{KEYS[5]}-ema.pth"}
    for key, known in ((KEYS[8], True), (KEYS[9], False)):
        fake.workspace.publish(fake.workspace.judgement(key, "image"), b"{}")
        if known:
            (fake.workspace.gate / "verdict.json").touch()
            os.utime(fake.workspace.verdict, (1, 1))
            fake.compared(tmp_path / "begun.pth", key)
            os.utime(fake.workspace.verdict, (1_600_000_001, 1_600_000_001))
    assert f"gate/judgements/{KEYS[8]}" not in fake.going()
    assert f"gate/judgements/{KEYS[9]}" in fake.going()


@pytest.mark.parametrize("content", ["5", '"x"', "[]", '{"training": []}', '{"training": 1, "parent": 2}'])
def test_damaged_documents_of_finetunes_end_in_no_traceback(fake: Fake, content: str) -> None:
    run = fake.finetune(KEYS[0])
    fake.finetune(KEYS[1])
    for path in (run.document, run.progress):
        path.write_text(content)
        fake.going()


@pytest.mark.parametrize("damage", ["missing", "damaged", "another version", "damaged verdict"])
def test_without_notes_on_comparisons_the_gate_is_left_alone(fake: Fake, damage: str) -> None:
    run, other = fake.finetune(KEYS[0]), fake.workspace.root / "other.pth"
    fake.compared(other, KEYS[6], verdict=True)
    fake.compared(run.root, KEYS[5], verdict=True)
    fake.workspace.publish(fake.workspace.judgement(KEYS[9], "image"), b"{}")
    assert {f"gate/judgements/{KEYS[9]}", f"gate/compared/{fake.workspace.compared(other).name}"} < fake.going()
    document = fake.workspace.compared(run.root)
    if damage == "missing":
        document.unlink()
    elif damage == "damaged verdict":
        fake.workspace.verdict.write_text('{"scores": []}')
    else:
        document.write_text("{" if damage == "damaged" else "[]")
    assert fake.going() == set()


def test_a_killed_sweep_leaves_no_finetune_half_deleted(place, workspace, monkeypatch) -> None:
    """A cycle would refuse a half-deleted folder, or train on some of the images only."""

    class KilledError(BaseException):
        pass

    def killed(folder: Path, **_: Any) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                path.unlink()
                raise KilledError

    runs = [RunFolder(workspace.finetune(each.finetune)) for each in place.turns]
    found = [{path.relative_to(run.root) for path in run.root.rglob("*")} for run in runs]
    times = 0
    with monkeypatch.context() as patch:
        patch.setattr("desra_core.housekeeping.garbage.shutil.rmtree", killed)
        while any(row["kind"] == "finetunes" for row in find_garbage(workspace).table.to_pylist()):
            with pytest.raises(KilledError):
                sweep(workspace)
            times += 1
            failed, first, second = ({path.relative_to(run.root) for path in run.root.rglob("*")} for run in runs)
            assert failed in (set(), found[0])
            assert second == found[2]
            assert {path for path in found[1] - first if path.parts[0] not in ("data", "state.pth")} == set()
            data = {path for path in found[1] if path.parts[0] == "data"}
            assert data & first in (set(), data)
    assert times > 1
    sweep(workspace)
    assert not find_garbage(workspace).table.num_rows


def test_models_stay(place, workspace: Workspace) -> None:
    models = {path: path.read_bytes() for path in (workspace.root / "models").glob("0*/*")}
    sweep(workspace, vanished=True)
    assert {path: path.read_bytes() for path in (workspace.root / "models").glob("0*/*")} == models
    assert current_model(workspace) is not None
