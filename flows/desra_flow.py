"""Turn functions into flows: give runs a name and a closing line, repeat them after some errors, report failures.

`process_corpus` is the body of the flows detect and mine.
"""

import contextlib
import inspect
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.exceptions import ParameterBindError, SignatureMismatchError
from prefect.flows import Flow
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import deployment, flow_run
from prefect.settings import get_current_settings
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from pydantic import BaseModel, ValidationError

from desra_core.detection.detectors import detector_files
from desra_core.errors import DesraError, UsageError, may_pass, printable
from desra_core.networks.checkpoints import BICUBIC, load_pair
from desra_core.networks.segmentation import segmenter_files
from desra_core.planning.plan import Plan, Prepared, prepare
from desra_core.settings import CorpusSettings, Detection, Machine, Mining, folder_of
from desra_core.settings.models import workspace_of
from desra_core.stages import CleanFunction
from desra_core.workspace import Workspace
from flows import handed_over
from tasks.dask_cluster import USUAL_PIXELS, Opening, gpus_wanted, open_dask
from tasks.dask_map import Dask
from tasks.logs import NowAndThen, carry, configure, say
from tasks.metrics import RunMetrics, update
from tasks.progress import RunProgress
from tasks.run_end import Summary, end_corpus_run, show_corpus
from tasks.shards import Run, process_shard, stages_of

P = ParamSpec("P")
R = TypeVar("R")

# The environment variable with the URL that gets the message of a failed run.
WEBHOOK = "DESRA_WEBHOOK"
_WEBHOOK_SECONDS = 5

# The file in which Linux lists the instructions of the CPU.
CPU = Path("/proc/cpuinfo")

# Seconds before each retry: for a lost packet, for a server that restarts, for a full disk that gets cleared.
PAUSES = (2, 15, 60)

_REMEDY = "edit the parameters of the deployment, or start desra serve again, which sets them anew"
# While the last images of one shard finish, the next one keeps the workers busy.
_SHARDS_IN_FLIGHT = 3
# The largest factor by which a network enlarges.
_LARGEST_SCALE = 16

# An error that is the message of a run's state needs no traceback by Prefect.
logging.getLogger("prefect.flow_runs").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], DesraError))
)


def report_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Write to log, stderr and webhook why a run failed: a hook for ``on_failure`` and ``on_crashed``. Never fails."""
    logger = flow_run_logger(flow_run, flow)
    logger.error("%s: %s", state.name, _reason(flow, flow_run, state))
    if flow_run.parent_task_run_id:  # the run that called this one reports it
        return
    message = failure_message(flow, flow_run, state)
    if flow_run.deployment_id:  # a run by hand ends with a message of the command
        _say(f"error: {message['run']} {(state.name or '').lower()}: {message['message']}", flow_run, message)
    if (webhook := os.environ.get(WEBHOOK)) and (trouble := post_to_webhook(webhook, message)):
        logger.warning(trouble)
        _say(f"warning: {message['run']}: {trouble}", flow_run, message)


def report_cancelled(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Say on stderr that a run was cancelled: a hook for ``on_cancellation``."""
    if not flow_run.parent_task_run_id:
        message = failure_message(flow, flow_run, state)
        _say(f"warning: {message['run']} was cancelled", flow_run, message)


