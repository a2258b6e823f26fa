"""Read the file of ``--cluster``, which names a Dask cluster to start or a scheduler, and open it for a run."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from distributed import LocalCluster, Nanny, SSHCluster, Worker
from distributed.deploy.cluster import Cluster
from distributed.security import Security
from pydantic import Field, ValidationError, field_validator, model_validator

from desra_core.errors import AbsentError, UsageError, described
from desra_core.settings import Frozen, at_home
from desra_core.settings.models import parse_span

_CLASSES = "such as distributed.LocalCluster, distributed.SSHCluster or dask_jobqueue.SLURMCluster"


class ClusterFile(Frozen):
    """What a cluster file may hold; the first three fields are those of Prefect's DaskTaskRunner."""

    cluster_class: str | None = Field(None, description="import path of a cluster class, " + _CLASSES)
    cluster_kwargs: dict[str, Any] = Field({}, description="arguments of that class")
    adapt_kwargs: dict[str, Any] = Field({}, description="least and largest number of workers: minimum and maximum")
    workers: int | None = Field(None, ge=1, description="number of workers that never changes")
    address: str | None = Field(
        None, pattern=r"^\w+://.+", description="address of a running scheduler, in place of a class"
    )
    security: dict[str, Any] = Field({}, description="arguments of distributed.Security, such as tls_ca_file")
    wait: str = Field("30 minutes", description="how long to wait for the first worker, like 2 hours")

    @field_validator("wait")
    @classmethod
    def _is_span(cls, wait: str) -> str:
        parse_span(wait)
        return wait

    @field_validator("adapt_kwargs")
    @classmethod
    def _keeps_one(cls, adapt_kwargs: dict[str, Any]) -> dict[str, Any]:
        # A run asks its workers what they are before it has work for them.
        least = adapt_kwargs.get("minimum", 1)
        if not isinstance(least, int) or least < 1:
            raise ValueError("a run needs a minimum of 1 or more")
        return adapt_kwargs | {"minimum": least} if adapt_kwargs else {}

    @model_validator(mode="after")
    def _one_of_each(self) -> ClusterFile:
        if (self.cluster_class is None) == (self.address is None):
            raise ValueError("give either cluster_class or address")
        if self.adapt_kwargs and self.workers:
            raise ValueError("give either adapt_kwargs or workers")
        if self.address and (self.cluster_kwargs or self.adapt_kwargs or self.workers):
            raise ValueError("an address takes no cluster_kwargs, adapt_kwargs or workers")
        return self

    @property
    def patience(self) -> float:
        """How many seconds to wait for a worker."""
        return parse_span(self.wait).total_seconds()


class Reached(NamedTuple):
    """The scheduler of a cluster file: its address and certificates, and how many seconds its workers may take."""

    address: str
    security: Security | None
    patience: float | None


def read_cluster_file(path: Path) -> ClusterFile:
    """Read and check a cluster file; nothing is started.

    Raises:
        UsageError: The file cannot be read, or a class, a package, an argument or a certificate in it cannot be used.
    """
    remedy = "mend the file or its name"
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(path, f"cannot be read ({described(error)})", remedy) from None
    except yaml.YAMLError as error:
        raise UsageError(path, f"is no YAML ({' '.join(str(error).split())})", remedy) from None
    if not isinstance(content, dict):
        raise UsageError(path, "holds no keys", f"give {_keys()}")
    try:
        file = ClusterFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise UsageError(path, f"has the unknown key {key}", f"keys are {_keys()}") from None
        why = first["msg"].removeprefix("Value error, ")
        field = ClusterFile.model_fields.get(key)
        reason = f"{key}: {first['input']} is not accepted ({why})" if field else f"does not fit together ({why})"
        raise UsageError(path, reason, (field and field.description) or f"keys are {_keys()}") from None
    _security_of(file, path)
    if file.cluster_class:
        _check_arguments(_imported(file.cluster_class, path), file, path)
    return file


