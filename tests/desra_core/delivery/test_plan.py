"""What a delivery rests on: the settings of the run before it, and keys that change with what the picture shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from desra_core.delivery.plan import corpus_of, delivery_key, mask_of
from desra_core.errors import UsageError
from desra_core.files import content_key
from desra_core.gate.model_registry import promote
from desra_core.networks.checkpoints import BICUBIC
from desra_core.planning.plan import save_settings, target_of
from desra_core.settings import Mining
from desra_core.settings.models import Delivering
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import HumanMask
from desra_core.workspace.products import Record, Target


@pytest.fixture
def mined(make_models, tmp_path) -> Mining:
    """The settings of a run, which its workspace has."""
    mse, gan = make_models(tmp_path / "models")
    mining = Mining(photos=tmp_path, gan_model=gan, mse_model=mse, workspace=tmp_path / "ws", threshold=0.6)
    workspace = Workspace(mining.workspace)
    workspace.create()
    save_settings(workspace, mining, target_of(mining)[0])
    return mining


def test_a_new_workspace_needs_no_twin(make_models, tmp_path) -> None:
    mse, gan = make_models(tmp_path / "models")
    given = {"photos": tmp_path / "photos", "output": tmp_path / "out", "gan_model": gan}
    corpus = corpus_of(Delivering(**given))
    assert (corpus.workspace, corpus.mse_model) == (tmp_path / "out/.desra", BICUBIC)
    twin = Workspace(tmp_path / "out/.desra").twin
    twin.parent.mkdir(parents=True)
    twin.write_bytes(mse.read_bytes())
    assert corpus_of(Delivering(**given)).mse_model == str(twin)
    assert corpus_of(Delivering(**given, mse_model=BICUBIC)).mse_model == BICUBIC


def test_the_latest_run_and_the_current_model_count(mined: Mining, make_models, tmp_path) -> None:
    delivering = Delivering(workspace=mined.workspace, output=tmp_path.parent / "out")
    assert corpus_of(delivering) == mined
    _, better = make_models(tmp_path / "better", strength=0.1)
    with Workspace(mined.workspace).locked() as workspace:
        entry = promote(workspace, better, parent=mined.gan_model, record={}, verdict={})
    corpus = corpus_of(delivering)
    assert (corpus.threshold, content_key(corpus.gan_model)) == (0.6, content_key(entry / "model.pth"))
    given = delivering.model_copy(update={"gan_model": mined.gan_model})
    assert corpus_of(given).gan_model == mined.gan_model


def test_pictures_among_the_photos_are_refused(mined: Mining, tmp_path) -> None:
    for output in (tmp_path, tmp_path / "out"):
        with pytest.raises(UsageError, match="would take for photos"):
            corpus_of(Delivering(workspace=mined.workspace, output=output))
    corpus_of(Delivering(workspace=mined.workspace, output=tmp_path.parent))


def test_keys_change_with_what_the_picture_shows(tmp_path) -> None:
    target = Target("similarity", "none", "weights", 1.0, 0.7, "4000", "artifacts", "mask", "mse", "gan")
    delivering = Delivering(output=tmp_path, workspace=tmp_path)

    def key(mask: str | None, changed: Target = target, **changes: object) -> str:
        record = Record("id", artifact_pixels=int(mask is not None), checksums={"masks": mask or ""})
        return delivery_key(delivering.model_copy(update=changes), changed, "id", record, None)

    other_mse, other_gan = replace(target, mse_sr_key="other"), replace(target, gan_sr_key="other")
    clean, repaired = key(None), key("mask")
    # Of a clean photo only the GAN result counts; of any, the format.
    assert {key(None, other_mse), key(None, strength=0.5), key(None, feather=3), key(None, repair="off")} == {clean}
    assert key("mask", repair="off") == clean
    others = {key("mask", other_mse), key("other"), key("mask", strength=0.5), key("mask", feather=3),
              key("mask", trust_map=True), key("mask", format="jpeg"), key("mask", other_gan)}  # fmt: skip
    assert len(others | {clean, repaired}) == 9
    assert len({clean, key(None, other_gan), key(None, quality=50), key(None, colour="srgb")}) == 4


def test_a_mask_by_a_person_counts_first(tmp_path) -> None:
    record = Record("id", artifact_pixels=5, checksums={"masks": "detected"})
    drawn, empty = HumanMask("a", tmp_path, 9, 1, "drawn"), HumanMask("a", tmp_path, 0, 0, "empty")
    assert [mask_of(record, human) for human in (None, drawn, empty)] == ["detected", "drawn", None]
    assert mask_of(replace(record, artifact_pixels=0), None) is None
