"""Count the photos of a place by their headers: formats, sizes, depths, profiles, copies, and what is left out."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from PIL import ImageCms

from desra_core.errors import ImageError, printable
from desra_core.files import hash_file
from desra_core.images.codec import Header, read_header
from desra_core.images.scanning import FILES, image_files, no_images, paths_of, why_passed_over
from desra_core.remote import threads_for

NOT_TOLD = "not told by the header"
# Classes of sizes by their upper limits in megapixels.
_CLASSES = (0.25, 1, 4, 16, 64)
_TREATMENTS = {"srgb": "is sRGB", "converted": "is converted to sRGB", "unusable": "cannot be used, counts as sRGB"}
_BATCH = 1024  # files whose headers are in memory at a time
_LONGEST_NAME = 60  # characters of a profile's name

# A row per photo, with the columns of `FILES`. ``height`` and ``width`` are those of the upright photo. ``start`` is a
# hash of the beginning of the file. A photo is a ``copy`` where another one has the same content.
PHOTOS = pa.schema(
    [
        *FILES,
        *(pa.field(name, pa.int32()) for name in ("height", "width")),
        *(pa.field(name, pa.string()) for name in ("format", "depth", "profile", "treatment")),
        pa.field("start", pa.uint64()),
        pa.field("copy", pa.bool_()),
    ]
)


class LeftOut(NamedTuple):
    """Files, or whole folders, of a kind that is passed over."""

    what: str
    reason: str
    files: int
    example: str | None


class Unreadable(NamedTuple):
    """Files that should be read, and cannot be for the same reason."""

    reason: str
    remedy: str
    files: int
    example: str


@dataclass(frozen=True)
class Census:
    """What is in a place.

    Attributes:
        place: The folder, file or glob.
        photos: The photos (schema `PHOTOS`), by path.
        left_out: What is passed over, as a run would pass it over.
        unreadable: What should be read and cannot be.
    """

    place: Path
    photos: pa.Table
    left_out: list[LeftOut]
    unreadable: list[Unreadable]

    @property
    def megapixels(self) -> Any:
        """The size of each photo."""
        return self.photos["height"].to_numpy() * self.photos["width"].to_numpy().astype(np.int64) / 1e6

    def counts(self, *columns: str) -> list[dict[str, Any]]:
        """Count photos, bytes and megapixels by the values of some columns of text, the most frequent first."""
        table = self.photos.append_column("megapixels", pa.array(self.megapixels))
        sums = [("size", "count"), ("size", "sum"), ("megapixels", "sum")]
        order = [("size_count", "descending"), *((column, "ascending") for column in columns)]
        rows = table.group_by(list(columns)).aggregate(sums).sort_by(order).to_pylist()
        return [
            {column: row[column] for column in columns} | _sums(*(row["_".join(each)] for each in sums)) for row in rows
        ]

    def sizes(self) -> list[dict[str, Any]]:
        """Count photos by classes of their size, the smallest first."""
        megapixels, size = self.megapixels, self.photos["size"].to_numpy()
        found = np.digitize(megapixels, _CLASSES)
        return [
            {"size": _class(each)}
            | _sums((chosen := found == each).sum(), size[chosen].sum(), megapixels[chosen].sum())
            for each in np.unique(found).tolist()
        ]

    def extremes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Name the smallest and the largest photo."""
        order = np.argsort(self.megapixels, kind="stable")
        found = self.photos.select(["path", "width", "height"]).take([order[0], order[-1]]).to_pylist()
        return found[0], found[1]

    def copies(self) -> dict[str, Any]:
        """Count the photos whose content another photo has, and name one of them."""
        copies = self.photos.filter(self.photos["copy"])
        example = copies["path"][0].as_py() if copies.num_rows else None
        return {"photos": copies.num_rows, "bytes": pc.sum(copies["size"]).as_py() or 0, "example": example}


