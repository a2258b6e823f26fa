"""The readers of files that others wrote, each as a function of bytes that lets nothing out but errors of one line.

`tests/fuzz/run.py` gives them bytes that libFuzzer makes up, `test_targets.py` the bytes that once broke them.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image
from safetensors.torch import save

from deployments.commands.flags import with_flags
from desra_core.annotations.labelme import draw_shapes, labelme_document, labelme_shape, read_labelme
from desra_core.benchmarking.data_sets import read_mask_rows
from desra_core.detection import severity
from desra_core.detection.blocks import FEATURES
from desra_core.detection.class_weights import load_weights
from desra_core.detection.detectors import trained
from desra_core.detection.detectors.description import read_description
from desra_core.detection.detectors.trained import Trees, load_trained
from desra_core.detection.severity import REGION_FEATURES, SeverityModel, load_severity_model
from desra_core.errors import DesraError
from desra_core.evaluation.coco_masks import decode_coco_mask, read_coco
from desra_core.evaluation.heat_maps import read_heat_map
from desra_core.evaluation.mask_files import decode_any_mask
from desra_core.images.codec import decode, decode_labels, image_size
from desra_core.images.encoding import read_origin
from desra_core.networks.checkpoints import read_kinds
from desra_core.networks.segmentation import segmenter_key
from desra_core.remote import file_at, members
from desra_core.settings.models import SETTINGS
from tests.picture_files import Page, bmp_file, bmp_rows, chunk, png_file, tiff_file
from tests.profiles import P3

# The place of the file that a target reads: in memory where the machine has such a disk.
FOLDER = Path(tempfile.mkdtemp(prefix="desra-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
SIDE = 50  # of the image that masks are drawn on
# Of Click, which typer may bring under another name.
_BadUsage: type[Exception] = typer.BadParameter.mro()[2]


class Target(NamedTuple):
    """A reader, valid files to begin with, and words that its files hold."""

    read: Callable[[bytes], object]
    seeds: Callable[[], Iterator[bytes]]
    words: tuple[str, ...] = ()


def tried(read: Callable[[bytes], object], data: bytes) -> str | None:
    """Let a reader read; returns the line of its error, and lets every other error out."""
    try:
        read(data)
    except DesraError as error:
        return str(error)
    except _BadUsage as error:
        return str(error)
    return None


def file_of(data: bytes, name: str) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------ pictures


def read_picture(data: bytes) -> None:
    """All that a run or an import does with the bytes of a picture; checksums of PNG are mended first."""
    data, path = healed(data), Path("photo")
    decode(data, path, max_pixels=2**22)
    read_origin(data, path)
    height, width = image_size(data, path)
    for read in (decode_labels, decode_any_mask):
        with contextlib.suppress(DesraError):
            read(data, path)
    assert height * width <= 2**22


def healed(data: bytes) -> bytes:
    """Give the chunks of a PNG right checksums, without which all would be refused alike."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, start = [data[:8]], 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            break
        parts += [data[start : end - 4], struct.pack(">I", zlib.crc32(data[start + 4 : end - 4]))]
        start = end
    return b"".join([*parts, data[start:]])


def pictures() -> Iterator[bytes]:
    rng = np.random.default_rng(5)
    samples = {depth: rng.integers(0, 256, (9, 13, depth), np.uint8) for depth in (1, 2, 3, 4)}
    deep = rng.integers(0, 65536, (9, 13, 3)).astype(np.uint16)
    yield png_file(samples[3], 2, 8)
    yield png_file(deep, 2, 16, chunk(b"iCCP", b"p\0\0" + zlib.compress(P3)))
    exif = Image.Exif()
    exif[271], exif[282], exif[283] = "Maker", 300.0, 300.0
    exif.get_ifd(34665)[36867] = "2020:01:01 00:00:00"
    for compression, predictor, tile in ((1, 1, 0), (5, 2, 0), (8, 2, 16), (32773, 1, 0), (50000, 1, 16)):
        yield tiff_file(Page(samples[3], 2, 8, compression=compression, predictor=predictor, tile=tile))
    yield tiff_file(Page(deep, 2, 16, planar=2), big=True, order=">")
    yield tiff_file(Page(samples[1] & 15, 3, 4, colormap=tuple(range(48))), Page(samples[4], 2, 8, extra=1))
    yield bmp_file(bmp_rows(samples[3], 8), 13, 9, 24)
    yield bmp_file(bmp_rows(samples[1] & 1, 1), 13, -9, 1, palette=bytes(8))
    photo = Image.fromarray(samples[3])
    options: dict[str, Any]
    for kind, options in (
        ("JPEG", {}), ("JPEG", {"progressive": True, "exif": exif, "icc_profile": P3}), ("WEBP", {"lossless": True}),
        ("WEBP", {}), ("PNG", {"pnginfo": None}), ("TIFF", {"compression": "jpeg"}), ("GIF", {}),
        ("TIFF", {"compression": "tiff_lzw"}), ("PNG", {"save_all": True, "append_images": [photo.rotate(180)]}),
    ):  # fmt: skip
        sink = io.BytesIO()
        photo.save(sink, kind, **options)
        yield sink.getvalue()
    sink = io.BytesIO()
    photo.convert("1").save(sink, "TIFF", compression="group4")
    yield sink.getvalue()