def note_end(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Write when and how a run ended to the metrics of its workspace: a hook for every end. Never fails."""
    if root := workspace_of(flow_run.parameters):
        end = "desra_last_run_end_timestamp_seconds", (flow.name, state.type.value.lower())
        update(Workspace(Path(root)), {end: state.timestamp.timestamp()})


def _say(line: str, flow_run: FlowRun, message: Mapping[str, str | None]) -> None:
    """Print a line in the log format of the run: the Prefect worker, which reports crashed runs, does not know it."""
    with contextlib.suppress(ValidationError):
        machine = Machine.model_validate(flow_run.parameters.get("machine", {}))
        configure(machine.log_level, machine.log_format)
    say(line, run=message["run"], workspace=message["workspace"])


def post_to_webhook(address: str, message: Mapping[str, str | None]) -> str | None:
    """Send a message to a webhook. Never fails.

    Args:
        address: URL of the webhook.
        message: The fields of a JSON object.

    Returns:
        The reason why the webhook did not get the message, without its secret address; None where it got it.
    """
    try:
        httpx.post(address, json=message, timeout=_WEBHOOK_SECONDS).raise_for_status()
    except httpx.HTTPStatusError as error:
        return f"the webhook refused the message: HTTP {error.response.status_code}"
    except Exception as error:  # noqa: BLE001 - no error here may hide the failure that the message reports
        return f"the webhook was not reached: {type(error).__name__}"
    return None


def failure_message(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> dict[str, str | None]:
    """Make the JSON message of a failed run for the webhook; Slack and Mattermost show its ``text``."""
    message = _reason(flow, flow_run, state)
    name, deployment = flow_run.name, os.environ.get("PREFECT__DEPLOYMENT_NAME")
    if deployment is None and flow_run.deployment_id:  # in the Prefect worker, which reports a crashed run
        deployment = str(flow_run.deployment_id)
        with contextlib.suppress(Exception), get_client(sync_client=True) as client:  # else keep the id
            name = client.read_flow_run(flow_run.id).name
            deployment = client.read_deployment(flow_run.deployment_id).name
    page = get_current_settings().ui_url
    url = f"{page}/runs/flow-run/{flow_run.id}" if page else None
    return {
        "text": f"{flow.name} {(state.name or '').lower()}: {name}: {message}" + (f" {url}" if url else ""),
        "deployment": deployment,
        "flow": flow.name,
        "run": name,
        "run_id": str(flow_run.id),
        "state": state.name,
        "message": message,
        "url": url,
        "workspace": workspace_of(flow_run.parameters),
    }


def _reason(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> str:
    """Return why a run failed; a crash has no message if the flow refuses the parameters, so check them again."""
    if state.is_crashed():
        try:
            flow.validate_parameters(flow_run.parameters)
        except Exception as error:  # noqa: BLE001 - any error here is the reason
            return printable(error)
    return printable(state.message or "no reason is known")


def runs_by_itself() -> bool:
    """Check whether a deployment started this run; such a run repeats itself after errors, others fail at once."""
    return bool(deployment.id)


class DesraFlow(Flow[P, R]):
    """A Prefect flow that refuses parameters in one line."""

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Validate parameters as Prefect does, but fail in one line, such as for a deployment of an earlier version.

        Raises:
            UsageError: This version does not take the parameters.
        """
        try:
            validated = super().validate_parameters(parameters)
        except (SignatureMismatchError, ParameterBindError) as error:
            raise UsageError("parameters", printable(error), _REMEDY) from None
        except Exception as error:
            cause = error if isinstance(error, ValidationError) else error.__cause__ or error.__context__
            if not isinstance(cause, ValidationError):
                raise
            first = cause.errors()[0]
            why = printable(first["msg"].removeprefix("Value error, "))
            reason = f"{printable(first['input'])} is not accepted ({why})"
            reason = "is missing" if first["type"] == "missing" else reason
            raise UsageError(".".join(map(str, first["loc"])), reason, _REMEDY) from None
        for name, settings in validated.items():
            raw = parameters.get(name)
            for field, value in settings if isinstance(settings, BaseModel) else ():
                given = raw.get(field) if isinstance(raw, dict) else None
                # Settings that may be a word make other texts whole paths.
                made_whole = (
                    isinstance(given, str)
                    and not Path(given).expanduser().is_absolute()
                    and given != value == str(Path(given).absolute())
                )
                if made_whole or (isinstance(value, Path) and not value.is_absolute()):
                    # A relative path would lie in the folder of the run, which is deleted at its end.
                    reason = f"{printable(given if made_whole else value)} is not accepted (a run needs the whole path)"
                    raise UsageError(f"{name}.{field}", reason, "begin it with /")
        return validated


def desra_flow(function: Callable[P, R]) -> DesraFlow[P, R]:
    """Turn a function into the flow of its name.

    The message of its final state is ``in_one_line`` of its result, or the error. A run that comes from a deployment
    repeats itself after errors worth a retry, and fails where its result has a ``problem``.
    """
    runner: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=_SHARDS_IN_FLIGHT)
    return DesraFlow(
        _ending_in_a_line(function),
        name=function.__name__,
        description=(inspect.getdoc(function) or "").partition("\n\nArgs:\n")[0],
        flow_run_name=run_name,
        task_runner=runner,
        on_completion=[note_end],
        on_failure=[report_failure, note_end],
        on_crashed=[report_failure, note_end],
        on_cancellation=[report_cancelled, note_end],
    )