def take_census(
    place: Path,
    *,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    on_read: Callable[[int, int], object] = lambda *_: None,
) -> Census:
    """Read the headers of the photos of a place, and whole files only where two of a size begin alike.

    Args:
        place, exclude, include: As for `desra_core.images.scanning.image_files`.
        on_read: Called with the number of files that are read, and their number in all.

    Raises:
        UsageError: As `image_files`, or there are no photos.
        AbsentError: As `image_files`.
    """
    examples: dict[str, str] = {}
    found = image_files(place, exclude=exclude, include=include, examples=examples)
    if not found.files.num_rows and not found.problems:
        raise no_images(place, "name a folder of photos", found.passed_over)
    files = found.files.sort_by("path")
    paths = paths_of(place, files)
    batches, problems = [PHOTOS.empty_table()], list(found.problems)
    with threads_for(place) as threads:
        for top in range(0, files.num_rows, _BATCH):
            rows = files.slice(top, _BATCH).to_pylist()
            kept = []
            for done, (row, header) in enumerate(zip(rows, threads.map(_header, islice(paths, _BATCH)), strict=True)):
                if isinstance(header, ImageError):
                    problems.append(header)
                else:
                    kept.append(row | header)
                on_read(top + done + 1, files.num_rows)
            batches.append(pa.Table.from_pylist(kept, PHOTOS))
    photos = pa.concat_tables(batches).combine_chunks()
    photos = photos.set_column(photos.num_columns - 1, "copy", pa.array(_copies(place, photos), pa.bool_()))
    left_out = [
        LeftOut(printable(kind).partition(" (pip")[0], why_passed_over(kind), count, examples.get(kind))
        for kind, count in sorted(found.passed_over.items(), key=lambda item: (-item[1], item[0]))
    ]
    return Census(place, photos, left_out, unreadable_ones(problems))


def unreadable_ones(problems: Sequence[ImageError]) -> list[Unreadable]:
    """Sum up errors by their reason, the most frequent first."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for error in problems:
        by_reason.setdefault((error.reason, error.remedy), []).append(error.subject)
    found = [Unreadable(reason, remedy, len(each), each[0]) for (reason, remedy), each in by_reason.items()]
    return sorted(found, key=lambda one: -one.files)


def _header(path: Path) -> dict[str, Any] | ImageError:
    """Read what the columns of `PHOTOS` say of a file."""
    try:
        header = read_header(path)
    except ImageError as error:
        return error
    profile, treatment = _profile(header)
    depth = NOT_TOLD
    if samples := header.samples:
        depth = f"{samples.bits}-bit {samples.colours}{' with alpha' if samples.alpha else ''}"
    height, width = header.size
    start = xxhash.xxh3_64_intdigest(header.start)
    told = {"height": height, "width": width, "format": header.format, "depth": depth}
    return told | {"profile": profile, "treatment": treatment, "start": start}


def _profile(header: Header) -> tuple[str, str]:
    """Name the profile of a photo, and say what becomes of it."""
    if header.samples is None:
        return NOT_TOLD, ""
    if header.profile is None:
        return "none", "counts as sRGB"
    return profile_name(header.profile), _TREATMENTS[header.treatment or "unusable"]


@lru_cache(maxsize=256)
def profile_name(profile: bytes) -> str:
    """Return the name that an ICC profile gives itself."""
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except (OSError, ImageCms.PyCMSError):
        return "damaged"
    return printable(" ".join(name.split()))[:_LONGEST_NAME] or "without a name"


def _copies(place: Path, photos: pa.Table) -> list[bool]:
    """Find the photos whose content an earlier photo has; those of equal size and beginning are read whole."""
    alike = np.stack([photos["size"].to_numpy().astype(np.uint64), photos["start"].to_numpy()], axis=1)
    _, inverse, counts = np.unique(alike, axis=0, return_inverse=True, return_counts=True)
    suspects = np.flatnonzero(counts[inverse.reshape(-1)] > 1)
    copies = [False] * photos.num_rows
    seen: set[str] = set()
    with threads_for(place) as threads:
        for top in range(0, len(suspects), _BATCH):
            batch = suspects[top : top + _BATCH]
            paths = paths_of(place, photos.take(batch))
            for index, content in zip(batch.tolist(), threads.map(_content, paths), strict=True):
                copies[index] = content in seen
                if content is not None:
                    seen.add(content)
    return copies


def _content(path: Path) -> str | None:
    """Identify the content of a file; None where it cannot be read any more."""
    try:
        return hash_file(path)
    except ImageError:
        return None


def _class(number: int) -> str:
    if number == 0:
        return f"under {_CLASSES[0]} MP"
    if number == len(_CLASSES):
        return f"{_CLASSES[-1]} MP and more"
    return f"{_CLASSES[number - 1]} to {_CLASSES[number]} MP"


def _sums(photos: Any, size: Any, megapixels: Any) -> dict[str, Any]:
    return {"photos": int(photos), "bytes": int(size), "megapixels": round(float(megapixels), 3)}
