"""``desra inspect``: count photos and estimate what a mine of them takes, before anything is computed."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import typer

from deployments.commands.runs import show_json
from deployments.commands.workspace import bytes_in_words
from desra_core.errors import UsageError, printable
from desra_core.evaluation.table import Section, counted, document_as_text
from desra_core.images.census import Unreadable, take_census, unreadable_ones
from desra_core.images.scanning import paths_of
from desra_core.networks.checkpoints import load_pair
from desra_core.planning.estimate import estimate, measure
from desra_core.report.document import duration
from desra_core.settings import Machine
from desra_core.settings.models import Inspecting
from desra_core.workspace.matching import Sources
from tasks.dask_cluster import NETWORK_WORKER_BYTES, WORKER_BYTES, gpus_wanted, share_of
from tasks.logs import NowAndThen

_SHOWN_ROWS = 20
_TOO_LARGE, _LESS = "has more pixels than fit into a worker's memory", "raise --memory or use fewer --workers"


def run_inspect(settings: Inspecting, machine: Machine, *, as_json: bool = False) -> int:
    """Count, measure and print; return the exit code."""
    if machine.elsewhere:
        flag = "--cluster" if machine.cluster else "--scheduler"
        raise UsageError(flag, "is of no use here: a sample is measured on this machine", "leave it out")
    if (settings.gan_model is None) != (settings.mse_model is None):
        lacking = "--gan-model" if settings.gan_model is None else "--mse-model"
        raise UsageError(lacking, "is not given", "give both models, of which --mse-model may be bicubic, or neither")
    gpus = gpus_wanted(settings.gan_model is not None, machine)
    models = None
    if settings.gan_model is not None and settings.mse_model is not None:
        device = "cuda" if gpus else "cpu"
        models = load_pair(settings.mse_model, settings.gan_model, device, settings.precision)
    sources = Sources(lr=settings.photos, exclude=settings.exclude, include=settings.include)
    census = take_census(settings.photos, **sources.globs(), on_read=NowAndThen("reading headers: {:,} of {:,}"))
    found: dict[str, Any] = {
        "place": settings.photos,
        "photos": census.photos.num_rows,
        "bytes": pc.sum(census.photos["size"]).as_py() or 0,
        "megapixels": round(float(census.megapixels.sum()), 3),
        "formats": census.counts("format"),
        "sizes": census.sizes(),
        "depths": census.counts("depth"),
        "profiles": census.counts("profile", "treatment"),
        "smallest": None,
        "largest": None,
        "copies": census.copies(),
        "left_out": census.left_out,
        "unreadable": census.unreadable,
        "sample": None,
        "estimate": None,
    }
    unreadable = list(census.unreadable)
    if census.photos.num_rows:
        found["smallest"], found["largest"] = census.extremes()
        pixels = census.megapixels * 1e6 * (models[1].scale if models else 1) ** 2
        share = share_of(machine, NETWORK_WORKER_BYTES if models else WORKER_BYTES, gpus, int(pixels.max()))
        fitting = pa.array(pixels <= share.max_pixels)
        too_large = census.photos.filter(pc.invert(fitting))
        if too_large.num_rows:
            example = str(next(paths_of(settings.photos, too_large)))
            unreadable.append(Unreadable(_TOO_LARGE, _LESS, too_large.num_rows, example))
        once = census.photos.filter(pc.and_not(fitting, census.photos["copy"]))
        said = NowAndThen("measuring a sample: {} of {} photos")
        measured, failures = measure(settings.photos, once, models, share.threads, said)
        unreadable += unreadable_ones(failures)
        made = estimate(measured, once, models, share.workers, gpus)
        found |= {"unreadable": unreadable, "sample": measured._asdict()}
        found["estimate"] = {"workers": share.workers, "gpus": gpus} | made._asdict()
    for name in ("left_out", "unreadable"):
        found[name] = [one._asdict() for one in found[name]]
    if as_json:
        show_json(found)
    else:
        typer.echo(document_as_text("", _sections(found)))
    return int(bool(unreadable))


def _sections(found: dict[str, Any]) -> list[Section]:
    """Make of the document what people read."""
    head = f"{counted(found['photos'], 'photo')}, {bytes_in_words(found['bytes'])}, {found['megapixels']:,.1f} MP"
    sections = [Section(note=f"{head} in {printable(found['place'])}")]
    for name in ("formats", "sizes", "depths", "profiles"):
        sections += _table(found[name], _counts)
    if found["smallest"]:
        sections.append(Section(note="\n".join(_named(word, found[word]) for word in ("smallest", "largest"))))
    if number := found["copies"]["photos"]:
        have = "has" if number == 1 else "have"
        example = printable(found["copies"]["example"])
        note = f"{counted(number, 'photo')} {have} the content of another one and will be computed once, such as"
        sections.append(Section(note=f"{note} {example}"))
    sections += _table(found["left_out"], lambda row: _left_out(row, "what", "left out"))
    sections += _table(found["unreadable"], lambda row: _left_out(row, "reason", "cannot be read because it"))
    if found["estimate"]:
        sections.append(Section(note="\n".join(_estimated(found["sample"], found["estimate"]))))
    return sections


def _table(rows: list[dict[str, Any]], written: Callable[[dict[str, Any]], dict[str, str]]) -> list[Section]:
    """Write the first rows as a table, and say how many more there are."""
    more = f"and {len(rows) - _SHOWN_ROWS} more: --json lists them all" if len(rows) > _SHOWN_ROWS else ""
    return [Section(table=list(map(written, rows[:_SHOWN_ROWS]))), Section(note=more)]


def _counts(row: dict[str, Any]) -> dict[str, str]:
    told = {name: str(value) for name, value in row.items() if isinstance(value, str)}
    numbers = {"photos": f"{row['photos']:,}", "bytes": bytes_in_words(row["bytes"]), "MP": f"{row['megapixels']:,.2f}"}
    return told | numbers


def _named(word: str, photo: dict[str, Any]) -> str:
    return f"{word:8} {photo['width']}x{photo['height']}  {printable(photo['path'])}"


def _left_out(row: dict[str, Any], first: str, heading: str) -> dict[str, str]:
    """Write files that are left out: the first column has a heading of its own."""
    cells = {heading: row[first]} | {name: value for name, value in row.items() if name != first}
    return {name: "" if value is None else printable(value) for name, value in cells.items()}


def _estimated(sample: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """Write the estimate, and what it rests on."""
    workers = counted(made["workers"], "worker") + (f" and {counted(made['gpus'], 'GPU')}" if made["gpus"] else "")
    photos = f"{counted(sample['photos'], 'photo')} ({sample['megapixels']:,.2f} MP)"
    if not sample["crops"]:
        lines = [f"measured on {photos}, decoded one after the other"]
        lines.append(f"decoding all: {duration(made['decoding'])} of one worker, of which a run would start {workers}")
        return [*lines, "not measured: inference and files, for which give --gan-model and --mse-model"]
    crops = f"a crop of {counted(sample['crops'], 'photo')} ({sample['crop_megapixels']:,.2f} MP)"
    parts = [f"{name} {duration(made[name])}" for name in ("decoding", "inference", "comparison", "keeping")]
    least, most = map(duration, made["seconds"])
    kept = " to ".join(bytes_in_words(round(size)) for size in made["mine"])
    lines = [f"measured on {photos}, decoded, and on {crops}, inferred with both models"]
    lines.append(f"mining     {least} to {most} on {workers}, from no photo with artifacts to all of them")
    lines.append(f"  one worker {', '.join(parts)} (keeping: where all have artifacts)")
    lines.append(f"  keeps    {kept}, from no photo with artifacts to all of them")
    pictures = [f"{bytes_in_words(round(made[kind]))} as {kind.upper()}" for kind in ("png", "jpeg")]
    lines.append(f"pictures   {' or '.join(pictures)} of quality 95")
    return [*lines, "not measured: starting, class labels, tables and the report, and failures"]
