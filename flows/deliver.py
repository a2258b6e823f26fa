"""Deliver: photos and models in, the repaired pictures out."""

from dataclasses import dataclass
from functools import partial

from desra_core.delivery.picture import deliver_clean
from desra_core.delivery.plan import Pictures, corpus_of, plan_deliveries
from desra_core.planning.plan import target_of
from desra_core.settings import Machine, Mining
from desra_core.settings.models import Delivering
from desra_core.stages import StageJob
from flows.desra_flow import desra_flow, files_of, opened_workspace, process_corpus
from tasks.dask_cluster import gpus_wanted, open_dask
from tasks.dask_map import device_of
from tasks.judging import deliver_shard, publish_deliveries
from tasks.logs import say
from tasks.progress import RunProgress
from tasks.run_end import RunEnd, Summary


@dataclass(frozen=True, kw_only=True)
class Delivered(RunEnd):
    """How a delivery and the run before it ended; ``failures`` counts the images without a picture."""

    found: Summary
    failures: int
    pictures: Pictures


@desra_flow
def deliver(delivering: Delivering, machine: Machine = Machine(), rescan: bool = True) -> Delivered:  # noqa: B008
    """Find the artifacts in all results, and write each result with its artifacts repaired.

    Args:
        delivering: The photos and the models, and how to write pictures.
        machine: Where and how wide to compute.
        rescan: Look for new and changed files first.
    """
    corpus = corpus_of(delivering)
    workspace = opened_workspace(corpus.workspace)
    with workspace.locked() as workspace:
        on_clean = None if delivering.trust_map else partial(deliver_clean, delivering=delivering)
        found = process_corpus(corpus, machine, rescan=rescan, on_clean=on_clean)
        deliveries = plan_deliveries(delivering, corpus)
        missing, failures = deliveries.missing(), 0
        if missing.images:
            networks = deliveries.target.super_resolves
            with open_dask(
                machine,
                folder=workspace.root,
                networks=networks,
                openvino=isinstance(corpus, Mining) and corpus.backend == "openvino",
                gpus=gpus_wanted(networks, machine),
                most_pixels=lambda: missing.pixels,
                files=partial(files_of, corpus, deliveries.some_files),
            ) as dask:
                if missing.inferred:
                    minutes = missing.seconds / dask.workers / 60
                    about = f", in about {minutes:.0f} min" if minutes >= 1 else ""
                    say(f"results that were not kept, inferred again: {missing.inferred}{about}")
                target, weights = target_of(corpus)
                device = device_of(machine, dask) if networks else "cpu"
                key = target.gan_sr_key or ""
                job = StageJob(corpus, target, weights, key, device, machine.tile, dask.threads, dask.max_pixels)
                with RunProgress("deliver", sum(missing.images.values()), 1) as progress:
                    for number in missing.images:
                        failures += deliver_shard(number, deliveries, job, dask, progress)
        pictures = publish_deliveries(deliveries)
    return Delivered(
        in_one_line=f"{pictures} in {delivering.output}",
        task_runs=found.task_runs + len(missing.images) + 1,
        to_look_at=found.to_look_at or failures > 0,
        problem=found.problem,
        found=found,
        failures=failures,
        pictures=pictures,
    )
