"""A Dask cluster for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from desra_core.settings import Machine
from tasks.dask_cluster import open_dask
from tasks.dask_map import Dask


@pytest.fixture(scope="module")
def dask() -> Iterator[Dask]:
    with open_dask(Machine(workers=2, memory="1GB")) as cluster:
        yield cluster
