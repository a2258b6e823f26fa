"""Which failures are tried again, and when."""

from __future__ import annotations

from prefect.runtime import deployment

from desra_core.errors import AbsentError, DesraError, TooLargeError, TransientError

# Seconds before each retry: for a lost packet, for a server that restarts, for a full disk that gets cleared.
PAUSES = (2, 15, 60)


def may_pass(error: object) -> bool:
    """Say whether an error is worth an automatic retry.

    Examples:
        >>> from desra_core.errors import ImageError, UsageError
        >>> may_pass(TooLargeError("a.png", "has too many pixels", "raise --memory"))
        False
        >>> may_pass(TransientError("/ws", "the disk is full", "free some space"))
        True
        >>> may_pass(ImageError("a.png", "is cut", "replace it")) or may_pass(UsageError("--x", "is bad", "mend it"))
        False
        >>> may_pass(ConnectionError("reset")) and may_pass(AbsentError("tcp://x", "has no workers", "start some"))
        True
    """
    passing = isinstance(error, TransientError | AbsentError) and not isinstance(error, TooLargeError)
    return passing or not isinstance(error, DesraError)


def runs_by_itself() -> bool:
    """Say whether the run comes from a deployment: one started by hand fails at once, and the person decides."""
    return bool(deployment.id)
