"""Images over a real Dask cluster, and the errors of those that fail."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import cloudpickle
import pytest

from desra_core.errors import ImageError, TooLargeError, TransientError, UsageError
from desra_core.settings import Machine
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import Record
from tasks.dask_cluster import open_dask
from tasks.dask_map import Dask
from tasks.logs import configure
from tests.tasks.jobs import ERRORS, done, follow, images, job

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_every_image_comes_back_once(dask: Dask) -> None:
    work = images(*(f"photo{index}" for index in range(50)))
    results = list(dask.map(*job(done), work))
    assert sorted(image.id for image, _ in results) == sorted(image.id for image, _ in work)
    assert all(result == Record(image.id, mask_key="done") for image, result in results)
    assert list(dask.map(*job(done), [])) == []


def test_memory_bounds_the_image_size(dask: Dask) -> None:
    assert (dask.max_pixels, dask.workers, dask.gpus) == (11_250_000, 2, 0)


def test_workers_keep_no_samples_of_their_stacks(dask: Dask) -> None:
    """Else they grow for the first 1000 seconds, and the memory for images is not theirs."""
    repeated = dask.client.run(lambda dask_worker: set(dask_worker.periodic_callbacks))
    assert len(repeated) == 2
    assert all("heartbeat" in names and "profile" not in names for names in repeated.values())


def moment(image: ImageRef, outcome: Record) -> Record:
    return Record(image.id, mask_key=str(time.monotonic_ns()))


def test_images_are_computed_and_recorded_in_the_order_of_the_work(capfd) -> None:
    """One that comes twice too: each time with what goes with it."""
    work = images(*"hgfedcba", *"hgfedcba")
    with open_dask(Machine(workers=1, memory="1GB", log_level="debug", log_format="json")) as cluster:
        results = sorted(cluster.map(*job(moment), work), key=lambda result: int(result[1].mask_key))
    assert "".join(image.id for image, _ in results) == "hgfedcbahgfedcba"
    configure("warning", "text")
    records = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"stage"' in line]
    assert "".join(record["image"] for record in records) == "hgfedcbahgfedcba"
    about = {(record["stage"], record["shard"], record["level"]) for record in records}
    assert about == {("moment", "00000", "debug")}


def troubled(image: ImageRef, outcome: Record) -> Record:
    if image.id == "surprise":
        raise ZeroDivisionError("a\nbug")
    if image.id == "full":
        raise TransientError("disk", "the disk is full", "free some space and run again")
    return done(image, outcome)


def test_troubles_name_their_image_and_spare_the_others(dask: Dask) -> None:
    work = images("surprise", "full", *(f"photo{index}" for index in range(10)))
    results = {image.id: result for image, result in dask.map(*job(troubled), work)}
    surprise, full = results.pop("surprise"), results.pop("full")
    assert str(surprise).startswith("gan/surprise: failed unexpectedly with ZeroDivisionError (a bug)")
    assert str(full) == "disk: the disk is full; free some space and run again"
    assert isinstance(surprise, TransientError)
    assert isinstance(full, TransientError)
    assert results == {image.id: done(image, Record(image.id)) for image, _ in work[2:]}


REPEATED = {
    "an image that cannot be": ImageError("photo", "is no image", "remove it"),
    "an image that is too large": TooLargeError("photo", "needs more memory", "raise --memory"),
    "a model that has gone": UsageError("model.pth", "does not exist", "check the path"),
}


@pytest.mark.parametrize("failure", REPEATED)
def test_a_failure_that_would_repeat_is_not_tried_again(dask: Dask, tmp_path: Path, failure: str) -> None:
    calls, error = tmp_path / "calls", REPEATED[failure]

    def fails(image: ImageRef, outcome: Record) -> Record:
        with calls.open("a") as file:
            file.write("x")
        raise error

    [(_, result)] = dask.map("fails", fails, {}, images("photo"))
    assert isinstance(result, ImageError)
    assert isinstance(result, TransientError) == (failure != "an image that cannot be")
    assert str(result) == str(error)
    assert calls.read_text() == "x"


def test_transient_failures_are_tried_again(dask: Dask, tmp_path: Path) -> None:
    marker = tmp_path / "failed"

    def fails_once(image: ImageRef, outcome: Record) -> Record:
        if not marker.exists():
            marker.touch()
            raise TransientError(image.id, "failed for now", "try again")
        return done(image, outcome)

    [(_, result)] = dask.map(*job(fails_once), images("photo"))
    assert marker.exists()
    assert result == Record("photo", mask_key="done")


class UnpicklableError(Exception):
    def __reduce__(self) -> str:
        raise TypeError("cannot be pickled")


def refuse(*_: object) -> Record:
    try:
        raise UnpicklableError
    except UnpicklableError:
        raise TransientError("a", "b", "c") from None


def test_the_cause_of_an_error_does_not_garble_it(dask: Dask) -> None:
    with pytest.raises(TransientError, match="a: b; c"):
        dask.call(lambda: refuse(), resources={})
    [(_, result)] = dask.map(*job(refuse), images("photo"))
    assert isinstance(result, TransientError)
    assert str(result) == "a: b; c"


def test_a_long_computation_is_followed(dask: Dask, tmp_path: Path) -> None:
    result, seconds = follow(dask, tmp_path / "calls", "well")
    assert result == 1
    assert 2 <= seconds <= 4


@pytest.mark.parametrize("fate", ERRORS)
def test_an_error_of_a_followed_computation_is_raised_at_once(dask: Dask, tmp_path: Path, fate: str) -> None:
    with pytest.raises(type(ERRORS[fate]), match=str(ERRORS[fate])):
        follow(dask, tmp_path / "calls", fate)
    assert len(list((tmp_path / "calls").iterdir())) == 1
