"""The parts that both kinds of benchmark share: methods, images, the work that is left, judging an image, tables."""

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.benchmarking.data_sets import DataSet, Example, heat_map_role, heat_map_tags, reference_role
from desra_core.detection.class_weights import load_weights
from desra_core.detection.detectors import (
    NEEDED_INPUTS,
    SUFFIXES,
    Detector,
    DetectorInputs,
    applied,
    detector_key,
    load_detector,
)
from desra_core.errors import ImageError, TransientError, UsageError, printable
from desra_core.evaluation.mask_files import is_lossy
from desra_core.evaluation.table import Section, counted
from desra_core.files import digest, fingerprint, read_bytes
from desra_core.images.codec import Pixels
from desra_core.networks.segmentation import load_segmenter, segment, segmenter_key
from desra_core.settings.models import Measuring
from desra_core.stages import read_label_file, read_photo, read_result
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File, ImageRef

_MASKS = ("gt_mask", "desra_mask", "exclude")
# The precision/recall curve is drawn at these multiples of a detector's own threshold: from a fifth to five times.
FACTORS = tuple(2 ** (step / 3) for step in range(-7, 8))
_AGAINST = " against "
# Heat maps have no threshold of their own; those of the share of viewers who would notice a pixel suit this one.
HEAT_THRESHOLD = 0.5
HEAT_MAP_VERSION = 1
# The Markdown file and the page list this many failures.
_FAILURES = 50

ClassWeights = npt.NDArray[np.float64]


class OperatingPoint(NamedTuple):
    """A row of the table: the masks of a method at one threshold of its scores."""

    name: str
    threshold: float

    @property
    def folder(self) -> str:
        """The name of the folder that holds the masks of this point."""
        return _as_folder(self.name)