# ------------------------------------------------------------------ checkpoints


def read_checkpoint(data: bytes) -> None:
    read_kinds(file_of(data, "model.pth"))


def read_pickle(data: bytes) -> None:
    """The pickle of a checkpoint, in an archive that is right."""
    read_kinds(file_of(archive(data), "model.pth"))


def archive(pickled: bytes, **further: bytes) -> bytes:
    """A checkpoint as torch.save writes it, of a pickle and two records of 72 bytes."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        records = {
            "data.pkl": pickled,
            "byteorder": b"little",
            "data/0": bytes(72),
            "data/1": bytes(72),
            "version": b"3\n",
        } | further
        for name, content in records.items():
            file.writestr(f"model/{name}", content)
    return sink.getvalue()


def tensors() -> dict[str, Any]:
    inner = {"conv.weight": torch.zeros(2, 1, 3, 3), "conv.bias": torch.ones(36, dtype=torch.bfloat16)}
    return {"params_ema": inner, "params": dict(inner), "step": 7, "scores": np.arange(3.0), "loss": np.float64(1)}


def checkpoints() -> Iterator[bytes]:
    for old in (False, True):
        sink = io.BytesIO()
        torch.save(tensors(), sink, _use_new_zipfile_serialization=not old)
        yield sink.getvalue()
    yield save(tensors()["params"])
    yield pickle.dumps({"a": 1})


def pickles() -> Iterator[bytes]:
    sink = io.BytesIO()
    torch.save(tensors(), sink)
    yield zipfile.ZipFile(sink).read("archive/data.pkl")
    yield pickle.dumps({"a": [1, 2.0, "x"], "b": (None, True)}, protocol=2)


# ------------------------------------------------------------------ masks that people drew

# What a value of a JSON file may be instead.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e-300, 1e308, float("inf"),
    float("nan"), "", "a", "7", "7.0", "\0", "\n", "\ud800", "../../x", "/etc/passwd", "x" * 300, "0550000000b1", [],
    [[]], {}, [0, 0, 9, 9], [0.0] * 6, [1, 1, 40, 1, 40, 40], [[1, 1], [40, 1], [40, 40]], {"size": [SIDE, SIDE],
    "counts": [0, 100, 2400]}, {"size": [SIDE, SIDE], "counts": "0"}, [{}], "polygon", "mask", "circle", "rectangle",
    "rotation", "linestrip", [[5, 5], [2**19, 5]], SIDE, 4 * SIDE, 400 * SIDE, 2**20, 2**16, "iVBORw0KGgo=",
)  # fmt: skip


def bent(document: Any, program: bytes) -> bytes:
    """Put other values into a document of JSON: each two bytes name a place in it and a value."""
    document = copy.deepcopy(document)
    for place, value in pairs(program):
        places = list(_places(document))
        holder, key = places[place % len(places)]
        holder[key] = copy.deepcopy(VALUES[value % len(VALUES)])
    return json.dumps(document).encode()


def pairs(data: bytes) -> Iterator[tuple[int, int]]:
    return zip(data[::2], data[1::2], strict=False)


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(entries):
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


def json_file(data: bytes, template: Any) -> bytes:
    """Bytes that begin with ``!`` bend a document, all others are the file."""
    return bent(template(), data[1:]) if data.startswith(b"!") else data


def read_drawn(data: bytes) -> None:
    draw_shapes(read_labelme(file_of(json_file(data, drawn), "photo.json")), (SIDE, SIDE))


@cache
def _drawn() -> bytes:
    square = np.ones((5, 6), bool)
    shapes = [labelme_shape(2, 3, crop, "") for crop in (square, np.pad(square, 2) ^ np.pad(square[1:-1, 1:-1], 3))]
    shapes += [
        {"label": "artifact", "shape_type": kind, "points": points}
        for kind, points in (
            ("circle", [[9, 9], [12, 9]]), ("rectangle", [[1, 1], [5, 7]]),
            ("rotation", [[20, 20], [30, 25], [25, 35], [15, 30]]),
        )
    ]  # fmt: skip
    return labelme_document("photo", (SIDE, SIDE), shapes)


def drawn() -> Any:
    return json.loads(_drawn())


def read_coco_file(data: bytes) -> None:
    for mask in read_coco(file_of(json_file(data, coco), "coco.json")).values():
        if mask.height * mask.width <= 2**22:  # the callers compare it with the image's size first
            decode_coco_mask(mask)


def read_table_of_masks(data: bytes) -> None:
    read_mask_rows(file_of(data, "masks.csv"), ("image", "mask", "prominence"))


def tables_of_masks() -> Iterator[bytes]:
    yield b'image,mask,prominence\na,a-1.png,0.5\n"b,c",b.png,\n'


def read_heat_map_file(data: bytes) -> None:
    read_heat_map(data, FOLDER / "a@SR@.npy.gz", (SIDE, SIDE))


def heat_maps() -> Iterator[bytes]:
    for array in (np.zeros((SIDE, SIDE), np.float32), np.zeros((SIDE - 2, SIDE - 2), bool, order="F")):
        content = io.BytesIO()
        np.save(content, array)
        yield content.getvalue()
        yield gzip.compress(content.getvalue(), mtime=0)


def coco() -> Any:
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": SIDE, "height": SIDE}],
        "categories": [{"id": 1, "name": "artifact"}, {"id": 2, "name": "text"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]], "bbox": [1, 1, 8, 8]},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 8], "attributes": {"rotation": 30}},
            {
                "id": 3, "image_id": 1, "category_id": 1,
                "segmentation": {"size": [SIDE, SIDE], "counts": [10, 40, SIDE * SIDE - 50]},
            },
        ],
    }  # fmt: skip


def documents(template: Callable[[], Any]) -> Callable[[], Iterator[bytes]]:
    def seeds() -> Iterator[bytes]:
        yield json.dumps(template()).encode()
        yield b"!"
        yield b"!" + bytes(range(40))

    return seeds


# ------------------------------------------------------------------ text


def read_class_weights(data: bytes) -> None:
    load_weights(str(file_of(data[1:], "weights.toml" if data.startswith(b"t") else "weights.csv")))


def class_weights() -> Iterator[bytes]:
    rows = "".join(f"{index},name,{index % 20}\n" for index in range(150))
    yield f"cade20k_index,name,interval\n{rows}".encode()
    yield f"cade20k_index,name,weight\n{rows}".encode()
    yield b"tversion = 1\n[[class]]\nindex = 0\nweight = 1.5\n"
    yield b"tversion = 1\n" + b"".join(b"[[class]]\nindex = %d\nweight = 1.5\n" % index for index in range(150))


@cache
def _commands() -> tuple[Any, ...]:
    found = []
    for kind in SETTINGS.values():
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(with_flags(lambda settings, machine: None, kind))
        found.append(typer.main.get_command(app))
    return tuple(found)


# What a TOML file may hold behind a key.
TOML = (
    "1", "-1", "0", "1.5", "nan", "-inf", "true", '""', '"x"', '"\\u0000"', '"~\\u0000/x"', '"~nobody-there/x"',
    '"\\n"', "[]", '["a"]', "[1, 2]", '["\\u0000"]', "{}", "{a = 1}", "2026-01-01", "12:00:00", "1" * 30, "9" * 5000,
    "[" * 2000, '"' + "x" * 300 + '"', '"mmseg:a,b"', '"labels:x"', '"0.1%"', '"101%"', '"4GB"', '"bicubic"',
    '"tcp://x"', "0x10", "1e400", '"\u202e"', "'''\nx'''", '"none"', '"9999999999999999999T"', '"0 6 * * *"', '"cpu"',
)  # fmt: skip


def read_settings(data: bytes) -> None:
    """The first byte names a command; then bytes of keys and values, or behind a ``#`` a file of TOML."""
    command = _commands()[data[0] % len(_commands())] if data else _commands()[0]
    text = data[1:]
    if not text.startswith(b"#"):
        keys = [parameter.name or "" for parameter in command.params]
        values = {parameter.name: '"x"' for parameter in command.params if parameter.required}
        values |= {keys[key % len(keys)]: TOML[value % len(TOML)] for key, value in pairs(text)}
        text = "\n".join(f"{key} = {value}" for key, value in values.items()).encode()
    path = file_of(text, "settings.toml")
    command.main(["--config", str(path)], standalone_mode=False)


