"""Times that were measured on this machine, kept from one planning to the next.

One file a record, `<cache>/profile/<hash of the key>.json`, written beside its place and moved over
it: writers need no lock, a reader sees a whole record or none, and a crash leaves at most a file
that no reader looks at. A record that is damaged, of another version or nonsense counts as not
there, with a warning that names the file; it is overwritten by the next measurement.
"""

from __future__ import annotations

import enum
import hashlib
import json
import stat
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .files import write_whole
from .ir.errors import UsageError
from .json_fields import strict_json

__all__ = ["BlockKey", "Measurement", "ProfileDatabase", "Record"]

_FORMAT = "cutset profile"
FORMAT_VERSION = 3
METHOD_VERSION = 6
"""Of how blocks are made and measured, by kernels of this cutset: others do not compare."""

_ABANDONED_SECONDS = 3600.0  # so old a temporary file has no writer any more
_MOST_BYTES = 1 << 24  # of a record of all nodes of a large graph: far less
_MOST_SECONDS = 1e6
_LATEST_SECONDS = 1e11  # since the epoch, thousands of years from now


class Measurement(enum.StrEnum):
    """What a record has the seconds of."""

    PART = "part"  # of a local graph: forward, input gradients and weight gradients
    NODES = "nodes"  # of a graph, each in its place, and the variance of their sum over its mean
    MESSAGE = "message"  # work on any, and on a byte of it
    INSTRUCTION = "instruction"  # of a program, beside its operators


