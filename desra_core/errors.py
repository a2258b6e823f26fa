"""The errors that people read as one line: which file or setting, what is wrong with it, what to do.

::

    DesraError
    ├── UsageError             exit code 2
    │   ├── LockedError
    │   ├── AbsentError
    │   └── ArgumentError      a ValueError too
    └── ImageError             exit code 1; the other images go on
        └── TransientError     the same image may succeed when it is tried again
            ├── LostError      the next run computes the lost data again
            └── TooLargeError  the image may succeed where a worker has more memory
"""

import re
from typing import NamedTuple


class Failure(NamedTuple):
    """The three parts of an error's line, as records store them; ``ImageError(*failure)`` makes the error again."""

    subject: str
    reason: str
    remedy: str


class DesraError(Exception):
    """A problem in one line: ``subject: reason; remedy``.

    Args:
        subject: The file, folder or setting that is at fault.
        reason: The fault, without the subject.
        remedy: The actions that can end the fault.
    """

    def __init__(self, subject: object, reason: str, remedy: str) -> None:
        self.subject, self.reason = without_password(str(subject)), without_password(reason)
        super().__init__(self.subject, self.reason, remedy)
        self.remedy = remedy

    @property
    def failure(self) -> Failure:
        """The three parts of the line."""
        return Failure(self.subject, self.reason, self.remedy)

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}; {self.remedy}"


class UsageError(DesraError):
    """The command, a setting or a whole input folder cannot be used; nothing was started."""


class LockedError(UsageError):
    """Another run holds the workspace."""


class AbsentError(UsageError):
    """An external service, such as a Dask scheduler, cannot be reached or has no workers."""


class ArgumentError(UsageError, ValueError):
    """A function got arrays that do not belong together, or a value that is out of range."""


class ImageError(DesraError):
    """One image cannot be processed, and fails again unless its file or the settings change."""


class TransientError(ImageError):
    """One image failed for a reason outside its content, such as a full disk or a lost worker."""


class LostError(TransientError):
    """Stored data of one image is missing, damaged, or was made under other settings."""


class TooLargeError(TransientError):
    """One image needs more memory than a worker has."""


def too_large(subject: object) -> TooLargeError:
    """Return the error about an image that memory has run out for."""
    return TooLargeError(subject, "needs more memory than there is", "raise --memory, or use fewer --workers")


def described(error: BaseException) -> str:
    """Return the type and message of an error in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:300]


def may_pass(error: object) -> bool:
    """Check whether an error is worth an automatic retry.

    Examples:
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


def without_password(text: str) -> str:
    """Leave user and password out of the addresses in a text: lines are kept in logs, and sent to webhooks.

    Examples:
        >>> without_password("PREFECT_API_URL=http://me:secret@prefect.example/api")
        'PREFECT_API_URL=http://prefect.example/api'
        >>> without_password("s3://bucket/photos?X-Amz-Signature=fe5f80f7")
        's3://bucket/photos?...'
    """
    return re.sub(r"(\w://[^\s?]*\?)\S*=\S*", r"\1...", re.sub(r"(\w://)[^\s/]*@", r"\1", text))


def printable(text: object) -> str:
    """Return a text, such as a file name, in one line with its control characters made visible."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in str(text))
