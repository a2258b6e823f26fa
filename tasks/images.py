"""Run one function on many images, for tasks without shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from desra_core.errors import ImageError
from desra_core.images.codec import most_pixels
from desra_core.settings import Machine
from desra_core.workspace.manifest import ImageRef
from tasks.dask_cluster import gpus_wanted
from tasks.dask_connection import open_dask
from tasks.dask_map import Dask, ImageJob
from tasks.progress import RunProgress


def each_image(
    name: str,
    prepare: Callable[[Dask, str], Callable[[ImageRef, Any], Any]],
    work: Sequence[tuple[ImageRef, Any]],
    machine: Machine,
    *,
    networks: bool,
    scale: int = 1,
    folder: Path,
) -> Iterator[tuple[ImageRef, Any]]:
    """Run a function on every image, on all workers, and show the progress.

    Args:
        name: The work in a word, shown to people.
        prepare: Gets the cluster and the device of networks, ``cpu`` or ``cuda``; returns the function that workers
            call with the two parts of an entry of ``work``. Function and result must be small and picklable.
        work: The images, each with something small for the function; an image may come several times.
        machine: Where and how wide to compute.
        networks: Whether the function runs networks.
        scale: The factor by which networks enlarge photos.
        folder: The folder that the function writes to.

    Yields:
        Each image with its result or its `ImageError`, in the order of completion.
    """
    gpus = gpus_wanted(networks, machine)
    turns = Counter(image.id for image, _ in work)
    stages = max(turns.values(), default=1)
    left, failed = turns.copy(), set[str]()
    files = {image.lr.path if scale > 1 and image.lr else image.path for image, _ in work}
    with (
        open_dask(
            machine,
            folder=folder,
            networks=networks,
            gpus=gpus,
            most_pixels=lambda: most_pixels(files) * scale**2,
        ) as dask,
        RunProgress(name, len(turns), stages) as progress,
    ):
        gpu: dict[str, float] = {"GPU": 1} if networks and dask.gpus and machine.device != "cpu" else {}
        function = prepare(dask, "cuda" if gpu else "cpu")
        for image, result in dask.map(ImageJob(name, function, gpu), work):
            left[image.id] -= 1
            last = not left[image.id]
            if isinstance(result, ImageError) and image.id not in failed:
                failed.add(image.id)
                progress.failed(result, len(image.names), 0)
            progress.passed(1, last=last and image.id not in failed)
            if last:
                progress.passed(stages - turns[image.id])  # the work that other images have and this one has not
            progress.show()
            yield image, result
