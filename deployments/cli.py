"""``desra``: a verb per flow. Plans from the workspace before it imports Prefect, Dask or torch."""

from __future__ import annotations

import os
import signal
import sys
import time
import tomllib
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer
from pydantic import BaseModel, ValidationError

from deployments.server import end_leftover_server, prefect_server, wait_for_task_runs
from desra_core import __version__
from desra_core.corpus import read_manifest
from desra_core.errors import DesraError, TransientError, UsageError, printable
from desra_core.matching import FAILURES
from desra_core.plan import Plan, make_plan, prepare
from desra_core.settings import Detection, Machine
from desra_core.tables import publish_tables, worst_regions
from desra_core.target import load_settings
from desra_core.workspace import Workspace, read_table

_DETECTION = Detection.model_fields
_MACHINE = Machine.model_fields
_SHOWN_FAILURES = 20
_SHOWN_REGIONS = 10
_LINE_SECONDS = 5.0

Model = TypeVar("Model", bound=BaseModel)

app = typer.Typer(
    name="desra",
    help="Find and delete the artifacts of GAN super-resolution models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 some images failed, 2 bad usage or input, 130 interrupted, 143 terminated.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except DesraError as error:
        _say(f"error: {printable(error)}")
        sys.exit(1 if isinstance(error, TransientError) else 2)


def _field(model: type[BaseModel], name: str) -> Any:
    return typer.Option(help=model.model_fields[name].description)


def _given_on_the_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"desra {__version__}")
        raise typer.Exit


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a TOML file the defaults of the command's flags."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is no TOML: {error}"
        raise UsageError(path, f"cannot be read ({reason})", "mend the file or its name") from None
    values = {key.replace("-", "_"): value for key, value in values.items()}
    known = {parameter.name for parameter in context.command.params} - {"config", "help"}
    if unknown := sorted(set(values) - known):
        names = ", ".join(sorted(name.replace("_", "-") for name in known if name))
        raise UsageError(path, f"has the unknown key {unknown[0]}", f"keys are {names}")
    context.default_map = values
    return path


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def detect(
    context: typer.Context,
    mse_sr: Annotated[Path, _field(Detection, "mse_sr")],
    gan_sr: Annotated[Path, _field(Detection, "gan_sr")],
    workspace: Annotated[Path, _field(Detection, "workspace")],
    lr: Annotated[Path | None, _field(Detection, "lr")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Folder of class-index PNGs; short for --segmenter labels:DIR.")
    ] = None,
    segmenter: Annotated[str | None, _field(Detection, "segmenter")] = None,
    weights: Annotated[str | None, _field(Detection, "weights")] = None,
    threshold: Annotated[float, _field(Detection, "threshold")] = _DETECTION["threshold"].default,
    min_area: Annotated[str, _field(Detection, "min_area")] = _DETECTION["min_area"].default,
    window: Annotated[int, _field(Detection, "window")] = _DETECTION["window"].default,
    keep: Annotated[Literal["artifacts", "maps", "all"], _field(Detection, "keep")] = _DETECTION["keep"].default,
    limit: Annotated[int | None, _field(Detection, "limit")] = None,
    shard_size: Annotated[int, _field(Detection, "shard_size")] = _DETECTION["shard_size"].default,
    tile: Annotated[int, _field(Machine, "tile")] = _MACHINE["tile"].default,
    device: Annotated[Literal["auto", "cpu", "cuda"], _field(Machine, "device")] = _MACHINE["device"].default,
    workers: Annotated[int | None, _field(Machine, "workers")] = None,
    memory: Annotated[str | None, _field(Machine, "memory")] = None,
    scheduler: Annotated[str | None, _field(Machine, "scheduler")] = None,
    config: Annotated[  # noqa: ARG001
        Path | None,
        typer.Option(
            callback=_read_config,
            is_eager=True,
            help="TOML file with any of these flags as keys; the command line wins. Paths in it are relative to "
            "where the command runs.",
        ),
    ] = None,
) -> None:
    """Compare two folders of super-resolution results and mark the artifacts.

    Writes a mask per image to WORKSPACE/masks and a table of regions to WORKSPACE/regions.parquet. The same command
    again goes on where it was cut off, takes in new files, and does nothing where nothing has changed.
    """
    if labels is not None and segmenter is not None:
        from_line = [name for name in ("labels", "segmenter") if _given_on_the_line(context, name)]
        if len(from_line) != 1:
            raise UsageError("--labels", "and --segmenter are both given", "leave one out")
        labels, segmenter = (labels, None) if from_line == ["labels"] else (None, segmenter)
    detection = _validated(
        Detection,
        mse_sr=mse_sr.absolute(),
        gan_sr=gan_sr.absolute(),
        workspace=workspace.absolute(),
        lr=lr and lr.absolute(),
        segmenter=_absolute(f"labels:{labels}" if labels else segmenter or "none"),
        weights=weights if weights in (None, "published", "none") else str(Path(weights).absolute()),
        threshold=threshold,
        min_area=min_area,
        window=window,
        keep=keep,
        limit=limit,
        shard_size=shard_size,
    )
    machine = _validated(Machine, workers=workers, memory=memory, scheduler=scheduler, device=device, tile=tile)
    try:
        code = _detect(detection, machine)
    except KeyboardInterrupt:
        _say("interrupted: the same command goes on where it stopped")
        code = 130
    raise typer.Exit(code)


