"""Planning a comparison, and the verdict that its judgements add up to."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from desra_core.errors import UsageError
from desra_core.gate import comparison as comparing
from desra_core.gate import rounds
from desra_core.gate.comparison import Comparison, decide_and_publish, plan_comparison, verdict_of
from desra_core.gate.criteria import Verdict, read_verdict
from desra_core.gate.judge import CONTROL, judge_stage
from desra_core.networks import checkpoints
from desra_core.networks.checkpoints import read_kinds
from desra_core.settings import Mining
from desra_core.settings.models import Comparing
from desra_core.workspace import Workspace
from tests.in_process import judge_all, judge_job, process


@pytest.fixture(scope="module")
def mined(make_models, make_photos, tmp_path_factory) -> SimpleNamespace:
    """Make a workspace, and a folder like a finetune's: its raw weights are weaker, its EMA weights the MSE model's."""
    root = tmp_path_factory.mktemp("comparison")
    mse, gan = make_models(root / "models")
    make_photos(root / "photos", 18)
    process(Mining(photos=root / "photos", mse_model=mse, gan_model=gan, workspace=root / "ws"))
    (root / "run/models").mkdir(parents=True)
    for number, strength in ((250, 1.4), (500, 0.1)):
        weaker = make_models(root / f"weaker{number}", strength=strength)[1]
        kinds = {"params": torch.load(weaker)["params"], "params_ema": torch.load(mse)["params"]}
        torch.save(kinds, root / f"run/models/iteration_{number:06d}.pth")
    return SimpleNamespace(root=root, photos=root / "photos", mse=mse, gan=gan, run=root / "run")


@pytest.fixture
def workspace(mined, tmp_path) -> Workspace:
    return Workspace(Path(shutil.copytree(mined.root / "ws", tmp_path / "ws")))


@pytest.fixture
def plan(mined, workspace) -> Callable[..., Comparison]:
    def make(after: Path = mined.run, **settings: Any) -> Comparison:
        with workspace.locked():
            return plan_comparison(Comparing(workspace=workspace.root, after=after, **settings))

    return make


def names(comparison: Comparison) -> list[str]:
    return [candidate.name for candidate in comparison.candidates]


def test_each_checkpoint_has_two_candidates(mined, workspace, plan) -> None:
    comparison = plan()
    assert names(comparison) == ["000250 raw", "000250 ema", "000500 raw", "000500 ema", CONTROL]
    for saved in comparison.candidates[:-1]:
        key = {"raw": "params", "ema": "params_ema"}[saved.weights]
        expected = torch.load(saved.source)[key]
        for weights in torch.load(saved.model, weights_only=True).values():
            assert all(torch.equal(weights[name], expected[name]) for name in expected)
    files = {path: path.stat().st_mtime_ns for path in (workspace.gate / "candidates").iterdir()}
    assert len(files) == 4
    (workspace.gate / "candidates/.0f.unfinished").touch()  # of a run that was killed
    plan()
    assert {path: path.stat().st_mtime_ns for path in (workspace.gate / "candidates").iterdir()} == files


def test_a_checkpoint_is_named_after_its_file(mined, plan, tmp_path) -> None:
    assert names(plan(mined.mse)) == ["mse", CONTROL]
    both = shutil.copy(mined.run / "models/iteration_000250.pth", tmp_path / "net_g_5000.pth")
    assert names(plan(Path(both))) == ["net_g_5000 raw", "net_g_5000 ema", CONTROL]


def test_kinds_of_weights(mined, tmp_path) -> None:
    weights = torch.load(mined.mse)["params"]
    other = torch.load(mined.gan)["params"]
    for content, kinds in (
        (weights, ["raw"]),
        ({"params": weights}, ["raw"]),
        ({"params_ema": weights}, ["raw"]),
        ({"params": weights, "params_ema": {name: value.clone() for name, value in weights.items()}}, ["raw"]),
        ({"params": weights, "params_ema": other}, ["raw", "ema"]),
        ({"params": weights, "params_ema": {}}, ["raw"]),
    ):
        torch.save(content, tmp_path / "model.pth")
        assert list(read_kinds(tmp_path / "model.pth")) == kinds
    other["body.0.bias"][0] = torch.inf
    torch.save({"params": weights, "params_ema": other}, tmp_path / "model.pth")
    with pytest.raises(UsageError, match=r"has values in body\.0\.bias that are not finite"):
        read_kinds(tmp_path / "model.pth")


def test_the_images_are_the_first_by_content_hash(plan) -> None:
    images = plan().images
    assert len(images) == 6
    marked = images[:4]
    assert [image.id for image in marked] == sorted(image.id for image in marked)
    few = plan(held_out=2, clean=1).images
    assert few == [*marked[:2], images[4]]


def test_judgements_hold_for_one_old_model_and_one_detection(mined, workspace, plan, make_models, tmp_path):
    def keys(**settings: Any) -> set[str]:
        return {candidate.key for candidate in plan(**settings).candidates}

    first = keys()
    assert len(first) == 5
    assert keys(min_removal=0.1, held_out=1, clean=1) == first
    stronger = make_models(tmp_path / "stronger", strength=2.0)[1]
    seen = set(first)
    for changes in ({"before": stronger}, {"mse_model": make_models(tmp_path / "m", strength=0.1)[1]}):
        assert seen.isdisjoint(keys(**changes))
        seen |= keys(**changes)
    process(Mining(photos=mined.photos, mse_model=mined.mse, gan_model=mined.gan, workspace=workspace.root,
                   threshold=0.6))  # fmt: skip
    assert seen.isdisjoint(keys())


def test_a_comparison_has_a_key(plan, mined) -> None:
    assert plan().key == plan(min_removal=0.1).key
    assert len({plan().key, plan(mined.mse).key, plan(held_out=1).key}) == 3


def test_the_verdict_names_its_models_and_images(mined, workspace, plan, monkeypatch) -> None:
    comparison = plan()
    assert len(comparison.missing()) == 6
    assert judge_all(comparison) == 6
    assert comparison.missing() == []
    expected = verdict_of(comparison)
    assert not workspace.verdict.exists(), "to ask what the verdict is writes nothing"
    verdict = decide_and_publish(comparison)
    assert verdict == expected
    document = json.loads(workspace.verdict.read_bytes())
    assert TypeAdapter(Verdict).validate_python(document["verdict"]) == verdict
    assert read_verdict(workspace)[0].verdict == verdict
    removed = {score.candidate: (score.gone, score.regions) for score in verdict.scores}
    assert removed == {"000250 raw": (0, 4), "000250 ema": (4, 4), "000500 raw": (4, 4), "000500 ema": (4, 4)}
    best = comparison.best(verdict)
    assert document["best"]["path"] == str(best.source)
    assert document["best"]["weights"] == best.weights
    assert document["best"]["file"] == str(best.model)
    assert document["images"] == [image.names[0] for image in comparison.images]
    severities = [picture["region"]["severity"] for picture in document["pictures"]]
    assert len(severities) == 4
    assert severities == sorted(severities, reverse=True)
    for picture in document["pictures"]:
        assert picture["crops"].keys() == {"lr", "mse_sr", "before", "after"}
        assert all((workspace.gate / path).exists() for path in picture["crops"].values())
    written = workspace.verdict.stat().st_mtime_ns
    read = Counter()
    reading = comparing.read_judgement
    monkeypatch.setattr(
        comparing,
        "read_judgement",
        lambda *which, **human: (read.update([(which[1].name, which[2].id)]), reading(*which, **human))[1],
    )
    assert decide_and_publish(comparison) == verdict
    assert max(read.values()) <= 3, "once to see what is missing, once for the scores, and the best once to be shown"
    assert workspace.verdict.stat().st_mtime_ns == written


@pytest.fixture
def many(make_models, tmp_path) -> Path:
    """Make the folder of a finetune that saved 6 models with two kinds of weights each."""
    (tmp_path / "many/models").mkdir(parents=True)
    for number in range(6):
        weights = [
            torch.load(make_models(tmp_path / "m", strength=1 + shift / 100)[1]) for shift in (number, number + 50)
        ]
        kinds = {name: content["params"] for name, content in zip(("params", "params_ema"), weights, strict=True)}
        torch.save(kinds, tmp_path / f"many/models/iteration_{number:06d}.pth")
    return tmp_path / "many"


@pytest.mark.parametrize("kept", [pytest.param(1000, marks=pytest.mark.slow), 6])
def test_each_of_many_models_is_loaded_once(plan, many, monkeypatch, kept: int) -> None:
    """This holds for all images together, however few models a process keeps."""
    cache = checkpoints._loaded.cache
    cache.clear()
    comparison = plan(many)
    assert len(comparison.candidates) == 13
    assert len(cache) == 14  # all were tried, but for the control
    size = comparison.candidates[0].model.stat().st_size
    monkeypatch.setattr(checkpoints.Model, "kept_bytes", size)
    monkeypatch.setattr(comparing, "KEPT_BYTES", kept * size)
    cache.clear()
    monkeypatch.setattr(cache, "_Cache__maxsize", kept * size)

    loaded: list[Path] = []
    recognised = checkpoints.recognised
    monkeypatch.setattr(checkpoints, "recognised", lambda path, *more: loaded.append(path) or recognised(path, *more))
    assert judge_all(comparison) == len(comparison.images) == 6
    times = Counter(loaded)
    assert {times[candidate.model] for candidate in comparison.candidates[:-1]} == {1}
    assert len(loaded) <= 14 + 2 * 3  # of the pair, once for each four others
    assert len(cache) == min(kept, 14)
    assert comparison.missing() == []
    plan(many)  # what was judged is not tried again
    assert {times[candidate.model] for candidate in comparison.candidates[:-1]} == {1}


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """The first part is one image of each kind, since the workspace has only four and two."""
    monkeypatch.setattr(rounds, "LEAST_MARKED", 1)
    monkeypatch.setattr(rounds, "LEAST_CLEAN", 1)


def of_best(verdict: Verdict) -> tuple[object, ...]:
    best = [score for score in verdict.scores if score.candidate == verdict.best]
    return verdict.outcome, verdict.best, verdict.reasons, best, verdict.control


@pytest.mark.usefixtures("small_parts")
def test_the_verdict_is_the_same_with_and_without_rounds(workspace, plan) -> None:
    comparison = plan()
    judge_all(comparison)
    verdict = decide_and_publish(comparison)
    assert verdict.dropped == ("000250 raw",)
    assert {score.candidate: score.images for score in verdict.scores}["000250 raw"] == 2
    assert len(list((workspace.gate / "judgements" / comparison.candidates[0].key).glob("*.json"))) == 2
    whole = plan(rounds=False)
    assert {names for _, names in whole.missing()} == {("000250 raw",)}
    judge_all(whole)
    full = decide_and_publish(whole)
    assert full.dropped == ()
    assert of_best(full) == of_best(verdict)
    assert decide_and_publish(plan()) == verdict, "what was judged beyond the rounds does not count in them"


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("stages", [1, 5, 8])
def test_a_run_that_was_killed_in_a_round_ends_with_the_same_verdict(mined, workspace, plan, tmp_path, stages) -> None:
    comparison = plan()
    job, left = judge_job(comparison), stages
    for each in comparison.rounds():
        work = each.missing[:left]
        for image, names in work:
            judge_stage(image, names, workspace, comparison, job)
        left -= len(work)
        if not left:
            break
    assert workspace.gate_results.exists() == (stages > 4), "mining has stored the results of the four others"
    resumed = plan()
    assert resumed.missing()
    judge_all(resumed)
    other = Workspace(Path(shutil.copytree(mined.root / "ws", tmp_path / "other")))
    with other.locked():
        uncut = plan_comparison(Comparing(workspace=other.root, after=mined.run))
        judge_all(uncut)
        expected = decide_and_publish(uncut)
    assert decide_and_publish(resumed) == expected
    assert not workspace.gate_results.exists(), "the verdict needs no results any more"


def test_an_image_that_lacks_one_judgement_counts_for_no_candidate(workspace, plan) -> None:
    """Otherwise a candidate that fails on the worst photos would look better than the others."""
    comparison = plan()
    judge_all(comparison)
    image, candidate = comparison.images[0], comparison.candidates[1]
    workspace.judgement(candidate.key, image.id).unlink()
    assert comparison.missing() == [(image, (candidate.name,))]
    verdict = decide_and_publish(comparison)
    assert {score.images for score in (*verdict.scores, verdict.control)} == {5}
    assert {score.regions for score in (*verdict.scores, verdict.control)} == {3}
    assert image.names[0] not in json.loads(workspace.verdict.read_bytes())["images"]


def test_without_held_out_images_nothing_passes(make_photos, mined, tmp_path) -> None:
    make_photos(tmp_path / "photos", 2)
    ws = tmp_path / "ws"
    process(Mining(photos=tmp_path / "photos", mse_model=mined.mse, gan_model=mined.gan, workspace=ws))
    with Workspace(ws).locked():
        comparison = plan_comparison(Comparing(workspace=ws, after=mined.mse, group_by="no such name"))
        comparison.images.clear()
        verdict = decide_and_publish(comparison)
    assert not verdict.passed
    assert verdict.reasons[0].startswith("No held-out image has an artifact region")
