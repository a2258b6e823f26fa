"""How a run speaks, how often where there is no terminal, and how many failures it tells."""

import sys

LINE_SECONDS = 5.0
SHOWN_FAILURES = 20


def say(line: str) -> None:
    """Print a line that is not the result."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