@app.command()
def status(
    workspace: Annotated[Path, typer.Option(help="The workspace to look at.")],
    failures: Annotated[bool, typer.Option("--failures", help="List every failure.")] = False,
) -> None:
    """Say what is done, pending and failed, from the workspace alone."""
    place = Workspace(workspace.absolute())
    detection, target = load_settings(place)
    manifest = read_manifest(place)
    if manifest is None:
        raise UsageError(place.root, "has no manifest", "run desra detect")
    plan = make_plan(place, manifest, target, limit=detection.limit)
    unscanned = read_table(place.scan_failures, FAILURES)
    failed = pa.concat_tables([unscanned, plan.failures])
    vanished = manifest.num_rows - int(pc.sum(manifest["present"]).as_py() or 0)
    owner = place.owner()
    images = plan.images + unscanned.num_rows
    retried = f", {plan.retries.num_rows} of them failed and will be tried again" if plan.retries.num_rows else ""
    typer.echo(f"workspace  {place.root}")
    typer.echo(f"run        {f'going on: {owner}' if owner else 'none at present'}")
    typer.echo(f"images     {images}" + (f", and {vanished} vanished ones, whose outputs stay" if vanished else ""))
    typer.echo(f"done       {plan.done}")
    typer.echo(f"pending    {plan.pending}{retried}")
    typer.echo(f"failed     {failed.num_rows}")
    _show_failures(pa.concat_tables([failed, plan.retries]), limit=None if failures else _SHOWN_FAILURES)


def _detect(detection: Detection, machine: Machine) -> int:
    workspace = Workspace(detection.workspace)
    workspace.create()
    with workspace.locked():
        end_leftover_server(workspace)
        if detection.segmenter == "none":
            _say("warning: no class labels, so every class has weight 1; give --labels or --segmenter")
        _, plan, _, scanned = prepare(detection, on_hashed=_HashingLines())
        assert scanned is not None
        if scanned.replaced:
            _say(f"{scanned.replaced} images have changed and are computed again")
        if scanned.vanished:
            _say(f"{scanned.vanished} images have vanished; their outputs stay")
        _show_failures(pa.concat_tables([scanned.failures, plan.failures]))
        if plan.dropped:
            _say(f"{plan.dropped} images are computed again: these settings need maps that were not kept")
        broken: tuple[str, ...] = ()
        if plan.pending:
            broken = _run(detection, machine, workspace)
        else:
            publish_tables(workspace)
        for line in broken:
            _say(f"error: {line}")
        return _report(workspace, detection, plan, scanned.failures.num_rows) or int(bool(broken))


def _run(detection: Detection, machine: Machine, workspace: Workspace) -> tuple[str, ...]:
    """Run the flow; returns a line for each shard that could not finish."""
    _say("starting Prefect and the workers, which takes some seconds")
    with prefect_server(workspace) as url:
        _say(f"watch at {url.removesuffix('/api')}")
        # Failures come as one line each, not as Prefect's tracebacks; those are in the run's logs on the server.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        from flows.detect import detect as flow

        summary = flow(detection, machine, rescan=False)
        if not wait_for_task_runs(summary.flow_run, summary.task_runs):
            _say("warning: the Prefect server has not recorded all task runs; the workspace is complete")
    return summary.broken_shards


def _report(workspace: Workspace, detection: Detection, before: Plan, scan_failures: int) -> int:
    """Print how the run ended; returns the exit code."""
    manifest = read_manifest(workspace)
    assert manifest is not None
    after = make_plan(workspace, manifest, before.target, limit=detection.limit)
    failures = scan_failures + after.failed + after.retries.num_rows
    regions = pq.read_table(workspace.regions, columns=["image"])
    if not before.pending:
        typer.echo(f"nothing to do: {after.done} of {after.images} images done, {failures} failed before")
    else:
        typer.echo(f"{after.done} of {after.images} images done, {failures} failed")
    marked = len(regions["image"].unique())
    unweighted = detection.segmenter == "none" or detection.weights == "none"
    weighting = "weight 1 for every class" if unweighted else "semantic weights"
    typer.echo(f"{regions.num_rows} artifact regions in {marked} images, found with {weighting}")
    for region in worst_regions(workspace, _SHOWN_REGIONS).to_pylist():
        place = f"{region['width']}x{region['height']} px at ({region['x']}, {region['y']})"
        line = f"  severity {region['severity']:8.1f}  {printable(region['image'])}  {place}"
        typer.echo(line + (f"  {region['class_name']}" if region["class_name"] else ""))
    typer.echo(f"masks    {workspace.masks}\nregions  {workspace.regions}")
    if failures:
        typer.echo(f"failures {workspace.failures}")
    return int(failures > 0 or after.pending > 0)


class _HashingLines:
    """Says now and then how far the hashing of new files is."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._said >= _LINE_SECONDS:
            self._said = time.monotonic()
            _say(f"reading new files: {done} of {total}")


def _show_failures(failures: pa.Table, limit: int | None = _SHOWN_FAILURES) -> None:
    for row in failures.slice(0, limit).to_pylist():
        _say(f"failed: {printable(DesraError(row['subject'], row['reason'], row['remedy']))}")
    if limit is not None and failures.num_rows > limit:
        _say(f"and {failures.num_rows - limit} more: desra status --failures lists them")


def _validated(model: type[Model], **values: Any) -> Model:
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        why = "" if first["type"] == "string_pattern_mismatch" else f" ({first['msg'].removeprefix('Value error, ')})"
        reason = f"{first['input']} is not accepted{why}"
        raise UsageError("--" + name.replace("_", "-"), reason, model.model_fields[name].description or "") from None


def _absolute(segmenter: str) -> str:
    """Make the paths of a segmenter absolute: workers have folders of their own."""
    kind, colon, paths = segmenter.partition(":")
    return kind + colon + ",".join(str(Path(path).absolute()) for path in paths.split(",") if path)


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    _say("terminated: the same command goes on where it stopped")
    sys.exit(128 + number)


def _say(line: str) -> None:
    typer.echo(line, err=True)


if __name__ == "__main__":
    main()
