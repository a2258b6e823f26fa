"""``desra train-detector`` and ``desra calibrate severity``: learn from masks and ratings of people."""

from pathlib import Path
from typing import Annotated

import typer

from deployments.commands.flags import AsJson
from deployments.commands.runs import show_json
from desra_core.errors import UsageError
from desra_core.evaluation.table import counted
from desra_core.settings import whole_path
from desra_core.workspace import Workspace
from tasks.logs import NowAndThen, say, say_each


def train_detector(
    output: Annotated[Path, typer.Option(help="File of the detector to write, a .json, for --method.")],
    dataset: Annotated[
        Path | None,
        typer.Argument(help="Folder with MSE-SR, GAN-SR and GT-Mask in it, as for desra benchmark.", metavar="DATASET"),
    ] = None,
    workspace: Annotated[Path | None, typer.Option(help="Learn from this workspace's human masks.")] = None,
    mse_sr: Annotated[
        Path | None, typer.Option(help="Folder of the MSE-trained model's results of clean pairs.")
    ] = None,
    gan_sr: Annotated[
        Path | None, typer.Option(help="Folder of the GAN-trained model's results, into which artifacts are injected.")
    ] = None,
    false_alarms: Annotated[
        float,
        typer.Option(min=1e-5, max=0.5, help="Share of blocks without an artifact that may be above the threshold."),
    ] = 0.003,
    seed: Annotated[int, typer.Option(min=0, help="Seed of injected artifacts.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Learn a detector from your own masks, for --method OUTPUT in desra detect and desra benchmark.

    Learns boosted trees over what differs in blocks of 8x8 px, from DATASET, from the human masks of WORKSPACE, or from
    clean pairs, into which artifacts are injected. The threshold and the printed numbers are of images that were left
    out of the fit, a fifth at a time. Exit code 1 where some images cannot be read.

    --json prints one object: output, images, blocks, marked (blocks), threshold, false_alarms, recall (share of the
    marked blocks above the threshold), precision_recall (area under the curve), and failures.
    """
    from desra_core.benchmarking.data_sets import read_data_set
    from desra_core.detection.detectors.trained import as_document
    from desra_core.files import write_json
    from desra_core.learning.detector import fit_detector, learn_from_data_set, learn_from_workspace

    _check_json(output)
    pairs = {role: folder for role, folder in (("mse_sr", mse_sr), ("gan_sr", gan_sr)) if folder is not None}
    if (workspace is None) == (dataset is None and not pairs):
        reason = "is not given" if workspace is None else "is given beside --workspace"
        raise UsageError("DATASET", reason, "give DATASET, --workspace, or --mse-sr and --gan-sr")
    if dataset is None and len(pairs) == 1:
        lacking = "--mse-sr" if mse_sr is None else "--gan-sr"
        raise UsageError(lacking, "is not given", "give both results of each photo")
    if dataset is not None and dataset.suffix.lower() == ".csv":
        remedy = "give a folder of data sets, or a COCO file"
        raise UsageError(dataset, "is a CSV file, from which no detector is learned", remedy)
    progress = NowAndThen("measuring blocks: {} of {} images")
    if workspace is not None:
        learned = learn_from_workspace(Workspace(whole_path(workspace)), progress)
    else:
        learned = learn_from_data_set(read_data_set(dataset, pairs, output), seed, progress)
    say_each("failed", learned.failures)
    say(f"fitting trees to the blocks of {counted(len(learned.scenes), 'image')}")
    fitted = fit_detector(list(learned.scenes.values()), false_alarms=false_alarms)
    numbers = {name: value for name, value in fitted._asdict().items() if name != "trees"} | {
        "false_alarms": false_alarms
    }
    write_json(output, as_document(fitted.trees, fitted.threshold, numbers))
    if as_json:
        failures = [error.failure._asdict() for error in learned.failures]
        show_json({"output": str(output)} | numbers | {"failures": failures})
    else:
        typer.echo(
            f"{counted(fitted.blocks, 'block')} of {counted(fitted.images, 'image')}, {fitted.marked} marked\n"
            f"on images left out of the fit: {fitted.recall:.0%} of the marked blocks found, where {false_alarms:.2%} "
            f"of the others are marked; area under precision and recall {fitted.precision_recall:.2f}\n"
            f"detector {output}\n"
            f"next     desra detect --method {output} --mse-sr ... --gan-sr ... --workspace ..."
        )
    raise typer.Exit(int(bool(learned.failures)))


def calibrate_severity(
    workspace: Annotated[Path, typer.Option(help="Workspace whose regions were rated in desra review --rate.")],
    output: Annotated[
        Path, typer.Option(help="File of the model to write, a .json, for --severity-model; a page goes beside it.")
    ],
    as_json: AsJson = False,
) -> None:
    """Fit how many viewers notice a region to the ratings of WORKSPACE, for --severity-model OUTPUT.

    Takes 200 ratings or more, of five images or more. The printed numbers and the page's reliability diagram are of
    images that were left out of the fit, a fifth at a time. Exit code 1 where some images cannot be read.

    --json prints one object: output, images, regions, ratings, noticed (share of the ratings that say yes), brier (mean
    squared error), brier_of_mean (that of the mean share), rank_correlation (Spearman's), reliability (predicted and
    observed share, and ratings, by tenth of the predicted share), gone (ratings of regions that are no more) and
    failures.
    """
    from desra_core.detection.severity import as_document
    from desra_core.files import write_json
    from desra_core.learning.severity import fit_severity, gather_ratings
    from desra_core.report.pages import write_reliability

    _check_json(output)
    gathered = gather_ratings(Workspace(whole_path(workspace)))
    say_each("failed", gathered.failures)
    if gathered.gone:
        say(f"warning: ratings of {counted(gathered.gone, 'region')} were left out: under these settings they are none")
    fitted = fit_severity(gathered.rated)
    numbers = {name: value for name, value in fitted._asdict().items() if name not in ("model", "reliability")}
    write_json(output, as_document(fitted.model, numbers))
    page = write_reliability(fitted, output)
    if as_json:
        failures = [error.failure._asdict() for error in gathered.failures]
        bins = [one._asdict() for one in fitted.reliability]
        show_json(
            {"output": str(output)} | numbers | {"reliability": bins, "gone": gathered.gone, "failures": failures}
        )
    else:
        typer.echo(
            f"{counted(fitted.ratings, 'rating')} of {counted(fitted.regions, 'region')} in "
            f"{counted(fitted.images, 'image')}; {fitted.noticed:.0%} say yes\n"
            f"on images left out of the fit: mean squared error {fitted.brier:.3f}, by the mean share "
            f"{fitted.brier_of_mean:.3f}; rank correlation {fitted.rank_correlation:.2f}\n"
            f"model    {output}\npage     {page}\n"
            f"next     desra mine ... --severity-model {output} --min-noticed 50"
        )
    raise typer.Exit(int(bool(gathered.failures)))


def _check_json(output: Path) -> None:
    if output.suffix != ".json":
        raise UsageError(output, "has another suffix than .json", "name a .json file with --output")
