from pathlib import Path

import pytest

from deployments.commands import demo
from desra_core.images import codec


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    demo.make_photos(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_names_no_two_alike_and_nothing_else(photos):
    names = [photo.name for photo in demo.PHOTOS]
    assert len({Path(name).stem for name in names}) == len(names) == 19
    assert set(content(photos)) == set(names)


def test_the_same_bytes_every_time(photos, tmp_path):
    demo.make_photos(tmp_path)
    assert content(tmp_path) == content(photos)


def test_what_exists_is_left_alone_and_a_lost_file_comes_back(photos):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in photos.iterdir()}
    lost = photos / demo.PHOTOS[0].name
    lost.unlink()
    demo.make_photos(photos)
    assert lost.read_bytes() == before.pop(lost)[0]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before


@pytest.mark.parametrize("photo", demo.PHOTOS, ids=lambda photo: photo.name)
def test_photos_are_small_and_were_not_trained_on(photos, photo):
    path = photos / photo.name
    pixels = codec.decode(path.read_bytes(), path).pixels
    assert pixels.shape[1] == photo.width
    assert min(pixels.shape[:2]) >= 100
    assert max(pixels.shape[:2]) <= 300
    assert pixels.std() > 5
    assert photo.source not in demo.TRAINED_ON


def test_prepare_writes_photos_and_models_and_runs_nothing(tmp_path, capsys):
    demo.demo(tmp_path, prepare=True)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "models"}
    for model in (demo.GAN_MODEL, demo.TWIN, demo.TWIN.with_suffix(".json")):
        assert (tmp_path / "models" / model.name).read_bytes() == model.read_bytes()
    assert capsys.readouterr().out == f"photos   {tmp_path}/photos\nmodels   {tmp_path}/models\n"
