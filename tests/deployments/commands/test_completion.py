"""Shell completion, as bash asks for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Calls the function that is registered for desra as bash does, and prints what it offers for the last word.
COMPLETE = """
function=$(complete -p desra | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
"$function" desra "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""

Bash = Callable[..., list[str]]


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Bash:
    """Run a script in bash, with a home folder of its own; returns the lines that it prints."""
    script = Path(sys.executable).with_name("desra")
    if shutil.which("bash") is None or not script.exists():
        pytest.skip("no bash, or desra is not installed beside this Python")
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"HOME": str(home), "PATH": f"{script.parent}:{os.environ['PATH']}"}

    def run(text: str, *arguments: str) -> list[str]:
        command = ["bash", "--norc", "-c", text, "bash", *arguments]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr == ""
        return ended.stdout.splitlines()

    return run


def test_bash_completes_commands_flags_and_choices(bash: Bash) -> None:
    asked = {
        ("desra", "ca"): ["calibrate"],
        ("desra", "bench"): ["benchmark"],
        ("desra", "mine", "--ke"): ["--keep-mse", "--keep"],
        ("desra", "mine", "photos", "--keep", ""): ["artifacts", "maps", "all"],
        ("desra", "cycle", "--preset", "c"): ["cpu"],
        ("desra", "benchmark", "synthetic", "--se"): ["--seed", "--segmenter"],
        ("desra", "mine", "--gan-model", ""): [""],  # nothing, so that bash completes files
    }
    quoted = "\n".join(f"offer {' '.join(map(repr, words))}" for words in asked)
    told = bash(f'eval "$(desra --show-completion bash)"\noffer() {{\n{COMPLETE}\necho end\n}}\n{quoted}')
    offers = "\n".join(told).split("\nend")
    assert [offer.strip("\n").split("\n") for offer in offers[:-1]] == list(asked.values())


def test_completion_is_installed_for_the_shell_that_asks(bash: Bash) -> None:
    told = bash("desra --install-completion; true")
    assert told[0].startswith("bash completion installed in ")
    assert bash(f'source "$HOME/.bashrc"\n{COMPLETE}', "desra", "detect", "--log-format", "j") == ["json"]
