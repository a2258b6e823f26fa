"""Damage in place is found wherever it is, and what is marked is made again byte for byte."""

from __future__ import annotations

import contextlib
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from desra_core.annotations.corrections import Correction, publish_corrections, undo_import
from desra_core.errors import LostError, TransientError, UsageError
from desra_core.files import write_json
from desra_core.gate.model_registry import promote
from desra_core.housekeeping.verify import Checked, Verification, mark, verify_documents, verify_image
from desra_core.images.codec import decode_mask, encode_mask
from desra_core.planning.plan import IMAGES, load_settings
from desra_core.settings.models import Finetuning
from desra_core.training.patches import check_frozen, read_sample
from desra_core.training.plan import plan_finetune
from desra_core.workspace import DATASET, Workspace, read_table
from desra_core.workspace.manifest import note_checksums, read_manifest
from desra_core.workspace.products import checksums_of, gather_shard, read_records, read_shard
from tests.conftest import in_one_thread
from tests.in_process import train
from tests.tasks.test_histories import Corpus, results


@pytest.fixture(scope="module")
def models(
    make_models: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    return make_models(tmp_path_factory.mktemp("models") / "models")


@pytest.fixture
def corpus(tmp_path: Path, models: tuple[Path, Path]) -> Corpus:
    return Corpus(tmp_path, lambda _, **__: models)


def verified(workspace: Workspace) -> Checked:
    """Check everything, as the flow does."""
    with workspace.locked():
        found = verify_documents(workspace)
        verification = Verification(workspace, {damage.path for damage in found.damaged})
        for number in verification.shards:
            for image, record in verification.work(number):
                found += verify_image(image, record, workspace)
    return found


def flipped(path: Path, position: float) -> None:
    """Flip one bit of a file in place, as a disk or a cable does."""
    data = bytearray(path.read_bytes())
    bit = int(position * (8 * len(data) - 1))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def mended(workspace: Workspace, found: Checked) -> None:
    with workspace.locked():
        for damage in found.damaged:
            assert damage.remedy is None
            mark(workspace, damage)


def test_a_whole_workspace_is_said_to_be_whole(corpus: Corpus) -> None:
    workspace = corpus.run(keep="all")
    found = verified(workspace)
    assert (found.damaged, found.missing) == ((), ())
    assert found.files >= len(list(workspace.root.glob("masks/*"))) + len(list(workspace.root.glob("dataset/*/*.png")))


@pytest.mark.parametrize("position", [0.0, 0.03, 0.5, 1.0])
def test_flipped_bits_in_pictures_and_arrays_are_found_and_mended(corpus: Corpus, position: float) -> None:
    workspace = corpus.run(keep="all")
    before = results(workspace)
    pictures = [path for pattern in ("masks/*", "dataset/*/*.png") for path in workspace.root.glob(pattern)]
    chunks = [path for path in workspace.maps.rglob("*") if path.is_file() and path.parent.suffix != ".zarr"]
    assert {path.parent.name for path in pictures} == {"masks", *DATASET}
    for path in (*pictures, *chunks):
        flipped(path, position)
    found = verified(workspace)
    damaged = {damage.path for damage in found.damaged}
    assert damaged >= {*pictures}
    assert all(damaged & {*path.parents} for path in chunks)
    assert len(damaged) == len(pictures) + len({path.parts[: len(workspace.root.parts) + 4] for path in chunks})
    mended(workspace, found)
    assert results(corpus.run(keep="all")) == before
    assert verified(workspace).damaged == ()


@pytest.mark.parametrize("position", [0.0, 0.1, 0.37, 0.5, 0.93, 1.0])
def test_a_damaged_table_is_named_and_made_again(corpus: Corpus, position: float) -> None:
    workspace = corpus.run(keep="maps")
    before = results(workspace)
    tables = ["manifest", "outcomes/00000000", "regions", "failures", "scan_failures", "dataset/manifest"]
    for path in [*(workspace.root / f"{name}.parquet" for name in tables), workspace.settings]:
        flipped(path, position)
        found = verified(workspace)
        assert [damage.path for damage in found.damaged] == [path]
        mended(workspace, found)
        assert results(corpus.run(keep="maps")) == before
    assert verified(workspace).damaged == ()


def test_results_that_were_deleted_are_made_again(corpus: Corpus) -> None:
    """Those of photos with artifacts, by which the gate judges and later settings make masks."""
    workspace = corpus.run()
    before = {path.relative_to(workspace.root) for path in workspace.maps.glob("*/*/*")}
    for role in ("mse_sr", "gan_sr"):
        shutil.rmtree(next(workspace.maps.glob(f"*/*/{role}")))
    corpus.run()
    assert {path.relative_to(workspace.root) for path in workspace.maps.glob("*/*/*")} == before
    assert verified(workspace).damaged == ()


def test_records_that_are_made_again_say_the_same(corpus: Corpus) -> None:
    workspace = corpus.run()
    before = read_records(workspace).drop_columns(["seconds"])
    workspace.shard_records(0).unlink()
    corpus.run()
    assert read_records(workspace).drop_columns(["seconds"]).equals(before)


def test_single_bits_of_tables_never_read_as_other_rows(corpus: Corpus) -> None:
    workspace = corpus.run()
    table = read_records(workspace)
    path = workspace.shard_records(0)
    data = path.read_bytes()
    for position in np.random.default_rng(0).random(200):
        flipped(path, position)
        with contextlib.suppress(UsageError):
            assert read_records(workspace).equals(table)  # where the bit is in the name of the checksum
        path.write_bytes(data)


def test_a_manifest_that_is_made_again_keeps_the_shards(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """Else an older record in a later shard would count before the newer one."""
    corpus = Corpus(tmp_path, lambda _, **__: models)
    corpus.run(shard_size=3)
    cv2.imwrite(str(corpus.photos / "0.png"), np.full((24, 24, 3), 200, np.uint8))  # the first name, in the last shard
    workspace = corpus.run(shard_size=3)
    shards = {row["name"]: row["shard"] for row in read_manifest(workspace).to_pylist()}
    workspace.manifest.unlink()
    corpus.run(shard_size=3, threshold=0.8)
    assert {row["name"]: row["shard"] for row in read_manifest(workspace).to_pylist()} == shards
    assert results(workspace) == results(corpus.run("fresh", threshold=0.8))


def test_a_picture_that_another_program_has_written_is_damage(corpus: Corpus) -> None:
    workspace = corpus.run()
    mask = next(workspace.masks.iterdir())
    mask.write_bytes(encode_mask(~decode_mask(mask.read_bytes(), mask)))
    assert [damage.path for damage in verified(workspace).damaged] == [mask]


def test_missing_pictures_are_named(corpus: Corpus) -> None:
    workspace = corpus.run()
    lost = [next(workspace.masks.iterdir()), next((workspace.root / "dataset/pseudo_gt").iterdir())]
    for path in lost:
        path.unlink()
    found = verified(workspace)
    assert (set(found.missing), found.damaged) == (set(lost), ())


def test_pictures_of_an_older_desra_get_checksums(corpus: Corpus) -> None:
    workspace = corpus.run()
    with workspace.locked():
        records = read_shard(workspace, 0)
        known = {key: record.checksums for key, record in records.items()}
        gather_shard(workspace, 0, [replace(record, checksums={}) for record in records.values()])
        (work,) = [Verification(workspace, ()).work(0)]
        untold = {image.names[0]: dict(verify_image(image, record, workspace).untold) for image, record in work}
        note_checksums(workspace, untold)
        assert checksums_of(workspace, known) == known
        next(workspace.masks.iterdir()).write_bytes(b"no picture")
        gather_shard(workspace, 0, [replace(record, checksums={}) for record in records.values()])
    assert len(verified(workspace).damaged) == 1


def test_an_import_and_its_undoing_leave_right_checksums(corpus: Corpus) -> None:
    workspace = corpus.run()
    row = read_table(workspace.dataset_manifest, IMAGES).to_pylist()[0]
    mask = np.zeros((row["height"], row["width"]), bool)
    for drawn in (mask | (np.arange(row["width"]) < 9), mask):
        png = encode_mask(drawn)
        correction = Correction("x", row["image"], row["id"], png, int(drawn.sum()), 1, True, (), (), False)
        with workspace.locked():
            publish_corrections(workspace, [correction])
        assert verified(workspace).damaged == ()
        human = workspace.human_mask(row["image"])
        assert human.read_bytes() == png
        flipped(human, 0.7)
        (damage,) = verified(workspace).damaged
        assert (damage.path, damage.remedy is not None) == (human, True)
        flipped(human, 0.7)
    for _ in range(2):
        with workspace.locked():
            undo_import(workspace)
        assert verified(workspace).damaged == ()
    assert verified(workspace).missing == ()


def test_a_finetune_leaves_a_damaged_picture_out(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = corpus.run()
    plan = plan_finetune(finetuning(workspace))
    chosen = {sample.id: sample for sample in plan.samples}
    assert len(chosen) > 1
    sample = next(iter(chosen.values()))
    flipped(sample.results[0], 0.5)
    with pytest.raises(LostError, match=r"is not as it was written; find and mend all"):
        read_sample(sample, 4)


def test_damage_in_a_training_is_found_and_trained_again(corpus: Corpus) -> None:
    workspace = corpus.run()
    with in_one_thread():
        run = train(finetuning(workspace))
        weights = {path.name: path.read_bytes() for path in run.models()}
        for gone in (run.models()[0], run.models()[-1]):
            gone.unlink()
            (damage,) = verified(workspace).damaged
            remedy = f"bring it back from a copy, or delete {run.root} to train again"
            assert (damage.path, damage.reason, damage.remedy) == (gone, "is gone: the gate cannot choose it", remedy)
            gone.write_bytes(weights[gone.name])
        for path in (run.models()[0], run.models()[-1], run.state, next(run.data.rglob("*.npy"))):
            flipped(path, 0.4 if path.suffix == ".npy" else place_of_weights(path))
            found = verified(workspace)
            assert [damage.path for damage in found.damaged] == [path]
            if path.suffix == ".pth":  # a training that has ended is not begun anew
                (damage,) = found.damaged
                assert damage.remedy == f"bring it back from a copy, or delete {run.root} to train again"
                write_json(run.progress, {"iterations": 8})
                found = verified(workspace)
            if path.suffix == ".npy":
                with pytest.raises(UsageError, match=r"is damaged or missing: it is not as it was written; delete"):
                    check_frozen(run.data)
                run.state.unlink()  # else the training has ended, and needs no images
                shutil.rmtree(run.root / "models")
            mended(workspace, found)
            train(finetuning(workspace))
            assert {path.name: path.read_bytes() for path in run.models()} == weights
        flipped(run.document, 0.5)
        (damage,) = verified(workspace).damaged
        assert damage.remedy is not None
        with pytest.raises(UsageError, match=r"run\.json: is damaged; bring it back from a copy"):
            plan_finetune(finetuning(workspace))
        run.document.unlink()
        with pytest.raises(UsageError, match=r"run\.json: is gone; bring it back from a copy, or delete"):
            plan_finetune(finetuning(workspace))


def test_damaged_promoted_models_are_named_and_stay(corpus: Corpus) -> None:
    workspace = corpus.run()
    with workspace.locked():
        entry = promote(workspace, corpus.mse, parent=corpus.gan, record={}, verdict={})
    for name in ("model.pth", "model.json", "history.json"):
        keep = (entry / name).read_bytes()
        flipped(entry / name, 0.3)
        (damage,) = verified(workspace).damaged
        assert (damage.path, damage.remedy is not None) == (entry / name, True)
        (entry / name).write_bytes(keep)
    assert verified(workspace).damaged == ()


def test_what_cannot_be_read_now_is_not_marked(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = corpus.run()

    def refuse(path: Path, expected: str | None) -> bytes:
        raise TransientError(path, "cannot be read (Input/output error)", "check the disk and run again")

    monkeypatch.setattr("desra_core.housekeeping.verify.read_checked", refuse)
    found = verified(workspace)
    assert found.damaged
    assert all(damage.remedy == "check the disk and run again" for damage in found.damaged)


def test_an_older_workspace_is_brought_up_and_a_newer_one_refused(corpus: Corpus) -> None:
    workspace = corpus.run()
    tables = [workspace.manifest, workspace.regions, workspace.shard_records(0), workspace.dataset_manifest]
    for path in tables:
        pq.write_table(pq.read_table(path), path)
    workspace.format.unlink()
    before = [pq.read_table(path) for path in tables]
    with workspace.locked():
        pass
    assert workspace.format.read_text() == "2\n"
    assert [pq.read_table(path) for path in tables] == before
    assert verified(workspace).damaged == ()
    workspace.format.write_text("3\n")
    for command in (lambda: load_settings(workspace), lambda: corpus.run()):
        with pytest.raises(UsageError, match=r"is of a newer desra .*; install that one: pip install --upgrade desra"):
            command()


def place_of_weights(path: Path) -> float:
    """Find the middle of the largest tensor in a checkpoint; between tensors there are only zeros."""
    with zipfile.ZipFile(path) as archive:
        tensor = archive.read(max(archive.infolist(), key=lambda info: info.file_size))
    data = path.read_bytes()
    return (data.index(tensor) + len(tensor) // 2) / len(data)


def finetuning(workspace: Workspace) -> Finetuning:
    return Finetuning(
        workspace=workspace.root, iterations=4, checkpoint_every=2, images=2, patch=32, batch=1, perceptual="off",
        gan_weight=0, amp="float32",
    )  # fmt: skip
