"""Give the readers of `tests/fuzz/targets.py` files that libFuzzer makes up: ``python tests/fuzz/run.py TARGET``.

What follows the target are options of libFuzzer, such as ``-max_total_time=600``. An input that breaks the reader is
left as crash-*, timeout-* or oom-* in .fuzz/TARGET; the files in .fuzz/TARGET/corpus each reached new code, and are
where a later run begins. Needs atheris: ``pip install -r tests/fuzz/requirements.txt``.
"""

import resource
import sys
from pathlib import Path
from types import ModuleType

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.modules["tests"] = ModuleType("tests")  # MMSegmentation installs a package of this name
sys.modules["tests"].__path__ = [str(ROOT / "tests")]

with atheris.instrument_imports(include=["desra_core", "deployments", "PIL", "tifffile", "tomllib"]):
    from tests.fuzz.targets import TARGETS, tried

MEMORY = 8 << 30  # bytes of address space, so that a bomb is an error, and no danger to the machine


def main() -> None:
    name, *options = sys.argv[1:]
    target, folder = TARGETS[name], ROOT / ".fuzz" / name
    corpus, words = folder / "corpus", folder / "words"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed{number}").write_bytes(seed)
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    fixed = ["-timeout=20", "-rss_limit_mb=3000", "-max_len=4096", f"-artifact_prefix={folder}/", f"-dict={words}"]
    atheris.Setup([sys.argv[0], *fixed, *options, str(corpus)], lambda data: tried(target.read, data))
    atheris.Fuzz()


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


main()