def run_name() -> str:
    """Return a name such as ``mine holidays 2026-11-20 02:00``; Prefect calls this as ``flow_run_name`` of a flow."""
    settings = next(iter(flow_run.parameters.values()), None)
    # Prefect names a run seconds before it starts, and again when it resumes.
    context = FlowRunContext.get()
    run, start = context.flow_run if context else None, datetime.now(UTC)
    if run:
        start = run.start_time or max(start, run.expected_start_time or start)
    return f"{flow_run.flow_name} {corpus_name(settings)} {start.astimezone():%Y-%m-%d %H:%M}"


def corpus_name(settings: Any) -> str:
    """Return the name of the folder of photos or of results, or of the workspace where none is given."""
    for field in ("photos", "gan_sr", "workspace"):
        value = getattr(settings, field, None) if not isinstance(settings, dict) else settings.get(field)
        if value:
            return Path(value).name
    return "corpus"


def _ending_in_a_line(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap the function of a flow: set the log, repeat it after errors that may pass, and end the run in a line."""

    @wraps(function)
    def body(*arguments: P.args, **named: P.kwargs) -> Any:
        given = []
        for value in (*arguments, *named.values()):
            if isinstance(value, Machine):
                configure(value.log_level, value.log_format)
            elif isinstance(value, BaseModel):
                given.append(value)
        # A run inside another run is repeated only together with the outer run.
        outermost = not flow_run.parent_flow_run_id
        if given and outermost:
            carry(run=flow_run.name, workspace=str(folder_of(given[0])))
        pauses = list(PAUSES) if runs_by_itself() and outermost else []
        while True:
            try:
                if given:
                    tags = {*flow_run.tags, flow_run.flow_name, corpus_name(given[0]), folder_of(given[0]).name}
                    with get_client(sync_client=True) as client:
                        client.update_flow_run(flow_run.id, tags=sorted(tags))
                return _ended(function(*arguments, **named))
            except Exception as error:
                if not pauses or not may_pass(error):
                    if isinstance(error, DesraError):
                        return Failed(message=printable(error), data=error)
                    raise
                pause, kind = pauses.pop(0), type(error).__name__
                get_run_logger().warning("%s: %s; tried again in %d s", kind, printable(error), pause)
                time.sleep(pause)

    # Prefect would look the names of annotations up in this module, not in that of the function.
    body.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return body


def _ended(result: Any) -> Any:
    """Make the final state of a run from its result; a result without ``in_one_line`` is returned as it is."""
    problem: DesraError | None = getattr(result, "problem", None)
    if problem is not None and runs_by_itself():
        raise problem
    line = getattr(result, "in_one_line", None)
    if runs_by_itself() and not flow_run.parent_flow_run_id:
        level = "warning: " if getattr(result, "to_look_at", False) else ""
        say(f"{level}{flow_run.name} completed" + (f": {line}" if line else ""))
    return Completed(message=line, data=result) if line else result


def opened_workspace(root: Path) -> Workspace:
    """Open the workspace of a run; create a missing workspace, except for a run of a deployment.

    Raises:
        UsageError: The workspace of a run of a deployment has vanished, perhaps with its disk.
    """
    workspace = Workspace(root)
    if runs_by_itself() and not workspace.exists():
        remedy = f"bring it back, or make a new one: desra serve does when it starts, or touch {workspace.lock}"
        raise UsageError(root, "is no workspace: all earlier results are gone with it", remedy)
    workspace.create()
    return workspace


def process_corpus(
    settings: CorpusSettings, machine: Machine, *, rescan: bool, on_clean: CleanFunction | None = None
) -> Summary:
    """Plan a run, take its shards through the stages and publish the results: the body of a flow.

    Args:
        settings: Settings of the run.
        machine: Where and how wide to compute.
        rescan: Look for new and changed files first.
        on_clean: As of `desra_core.stages.StageJob`.
    """
    workspace = opened_workspace(settings.workspace)
    with workspace.locked() as workspace:
        prepared = None if rescan else handed_over(settings, Prepared)
        on_hashed = NowAndThen("reading new files: {} of {}")
        prepared = prepared or prepare(settings, rescan=rescan, on_hashed=on_hashed)
        plan = prepared.plan
        metrics = RunMetrics(workspace, plan)
        if not plan.pending:
            show_corpus(settings, prepared)
            return end_corpus_run(workspace, plan, 1)
        with handed_over(settings, Opening) or opened_dask(settings, machine, plan) as dask:
            show_corpus(settings, prepared, dask)
            stages = stages_of(settings, plan.target, prepared.weights, machine, dask, on_clean)
            with RunProgress(settings.verb, plan.pending, len(stages)) as progress:
                run = Run(workspace, plan, stages, dask, progress, metrics)
                try:
                    run.judge()
                    shards = [] if run.refusal else plan.shards
                    broken = progress.follow([process_shard.submit(shard, run) for shard in shards])
                    if run.refusal:
                        raise run.refusal
                finally:
                    metrics.write()
        task_runs = len(plan.shards) * (1 + len(stages)) + 1
        return end_corpus_run(workspace, plan, task_runs, broken, *progress.failures)


def opened_dask(settings: CorpusSettings, machine: Machine, plan: Plan) -> AbstractContextManager[Dask]:
    """Open Dask for a plan: with GPUs where it runs networks, and workers with memory for its largest image."""
    networks = plan.target.runs_networks
    gpus, largest = gpus_wanted(networks, machine), partial(_most_pixels, settings, plan)
    openvino = False
    if isinstance(settings, Mining):
        openvino = settings.backend == "openvino"
        if not (gpus or machine.elsewhere or plan.done or runs_by_itself()):
            suggest_bfloat16(settings)
    return open_dask(
        machine,
        folder=settings.workspace,
        networks=networks,
        openvino=openvino,
        gpus=gpus,
        most_pixels=largest,
        files=partial(files_of, settings, plan.some_files),
    )


def suggest_bfloat16(mining: Mining, cpu: Path = CPU) -> None:
    """Print that bfloat16 is faster, where nobody has chosen a precision and this CPU has instructions for it."""
    if "precision" not in mining.model_fields_set and (share := bfloat16_share(cpu)):
        cost = "its results are a little less exact"
        say(f"on this CPU, --precision bfloat16 takes about {share} of the time; {cost}")


def bfloat16_share(cpu: Path = CPU) -> str | None:
    """Return the share of the time of float32 that bfloat16 takes on this CPU; None without instructions for it."""
    features = set(cpu.read_text().split()) if cpu.exists() else set()
    shares = {"amx_bf16": "a fifth", "avx512_bf16": "half"}
    return next((share for feature, share in shares.items() if feature in features), None)


def files_of(settings: CorpusSettings, some_files: Callable[[], list[Path]]) -> list[Path]:
    """List files that workers read: models, the user's own detector, and some of the photos, results and labels."""
    given: list[str | Path] = [settings.gan_model, settings.mse_model] if isinstance(settings, Mining) else []
    files = [Path(name) for name in given if name != BICUBIC]
    files += detector_files(settings.method) if isinstance(settings, Detection) else []
    files += [settings.severity_model] if settings.severity_model else []
    return files + segmenter_files(settings.segmenter) + some_files()


def _most_pixels(settings: CorpusSettings, plan: Plan) -> int:
    """Return the pixels of the largest result to come."""
    pixels = plan.most_pixels()
    if not isinstance(settings, Mining) or pixels * _LARGEST_SCALE**2 <= USUAL_PIXELS:
        return pixels  # fits at any scale, so do not import PyTorch to read the scale
    _, model = load_pair(settings.mse_model, settings.gan_model, engine=settings.engine)
    return pixels * model.scale**2
