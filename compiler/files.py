"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .ir.errors import UsageError

__all__ = ["check_target", "unusable", "write_whole"]


def write_whole(target: Path, text: str, what: str) -> None:
    """Write `text` at once: a reader sees the old file or the new one, never a part.

    Args:
        what: the kind of file, for messages.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(
            prefix=f".{target.name}.", suffix=".tmp", dir=target.parent
        )
    except OSError as error:
        raise unusable(target, "write", what, error) from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unusable(target, "write", what, error) from error
        raise


def check_target(target: Path, what: str) -> None:
    """Find out before long work, not after it, that its file has nowhere to go.

    Args:
        what: the kind of file, for messages.

    Raises:
        UsageError: the file is a folder, or its folder does not exist or takes no files.
    """
    folder = target.absolute().parent
    if target.is_dir() or not folder.is_dir():
        raise UsageError(
            f"the {what} file cannot be written: "
            + ("this is a folder" if target.is_dir() else "its folder does not exist"),
            where=str(target),
            ways_out=("name a file in an existing folder",),
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unusable(target, "write", what, error) from error


def unusable(path: Path, verb: str, what: str, error: OSError) -> UsageError:
    """The error for a file that cannot be read or written."""
    return UsageError(
        f"cannot {verb} the {what} file: {error.strerror or error}",
        where=str(path),
        ways_out=("check the path and its permissions",),
    )
