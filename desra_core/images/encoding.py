"""Write results as files for people: in the colours of their photos, with the photo's metadata."""

import contextlib
import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tifffile
from PIL import Image

from desra_core.errors import ArgumentError
from desra_core.images import colour as colours
from desra_core.images.codec import TRANSPOSED, Pixels, eight_bits, encode_png, opened, treatment_of
from desra_core.images.decoders import EXIF_PREFIX, PNG_SIGNATURE, png_chunk

FORMATS = ("png", "jpeg", "webp", "tiff", "avif")

_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tif", "avif": ".avif"}
_LONGEST_SIDE = {"jpeg": 65_500, "webp": 16_383, "avif": 32_768}  # what libjpeg, libwebp and libavif read
_MOST_AVIF_PIXELS = 2**28
_MOST_TIFF_BYTES = 2**32 - 2**25
_LOSSLESS = 100  # the quality at which WebP loses nothing
_FULL_COLOUR = 90  # the quality from which colours have the resolution of brightness
_ROWS = 64  # rows that are laid over white at a time

_MOST_EXIF_BYTES = 65_527  # of a JPEG, without the prefix
_MOST_XMP_BYTES = 65_502
_ORIENTATION, _ACROSS, _DOWN, _UNIT, _INCH = 274, 282, 283, 296, 2
_EXIF, _GPS, _INTEROPERABILITY = 34665, 34853, 40965
_MAKER_NOTE, _COLOUR_SPACE = 37500, 40961
_ABOVE = {_EXIF: 0, _INTEROPERABILITY: _EXIF, _GPS: 0}  # the directory that points to each directory
_RESOLUTION = frozenset({_ACROSS, _DOWN, _UNIT})
_PIXEL_SIZES = frozenset({40962, 40963})
# The tags that describe a photo: title, author, camera, date, rating. All others describe how a file holds the pixels.
_DESCRIPTIVE = _RESOLUTION | {269, 270, 271, 272, 305, 306, 315, 316, 18246, 18249, 33432, *range(40091, 40096)}
_SHORT, _LONG, _RATIONAL = 3, 4, 5  # types of tags
_SIZES = {1: 1, 2: 1, _SHORT: 2, _LONG: 4, _RATIONAL: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # bytes a value
_ENTRY = 12  # bytes of a tag in its directory
_MOST_TAGS = 512
_MOST_TAG_BYTES = 2**24
_CLASSIC_TIFF = (b"II*\0", b"MM\0*")

_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation(?:\s*=\s*[\"']|\s*>)\s*)[2-8]")
_XMP_SIZE_NAMES = rb"(?:exif:Pixel[XY]Dimension|tiff:Image(?:Width|Length))"
_XMP_SIZES = re.compile(rb"\s" + _XMP_SIZE_NAMES + rb"\s*=\s*(?:\"[^\"]*\"|'[^']*')|<("
                        + _XMP_SIZE_NAMES + rb")\s*>[^<]*</\1\s*>")  # fmt: skip


class Origin(NamedTuple):
    """What a photo file has beside its pixels, as it applies to the upright photo at any size."""

    profile: bytes | None  # the ICC profile, where it can be used
    exif: bytes | None  # without ``Exif\0\0``; orientation 1, no sizes in pixels, no thumbnail
    xmp: bytes | None  # orientation 1, no sizes in pixels
    resolution: tuple[float, float] | None  # pixels per inch, horizontal and vertical


def read_origin(data: bytes, path: Path) -> Origin:
    """Read the profile and the metadata of a photo; damaged metadata count as absent.

    Args:
        data: The whole file.
        path: The path that errors name.

    Raises:
        ImageError: The file is no image that `desra_core.images.codec.decode` reads.
    """
    picture = opened(data, path)
    stored = picture.metadata()
    profile = picture.profile
    if profile is not None:
        models = (4,) if picture.has_inks else (3, 1)
        if all(treatment_of(picture, channels) == "unusable" for channels in models):
            profile = None
    resolution = stored.resolution
    if resolution is not None and picture.orientation in TRANSPOSED:
        resolution = resolution[::-1]
    return Origin(profile, _upright_exif(stored.exif, resolution), _upright_xmp(stored.xmp), resolution)


def suffix_of(format: str) -> str:  # noqa: A002
    """Return the suffix of files of a format of `FORMATS`, with its dot."""
    return _SUFFIXES[format]


def encode_picture(
    pixels: Pixels,
    alpha: Pixels | None,
    format: str,  # noqa: A002
    *,
    quality: int,
    origin: Origin | None,
    colour: Literal["source", "srgb"],
) -> bytes:
    """Encode a picture; the same picture is the same bytes each time.

    PNG and TIFF keep 16 bits, the other formats have 8. All but JPEG keep alpha: a JPEG shows the picture over white.

    Args:
        pixels: ``(H, W, 1 or 3)`` of sRGB, uint8 or uint16, upright.
        alpha: ``(H, W)`` of the same dtype, or None.
        format: One of `FORMATS`.
        quality: 1 to 100, of JPEG, WebP and AVIF; a WebP of 100 is lossless.
        origin: The profile and metadata of the photo, or None for a file without.
        colour: ``source`` converts to the photo's profile where the format can hold it, otherwise to sRGB; a photo
            without a profile is left without one. ``srgb`` writes sRGB, and its profile.

    Raises:
        ArgumentError: The picture is larger than the format allows.
    """
    height, width = pixels.shape[:2]
    longest = _LONGEST_SIDE.get(format, 2**31 - 1)
    if max(height, width) > longest or (format == "avif" and height * width > _MOST_AVIF_PIXELS):
        limit = f"{longest} pixels a side" + (f" and {_MOST_AVIF_PIXELS} in all" if format == "avif" else "")
        raise ArgumentError("picture", f"is {width}x{height}, but {format} holds {limit}", "choose png or tiff")
    if format in ("jpeg", "webp", "avif"):
        if alpha is not None and format == "jpeg":
            pixels, alpha = _over_white(pixels, alpha), None
        alpha = None if alpha is None else eight_bits(alpha)
    if format == "webp" and pixels.shape[2] == 1:  # WebP has no gray
        pixels = np.repeat(pixels, 3, axis=2)  # type: ignore[assignment]
    pixels, profile = _coloured(pixels, format, origin, colour)
    exif, xmp, resolution = (origin.exif, origin.xmp, origin.resolution) if origin else (None, None, None)
    if exif and profile in (colours.SRGB, colours.GRAY):
        exif = _of_srgb(exif)
    if format == "png":
        return _png(pixels, alpha, Origin(profile, exif, xmp, resolution))
    if format == "tiff":
        return _tiff(pixels, alpha, Origin(profile, exif, xmp, resolution))
    pixels = eight_bits(pixels)
    samples = pixels if alpha is None else np.dstack([pixels, alpha])
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "CMYK" if alpha is None else "RGBA"}[samples.shape[2]]
    image = Image.frombytes(mode, (width, height), np.ascontiguousarray(samples).tobytes())
    options: dict[str, Any] = {"quality": quality, "icc_profile": profile}
    if format == "jpeg":
        options |= {"subsampling": 0 if quality >= _FULL_COLOUR else 2, "optimize": True}
        options |= {"dpi": tuple(map(round, resolution))} if resolution else {}
        exif = _fitting_exif(exif)
        xmp = xmp if xmp and len(xmp) <= _MOST_XMP_BYTES else None
    elif format == "webp":
        options |= {"lossless": quality >= _LOSSLESS, "exact": True}
    else:
        full = "4:0:0" if mode == "L" else "4:4:4"
        options |= {"subsampling": full if quality >= _FULL_COLOUR or mode == "L" else "4:2:0", "max_threads": 1}
        exif = exif and _without(exif, 0, _ORIENTATION)  # Pillow would lay out EXIF with an orientation anew
        if mode == "LA":
            image = image.convert("RGBA")
    if exif:
        options["exif"] = EXIF_PREFIX + exif
    if xmp:
        options["xmp"] = xmp
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def _coloured(pixels: Pixels, format: str, origin: Origin | None, colour: str) -> tuple[Pixels, bytes | None]:  # noqa: A002
    """Convert pixels of sRGB to the colours of a file; returns the profile of these, too."""
    channels = pixels.shape[2]
    srgb = colours.GRAY if channels == 1 else colours.SRGB
    if colour == "srgb":
        return pixels, srgb
    profile = origin.profile if origin else None
    if profile is None:
        return pixels, None
    model = colours.model_of(profile)
    samples = 4 if model == "cmyk" and channels == 3 and format in ("jpeg", "tiff") else channels
    if not colours.fits(profile, samples):
        return pixels, srgb
    if colours.treatment(profile, samples) == "srgb":
        return pixels, profile
    return colours.from_srgb(pixels, profile), profile


def _over_white(pixels: Pixels, alpha: Pixels) -> Pixels:
    """Lay a picture over white, as a browser shows it on a page."""
    most = np.iinfo(pixels.dtype).max
    result = np.empty_like(pixels)
    for top in range(0, len(pixels), _ROWS):
        rows = slice(top, top + _ROWS)
        opacity = alpha[rows, :, np.newaxis].astype(np.uint64)
        result[rows] = (pixels[rows] * opacity + most * (most - opacity) + most // 2) // most
    return result


def _png(pixels: Pixels, alpha: Pixels | None, told: Origin) -> bytes:
    profile, exif, xmp, resolution = told
    encoded = encode_png(pixels, alpha)
    chunks = []
    if profile:
        chunks.append(png_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile)))
    if resolution:
        across, down = (round(inches / 0.0254) for inches in resolution)
        chunks.append(png_chunk(b"pHYs", struct.pack(">IIB", across, down, 1)))
    if exif:
        chunks.append(png_chunk(b"eXIf", exif))
    if xmp:
        chunks.append(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    start = len(PNG_SIGNATURE) + 25  # the end of the chunk IHDR
    return b"".join([encoded[:start], *chunks, encoded[start:]])


def _tiff(pixels: Pixels, alpha: Pixels | None, told: Origin) -> bytes:
    """Write a TIFF; the directories of EXIF become its own, which are appended to what tifffile writes."""
    profile, exif, xmp, resolution = told
    samples = pixels if alpha is None else np.dstack([pixels, alpha])
    if samples.nbytes > _MOST_TIFF_BYTES:
        reason = f"is {pixels.shape[1]}x{pixels.shape[0]}, but tiff holds 4 GB of samples"
        raise ArgumentError("picture", reason, "choose png")
    order, directories = _directories(exif) if exif else ("<", {})
    main = {tag: one for tag, one in directories.pop(0, {}).items() if tag in _DESCRIPTIVE - _RESOLUTION}
    below = [tag for tag in directories if _ABOVE[tag] == 0]
    tags: list[tuple[int | str, int, int, bytes | int, bool]] = [
        (tag, one.kind, one.values, one.data, True) for tag, one in main.items()
    ]
    tags += [({_EXIF: "ExifTag", _GPS: "GPSTag"}[tag], _LONG, 1, 0, True) for tag in below]
    if xmp:
        tags.append((700, 1, len(xmp), xmp, True))
    sink = io.BytesIO()
    tifffile.imwrite(
        sink, samples[:, :, 0] if samples.shape[2] == 1 else samples,
        byteorder=order, compression="adobe_deflate", predictor=True, metadata=None, software=False, extratags=tags,
        photometric={1: "minisblack", 3: "rgb", 4: "separated"}[pixels.shape[2]], planarconfig="contig",
        extrasamples=None if alpha is None else ["unassalpha"], iccprofile=profile, maxworkers=1,
        resolution=resolution, resolutionunit="inch" if resolution else None,
    )  # fmt: skip
    start = sink.seek(0, io.SEEK_END)
    sink.write(bytes(start % 2))
    laid_out, starts = _laid_out(directories, start + start % 2, order)
    sink.write(laid_out)
    view = sink.getbuffer()
    (first,) = struct.unpack_from(f"{order}I", view, 4)
    (count,) = struct.unpack_from(f"{order}H", view, first)
    for place in range(first + 2, first + 2 + _ENTRY * count, _ENTRY):
        (tag,) = struct.unpack_from(f"{order}H", view, place)
        if tag in below:
            struct.pack_into(f"{order}I", view, place + 8, starts[tag])
    view.release()
    return sink.getvalue()


class _Tag(NamedTuple):
    """A tag of EXIF: its type, its number of values, and these as bytes in the order of the block."""

    kind: int
    values: int
    data: bytes


# The tags of a directory. A block of EXIF has several: 0 is the main one, the others have the tags that point to them.
_Directory = dict[int, _Tag]


def _directories(block: bytes) -> tuple[Literal["<", ">"], dict[int, _Directory]]:
    """Read the directories of a block of EXIF and their byte order; what is damaged is left out."""
    order: Literal["<", ">"] = ">" if block.startswith(b"MM") else "<"
    if not block.startswith(_CLASSIC_TIFF):
        return order, {}
    found: dict[int, _Directory] = {}
    left = _MOST_TAG_BYTES

    def read(start: int, wanted: frozenset[int] | None) -> _Directory:
        nonlocal left
        directory: _Directory = {}
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for place in range(start + 2, start + 2 + _ENTRY * min(count, _MOST_TAGS), _ENTRY):
            if place + _ENTRY > len(block):
                break
            tag, kind, values, data = struct.unpack_from(f"{order}HHI4s", block, place)
            size = _SIZES.get(kind, 0) * values
            if size > len(data):
                (offset,) = struct.unpack(f"{order}I", data)
                data = block[offset : offset + min(size, left)]
            if 0 < size <= len(data) and (wanted is None or tag in wanted):
                directory[tag] = _Tag(kind, values, data[:size])
                left -= size
        return directory

    with contextlib.suppress(struct.error):
        found[0] = read(struct.unpack_from(f"{order}I", block, 4)[0], _DESCRIPTIVE | {_ORIENTATION, _EXIF, _GPS})
    for tag, above in _ABOVE.items():
        pointer = found.get(above, {}).pop(tag, None)
        with contextlib.suppress(struct.error):
            if pointer is not None and (directory := read(struct.unpack(f"{order}I", pointer.data)[0], None)):
                found[tag] = directory
    return order, found


def _laid_out(directories: dict[int, _Directory], start: int, order: str) -> tuple[bytes, dict[int, int]]:
    """Lay out directories one after the other from an offset on; returns where each of them begins, too."""
    ordered = {tag: directories[tag] for tag in (0, *_ABOVE) if tag in directories}
    pointers = {tag: [below for below in ordered if _ABOVE.get(below) == tag] for tag in ordered}
    starts = {}
    for tag, directory in ordered.items():
        starts[tag] = start
        start += 6 + _ENTRY * (len(directory) + len(pointers[tag]))
        start += sum(len(one.data) + len(one.data) % 2 for one in directory.values() if len(one.data) > 4)
    parts = []
    for tag, directory in ordered.items():
        links = {below: _Tag(_LONG, 1, struct.pack(f"{order}I", starts[below])) for below in pointers[tag]}
        entries, values = [], b""
        place = starts[tag] + 6 + _ENTRY * (len(directory) + len(links))
        for name, one in sorted((directory | links).items()):
            data = one.data.ljust(4, b"\0")
            if len(one.data) > 4:
                data = struct.pack(f"{order}I", place + len(values))
                values += one.data + bytes(len(one.data) % 2)
            entries.append(struct.pack(f"{order}HHI4s", name, one.kind, one.values, data))
        parts += [struct.pack(f"{order}H", len(entries)), *entries, bytes(4), values]
    return b"".join(parts), starts


def _block(directories: dict[int, _Directory], order: str) -> bytes:
    """Make a block of EXIF."""
    header = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HI", 42, 8)
    return header + _laid_out(directories, 8, order)[0]


def _upright_exif(exif: bytes | None, resolution: tuple[float, float] | None) -> bytes | None:
    """Lay out what EXIF says about a photo for the upright photo of any size; values stay byte by byte."""
    order, found = _directories(exif) if exif else ("<", {})
    if not found and resolution is None:
        return None
    main = {tag: one for tag, one in found.get(0, {}).items() if tag not in _RESOLUTION}
    main[_ORIENTATION] = _Tag(_SHORT, 1, struct.pack(f"{order}H", 1))
    if resolution is not None:
        for tag, value in zip((_ACROSS, _DOWN), resolution, strict=True):
            main[tag] = _Tag(_RATIONAL, 1, struct.pack(f"{order}II", round(value * 1000), 1000))
        main[_UNIT] = _Tag(_SHORT, 1, struct.pack(f"{order}H", _INCH))
    found[0] = main
    found[_EXIF] = {tag: one for tag, one in found.get(_EXIF, {}).items() if tag not in _PIXEL_SIZES}
    return _block({tag: directory for tag, directory in found.items() if directory}, order)


def _of_srgb(exif: bytes) -> bytes:
    """Return the EXIF for a file of sRGB."""
    order, found = _directories(exif)
    found.pop(_INTEROPERABILITY, None)
    if _COLOUR_SPACE in found.get(_EXIF, {}):
        found[_EXIF][_COLOUR_SPACE] = _Tag(_SHORT, 1, struct.pack(f"{order}H", 1))
    return _block(found, order)


def _without(exif: bytes, directory: int, tag: int) -> bytes:
    """Return EXIF without a tag of one of its directories."""
    order, found = _directories(exif)
    found.get(directory, {}).pop(tag, None)
    return _block(found, order)


def _fitting_exif(exif: bytes | None) -> bytes | None:
    """Return EXIF that fits into a JPEG: if need be without the camera's own notes; None where that does not do."""
    if exif and len(exif) > _MOST_EXIF_BYTES:
        exif = _without(exif, _EXIF, _MAKER_NOTE)
    return exif if exif and len(exif) <= _MOST_EXIF_BYTES else None


def _upright_xmp(xmp: bytes | None) -> bytes | None:
    """Correct the orientation in XMP, and take the sizes in pixels out."""
    return None if not xmp else _XMP_SIZES.sub(b"", _XMP_ORIENTATION.sub(rb"\g<1>1", xmp))
