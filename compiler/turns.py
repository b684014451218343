"""One measurement at a time on a machine, as two at once would measure each other.

Whoever measures holds a lock on a file that all users of the machine share. It ends with the
process, so nobody waits for the dead. It is a courtesy, not a guard: who has waited long enough, or
cannot have the file, measures all the same, and is told what that means.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["measuring_turn"]

_SHARED = Path("/tmp")  # TMPDIR may be another one for each user
_NAME = "cutset-measuring.lock"
_LIMIT_SECONDS = 240.0  # a calibration takes less; ranks of a job wait 300 s for each other
_POLL_SECONDS = 0.1
# a pipe in its place is opened without waiting for a writer, a link is not followed
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def measuring_turn(
    say: Callable[[str], None], *, limit_seconds: float = _LIMIT_SECONDS, path: Path | None = None
) -> Iterator[None]:
    """Hold this machine's lock on measuring.

    Args:
        say: is told once if another measurement has to end first.
        limit_seconds: of waiting for it; a warning tells if that was not enough.
        path: of the lock file; None: the one of this machine.
    """
    path = path or _lock_path()
    try:
        descriptor = _opened(path)
    except OSError as error:
        _warn(f"{path} cannot be locked ({error.strerror or error})")
        yield
        return
    try:
        _wait(descriptor, path, say, limit_seconds)
        yield
    finally:
        os.close(descriptor)  # the lock ends with it


def _lock_path() -> Path:
    return (_SHARED if _SHARED.is_dir() else Path(tempfile.gettempdir())) / _NAME


def _opened(path: Path) -> int:
    """The lock file, made if it is not there. Reading is enough to lock a file of another user."""
    try:
        return os.open(path, _FLAGS)
    except FileNotFoundError:
        pass
    try:
        descriptor = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:  # another process was faster
        return os.open(path, _FLAGS)
    os.fchmod(descriptor, 0o644)  # whatever the umask: others have to read it
    return descriptor


def _wait(descriptor: int, path: Path, say: Callable[[str], None], limit_seconds: float) -> None:
    deadline = time.monotonic() + limit_seconds
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError as error:  # a file system without locks
            _warn(f"{path} cannot be locked ({error.strerror or error})")
            return
        if time.monotonic() >= deadline:
            _warn(f"another measurement on this machine goes on after {limit_seconds:g} s")
            return
        if not told:
            told = True
            say(
                f"waits for another measurement on this machine, at most {limit_seconds:g} s "
                f"(lock: {path})"
            )
        time.sleep(_POLL_SECONDS)


def _warn(cause: str) -> None:
    warnings.warn(
        f"{cause}: times that are measured now may be too long if another process measures too",
        stacklevel=5,
    )
