"""Names of images, and what other tools make of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from desra_core.images.codec import SUFFIXES
from desra_core.images.scanning import normalized

# What Label Studio puts before the names of files that are given to it.
_UPLOADED = re.compile(r"^[0-9a-f]{8}-(?=.)")


class ImageNames:
    """The names of images, to be found by the paths that other tools write of their files.

    Parameters
    ----------
    names
        Relative paths with ``/`` and without suffix, or with it where two images would else share one.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._by_path: dict[str, list[str]] = {}
        self._by_last: dict[str, list[str]] = {}
        for name in names:
            plain = normalized(name)
            self._by_path.setdefault(plain, []).append(name)
            self._by_last.setdefault(plain.rpartition("/")[2], []).append(name)

    def exact(self, path: str) -> list[str]:
        """The images at this very path, with a suffix or without; more than one only where letters are composed."""
        for name in _with_and_without_suffix(path):
            if found := self._by_path.get(normalized(name)):
                return [name] if name in found else found
        return []

    def ending_like(self, path: str) -> list[str]:
        """The images of whose path this is the end, with a suffix or without."""
        for plain in _with_and_without_suffix(normalized(path)):
            found = self._by_last.get(plain.rpartition("/")[2], ())
            if ending := [name for name in found if f"/{normalized(name)}".endswith(f"/{plain}")]:
                return sorted(ending)
        return []

    def find(self, path: str) -> list[str]:
        r"""Find the images that a path may mean: none, the one, or several between which it does not decide.

        It may be relative to another folder, absolute, or of Windows: the image counts whose name is the longest end of
        it, or else that of whose name it is the end itself.

        Examples
        --------
        >>> names = ImageNames(["x", "s1/x", "s1/y", "s2/y"])
        >>> names.find("../exp3/s1/x.png"), names.find(r"C:\exp3\s2\y.jpg"), names.find("y.png")
        (['s1/x'], ['s2/y'], ['s1/y', 's2/y'])
        """
        if found := self.exact(path):
            return found
        parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        for last in dict.fromkeys((parts[-1], _UPLOADED.sub("", parts[-1]))) if parts else ():
            whole = [*parts[:-1], last]
            ends = ["/".join(whole[start:]) for start in range(len(whole))]
            if found := next(filter(None, map(self.exact, ends)), []) or self.ending_like(ends[0]):
                return found
        return []


def _with_and_without_suffix(path: str) -> tuple[str, str]:
    """A path without its suffix and as it is, the likelier first: only suffixes of images are sure to be some."""
    stem, suffix = os.path.splitext(path)
    return (stem, path) if suffix.lower() in SUFFIXES else (path, stem)