def _as_folder(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class Method:
    """A detector, whose score maps are computed once per image, and the operating points at which masks are judged."""

    name: str
    spec: str  # name or file, as for `desra_core.detection.detectors.load_detector`
    key: str  # identifies its scores
    inputs: tuple[str, ...]
    points: tuple[OperatingPoint, ...]
    weighs_classes: bool = False  # class weights can apply to its scores
    weighted: bool = False  # class weights do apply
    own_threshold: float = 0.0  # the detector's own
    reference: str = ""  # the reference that takes the place of the MSE results; empty for these

    def against(self, reference: str) -> Self:
        """Return the method that compares the GAN results with another reference."""
        points = tuple(OperatingPoint(f"{point.name}{_AGAINST}{reference}", point.threshold) for point in self.points)
        return replace(self, name=f"{self.name}{_AGAINST}{reference}", points=points, reference=reference)

    @property
    def compares_masks(self) -> bool:
        """Check whether its masks are compared with the DeSRA masks of a data set."""
        return self.weighs_classes and not self.reference

    def plain(self, name: str) -> str:
        """Return the name of this method or of one of its points without the reference."""
        return name.removesuffix(f"{_AGAINST}{self.reference}") if self.reference else name

    @property
    def folder(self) -> str:
        """The name of the folder that holds what is kept of its scores."""
        return _as_folder(self.name)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The thresholds of the method's curve, ascending; none where the detector's own threshold is not positive."""
        return tuple(self.own_threshold * factor for factor in FACTORS) if self.own_threshold > 0 else ()

    @property
    def is_stored(self) -> bool:
        """Check whether its scores are heat maps of the data set."""
        return not self.spec

    def detector(self, weights: ClassWeights | None) -> Detector:
        """Load the detector; ``weights`` are the class weights of the benchmark, ``(150,)``."""
        return applied(self.spec).weighted(weights) if self.weighted else load_detector(self.spec)


class DecodedPair(NamedTuple):
    """The decoded files of an image of ``shape`` ``(H, W)``; ``seconds`` is the time to compute its labels, if any."""

    path: Path
    shape: tuple[int, int]
    inputs: DetectorInputs
    seconds: float | None
    references: dict[str, Pixels]  # by name, those that are needed

    def inputs_of(self, method: Method) -> DetectorInputs:
        """Return the inputs of a method, with its reference in the place of the MSE result."""
        return self.inputs._replace(mse_sr=self.references[method.reference]) if method.reference else self.inputs


@dataclass(frozen=True)
class Job(ABC):
    """An image of a benchmark, as it goes to a worker; ``missing`` names the methods that are to be run on it."""

    part: str
    name: str
    missing: tuple[str, ...]
    references: dict[str, File]  # by name

    @abstractmethod
    def path(self, workspace: Workspace) -> Path:
        """Return the file of the image's result."""

    @abstractmethod
    def left(self, workspace: Workspace, methods: Sequence[Method]) -> Self | ImageError | None:
        """Return the job with the methods that its file lacks as ``missing``; None if nothing is left to do.

        Where the file holds an error that would come again, return that error.
        """

    @abstractmethod
    def judge(self, pair: DecodedPair, benchmark: "Benchmark[Any]") -> bytes:
        """Run the missing methods on a pair, and return the new content of the file (raises `ImageError`)."""

    @abstractmethod
    def failed(self, error: ImageError, workspace: Workspace) -> bytes:
        """Return the content of the file of an image that cannot be judged."""


AnyJob = TypeVar("AnyJob", bound=Job)
# Takes an image, its files by role, and the methods that can be run on the image with the keys of their inputs.
JobMaker = Callable[[Example, dict[str, File], dict[Method, list[str]]], AnyJob]


@dataclass(frozen=True)
class Benchmark(Generic[AnyJob]):
    """Images to judge, and the methods in the order of the table."""

    settings: Measuring
    methods: tuple[Method, ...]
    work: list[tuple[ImageRef, AnyJob]]  # every image that can be judged, with its job
    failures: list[ImageError]  # why other images cannot be judged
    unjudged: list[Path]  # GAN results without a ground truth
    lossy: list[Path]  # masks that are JPEG or lossy WebP
    weights: ClassWeights | None  # (150,) float64; None where no method is weighted

    def missing(self) -> list[tuple[ImageRef, AnyJob]]:
        """List the images that are left to judge, without those that would fail again."""
        left = ((image, job.left(self.workspace, self.methods)) for image, job in self.work)
        return [(image, job) for image, job in left if isinstance(job, Job)]

    def failed(self) -> list[ImageError]:
        """List the errors of images that cannot be judged, because files are lacking or files are at fault."""
        left = (job.left(self.workspace, self.methods) for _, job in self.work)
        return self.failures + [error for error in left if isinstance(error, ImageError)]

    @property
    def notes(self) -> list[str]:
        """What a reader needs to know to judge the numbers."""
        said = []
        if self.lossy:
            masks = counted(len(self.lossy), "mask is", "masks are")
            said.append(f"{masks} JPEG or lossy WebP, thresholded at half: save masks as PNG")
        if self.unjudged:
            results = counted(len(self.unjudged), "GAN result has", "GAN results have")
            said.append(f"{results} no ground truth, the first is {printable(self.unjudged[0])}")
        return said

    @property
    def workspace(self) -> Workspace:
        """The folder of all results."""
        return Workspace(self.settings.output)

    @property
    def runs_networks(self) -> bool:
        """Check whether class labels are computed."""
        return self.settings.segmenter != "none" and any("labels" in method.inputs for method in self.methods)


class Tables(NamedTuple):
    """The results of a benchmark: sections for people, a CSV file, and a document for JSON with all numbers.

    A terminal shows ``brief``, or all sections where it is empty.
    """

    stem: str
    title: str
    sections: list[Section]
    csv: str
    document: dict[str, Any]
    brief: Sequence[Section] = ()

    def with_failures(self, failures: Sequence[ImageError]) -> list[Section]:
        """Add a section about the images that could not be judged."""
        lines = [printable(error) for error in failures[:_FAILURES]]
        if len(failures) > _FAILURES:
            lines.append(f"and {len(failures) - _FAILURES} more, in {self.stem}.json")
        return [*self.sections, Section("Images that could not be judged", lines)] if failures else self.sections


def plan_jobs(
    settings: Measuring, data_set: DataSet, make_job: JobMaker[AnyJob], references: Sequence[str] = ()
) -> Benchmark[AnyJob]:
    """Hash the files of a data set and list the jobs. Writes nothing. Each method is run for each of the references.

    Raises `UsageError`: a method, the weights or the segmenter cannot be used, or lacks an input.
    """
    segmentation = segmenter_key(settings.segmenter) if settings.segmenter != "none" else None
    given = {role for example in data_set.examples for role in example.files} | ({"labels"} if segmentation else set())
    source = settings.weights or ("published" if "labels" in given else "none")
    if source != "none" and "labels" not in given:
        remedy = "add --labels or --segmenter, or drop --weights"
        raise UsageError("--weights", f"{source} needs class labels", remedy)
    weights = load_weights(source) if source != "none" else None
    methods = load_methods(settings.methods.split(","), weights_key=weights.key if weights else None)
    methods += [method.against(reference) for reference in references for method in methods]
    for tag in heat_map_tags(given):
        role = heat_map_role(tag)
        points = (OperatingPoint(role, HEAT_THRESHOLD),)
        methods.append(Method(role, "", f"heat map {HEAT_MAP_VERSION}", (role,), points, own_threshold=HEAT_THRESHOLD))
    for method in methods:
        for role in method.inputs:
            if role not in given:
                needed, remedy = NEEDED_INPUTS[role]
                raise UsageError("--methods", f"{method.name} needs {needed}", remedy)
    used = {"mse_sr", "gan_sr", *_MASKS, *map(reference_role, references)}.union(*(method.inputs for method in methods))
    if segmentation:
        used.discard("labels")
    with ThreadPoolExecutor() as pool:
        hashed = list(pool.map(lambda example: _hashed(example, used), data_set.examples))
    work, failures, lossy = [], list(data_set.failures), []
    for example, found in zip(data_set.examples, hashed, strict=True):
        if isinstance(found, ImageError):
            failures.append(found)
            continue
        files, lossy_masks = found
        lossy += lossy_masks
        hashes = {role: file.hash for role, file in files.items()}
        if segmentation:
            hashes["labels"] = segmentation
        usable = [method for method in methods if hashes.keys() >= set(method.inputs)]
        inputs = {method: [hashes[role] for role in method.inputs] for method in usable}
        # The id does not come from the content: two parts may hold the same pair with different masks.
        roles = {role: files.get(role) for role in ("mse_sr", "gan_sr", "lr", "labels")}
        image = ImageRef(fingerprint(example.part, example.name), 0, (example.title,), **roles)
        work.append((image, make_job(example, files, inputs)))
    values = weights.values if weights else None
    return Benchmark(settings, tuple(methods), work, failures, data_set.unjudged, lossy, values)


def load_methods(specs: Iterable[str], *, weights_key: str | None) -> list[Method]:
    """Load the methods of a benchmark; ``specs`` are names and files of detectors, as `load_detector` takes them.

    A detector that weighs classes gives two methods: one with weight 1, and, where class weights have a key
    (``weights_key``), one with these. Operating points are the detector's ``thresholds``, else its own threshold.

    Raises `UsageError`: a method is unknown, fails to load, or two have one name.
    """
    found: list[Method] = []
    for spec in specs:
        detector = load_detector(spec)
        name = Path(spec).stem if spec.endswith(SUFFIXES) else spec
        key, inputs, own_threshold = detector_key(spec), tuple(detector.inputs), float(detector.threshold)
        weighs_classes = applied(spec).weighs_classes
        if weighs_classes:
            if weights_key is not None:
                own = (OperatingPoint(name, detector.threshold),)
                found.append(Method(name, spec, f"{key} {weights_key}", ("labels",), own, True, True, own_threshold))
            name = f"{name}, weight 1"
        points = [OperatingPoint(f"{name}, {value:g}", value) for value in getattr(detector, "thresholds", ())]
        points = points or [OperatingPoint(name, detector.threshold)]
        found.append(Method(name, spec, key, inputs, tuple(points), weighs_classes, False, own_threshold))
    folders = [point.folder for method in found for point in method.points]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UsageError("--methods", f"has two methods called {folder}", "rename a file, or leave one out")
    return found


def judge_image(image: ImageRef, job: Job, benchmark: Benchmark[Any], device: str, max_pixels: int) -> None:
    """Run the methods that an image lacks, and publish the result. Workers call this function.

    Networks run on ``device``, ``cpu`` or ``cuda``. Files of more than ``max_pixels`` pixels are refused.

    Raises `ImageError`: the image cannot be judged. Errors other than `TransientError` would come again, so they are
    also recorded in the file of the result.
    """
    workspace = benchmark.workspace
    try:
        pair = _read_pair(image, job, benchmark, device, max_pixels)
        with _one_thread():
            content = job.judge(pair, benchmark)
    except TransientError:
        raise
    except ImageError as error:
        workspace.publish(job.path(workspace), job.failed(error, workspace))
        raise
    workspace.publish(job.path(workspace), content)


def _hashed(example: Example, used: set[str]) -> tuple[dict[str, File], list[Path]] | ImageError:
    """Hash the used files of an image, and list its lossy masks; return the error of a file that cannot be read."""
    files, lossy = {}, []
    try:
        for role, path in example.files.items():
            if role in used:
                data = read_bytes(path)
                files[role] = File(path, digest(data))
                if role in _MASKS and is_lossy(data):
                    lossy.append(path)
    except ImageError as error:
        return error
    return files, lossy


def _read_pair(image: ImageRef, job: Job, benchmark: Benchmark[Any], device: str, max_pixels: int) -> DecodedPair:
    """Decode a pair and the other inputs of the missing methods."""
    assert image.mse_sr is not None
    assert image.gan_sr is not None
    missing = [method for method in benchmark.methods if method.name in job.missing]
    inputs = {role for method in missing for role in method.inputs}
    mse_sr, gan_sr = (read_result(file, max_pixels).pixels for file in (image.mse_sr, image.gan_sr))
    asked = dict.fromkeys(method.reference for method in missing if method.reference)
    references = {name: read_result(job.references[name], max_pixels).pixels for name in asked}
    for twin, other in {"MSE twin": mse_sr, **references}.items():
        if other.shape[:2] != gan_sr.shape[:2]:
            sizes = " and ".join(f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (gan_sr, other))
            raise ImageError(image.path, f"and its {twin} are {sizes}", "give results of one size")
    lr = read_photo(image.lr, max_pixels).pixels if "lr" in inputs and image.lr else None
    labels, seconds = None, None
    if "labels" in inputs and image.labels:
        labels = read_label_file(image.labels, gan_sr.shape[:2], max_pixels)
    elif "labels" in inputs:
        segmenter = load_segmenter(benchmark.settings.segmenter, device)
        started = time.perf_counter()
        labels = segment(segmenter, gan_sr, image.path)
        seconds = round(time.perf_counter() - started, 4)
    return DecodedPair(image.path, mse_sr.shape[:2], DetectorInputs(mse_sr, gan_sr, lr, labels), seconds, references)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limit OpenCV, and PyTorch if it is loaded, to this thread, because only the time of this thread is measured."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    torch = sys.modules.get("torch")
    torch_threads = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
        if torch:
            torch.set_num_threads(torch_threads)
