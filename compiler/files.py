"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .ir.errors import UsageError

__all__ = ["check_target", "set_aside", "unusable", "write_whole"]


def write_whole(target: Path, content: str | bytes, what: str) -> None:
    """Write `content` at once: a reader sees the old file or the new one, never a part.

    A link stays, and leads to the new file. A device or a pipe is written to, and stays what it is.

    Args:
        what: the kind of file, for messages.

    Raises:
        UsageError: the file cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    place = Path(os.path.realpath(target))
    try:
        if _is_stream(place):
            place.write_bytes(data)
        else:
            _replace(place, data)
    except OSError as error:
        raise unusable(target, "write", what, error) from error


def _is_stream(place: Path) -> bool:
    """Whether something is there that keeps no content: a device, a pipe."""
    return place.exists() and not place.is_file() and not place.is_dir()


def _replace(place: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{place.name}.", suffix=".tmp", dir=place.parent
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, place)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def set_aside(target: Path, what: str) -> Iterator[Path]:
    """A folder for `target` and files that it refers to, which are moved beside it in the end.

    `target` comes last, and its old content goes before any of the others comes: a reader sees
    the old files, the new ones, or no `target`. Nothing stays of a block that fails.

    Args:
        what: the kind of file, for messages.

    Raises:
        UsageError: a file cannot be written, or is a device or a pipe.
    """
    place = Path(os.path.realpath(target))
    if _is_stream(place):
        raise UsageError(
            f"the {what} file needs others beside it, which a device or a pipe has no place for",
            where=str(target),
            ways_out=("name a file in an existing folder",),
        )
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{place.name}.", suffix=".tmp", dir=place.parent
        ) as folder:
            yield Path(folder)
            made = sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name)
            if len(made) > 1:
                place.unlink(missing_ok=True)
            for file in made:
                with file.open("rb") as content:
                    os.fsync(content.fileno())
                os.replace(file, place if file.name == target.name else place.parent / file.name)
    except OSError as error:
        raise unusable(target, "write", what, error) from error


def check_target(target: Path, what: str) -> None:
    """Find out before long work, not after it, that its file has nowhere to go.

    Args:
        what: the kind of file, for messages.

    Raises:
        UsageError: the file is a folder, or its folder does not exist or takes no files.
    """
    place = Path(os.path.realpath(target))
    if place.is_dir() or not place.parent.is_dir():
        raise UsageError(
            f"the {what} file cannot be written: "
            + ("this is a folder" if place.is_dir() else "its folder does not exist"),
            where=str(target),
            ways_out=("name a file in an existing folder",),
        )
    if _is_stream(place):
        return
    try:
        with tempfile.TemporaryFile(dir=place.parent):
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
