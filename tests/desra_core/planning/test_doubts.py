"""What stored images say against their two models, and when a run says it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from desra_core import load_pair, super_resolve
from desra_core.detection.agreement import FIRST, PairAgreement, measure_agreement
from desra_core.errors import DesraError, UsageError
from desra_core.images.codec import Pixels, encode_png
from desra_core.planning.doubts import FirstPairs, stored_doubts
from desra_core.planning.plan import load_settings
from desra_core.settings import Detection, Mining
from desra_core.workspace import Workspace
from desra_core.workspace.products import SCHEMA, Record, read_records
from tests.conftest import MODELS
from tests.in_process import process
from tests.wrong_pairs import real_photos

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def results() -> list[tuple[Pixels, Pixels, Pixels]]:
    """Photos, with their results by the trained pair."""
    models = load_pair(MODELS / "mse.pth", MODELS / "gan.pth")
    return [(lr, *(super_resolve(model, lr).pixels for model in models)) for lr in real_photos(FIRST + 2, side=24)]


def detection(folder: Path, pairs: list[tuple[Pixels, ...]], **settings: object) -> Detection:
    roles = {"mse_sr": [pair[-2] for pair in pairs], "gan_sr": [pair[-1] for pair in pairs]}
    for role, pictures in roles.items():
        (folder / role).mkdir(parents=True, exist_ok=True)
        for index, pixels in enumerate(pictures):
            (folder / role / f"{index:02d}.png").write_bytes(encode_png(pixels))
    return Detection(mse_sr=folder / "mse_sr", gan_sr=folder / "gan_sr", workspace=folder / "ws", **settings)


def doubts(workspace: Workspace) -> list[DesraError]:
    return stored_doubts(workspace, *load_settings(workspace))


def ids(workspace: Workspace) -> pa.Array:
    return pq.read_table(workspace.manifest)["id"].combine_chunks()


def first_pairs(workspace: Workspace) -> FirstPairs:
    return FirstPairs(workspace, *load_settings(workspace), ids(workspace))


def records_of(pairs: list[tuple[Pixels, ...]]) -> list[Record]:
    found = [measure_agreement(pair[-2], pair[-1]) for pair in pairs]
    return [Record(str(index), agreement=each and each._asdict()) for index, each in enumerate(found)]


@pytest.fixture
def empty(results, tmp_path) -> Workspace:
    """A workspace whose run has compared nothing."""
    workspace = process(detection(tmp_path, results[:1]))
    workspace.shard_records(0).unlink()
    return workspace


def test_a_run_judges_once_when_it_has_seen_enough(results, empty):
    exchanged = [(lr, gan_sr, mse_sr) for lr, mse_sr, gan_sr in results]
    pairs, said = first_pairs(empty), []
    for number, record in enumerate(records_of(exchanged), 1):
        found = pairs.add([record])
        said += [(number, doubt) for doubt in found]
    ((number, doubt),) = said
    assert number == FIRST
    assert "as if the two were exchanged" in doubt.reason


def test_images_that_say_nothing_do_not_count(results, empty):
    flat = [(np.full((96, 96, 3), 9, np.uint8), np.full((96, 96, 3), 10, np.uint8))] * FIRST
    small = [(pixels[:20, :20], pixels[:20, :20]) for pixels, _ in flat]
    exchanged = [(gan_sr, mse_sr) for _, mse_sr, gan_sr in results]
    pairs = first_pairs(empty)
    assert pairs.add([*records_of(flat), *records_of(small), *records_of(exchanged[: FIRST - 1])]) == []
    assert len(pairs.add(records_of(exchanged[FIRST - 1 : FIRST]))) == 1


def test_what_cannot_be_ends_the_run(results, empty):
    black = [(mse_sr, np.zeros_like(gan_sr)) for _, mse_sr, gan_sr in results]
    pairs = first_pairs(empty)
    assert pairs.add(records_of(black[: FIRST - 1])) == []
    with pytest.raises(UsageError, match="has practically one colour in 16 of 16 images; copy or train it again"):
        pairs.add(records_of(black[FIRST - 1 : FIRST]))


def test_a_model_whose_values_are_never_finite_ends_the_run(results, tmp_path):
    """One photo on which it overflows does not: that photo fails alone."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encode_png(results[0][0]))
    models = {"mse_model": str(MODELS / "mse.pth"), "gan_model": MODELS / "gan.pth"}
    workspace = process(Mining(photos=tmp_path / "photos", workspace=tmp_path / "ws", **models))
    reason = f"cannot be upscaled: {MODELS / 'gan.pth'} gives values that are not finite"
    failed = Record("x", failed_stage="super_resolution", subject="x.png", reason=reason, remedy="use float32")
    good = records_of(results[:1])
    pairs = first_pairs(workspace)
    assert pairs.add([*good, *[failed] * 3 * FIRST]) == []
    workspace.shard_records(0).unlink()
    pairs = first_pairs(workspace)
    assert pairs.add([failed] * (FIRST - 1)) == []
    with pytest.raises(UsageError, match=r"gan\.pth: gives values that are not finite for any of the first 16 photos"):
        pairs.add([failed])