@contextlib.contextmanager
def opened_cluster(path: Path) -> Iterator[Reached]:
    """Start the cluster of a cluster file, or find its scheduler; stop the cluster at the end.

    Raises:
        UsageError: As `read_cluster_file`, or the class refuses its arguments.
        AbsentError: The cluster does not start.
    """
    file = read_cluster_file(path)
    security = _security_of(file, path)
    if file.address:
        yield Reached(file.address, security, None)
        return
    kind = _imported(str(file.cluster_class), path)
    given = dict(file.cluster_kwargs) | ({"security": security} if security else {})
    if "silence_logs" in inspect.signature(kind).parameters:
        given = {"silence_logs": logging.CRITICAL} | given
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # such as that the dashboard has another port
            cluster = kind(**given)
    except (TypeError, ValueError) as error:
        reason = f"{file.cluster_class} refuses its arguments ({described(error)})"
        raise UsageError(path, reason, "mend cluster_kwargs") from None
    except Exception as error:
        reason = f"{file.cluster_class} does not start ({described(_first_cause(error))})"
        raise AbsentError(path, reason, "mend cluster_kwargs, or what it names") from error
    with contextlib.closing(cluster):
        if file.workers:
            cluster.scale(file.workers)
        elif file.adapt_kwargs:
            cluster.adapt(**file.adapt_kwargs)
        yield Reached(cluster.scheduler_address, cluster.security, file.patience)


def _first_cause(error: BaseException) -> BaseException:
    return _first_cause(error.__cause__) if error.__cause__ else error


def _keys() -> str:
    return ", ".join(ClusterFile.model_fields)


def _imported(name: str, path: Path) -> Callable[..., Any]:
    """Import a cluster class by its path (raises `UsageError`)."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        reason = f"{name} needs the package {package}, which is not installed"
        raise UsageError(path, reason, f"pip install {package.replace('_', '-')}, or name another class") from None
    except (ImportError, AttributeError, ValueError) as error:
        reason = f"cluster_class: {name} cannot be imported ({described(error)})"
        raise UsageError(path, reason, f"give the {ClusterFile.model_fields['cluster_class'].description}") from None
    if found is SSHCluster or (isinstance(found, type) and issubclass(found, Cluster)):
        return found
    raise UsageError(path, f"cluster_class: {name} is no cluster of Dask", f"give one {_CLASSES}")


def _check_arguments(kind: Callable[..., Any], file: ClusterFile, path: Path) -> None:
    """Check the names of the arguments, as far as they can be known before the class is called."""
    arguments: Mapping[str, Any] = file.cluster_kwargs
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise UsageError(path, f"cluster_kwargs: {file.cluster_class}: {error}", "mend the file") from None
    # These pass on what they do not take themselves.
    takers: list[Any] = [kind, getattr(kind, "job_cls", None)]
    if isinstance(kind, type) and issubclass(kind, LocalCluster):
        takers += [Nanny, Worker]
    elif takers[1] is None:
        return
    taken = {
        name
        for taker in takers
        for each in getattr(taker, "__mro__", ())[:-1]
        for name in inspect.signature(each.__init__).parameters
    }
    if unknown := sorted(set(map(str, arguments)) - taken):
        raise UsageError(path, f"cluster_kwargs: {file.cluster_class} takes no {unknown[0]}", "mend the file")


def _security_of(file: ClusterFile, path: Path) -> Security | None:
    """Make the certificates of a file; None where it names none, and Dask's own configuration counts."""
    if not file.security:
        return None
    given = {
        name: str(at_home(value)) if name.startswith("tls_") and isinstance(value, str) else value
        for name, value in file.security.items()
    }
    for name, value in given.items():
        if name.endswith(("_file", "_cert", "_key")) and not Path(str(value)).is_file():
            raise UsageError(path, f"security: {name}: {value} does not exist", "give the path of a PEM file")
    try:
        return Security(**{"require_encryption": True} | given)
    except TypeError as error:
        raise UsageError(path, f"security: {described(error)}", "give arguments of distributed.Security") from None
