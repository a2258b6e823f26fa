"""Command-line flags made from the settings models: one flag per field, with its type, default and description."""

import inspect
import tomllib
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from desra_core.detection.detectors import SUFFIXES
from desra_core.errors import UsageError
from desra_core.files import read_input
from desra_core.remote import Remote, place_of
from desra_core.settings import Frozen, Heading, Machine, at_home, folder_of, heading_of, whole_path
from tasks.logs import carry, configure, say

Settings = TypeVar("Settings", bound=Frozen)

_LABELS = "Folder of class-index PNGs by image name; short for --segmenter labels:DIR."
_CONFIG = (
    "TOML file with any of these flags as keys; the command line wins. Paths in it are relative to where the command "
    "runs."
)


AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document, as described above, and nothing else on stdout.")
]


def with_flags(
    run: Callable[..., None],
    kind: type[Settings],
    *,
    argument: str | None = None,
    config_argument: bool = False,
    json_flag: bool = False,
) -> Callable[..., None]:
    """Turn a function of settings and a machine into a Typer command with a flag for each field of either model.

    Args:
        run: The function of the settings and the machine; the command gets its name and its docstring as help.
        kind: The settings model.
        argument: A field that is given by position instead of as a flag.
        config_argument: Whether the TOML file is given by position instead of as ``--config``.
        json_flag: Whether there is a flag ``--json``, which the function gets as ``as_json``.
    """
    labelled = "segmenter" in kind.model_fields and "labels" not in kind.model_fields

    def command(**values: Any) -> None:
        context, config = values.pop("context"), values.pop("config")
        form = {"as_json": values.pop("as_json")} if json_flag else {}
        if context.args:
            reason = f"{1 + len(context.args)} of them are given, as by a shell that fills in a glob"
            raise UsageError((argument or "").upper(), reason, "put the glob in quotes, or name the folder")
        if labelled:
            values["segmenter"] = _segmenter(context, values.pop("labels"), values["segmenter"])
        if values.get("weights") not in (None, "published", "none"):
            values["weights"] = str(whole_path(values["weights"]))
        if values.get("method", "").endswith(SUFFIXES):
            values["method"] = str(whole_path(values["method"]))
        machine = {name: values.pop(name) for name in Machine.model_fields}
        # A default may depend on other settings, so the model itself fills in the fields that were not given. The
        # segmenter may have come from --labels.
        defaults = {name for name in values if _source(context, name) == "DEFAULT" and name != "segmenter"}
        given = {name: value for name, value in values.items() if name not in defaults}

        def named(name: str) -> str:
            if _source(context, name) == "DEFAULT_MAP":
                return f"{_key(name)} in {config}"
            return name.upper() if name == argument else f"--{_key(name)}"

        where = _validated(Machine, machine, named)
        configure(where.log_level, where.log_format)
        if where.cluster:
            from tasks.cluster_file import read_cluster_file  # late, because it loads Dask

            read_cluster_file(where.cluster)
        settings = _validated(kind, given, named)
        if {"workspace", "output"} & kind.model_fields.keys():
            carry(workspace=str(folder_of(settings)))
        run(settings, where, **form)

    look: Any = partial(typer.Argument, metavar="CONFIG") if config_argument else typer.Option
    parameters = [_parameter("context", typer.Context, inspect.Parameter.empty)]
    for heading, model, name in _in_order(kind):
        parameters.append(_field_parameter(name, model.model_fields[name], heading, positional=name == argument))
        if name == "segmenter" and labelled:
            option = typer.Option(help=_LABELS, rich_help_panel=heading)
            parameters.append(_parameter("labels", Annotated[Path | None, option], None))
    if json_flag:
        parameters.append(_parameter("as_json", AsJson, False))
    parameters.append(
        _parameter("config", Annotated[Path | None, look(callback=_read_config, is_eager=True, help=_CONFIG)], None)
    )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__, command.__name__ = run.__doc__, run.__name__
    return command


def paths_at_home(
    run: Callable[..., None], *, interrupted: str = "the same command begins again"
) -> Callable[..., None]:
    """Wrap a command that declares its own flags: replace ``~`` in paths, refuse URLs, and end in a line on Ctrl-C."""

    @wraps(run)
    def command(**values: Any) -> None:
        for value in values.values():
            if isinstance(value, Path) and isinstance(url := place_of(value), Remote):
                raise UsageError(url, "is a URL, which this command does not take", "give a path on a file system")
        try:
            run(**{name: at_home(value) if isinstance(value, Path) else value for name, value in values.items()})
        except KeyboardInterrupt:
            say(f"interrupted: {interrupted}")
            raise typer.Exit(130) from None

    return command


