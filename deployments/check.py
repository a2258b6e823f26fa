"""Check that this machine can run DeSRA: print each missing part, with the package that brings it.

Needs the standard library only, so that it runs before anything is installed (as a file) and also afterwards
(``python -m deployments.check``). Without this check, a missing library would show only after two gigabytes of
downloads, as an ``ImportError`` that does not name a package. No compiler is needed: mmcv-full and basicsr are built
from source, but without their compiled operators.
"""

import ctypes
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Library(NamedTuple):
    """A shared library of the system: its file, the Python package that loads it, the packages that bring it."""

    soname: str
    needed_by: str
    debian: str
    fedora: str


LIBRARIES = (
    Library("libGL.so.1", "opencv-python", "libgl1", "mesa-libGL"),
    Library("libgthread-2.0.so.0", "opencv-python", "libglib2.0-0 (libglib2.0-0t64 from Debian 13 and Ubuntu 24.04)",
            "glib2"),
)  # fmt: skip


def interpreter_problems() -> list[str]:
    """Check the version and the modules of the running Python; return a line for each problem."""
    major, minor, patch, *_ = sys.version_info
    if not (3, 11) <= (major, minor) < (3, 13):
        return [
            f"{sys.executable} is Python {major}.{minor}.{patch}, but 3.11 or 3.12 is needed: mmcv-full and basicsr "
            "do not build on later ones; install one of them, or name it: make PYTHON=/path/to/python3.11"
        ]
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    problem = (
        f"{sys.executable} has no {' and no '.join(missing)}: install python{major}.{minor}-venv (Debian, Ubuntu), "
        "or name another Python: make PYTHON=/path/to/python3.11"
    )
    return [problem] if missing else []


def library_problems(libraries: Iterable[Library] = LIBRARIES) -> list[str]:
    """Load each shared library as the dynamic loader finds it; return a line for each that cannot be loaded.

    Examples:
        >>> library_problems([Library("liba.so.1", "example", "liba1", "liba")])
        ['liba.so.1, which example needs, is missing: install liba1 (Debian, Ubuntu) or liba (Fedora)']
    """
    problems = []
    for library in libraries:
        try:
            ctypes.CDLL(library.soname)
        except OSError as error:
            absent = str(error).startswith(f"{library.soname}: cannot open shared object file")
            reason = "is missing" if absent else f"cannot be loaded ({error})"
            problems.append(
                f"{library.soname}, which {library.needed_by} needs, {reason}: "
                f"install {library.debian} (Debian, Ubuntu) or {library.fedora} (Fedora)"
            )
    return problems


def platform_problems() -> list[str]:
    """Check the operating system and its libraries; return a line for each problem."""
    if "musl" in str(sysconfig.get_config_var("HOST_GNU_TYPE")):
        return ["this system (Alpine Linux) uses musl, for which PyTorch has no wheels: use Debian or the like"]
    return library_problems() if sys.platform == "linux" else []


def main(arguments: Sequence[str]) -> int:
    """Print all problems, or with ``--interpreter`` those of Python alone; return 0 without a problem, else 2."""
    problems = interpreter_problems()
    if "--interpreter" not in arguments:
        problems += platform_problems()
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    if problems:
        return 2
    sys.stdout.write(f"Set-up check: Python {sys.version.split()[0]} and the system libraries are fine.\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
