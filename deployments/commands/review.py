"""``desra review``: people accept, reject and mend regions in a page, or rate them."""

import contextlib
import os
import shlex
import sys
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.commands.runs import existing_workspace
from desra_core.errors import UsageError, printable
from desra_core.evaluation.table import counted
from desra_core.files import write_secret
from desra_core.workspace.answers import open_answers
from tasks.logs import say, say_each

if TYPE_CHECKING:
    from desra_core.annotations.review import Review


def review(
    workspace: Annotated[Path, typer.Option(help="The workspace whose regions are to be looked at.")],
    rater: Annotated[str, typer.Option(help="Who answers; the answers are in WORKSPACE/review/RATER.jsonl.")],
    rate: Annotated[
        bool, typer.Option("--rate", help="Show each region for a while, and ask only whether something is wrong.")
    ] = False,
    seconds: Annotated[float | None, typer.Option(min=0.1, max=60, help="With --rate: for how long; 5 s.")] = None,
    passes: Annotated[
        int | None,
        typer.Option(min=1, help="How many raters each region needs; 1, and with --rate as many as there are."),
    ] = None,
    checks: Annotated[
        str | None, typer.Option(help="A rater whose answers are known to be right: every tenth region is one of them.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Images without a region too, last, as far as their pictures are there.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port on this machine; 0 for any free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Look at region after region in a page on this machine: accept, reject, mend or draw its mask by keys.

    Prints the address of the page, which has a secret in it, and ends with Ctrl-C. Every answer is on the disk before
    the next region shows. What is decided becomes the image's human mask, as with desra import. Several raters may
    answer at a time, each with a command of their own.
    """
    if seconds is not None and not rate:
        raise UsageError("--seconds", "counts only with --rate", "leave it out, or give --rate")
    if rate and everything:
        raise UsageError("--all", "and --rate are both given", "leave one out: only regions are rated")
    place = existing_workspace(workspace.absolute())
    with open_answers(place, rater) as file:
        from deployments.serving.review import review_server  # late, because it loads matplotlib
        from desra_core.annotations.review import Review

        made = Review(
            place,
            file,
            rater,
            rating=rate,
            passes=passes or (None if rate else 1),
            everything=everything,
            checks=checks,
        )
        if made.left_out:
            images = counted(made.left_out, "image")
            say(f"left out: {images} whose human mask is not of a review; desra import --undo takes such masks back")
        if made.unpictured:
            say(f"left out: {counted(made.unpictured, 'image')} whose pictures are not there")
        serving = review_server(made, port, (seconds or 5.0) if rate else None)
        leads = place.answers(rater).with_suffix(".html")
        with contextlib.suppress(KeyboardInterrupt), serving as address, contextlib.ExitStack() as stack:
            stack.callback(leads.unlink, missing_ok=True)
            typer.echo(f"review   {address}\nend      Ctrl-C")
            # Elsewhere, a browser for terminals would take this one.
            if browser and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
                # Every user of the machine sees the command line of a browser, so the secret is not in it.
                write_secret(leads, f'<!DOCTYPE html><meta http-equiv="refresh" content="0; url={address}">')
                webbrowser.open(leads.as_uri())
            threading.Event().wait()
        if not rate:
            made.bring()
        _show_end(made, rate=rate)


def _show_end(made: "Review", *, rate: bool) -> None:
    counts, agreed, imported = made.counts(), made.agreement(), made.imported()
    asked, right = made.checked()
    path = made.workspace.answers(made.rater)
    typer.echo(f"answers  {counts['answered']} of {counted(counts['all'], 'region')}, {counts['left']} left: {path}")
    if agreed.share is not None:
        kappa = "undefined, since all answers are equal" if agreed.kappa is None else f"{agreed.kappa:.2f}"
        name = "Cohen's" if agreed.raters == 2 else "Fleiss'"
        regions = counted(agreed.regions, "region")
        typer.echo(f"agree    {agreed.raters} raters on {agreed.share:.0%} of {regions}; {name} kappa {kappa}")
    if asked:
        typer.echo(f"checks   {right} of {asked} answered as known")
    root = shlex.quote(str(made.workspace.root))
    if rate:
        typer.echo(f"next     desra calibrate severity --workspace {root} --output severity.json")
        return
    typer.echo(f"masks    {counted(imported.images, 'human mask')} of reviews in {made.workspace.human}")
    say_each("failed", [printable(error) for error in made.failed.values()])
    if imported.waiting:
        say(f"{counted(imported.waiting, 'mask')} not imported yet: {imported.why}; desra review again imports them")
    typer.echo(f"next     desra evaluate --workspace {root}; desra finetune --workspace {root} --output RUN")