def _in_order(kind: type[Frozen]) -> list[tuple[Heading | None, type[Frozen], str]]:
    """List the fields of a kind and of `Machine` with their headings, in the order of the help.

    Under a heading, fields without a default come first, and the kind's own fields before inherited fields.
    """
    order: tuple[Heading | None, ...] = (None, *get_args(Heading))

    def place(field: tuple[Heading | None, type[Frozen], str]) -> tuple[int, bool, bool]:
        heading, model, name = field
        return order.index(heading), not model.model_fields[name].is_required(), name not in model.__annotations__

    fields = [(heading_of(model, name), model, name) for model in (kind, Machine) for name in model.model_fields]
    return sorted(fields, key=place)


def _field_parameter(
    name: str, field: FieldInfo, heading: str | None, *, positional: bool = False
) -> inspect.Parameter:
    # Typer's type for a flag that may be given several times.
    several = field.annotation == tuple[str, ...]
    metavar = "<str>" if several else None
    info: Any = typer.Option(help=field.description, rich_help_panel=heading, metavar=metavar)
    if positional:
        info = typer.Argument(help=field.description, metavar=name.upper())
    annotation: Any = list[str] if several else field.annotation
    default = inspect.Parameter.empty if field.is_required() else field.default
    if field.default_factory:  # the model fills it in
        annotation, default = annotation | None, None
    return _parameter(name, Annotated[annotation, info], default)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a TOML file the defaults of the command's flags (raises `UsageError`: bad file or key)."""
    if path is None:
        return None
    path = at_home(path)
    try:
        values = tomllib.loads(read_input(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is no TOML: {error}"
        serves = path.is_dir() and context.command.name == "serve"  # whose folder of photos is a flag
        remedy = "give a folder of photos as --photos" if serves else "mend the file or its name"
        raise UsageError(path, f"cannot be read ({reason})", remedy) from None
    values = {key.replace("-", "_"): value for key, value in values.items()}
    parameters = {str(parameter.name): parameter for parameter in context.command.params}
    known = parameters.keys() - {"config", "help", "as_json"}
    if unknown := sorted(set(values) - known):
        names = ", ".join(sorted(map(_key, known)))
        raise UsageError(path, f"has the unknown key {unknown[0]}", f"keys are {names}")
    for name, value in values.items():
        if any("\0" in text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)):
            raise UsageError(f"{_key(name)} in {path}", "holds a null character", "no name holds one: mend the file")
        if isinstance(value, str) and getattr(parameters[name], "multiple", False):
            values[name] = [value]
    context.default_map = values
    return path


def _segmenter(context: typer.Context, labels: Path | None, segmenter: str) -> str:
    """Combine ``--labels`` and ``--segmenter``, with absolute paths, since workers run in other folders."""
    if labels is not None:
        on_the_line = [_source(context, name) == "COMMANDLINE" for name in ("labels", "segmenter")]
        if segmenter != "none" and on_the_line[0] == on_the_line[1]:
            raise UsageError("--labels", "and --segmenter are both given", "leave one out")
        if segmenter == "none" or on_the_line[0]:
            segmenter = f"labels:{labels}"
    kind, colon, paths = segmenter.partition(":")
    parts = paths.split(",") if kind == "mmseg" else [paths]
    return kind + colon + ",".join(str(whole_path(path)) for path in parts if path)


def _source(context: typer.Context, name: str) -> str | None:
    """Return where the value of a flag comes from, in Click's words."""
    return getattr(context.get_parameter_source(name), "name", None)


def _key(name: str) -> str:
    return name.replace("_", "-")


def _validated(model: type[Settings], values: dict[str, Any], named: Callable[[str], str]) -> Settings:
    try:
        return model(
            **{name: whole_path(value) if isinstance(value, Path) else value for name, value in values.items()}
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        why = "" if first["type"] == "string_pattern_mismatch" else f" ({first['msg'].removeprefix('Value error, ')})"
        reason = f"{first['input']} is not accepted{why}"
        raise UsageError(named(name), reason, model.model_fields[name].description or "") from None
