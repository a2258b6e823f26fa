"""What runs, reports and desra status say about the reference of a corpus."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from desra_core.errors import UsageError
from desra_core.files import content_key
from desra_core.planning.plan import result_key, result_keys, target_of
from desra_core.planning.reference import describe_reference
from desra_core.settings import Detection, Mining
from desra_core.workspace import Workspace


@pytest.fixture
def mining(make_models, tmp_path: Path) -> Mining:
    mse, gan = make_models(tmp_path / "models")
    return Mining(photos=tmp_path, mse_model=mse, gan_model=gan, workspace=tmp_path / "ws")


def twin(mining: Mining, parent: str) -> Any:
    """Write what desra twin writes beside a checkpoint, and return the sentence."""
    document = {"parent": {"key": parent}, "verdict": {"psnr": {"twin": 25.0, "gan": 23.5, "bicubic": 24.0}}}
    Path(mining.mse_model).with_suffix(".json").write_text(json.dumps(document))
    return describe_reference(mining)


def test_a_network_of_unknown_origin(mining: Mining) -> None:
    assert describe_reference(mining) == (
        "mse.pth, a network that desra did not train: unless the GAN model was finetuned from it, look at the worst "
        "regions before you trust the masks"
    )
    for text in ("no JSON", "[]", '{"parent": 1}', '{"parent": {"key": "a"}, "verdict": {"psnr": {"twin": "x"}}}'):
        Path(mining.mse_model).with_suffix(".json").write_text(text)
        assert "a network that desra did not train" in str(describe_reference(mining))


def test_a_twin_of_this_gan_model_of_its_parent_and_of_another(mining: Mining, tmp_path: Path) -> None:
    key = content_key(mining.gan_model)
    assert twin(mining, key) == (
        "mse.pth, the MSE twin that desra trained from this GAN model (25.00 dB against 23.50 dB PSNR on held-out "
        "photos): trust the masks as far as those photos are like yours"
    )
    assert "a twin that desra trained from another GAN model: look at" in twin(mining, "0" * 32)
    history = tmp_path / "models/history.json"  # beside a promoted model
    history.write_text(json.dumps([{"model": "0" * 32}, {"model": key}]))
    assert "from the GAN model that this one was finetuned from (25.00 dB" in twin(mining, "0" * 32)
    assert "from another GAN model" in twin(mining, "1" * 32)
    for text in ('{"loss": [1, 2]}', "[1, 2]"):  # of another tool
        history.write_text(text)
        assert "from another GAN model" in twin(mining, "0" * 32)


def test_a_checkpoint_of_a_finetune_is_known_by_its_parents(mining: Mining, make_models, tmp_path: Path) -> None:
    """Its JSON file names the parent; beside that, a promoted model, is the history."""
    promoted = make_models(tmp_path / "promoted", scale=2)[1]
    beside = mining.gan_model.with_suffix(".json")
    beside.write_text(json.dumps({"parent": {"key": content_key(promoted), "path": str(promoted)}}))
    promoted.with_name("history.json").write_text(json.dumps([{"model": "0" * 32}]))
    for key in (content_key(promoted), "0" * 32):
        assert "from the GAN model that this one was finetuned from (25.00 dB" in twin(mining, key)
    promoted.unlink()
    assert "from another GAN model" in twin(mining, "0" * 32)
    for parent in ({"key": content_key(mining.gan_model), "path": str(mining.gan_model)}, "a text", {"path": 1}):
        beside.write_text(json.dumps({"parent": parent}))  # its own parent, or of another tool
        assert "from another GAN model" in twin(mining, "0" * 32)


def test_the_workspaces_twin_must_be_of_this_model_unless_it_is_named(mining: Mining) -> None:
    own = Workspace(mining.workspace).twin
    own.parent.mkdir(parents=True)
    shutil.copyfile(mining.mse_model, own)
    own.with_suffix(".json").write_text(json.dumps({"parent": {"key": "0" * 32}}))
    given = mining.model_dump(include={"photos", "gan_model", "workspace"})
    with pytest.raises(UsageError, match=r"twin.pth: is the twin of another GAN model; delete .*/ws/twin and train"):
        target_of(Mining(**given))
    target_of(Mining(**given, mse_model=str(own)))
    own.with_suffix(".json").write_text(json.dumps({"parent": {"key": content_key(mining.gan_model)}}))
    target_of(Mining(**given))


def test_bicubic_enlargement_and_files(mining: Mining) -> None:
    bicubic = mining.model_copy(update={"mse_model": "bicubic"})
    assert str(describe_reference(bicubic)).startswith("bicubic enlargement, which ")
    assert describe_reference(Detection(mse_sr="/m", gan_sr="/g", workspace="/ws")) is None


def test_keys_of_bicubic_results(mining: Mining, make_models, tmp_path: Path, monkeypatch) -> None:
    """They cover the definition, and the GAN model, because its scale is theirs."""
    word, other = mining.model_copy(update={"mse_model": "bicubic"}), make_models(tmp_path / "x2", scale=2)[1]
    keys = result_keys("bicubic", mining.gan_model, "float32")
    target, _ = target_of(word)
    assert (target.mse_sr_key, target.gan_sr_key) == keys
    assert keys[1] == result_key(mining.gan_model, "float32")
    assert result_keys(mining.mse_model, mining.gan_model, "float32")[0] not in keys
    assert result_keys("bicubic", other, "float32")[0] not in keys
    assert result_keys(None, other, "float32")[0] is None
    monkeypatch.setattr("desra_core.planning.plan.BICUBIC_VERSION", 0)
    changed, _ = target_of(word)
    assert changed.gan_sr_key == target.gan_sr_key
    assert changed.mse_sr_key != target.mse_sr_key
    assert changed.similarity_key != target.similarity_key
    assert target_of(mining)[0].mse_sr_key == result_key(Path(mining.mse_model), "float32")
