"""Files of what was learned: JSON with a checksum and without code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from desra_core.errors import UsageError
from desra_core.files import parse_json, read_input

_Learned = TypeVar("_Learned")


class Form(NamedTuple):
    """A kind of these files: its name in the file, in messages, its features, and the command that writes it."""

    kind: str
    title: str
    features: Any  # version and names; a file with other features is refused
    command: str

    def document(self, origin: dict[str, Any], **members: Any) -> dict[str, Any]:
        """Return the content of a file; ``origin`` tells what it was learned from."""
        return {"kind": self.kind, "features": self.features, "origin": origin, **members}

    def read(self, path: Path, build: Callable[[dict[str, Any]], _Learned]) -> _Learned:
        """Read a file, and build what was learned from its content.

        Raises:
            UsageError: The file cannot be read, is none of this kind or version, or ``build`` raises a `ValueError`,
                `KeyError` or `TypeError`.
        """
        remedy = f"name a file that {self.command} has written"
        try:
            document = parse_json(read_input(path))
            if not isinstance(document, dict) or document.get("kind") != self.kind:
                raise UsageError(path, f"is no {self.title}", remedy)
            if document["features"] != self.features:
                raise UsageError(path, "was learned by another version of desra", f"run {self.command} again")
            return build(document)
        except OSError as error:
            raise UsageError(path, f"cannot be read ({error.strerror})", "mend the file or its name") from None
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UsageError(path, f"is damaged ({error})", remedy) from None
