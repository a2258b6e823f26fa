"""One function over many images, for tasks that need no shards: what is done is for their own results to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from desra_core.corpus import ImageRef
from desra_core.errors import ImageError
from desra_core.settings import Machine
from tasks.fanout import Dask, Job, open_dask
from tasks.progress import RunProgress
from tasks.stages import gpus_wanted

Work = Sequence[tuple[ImageRef, Any]]


def each_image(
    name: str,
    prepare: Callable[[Dask, str], Callable[[ImageRef, Any], Any]],
    work: Work,
    machine: Machine,
    *,
    networks: bool,
    folder: Path,
) -> Iterator[tuple[ImageRef, Any]]:
    """Run a function on every image, on all workers; show how far it is.

    Parameters
    ----------
    name
        What is done, in a word.
    prepare
        Gets the cluster and the device of networks, ``cpu`` or ``cuda``; returns the function of an image and of what
        goes with it in ``work``, which workers call: it must be picklable, and so must its small result.
    work
        The images, each with something small for the function.
    machine
        Where and how wide to compute.
    networks
        Whether the function runs networks.
    folder
        Where it writes.

    Yields
    ------
    Each image with its result, or with the `ImageError` that it failed by, as they come.
    """
    gpus = gpus_wanted(networks, machine)
    with (
        open_dask(machine, folder=folder, networks=networks, gpus=gpus) as dask,
        RunProgress(name, len(work), 1) as progress,
    ):
        gpu: dict[str, float] = {"GPU": 1} if networks and dask.gpus and machine.device != "cpu" else {}
        function = prepare(dask, "cuda" if gpu else "cpu")
        for image, result in dask.map(Job(name, function, gpu), work):
            if isinstance(result, ImageError):
                progress.failed(result, len(image.names), 1)
            else:
                progress.passed(1, last=True)
            progress.show()
            yield image, result