@dataclass(frozen=True, slots=True)
class BlockKey:
    """What times depend on.

    Args:
        content: SHA-256 of what runs: operators, local types, dtypes; of nodes in their places also
            what the workers beside run.
        mode: `train` or `infer`.
        device: the hardware, and the workers that measured beside it (see `hardware.py`).
        copies: sets of tensors that it ran on in turn.
        compiled: by Inductor.
        cuda_graphs: replayed as CUDA graphs.
        torch: version.
        kind: what was measured.
        method: `METHOD_VERSION`.
    """

    content: str
    mode: str
    device: str
    copies: int
    compiled: bool
    cuda_graphs: bool
    torch: str
    kind: Measurement = Measurement.PART
    method: int = METHOD_VERSION

    @property
    def digest(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Record:
    """One measurement.

    Args:
        path: module path of the block where it was found; empty for nodes and messages.
        num_nodes: operators in it.
        seconds: as the kind of the key says.
        measured_at: seconds since the epoch.
    """

    key: BlockKey
    path: str
    num_nodes: int
    seconds: tuple[float, ...]
    measured_at: float


class ProfileDatabase:
    """Records below `directory`, which need not be there yet."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "profile"
        self._is_writable = True

    @property
    def directory(self) -> Path:
        return self._directory

    def get(self, key: BlockKey) -> Record | None:
        """The record of `key`; None, with a warning if there is a file, where none can be used."""
        record = self._read(self._path(key))
        if record is not None and record.key != key:
            self._ignore(self._path(key), "it is about something else")
            return None
        return record

    def put(self, record: Record) -> None:
        """Keep `record`; where that is impossible, warn once and go on without."""
        if not self._is_writable:
            return
        document = {"format": _FORMAT, "format_version": FORMAT_VERSION, **asdict(record)}
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(record.key), json.dumps(document, indent=1) + "\n", "profile")
        except (OSError, UsageError) as error:
            self._is_writable = False
            cause = error.cause if isinstance(error, UsageError) else str(error)
            warnings.warn(
                f"measured times are not kept in {self._directory}: {cause}", stacklevel=2
            )

    def records(self) -> tuple[Record, ...]:
        """All that can be used, by device, then path."""
        found = (self._read(path) for path in self._files())
        kept = [record for record in found if record is not None]
        return tuple(sorted(kept, key=lambda r: (r.key.device, r.path, r.key.digest)))

    def clear(self, *, older_than_seconds: float = 0.0, device: str = "") -> int:
        """Remove records, those that cannot be used among them, and files of writers that died.

        Args:
            older_than_seconds: of records only those.
            device: of records only those whose device contains this, whatever the case.

        Returns:
            How many records were removed.

        Raises:
            UsageError: a file cannot be removed.
        """
        now = time.time()
        removed = 0
        for path in self._files():
            record = self._read(path, quiet=True)
            age = max(0.0, now - (record.measured_at if record else _changed_at(path)))
            is_meant = record is None or device.lower() in record.key.device.lower()
            if age >= older_than_seconds and is_meant:
                _remove(path)
                removed += 1
        for path in self._directory.glob(".*.tmp"):
            if now - _changed_at(path) > _ABANDONED_SECONDS:
                _remove(path)
        return removed

    def _path(self, key: BlockKey) -> Path:
        return self._directory / f"{key.digest}.json"

    def _files(self) -> Iterable[Path]:
        found = self._directory.glob("[!.]*.json")
        return sorted(path for path in found if not path.is_dir())

    def _read(self, path: Path, *, quiet: bool = False) -> Record | None:
        try:
            return _parsed(_text_of(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            if not quiet:
                self._ignore(path, str(error))
            return None

    def _ignore(self, path: Path, reason: str) -> None:
        warnings.warn(f"the profile record {path} is ignored: {reason}", stacklevel=4)


def _text_of(path: Path) -> str:
    """What a record's file says. Raises OSError or ValueError."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
        raise ValueError(f"it is no file of at most {_MOST_BYTES} bytes")  # reading might not end
    return path.read_text(encoding="utf-8")


def _changed_at(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:  # another process was faster
        return time.time()


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot remove the profile record: {error.strerror or error}",
            where=str(path),
            ways_out=("check the permissions of the cache directory",),
        ) from error


def _parsed(text: str) -> Record:
    """The record in `text`. Raises ValueError with what is wrong."""
    document = strict_json(text)
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError("it is no record of measured times")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"it has format version {version}, this cutset reads {FORMAT_VERSION}")
    names = {"format", "format_version", *(field.name for field in fields(Record))}
    if set(document) != names:
        raise ValueError(f"its fields are not those of a record: {_difference(document, names)}")
    key = _typed(document["key"], "key", dict)
    if set(key) != {field.name for field in fields(BlockKey)}:
        raise ValueError("its key has other fields")
    for name, kind in (
        *((name, str) for name in ("content", "mode", "device", "torch", "kind")),
        *((name, int) for name in ("copies", "method")),
        *((name, bool) for name in ("compiled", "cuda_graphs")),
    ):
        _typed(key[name], f"key.{name}", kind)
    seconds = [_amount(item, "seconds") for item in _typed(document["seconds"], "seconds", list)]
    num_nodes = _typed(document["num_nodes"], "num_nodes", int)
    measured = Measurement(key["kind"])
    wanted = {
        Measurement.PART: 3,
        Measurement.NODES: num_nodes + 1,
        Measurement.MESSAGE: 2,
        Measurement.INSTRUCTION: 1,
    }[measured]
    if len(seconds) != wanted:
        raise ValueError(f"seconds of a {measured} record are {wanted}, not {len(seconds)}")
    if measured is Measurement.PART and not seconds[0] > 0.0:
        raise ValueError("forward takes no time")
    return Record(
        key=BlockKey(**(key | {"kind": measured})),
        path=_typed(document["path"], "path", str),
        num_nodes=num_nodes,
        seconds=tuple(seconds),
        measured_at=_amount(document["measured_at"], "measured_at", most=_LATEST_SECONDS),
    )


def _difference(document: dict[str, Any], names: set[str]) -> str:
    return ", ".join(sorted(set(document) ^ names))


def _typed(value: Any, name: str, kind: type) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r}, not of type {kind.__name__}")
    return value


def _amount(value: Any, name: str, most: float = _MOST_SECONDS) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}, which is no number")
    if not 0.0 <= value < most:
        raise ValueError(f"{name} is {value!r}, which cannot be")
    return float(value)
