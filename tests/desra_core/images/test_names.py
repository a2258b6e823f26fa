"""What the paths that other tools write mean among the images of a workspace."""

from __future__ import annotations

import unicodedata

import pytest

from desra_core.images.names import ImageNames

NAMES = ["x", "s1/x", "s1/y", "s2/y", "a.v2", "same.jpg", "same.png", "h\\i", "images/g", "Köln/früh", "b", "b.v2"]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("x.png", ["x"]),
        ("./x.png", ["x"]),
        ("s1/x.jpg", ["s1/x"]),
        ("images/s1/x.jpg", ["s1/x"]),
        ("data/images/images/x.png", ["x"]),
        ("../exp3/s1/x.png", ["s1/x"]),
        ("/home/me/exp3/s1/x.png", ["s1/x"]),
        ("C:\\exp3\\s1\\x.png", ["s1/x"]),
        ("..\\s1\\x.png", ["s1/x"]),
        ("y.png", ["s1/y", "s2/y"]),
        ("s2/y.png", ["s2/y"]),
        ("s3/y.png", []),
        ("früh.png", ["Köln/früh"]),
        (unicodedata.normalize("NFD", "Köln/früh.png"), ["Köln/früh"]),
        (unicodedata.normalize("NFD", "/home/Köln/früh.png"), ["Köln/früh"]),
        ("h\\i.png", ["h\\i"]),
        ("images/g.png", ["images/g"]),
        ("g.png", ["images/g"]),
        ("a.v2.png", ["a.v2"]),
        ("a.v2", ["a.v2"]),
        ("b.v2", ["b.v2"]),
        ("same.jpg", ["same.jpg"]),
        ("same.png.png", ["same.png"]),
        ("images/0123abcd-s2/y.png", []),
        ("../upload/1/0123abcd-x.png", ["x"]),
        ("images\\0123abcd-früh.png", []),
        ("0123abcd-früh.png", ["Köln/früh"]),
        ("z.png", []),
        ("", []),
        ("/", []),
    ],
)
def test_a_path_means(path: str, found: list[str]) -> None:
    assert ImageNames(NAMES).find(path) == found


def test_names_that_differ_in_composed_letters_alone() -> None:
    composed, decomposed = "ü/x", unicodedata.normalize("NFD", "ü/x")
    names = ImageNames([composed, decomposed])
    assert names.find(f"{decomposed}.png") == [decomposed]
    assert names.find(f"{composed}.png") == [composed]
    assert names.find("x.png") == sorted([composed, decomposed])