def settings() -> Iterator[bytes]:
    for index in range(len(SETTINGS)):
        yield bytes([index])
        yield bytes([index]) + bytes(range(30))
    yield b"\0#photos = 'x'\nworkspace = 'ws'\ngan-model = 'a.pth'\n"


def read_config(data: bytes) -> None:
    """A config of MMSegmentation, as far as it is read before it is run."""
    segmenter_key(f"mmseg:{file_of(data, 'config.py')},{file_of(b'x', 'weights.pth')}")


def configs() -> Iterator[bytes]:
    yield b"_base_ = ['weights.pth']\nmodel = dict(type='EncoderDecoder')\n"
    yield b"_base_ = './config.py'\n"


def read_learned(data: bytes) -> None:
    """A detector that was trained, a severity model, or the description of a detector, by the first byte."""
    if data.startswith(b"d"):
        trees = load_trained(file_of(data[1:], "learned.json")).trees
        trained._walk.py_func(np.zeros((2, len(FEATURES)), np.float32), *trees)  # numba cannot compile what is traced
    elif data.startswith(b"s"):
        load_severity_model(file_of(data[1:], "severity.json")).noticed(np.zeros((2, len(REGION_FEATURES))))
    else:
        read_description(file_of(data[1:], "described.toml"))


def learned() -> Iterator[bytes]:
    trees = Trees(*map(np.array, ([0, 0, 0], [0.5, 0, 0], [1, 0, 0], [2, 0, 0], [0, 1, 2.0], [0])), baseline=0.1)
    ones = np.ones(len(REGION_FEATURES))
    yield b"d" + json.dumps(trained.as_document(trees, 2.0, {})).encode()
    yield b"s" + json.dumps(severity.as_document(SeverityModel(ones, ones, ones, 0.5), {})).encode()
    yield b'tkind = "network"\nfile = "a.pt"\nthreshold = 1\nside = 32\nmean = [0.5, 0.5, 0.5]\ninput = "pair"\n'