def test_what_an_earlier_run_has_measured_counts(results, tmp_path):
    workspace = process(detection(tmp_path, [(gan_sr, mse_sr) for _, mse_sr, gan_sr in results]))
    (doubt,) = doubts(workspace)
    assert doubt.subject == str(tmp_path / "mse_sr")
    pairs = first_pairs(workspace)
    assert len(pairs.add([])) == 1
    assert pairs.add([]) == []


def test_images_that_were_replaced_or_left_out_do_not_count(results, tmp_path):
    process(detection(tmp_path, [(mse_sr, np.zeros_like(gan_sr)) for _, mse_sr, gan_sr in results]))
    (doubt,) = doubts(Workspace(tmp_path / "ws"))
    assert isinstance(doubt, UsageError)
    workspace = process(detection(tmp_path, results))
    assert doubts(workspace) == []
    assert first_pairs(workspace).add([]) == []


def test_other_settings_do_not_count(results, tmp_path):
    pairs = [(gan_sr, mse_sr) for _, mse_sr, gan_sr in results]
    workspace = process(detection(tmp_path, pairs))
    settings, target = load_settings(workspace)
    other = target.__class__(**(target.__dict__ | {"similarity_key": "another"}))
    assert stored_doubts(workspace, settings, other) == []


def test_images_of_two_photos_are_named(results, tmp_path):
    wrong = [*results[:-1], (*results[-1][:2], results[0][2])]
    workspace = process(detection(tmp_path, wrong))
    (doubt,) = doubts(workspace)
    name = f"{len(wrong) - 1:02d}"
    assert str(doubt) == f"1 image: show other things in both results: {name}; give the results of the same photos"


def test_records_of_before_say_nothing(results, tmp_path):
    """As an older desra has written them."""
    workspace = process(detection(tmp_path, [(gan_sr, mse_sr) for _, mse_sr, gan_sr in results]))
    path = workspace.shard_records(0)
    pq.write_table(pq.read_table(path).drop_columns(["agreement"]), path)
    assert doubts(workspace) == []
    assert first_pairs(workspace).add([]) == []
    assert set(read_records(workspace)["agreement"].to_pylist()) == {None}


def test_the_column_holds_what_was_measured(results, tmp_path):
    workspace = process(detection(tmp_path, results[:3]))
    expected = [measure_agreement(mse_sr, gan_sr) for _, mse_sr, gan_sr in results[:3]]
    stored = [PairAgreement(**row) for row in read_records(workspace)["agreement"].to_pylist()]
    assert sorted(stored, key=str) == sorted((each for each in expected if each), key=str)
    assert SCHEMA.field("agreement").nullable
