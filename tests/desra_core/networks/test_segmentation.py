"""Labels against MMSegmentation's own API, and every way in which a config or a checkpoint can be unusable.

The model is a real SegFormer mit-b0 in MMSegmentation's own format, with random weights.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
import zarr
from torch.nn.functional import interpolate

from desra_core import third_party
from desra_core.errors import ImageError, UsageError
from desra_core.images.codec import bgr8, decode
from desra_core.networks.segmentation import MMSegSegmenter, load_segmenter, segment, segmenter_key, upsampled_argmax
from desra_core.planning import plan as planning
from desra_core.planning.plan import prepare
from desra_core.settings import Detection
from desra_core.workspace import Workspace

third_party.mend_mmcv()

import mmcv  # noqa: E402
import mmseg  # noqa: E402
from mmcv.runner import save_checkpoint  # noqa: E402
from mmseg.apis import inference_segmentor, init_segmentor  # noqa: E402
from mmseg.datasets import ADE20KDataset  # noqa: E402
from mmseg.models import build_segmentor  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*avg_non_ignore")  # mmseg, about a loss of the training

SHIPPED = Path(mmseg.__file__).parent / ".mim/configs/segformer/segformer_mit-b0_512x512_160k_ade20k.py"
META = {"CLASSES": ADE20KDataset.CLASSES, "PALETTE": ADE20KDataset.PALETTE}


def settings(scale=(512, 160)):
    """The shipped mit-b0 config, at a quarter of the published scale to be quick."""
    config = mmcv.Config.fromfile(str(SHIPPED))
    config.model.pretrained = None
    config.data.test.pipeline[1].img_scale = scale
    return config


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    model = build_segmentor(settings().model)
    with torch.no_grad():
        model.decode_head.conv_seg.weight.mul_(20)  # so that labels vary over an image
    return model


@pytest.fixture(scope="session")
def folder(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("segformer")
    settings().dump(str(folder / "config.py"))
    save_checkpoint(model, str(folder / "v0.pth"), meta=META)
    newer = {"dataset_meta": {"classes": list(ADE20KDataset.CLASSES), "palette": ADE20KDataset.PALETTE}}
    torch.save({"meta": newer, "state_dict": model.state_dict(), "message_hub": {}}, folder / "v1.pth")
    return folder


@pytest.fixture(scope="session")
def segmenter(folder):
    return MMSegSegmenter(folder / "config.py", folder / "v0.pth", "cpu")


@pytest.fixture(scope="session")
def reference(folder):
    return init_segmentor(str(folder / "config.py"), str(folder / "v0.pth"), "cpu")


def photo(name):
    return getattr(skimage.data, name)()


def enlarged(pixels, factor):
    return np.kron(pixels, np.ones((factor, factor, 1), pixels.dtype))


PHOTOS = {
    "astronaut": lambda: photo("astronaut"),
    "coffee": lambda: photo("coffee"),
    "odd sides": lambda: photo("chelsea")[1:, 2:],
    "one megapixel": lambda: enlarged(photo("coffee"), 2)[:811, :1199],
    "panorama": lambda: photo("coffee")[100:157],
    "smallest": lambda: photo("chelsea")[100:111, 100:111],
    "gray": lambda: photo("astronaut")[:, :, :1],
    "16 bits": lambda: photo("coffee")[:, ::-1].astype(np.uint16) * 257 + 93,
}


@pytest.mark.parametrize("case", PHOTOS)
def test_labels_are_those_of_mmsegmentation(case, segmenter, reference):
    pixels = PHOTOS[case]()
    labels = segmenter(pixels)
    assert labels.dtype == np.uint8
    assert labels.shape == pixels.shape[:2]
    np.testing.assert_array_equal(labels, inference_segmentor(reference, bgr8(pixels))[0])
    if case != "smallest":
        assert len(np.unique(labels)) > 3


@pytest.mark.parametrize("scale", [(512, 160), pytest.param((2048, 640), marks=pytest.mark.slow)])
def test_labels_with_padding(folder, tmp_path, scale):
    config = settings(scale)
    config.data.test.pipeline[1].transforms.insert(3, {"type": "Pad", "size_divisor": 96})
    config.dump(str(tmp_path / "padded.py"))
    pixels = photo("chelsea")
    padded = MMSegSegmenter(tmp_path / "padded.py", folder / "v0.pth", "cpu")
    reference = init_segmentor(str(tmp_path / "padded.py"), str(folder / "v0.pth"), "cpu")
    np.testing.assert_array_equal(padded(pixels), inference_segmentor(reference, bgr8(pixels))[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_labels_on_cuda(folder):
    pixels = PHOTOS["one megapixel"]()
    labels = MMSegSegmenter(folder / "config.py", folder / "v0.pth", "cuda:0")(pixels)
    reference = init_segmentor(str(folder / "config.py"), str(folder / "v0.pth"), "cuda:0")
    np.testing.assert_array_equal(labels, inference_segmentor(reference, bgr8(pixels))[0])


class Gpu(str):
    """A CPU with the name of a GPU."""

    def startswith(self, *_):
        return True


def test_labels_are_computed_without_tf32(folder):
    """Otherwise the labels of a GPU and of a CPU would differ under one key."""
    segmenter = MMSegSegmenter(folder / "config.py", folder / "v0.pth", "cpu")
    segmenter._device = Gpu("cpu")
    seen = set()
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda *_: seen.add((conv.fp32_precision, matmul.fp32_precision))
    )
    with hook:
        segmenter(photo("chelsea")[:100, :100])
    assert seen == {("ieee", "ieee")}


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("spread", [0.1, 30.0])  # many winners, and few
@pytest.mark.parametrize(
    ("network", "kept", "size"),
    [
        ((48, 96), (48, 96), (301, 403)),
        ((48, 96), (41, 87), (19, 123)),
        ((48, 96), (41, 87), (19, 23)),
        ((11, 120), (11, 120), (40, 150)),  # smaller than the logits
    ],
)
def test_upsampled_argmax_is_argmax_of_two_resizes(network, kept, size, spread, align_corners):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((1, 150, 12, 16), generator=generator)
    logits += spread * torch.randn((1, 150, 1, 1), generator=generator)
    logits[:, 149] = logits[:, 7]  # equal values everywhere: the lower index wins
    resized = interpolate(logits, network, mode="bilinear", align_corners=align_corners)
    resized = interpolate(resized[:, :, : kept[0], : kept[1]], size, mode="bilinear", align_corners=align_corners)
    labels = upsampled_argmax(logits, network_size=network, kept_size=kept, size=size, align_corners=align_corners)
    assert torch.equal(labels.long(), resized[0].argmax(0))


def test_checkpoint_of_1x_gives_the_same_labels(folder, segmenter):
    pixels = photo("chelsea")
    newer = MMSegSegmenter(folder / "config.py", folder / "v1.pth", "cpu")
    np.testing.assert_array_equal(newer(pixels), segmenter(pixels))


def test_old_file_format_and_data_parallel_names_load(folder, model, tmp_path, segmenter):
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    content = {"state_dict": weights, "meta": META}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    pixels = photo("chelsea")
    old = MMSegSegmenter(folder / "config.py", tmp_path / "old.pth", "cpu")
    np.testing.assert_array_equal(old(pixels), segmenter(pixels))


def test_shipped_config_with_bases_loads(model, tmp_path):
    save_checkpoint(model, str(tmp_path / "v0.pth"), meta=META)
    MMSegSegmenter(SHIPPED, tmp_path / "v0.pth", "cpu")


def test_load_segmenter_is_cached_until_a_file_changes(folder, tmp_path):
    config = tmp_path / "config.py"
    config.write_bytes((folder / "config.py").read_bytes())
    spec = f"mmseg:{config},{folder}/v0.pth"
    first = load_segmenter(spec, "cpu")
    assert load_segmenter(spec, "cpu") is first
    key = segmenter_key(spec)
    config.write_text(config.read_text() + "\n# a comment\n")
    assert load_segmenter(spec, "cpu") is not first
    assert segmenter_key(spec) != key


def test_key_follows_content_and_bases_not_paths(tmp_path):
    base, config, moved, checkpoint = (tmp_path / name for name in ("base.py", "a.py", "b.py", "c.pth"))
    base.write_text("x = 1")
    config.write_text("_base_ = ['base.py']\ny = 2")
    moved.write_text(config.read_text())
    checkpoint.write_bytes(b"weights")
    key = segmenter_key(f"mmseg:{config},{checkpoint}")
    assert key == segmenter_key(f"mmseg:{moved},{checkpoint}")
    base.write_text("x = 2")
    assert key != segmenter_key(f"mmseg:{config},{checkpoint}")


def test_key_needs_no_torch(folder):
    spec = f"mmseg:{folder}/config.py,{folder}/v0.pth"
    code = (
        "import sys; from desra_core.networks.segmentation import segmenter_key\n"
        f"assert segmenter_key({spec!r}) == {segmenter_key(spec)!r}\n"
        "assert not {'torch', 'mmcv', 'mmseg'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("spec", ["", "mmseg", "mmseg:", "mmseg:a.py", "mmseg:a.py,", "mmseg:a,b,c", "onnx:a,b"])
def test_malformed_spec(spec):
    with pytest.raises(UsageError, match="mmseg:CONFIG,CHECKPOINT"):
        segmenter_key(spec)


def refusal(config, checkpoint):
    """Return the line that refuses a pair of files."""
    with pytest.raises(UsageError) as caught:
        load_segmenter(f"mmseg:{config},{checkpoint}", "cpu")
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 700
    return line


CLASSES = list(ADE20KDataset.CLASSES)
BAD_META = {
    "19 classes": ({"CLASSES": CLASSES[:19]}, "has 19 classes where ADE20K has 150"),
    "swapped": ({"CLASSES": [CLASSES[1], CLASSES[0], *CLASSES[2:]]}, "calls class 0 'building' where"),
    "swapped in 1.x": (
        {"dataset_meta": {"classes": [*CLASSES[:-2], "flag", "clock"]}},
        "calls class 148 'flag'",
    ),
    "no classes": ({"CLASSES": None}, "does not name its classes"),
    "no meta": (None, "does not name its classes"),
    "1.x without classes": ({"dataset_meta": {}}, "does not name its classes"),
}


@pytest.mark.parametrize("case", BAD_META)
def test_checkpoint_for_other_classes(case, folder, model, tmp_path):
    meta, reason = BAD_META[case]
    torch.save({"state_dict": model.state_dict(), "meta": meta}, tmp_path / "other.pth")
    line = refusal(folder / "config.py", tmp_path / "other.pth")
    assert line.startswith(str(tmp_path / "other.pth"))
    assert reason in line


def test_files_that_are_no_checkpoint(folder, tmp_path):
    zip_format = (folder / "v0.pth").read_bytes()
    torch.save(torch.load(folder / "v0.pth"), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old_format = (tmp_path / "old.pth").read_bytes()
    contents = {
        "truncated": zip_format[: len(zip_format) // 2],
        "truncated in the old format": old_format[: len(old_format) // 2],
        "empty": b"",
        "text": b"hello, I am not a checkpoint\n",
        "page": b"<!DOCTYPE html><html>404</html>",
        "noise": np.random.default_rng(0).bytes(4096),
        "zip": b"PK\x05\x06" + bytes(18),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert "is not a checkpoint, or only a part of one" in refusal(folder / "config.py", tmp_path / name), name


def test_pickle_with_code_is_refused_unexecuted(folder, model, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for old in (False, True):
        content = {"state_dict": model.state_dict(), "meta": META, "hook": Bomb()}
        torch.save(content, tmp_path / "bomb.pth", _use_new_zipfile_serialization=not old)
        line = refusal(folder / "config.py", tmp_path / "bomb.pth")
        assert "posix.mkdir" in line
        assert "run code" in line
        assert not (tmp_path / "exploded").exists()


def test_numpy_scalars_of_1x_are_left_out(folder, model, tmp_path):
    content = {"state_dict": model.state_dict(), "meta": META, "message_hub": {"loss": np.float64(1)}}
    torch.save(content, tmp_path / "hub.pth")
    assert load_segmenter(f"mmseg:{folder / 'config.py'},{tmp_path / 'hub.pth'}", "cpu")


def test_other_objects_are_refused_with_a_way_out(folder, model, tmp_path):
    torch.save({"state_dict": model.state_dict(), "meta": META, "hook": Path("x")}, tmp_path / "hook.pth")
    line = refusal(folder / "config.py", tmp_path / "hook.pth")
    assert "pathlib" in line
    assert "weights_only=False" in line


def test_weights_that_do_not_fit(folder, model, tmp_path):
    full = model.state_dict()
    last = "decode_head.conv_seg.weight"
    cases = {
        "shape": {**full, last: full[last][:19]},
        "missing": {name: value for name, value in full.items() if name != last},
        "no tensor": {**full, last: "a string"},
    }
    for name, weights in cases.items():
        torch.save({"state_dict": weights, "meta": META}, tmp_path / name)
        line = refusal(folder / "config.py", tmp_path / name)
        assert f"does not fit {folder}/config.py (parameters that differ: 1, such as {last})" in line
    torch.save({"state_dict": {**full, "extra": torch.zeros(1)}, "meta": META}, tmp_path / "unexpected")
    assert "such as extra" in refusal(folder / "config.py", tmp_path / "unexpected")
    for content in (full, [1, 2], torch.zeros(3)):
        torch.save(content, tmp_path / "bare")
        assert "has no state_dict" in refusal(folder / "config.py", tmp_path / "bare")


def test_missing_and_unreadable_files(folder, tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.py", folder / "v0.pth")
    assert "does not exist" in refusal(folder / "config.py", tmp_path / "none.pth")
    assert "Is a directory" in refusal(folder / "config.py", tmp_path)


BAD_CONFIGS = {
    "no Python": ("{ this is not Python", "is not a Python file"),
    "binary": ("a = 1\0", "is not a Python file"),
    "missing base": ("_base_ = 'gone.py'", "gone.py: does not exist"),
    "computed base": ("_base_ = 'a' + '.py'", "computes its _base_"),
    "base of another type": ("_base_ = [1]", "computes its _base_"),
    "no base": ("_base_ = None", "computes its _base_"),
    "its own base": ("_base_ = 'config.py'", "inherits from itself"),
    "no end of it": ("_base_ = " + "-" * 100_000 + "1", "is not a Python file"),
    "null in a name": ("_base_ = 'a\\0b'", "does not exist"),
    "raises": ("model = 1 / 0", "ZeroDivisionError"),
    "imports the unknown": ("import nothing_of_this_name", "ModuleNotFoundError"),
    "no model": ("data = dict()", "describes no model"),
    "model of another kind": ("model = 3", "describes no model"),
    "no pipeline": ("model = dict(type='EncoderDecoder')", "has no test pipeline"),
    "1.x": ("model = dict(data_preprocessor=dict()); test_dataloader = dict()", "is of MMSegmentation 1.x"),
    "unknown backbone": (
        "model = dict(type='EncoderDecoder', backbone=dict(type='Nope'), decode_head=dict(type='FCNHead'))\n"
        "data = dict(test=dict(pipeline=[dict(type='LoadImageFromFile')]))",
        "Nope is not in the models registry",
    ),
    "other type": (
        "model = dict(type='CascadeEncoderDecoder'); data = dict()",
        "describes no EncoderDecoder",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_unusable_config(case, folder, tmp_path):
    text, reason = BAD_CONFIGS[case]
    (tmp_path / "config.py").write_text(text)
    assert reason in refusal(tmp_path / "config.py", folder / "v0.pth")


def slide(config):
    config.model.test_cfg = {"mode": "slide", "crop_size": (512, 512), "stride": (341, 341)}


def many_scales(config):
    config.data.test.pipeline[1].img_ratios = [0.5, 1.0]


def flipped(config):
    config.data.test.pipeline[1].flip = True


def cityscapes(config):
    config.model.decode_head.num_classes = 19


def broken_pipeline(config):
    config.data.test.pipeline[1].transforms[4]["keys"] = ["nothing"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (slide, "infers in slide mode"),
        (many_scales, "makes 2 views of an image"),
        (flipped, "makes 2 views of an image"),
        (cityscapes, "has a decode head for 19 classes"),
        (broken_pipeline, "has a test pipeline that fails"),
    ],
)
def test_config_for_another_way_to_infer(change, reason, folder, tmp_path):
    config = settings()
    change(config)
    config.dump(str(tmp_path / "config.py"))
    assert reason in refusal(tmp_path / "config.py", folder / "v0.pth")


def test_too_narrow_image(segmenter):
    with pytest.raises(ImageError, match=r"512x\d+ pixels for segmentation: is too narrow"):
        segmenter(np.zeros((11, 2048, 3), np.uint8))


def test_the_photo_that_cannot_be_labelled_is_named(segmenter):
    """As mine, detect, the gate and a benchmark need it."""
    with pytest.raises(ImageError, match=r"^photos/a\.png: is too narrow"):
        segment(segmenter, np.zeros((11, 2048, 3), np.uint8), Path("photos/a.png"))
    gan_sr = photo("astronaut")[:40, :60]
    assert np.array_equal(segment(segmenter, gan_sr, Path("a.png")), segmenter(gan_sr))


def test_weights_that_are_not_finite(folder, model, tmp_path):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["decode_head.conv_seg.bias"][3] = torch.nan
    torch.save({"state_dict": weights, "meta": META}, tmp_path / "nan.pth")
    segmenter = MMSegSegmenter(folder / "config.py", tmp_path / "nan.pth", "cpu")
    with pytest.raises(UsageError, match="not finite"):
        segmenter(photo("chelsea"))


def test_a_model_that_cannot_be_run_is_refused_before_anything_is_started(
    folder, model, make_pairs, monkeypatch, tmp_path
):
    """Planning refuses it, like checkpoints for super-resolution, and tries no model twice."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["decode_head.conv_seg.bias"][3] = torch.nan
    torch.save({"state_dict": weights, "meta": META}, tmp_path / "nan.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    misfit = settings()
    misfit.model.decode_head.in_index = [0, 1, 2, 9]
    misfit.dump(str(tmp_path / "misfit.py"))
    make_pairs(tmp_path, 2)
    workspace = Workspace(tmp_path / "ws")
    workspace.create()

    def plan(config, checkpoint):
        detection = Detection(mse_sr=tmp_path / "mse_sr", gan_sr=tmp_path / "gan_sr", workspace=workspace.root,
                              segmenter=f"mmseg:{config},{checkpoint}")  # fmt: skip
        with workspace.locked():
            return prepare(detection)

    for config, checkpoint, reason in (
        (folder / "config.py", tmp_path / "text.pth", r"text\.pth: is not a checkpoint"),
        (folder / "config.py", tmp_path / "nan.pth", r"nan\.pth: gives values that are not finite"),
        (tmp_path / "misfit.py", folder / "v0.pth", r"misfit\.py: describes a model that cannot be run \(IndexError: "),
    ):
        with pytest.raises(UsageError, match=reason) as refused:
            plan(config, checkpoint)
        assert "\n" not in str(refused.value)
        assert not workspace.settings.exists()
    assert plan(folder / "config.py", folder / "v0.pth").plan.pending == 2
    tried = []
    monkeypatch.setattr(planning, "try_segmenter", tried.append)
    assert plan(folder / "config.py", folder / "v0.pth").plan.pending == 2
    assert not tried


MEMORY_SCRIPT = r"""
import re, sys
from pathlib import Path
import numpy as np, psutil, skimage.data
from desra_core.networks.segmentation import load_segmenter

segmenter = load_segmenter(sys.argv[1], "cpu")
segmenter(skimage.data.chelsea())
side = int(sys.argv[2])
pixels = np.tile(skimage.data.chelsea(), (27, 18, 1))[:side, :side].copy()
before = psutil.Process().memory_info().rss
labels = segmenter(pixels)
# not ru_maxrss, which a process inherits from the one that started it
peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(peak - before)
assert labels.shape == (side, side) and labels.min() < labels.max()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux tells it")
@pytest.mark.parametrize(("side", "limit"), [(4000, 600e6), (8000, 1e9)])
def test_64_megapixels_need_less_than_a_gigabyte(folder, tmp_path, side, limit):
    settings((2048, 640)).dump(str(tmp_path / "config.py"))
    spec = f"mmseg:{tmp_path}/config.py,{folder}/v0.pth"
    command = [sys.executable, "-c", MEMORY_SCRIPT, spec, str(side)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout.splitlines()[-1]) < limit


@pytest.mark.slow
def test_desra_detect_with_segformer(folder, segmenter, make_pairs, desra, tmp_path):
    """Labels are computed where a mask is possible at all; with --keep maps, for every image."""
    make_pairs(tmp_path, 4)
    workspace = tmp_path / "ws"
    command = (
        "detect", "--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr", "--workspace", workspace,
        "--segmenter", f"mmseg:{folder / 'config.py'},{folder / 'v0.pth'}", "--weights", "none",
    )  # fmt: skip
    run = desra(*command)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr.lower()
    stored = sorted(workspace.glob("maps/*/*.zarr/labels"))
    assert len(stored) == 2
    assert desra(*command, "--keep", "maps").returncode == 0
    assert len(list(workspace.glob("maps/*/*.zarr/labels"))) == 4
    regions = pq.read_table(workspace / "regions.parquet").to_pylist()
    assert {region["image"] for region in regions} == {"set1/photo001", "set0/photo002"}
    path = tmp_path / "gan_sr" / f"{regions[0]['image']}.png"
    labels = zarr.open_array(workspace.glob(f"maps/*/{regions[0]['id']}.zarr/labels").__next__(), mode="r")[:]
    np.testing.assert_array_equal(labels, segmenter(decode(path.read_bytes(), path).pixels))
    assert all(region["class_name"] for region in regions)

    # What was stored is damaged or gone: the run after tells of it or mends it, the next one has mended it.
    masks = {path: path.read_bytes() for path in workspace.glob("masks/**/*.png")}
    shutil.rmtree(workspace.joinpath(*path_of(regions[0]["id"]), "labels"))
    damaged = workspace.joinpath(*path_of(regions[-1]["id"]), "similarity", "c", "0", "0")
    damaged.write_bytes(b"x")
    for path in masks:
        path.unlink()
    desra(*command)
    mended = desra(*command)
    assert mended.returncode == 0, mended.stderr
    assert {path: path.read_bytes() for path in workspace.glob("masks/**/*.png")} == masks


def path_of(image_id):
    return "maps", image_id[:2], f"{image_id}.zarr"