def read_tar(data: bytes) -> None:
    for member in list(members(path := file_of(data, "x.tar"))):
        file_at(path.parent, f"{path.name}/x", member.size, member.offset).read_bytes()


def tars() -> Iterator[bytes]:
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(fileobj=(file := io.BytesIO()), mode="w", format=form) as tar:
            for name in ("a.jpg", "b/" * 80 + "c.png"):
                member = tarfile.TarInfo(name)
                member.size = 3
                tar.addfile(member, io.BytesIO(b"abc"))
        yield file.getvalue()


TARGETS = {
    "pictures": Target(
        read_picture, pictures, ("IHDR", "PLTE", "tRNS", "eXIf", "iCCP", "zTXt", "RIFF", "WEBP", "acsp")
    ),
    "checkpoints": Target(read_checkpoint, checkpoints, ("params", "PK", "__metadata__", "data_offsets", "F32")),
    "pickles": Target(read_pickle, pickles, ("torch\n", "_utils\n", "_rebuild_tensor_v2\n", "storage", "FloatStorage")),
    "labelme": Target(read_drawn, documents(drawn), ("shapes", "points", "mask", "imageWidth")),
    "coco": Target(read_coco_file, documents(coco), ("images", "annotations", "segmentation", "counts", "bbox")),
    "masks": Target(read_table_of_masks, tables_of_masks, ("image", "mask", "prominence", '"', "\r\n")),
    "heat_maps": Target(read_heat_map_file, heat_maps, ("NUMPY", "descr", "fortran_order", "shape", "<f4", "|b1")),
    "weights": Target(read_class_weights, class_weights, ("[[class]]", "index", "weight", "interval", "version")),
    "learned": Target(read_learned, learned, ("trees", "left", "roots", "feature", "scale", "NaN", "kind", "channel")),
    "settings": Target(read_settings, settings, (" = ", "[", "{", "'''", "#")),
    "tars": Target(read_tar, tars, ("ustar", "x", "L", "size=", "path=", "GNU.sparse.size=")),
    "segmenter": Target(read_config, configs, ("_base_", "[", "(", "lambda")),
}
