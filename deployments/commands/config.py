"""``desra config``: the settings of a workspace's latest run as a TOML file for ``--config``."""

import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from desra_core.errors import UsageError, printable
from desra_core.evaluation.table import as_toml
from desra_core.files import paths_in, read_document
from desra_core.gate.criteria import read_verdict
from desra_core.planning.plan import load_settings
from desra_core.settings import CorpusSettings, Detection, Frozen, given_values
from desra_core.settings.models import SETTINGS, Finetuning
from desra_core.training.plan import RunFolder
from desra_core.workspace import Workspace

_WIDTH = 100


def config(
    from_workspace: Annotated[Path, typer.Option(help="The workspace whose latest settings to print.")],
    command: Annotated[
        Literal["mine", "detect", "finetune", "cycle", "serve"] | None,
        typer.Option("--for", help="Command to write the file for; by default the one that found the artifacts."),
    ] = None,
) -> None:
    """Print the latest settings of a workspace as a TOML file, which a command takes as --config.

    Holds the values that are not the defaults, with absolute paths. With this file, mine, detect and finetune have
    nothing to do. For finetune, cycle and serve, it holds the settings of the latest finetune and the limits of the
    latest verdict as well, where the workspace has them. A workspace does not record workers, memory and devices, nor
    schedules, --lpips, --promote and --twin-photos.
    """
    place = Workspace(from_workspace.absolute())
    corpus, _ = load_settings(place)
    verb = command or corpus.verb
    if verb in ("mine", "cycle", "serve", "detect") and (verb == "detect") != isinstance(corpus, Detection):
        reason = f"belongs to runs of desra {corpus.verb}, not of desra {verb}"
        raise UsageError(place.root, reason, "leave out --for")
    recorded = corpus if verb == corpus.verb else _recorded(place, corpus, SETTINGS[verb])
    lines = [f"# desra {verb} {'' if verb == 'serve' else '--config '}FILE: the settings of {printable(place.root)}"]
    for name, value in given_values(recorded).items():
        about = textwrap.wrap(type(recorded).model_fields[name].description or "", _WIDTH - 2)
        lines += ["", *(f"# {line}" for line in about), *as_toml({name.replace("_", "-"): value})]
    text = "\n".join(lines)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(place.root, "records a path that is no UTF-8, as TOML has to be", "rename it") from None
    typer.echo(text)


def _recorded(place: Workspace, corpus: CorpusSettings, kind: type[Frozen]) -> Frozen:
    """Make the settings of a finetune or a cycle from what a workspace records of both.

    Raises `UsageError` where its files are damaged, or of a version with other settings.
    """
    latest = _latest_finetune(place)
    document = read_document(latest.document) if latest else {}
    values: dict[str, Any] = dict(document.get("training", {}))
    if kind is Finetuning:
        values["workspace"] = place.root
        if latest and latest.root.parent != _finetunes(place):
            values["output"] = latest.root
        parent = document.get("parent", {}).get("path")
        if parent != str(getattr(corpus, "gan_model", None)):
            values["gan_model"] = parent
    else:
        if document.get("parent", {}).get("path") != str(getattr(corpus, "gan_model", None)):
            values.pop("discriminator", None)  # it belongs to the model before; a promoted model brings its own
        values |= corpus.model_dump()
        if verdict := read_verdict(place):
            values |= verdict[0].verdict.thresholds
    try:
        return kind.model_validate(values)
    except ValidationError:
        raise UsageError(place.root, "records settings of another version", "write the file by hand") from None


def _latest_finetune(place: Workspace) -> RunFolder | None:
    """Find the finetune that began last: of those in the workspace, and those that were compared."""
    compared = [read_document(path).get("after") for path in paths_in(place.gate / "compared", "*.json")]
    folders = [*paths_in(_finetunes(place), "*"), *(Path(after) for after in compared if after)]
    runs = [run for run in map(RunFolder, folders) if run.document.exists()]
    return max(runs, key=lambda run: run.document.stat().st_mtime_ns, default=None)


def _finetunes(place: Workspace) -> Path:
    return place.finetune("any").parent
