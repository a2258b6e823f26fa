"""The metrics of a workspace for Prometheus: a file that runs write, from which any scrape can be answered.

The file has Prometheus' text format, so that node_exporter can read it, too. Its counters go on from run to run.
"""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from desra_core.errors import DesraError, printable
from desra_core.planning.plan import Plan
from desra_core.workspace import Workspace
from desra_core.workspace.products import stages_for

_WRITE_SECONDS = 5.0

# A sample: the name of its metric, and the values of the labels of that metric.
Key = tuple[str, tuple[str, ...]]


class Family(NamedTuple):
    """A metric, whose samples also have the label ``workspace``."""

    kind: type[CounterMetricFamily | GaugeMetricFamily]
    documentation: str
    labels: tuple[str, ...] = ()


FAMILIES = {
    "desra_images_total": Family(
        CounterMetricFamily, "Images that have passed a stage (done) or failed in it.", ("stage", "state")
    ),
    "desra_stage_seconds_total": Family(CounterMetricFamily, "Computing time of a stage on all workers.", ("stage",)),
    "desra_corpus_images": Family(GaugeMetricFamily, "Images of the corpus: done, failed, or to do.", ("state",)),
    "desra_artifact_images": Family(GaugeMetricFamily, "Images with artifacts at the end of the latest run."),
    "desra_artifact_regions": Family(GaugeMetricFamily, "Artifact regions at the end of the latest run."),
    "desra_last_run_end_timestamp_seconds": Family(
        GaugeMetricFamily, "When a run of this flow last ended in this way.", ("flow", "outcome")
    ),
    "desra_workspace_in_use": Family(GaugeMetricFamily, "Whether a run holds the workspace."),
    "desra_runs": Family(GaugeMetricFamily, "Runs of the work pool that wait for their turn, or run.", ("state",)),
    "desra_gpu_memory_used_bytes": Family(GaugeMetricFamily, "Memory of a GPU that is in use.", ("gpu",)),
    "desra_gpu_memory_size_bytes": Family(GaugeMetricFamily, "Memory of a GPU.", ("gpu",)),
}


def read_samples(path: Path) -> dict[Key, float]:
    """Read the samples of a file by `render`; none where it is missing or damaged, so that its counters begin anew."""
    samples = {}
    with contextlib.suppress(OSError, ValueError, KeyError):
        for metric in text_string_to_metric_families(path.read_text("utf-8")):
            for sample in metric.samples:
                labels = tuple(sample.labels[label] for label in FAMILIES[sample.name].labels)
                samples[sample.name, labels] = sample.value
        return samples
    return {}


def render(samples: Mapping[Key, float], workspace: Workspace) -> bytes:
    """Write samples in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Samples(samples, printable(workspace.root)))
    return generate_latest(registry)


class _Samples(Collector):
    def __init__(self, samples: Mapping[Key, float], workspace: str) -> None:
        self._samples, self._workspace = samples, workspace

    def collect(self) -> Iterable[Metric]:
        for name, family in FAMILIES.items():
            metric = family.kind(name, family.documentation, labels=["workspace", *family.labels])
            for (named, labels), value in sorted(self._samples.items()):
                if named == name:
                    metric.add_metric([self._workspace, *labels], value)
            if metric.samples:
                yield metric


def update(
    workspace: Workspace, values: Mapping[Key, float], added: Mapping[Key, float] = MappingProxyType({})
) -> bool:
    """Set gauges and increase counters in the file of a workspace; never fails.

    Returns:
        Whether they were written: a full disk or a vanished workspace does not disturb a run.
    """
    if not workspace.exists():
        return False
    samples = read_samples(workspace.metrics)
    samples.update(values)
    samples.update({key: samples.get(key, 0) + more for key, more in added.items()})
    try:
        workspace.publish(workspace.metrics, render(samples, workspace))
    except (DesraError, OSError):
        return False
    return True


class RunMetrics:
    """Count images as they pass their stages, and write the counts now and then. Several threads may call this.

    Args:
        workspace: The workspace, which must be locked.
        plan: The plan of the run.
    """

    def __init__(self, workspace: Workspace, plan: Plan) -> None:
        self._workspace = workspace
        self._states = {"done": plan.done, "failed": plan.failed, "todo": plan.pending}
        self._added: defaultdict[Key, float] = defaultdict(float)
        for stage in stages_for(plan.target):  # Prometheus does not see the first increase of a counter that is absent
            for state in ("done", "failed"):
                self._added["desra_images_total", (stage.name, state)] += 0
        self._lock = threading.Lock()
        self.write()

    def count(self, stage: str, seconds: float, *, names: int, failed: bool, last: bool) -> None:
        """Count an image that has passed a stage or failed in it.

        Args:
            stage: The stage.
            seconds: Its computing time.
            names: Number of names of the image.
            failed: Whether the image failed.
            last: Whether it has passed its last stage.
        """
        with self._lock:
            self._added["desra_images_total", (stage, "failed" if failed else "done")] += 1
            self._added["desra_stage_seconds_total", (stage,)] += seconds
            if failed or last:
                self._states["failed" if failed else "done"] += names
                self._states["todo"] -= names
            due = time.monotonic() - self._written >= _WRITE_SECONDS
        if due:
            self.write()

    def write(self) -> None:
        """Write the counts since the last call."""
        with self._lock:
            self._written = time.monotonic()
            images: dict[Key, float] = {("desra_corpus_images", (each,)): count for each, count in self._states.items()}
            if update(self._workspace, images, self._added):
                self._added.clear()
