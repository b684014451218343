"""Files that hold tensors by name, and how a rank reads its parts of them.

Three formats: safetensors, `torch.save` archives (read through a memory map, and nothing but
tensors and plain data out of them), and checkpoints of `torch.distributed.checkpoint`. Only the
part that is asked for is copied. Pages of a mapped file count as memory of the process once they
are touched, so a file is opened anew after so many bytes.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..compiler.ir.errors import UsageError
from .checkpoint_files import CheckpointFile

__all__ = ["StoredPart", "StoredTensor", "WeightReader", "stored_tensors"]

_OPEN_BYTES = 16 << 20  # read from one file before it is opened anew
_SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "C64": torch.complex64,
    }
)
_NESTED = ("model", "state_dict")  # where scripts keep the weights of a larger archive
# What torch and pickle raise about an archive that is damaged or is none
_ARCHIVE_ERRORS = (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A whole tensor in a file.

    Args:
        format: `safetensors`, `torch` or `checkpoint`.
        path: of the file; of a checkpoint its directory.
        key: name of the tensor there.
    """

    format: str
    path: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A rectangular part of a tensor in a file, wanted as `dtype`."""

    tensor: StoredTensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


class _File(Protocol):
    """An open file."""

    def entries(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor."""
        ...

    def copy(self, key: str, offset: tuple[int, ...], target: Tensor) -> None:
        """Fill `target` with the part of tensor `key` that begins at `offset`."""
        ...


class _SafetensorsFile:
    def __init__(self, path: str) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise UsageError(
                "reading this file needs the package safetensors",
                where=path,
                ways_out=("pip install 'cutset[safetensors]'", "save the weights by torch.save"),
            ) from None
        try:
            self._file: Any = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
        self._path = path

    def entries(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        found = {}
        for key in self._file.keys():  # noqa: SIM118 - the file is no mapping
            part = self._file.get_slice(key)
            dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
            if dtype is None:
                raise UsageError(
                    f"tensor {key} has type {part.get_dtype()}, which is not supported",
                    where=self._path,
                )
            found[key] = tuple(part.get_shape()), dtype
        return found

    def copy(self, key: str, offset: tuple[int, ...], target: Tensor) -> None:
        if not offset:
            target.copy_(self._file.get_tensor(key))
            return
        target.copy_(self._file.get_slice(key)[_slices(offset, target)])


class _TorchFile:
    def __init__(self, path: str) -> None:
        try:
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except _ARCHIVE_ERRORS as error:
            raise _unreadable(path, error) from error
        for name in _NESTED:
            if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
                found = found[name]
        if not isinstance(found, Mapping):
            raise UsageError(
                f"it holds a {type(found).__name__}, not a state_dict",
                where=path,
                ways_out=("torch.save(model.state_dict(), path)",),
            )
        self._tensors = {name: item for name, item in found.items() if isinstance(item, Tensor)}

    def entries(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (tuple(item.shape), item.dtype) for name, item in self._tensors.items()}

    def copy(self, key: str, offset: tuple[int, ...], target: Tensor) -> None:
        target.copy_(self._tensors[key].detach()[_slices(offset, target)])


_OPENERS: Mapping[str, Any] = MappingProxyType(
    {"safetensors": _SafetensorsFile, "torch": _TorchFile, "checkpoint": CheckpointFile}
)


def stored_tensors(format: str, path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by their names there.

    Raises:
        UsageError: it cannot be read as this format.
    """
    file: _File = _OPENERS[format](str(path))
    return {
        key: StoredTensor(format, str(path), key, shape, dtype)
        for key, (shape, dtype) in file.entries().items()
    }


class WeightReader:
    """Reads parts of tensors, keeping a file open while it is read from."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._read_bytes = 0

    def read(self, part: StoredPart, device: torch.device) -> Tensor:
        """The part, in memory of its own.

        Raises:
            UsageError: the file cannot be read, or has changed since it was listed.
        """
        stored = part.tensor
        target = torch.empty(part.shape, dtype=part.dtype)
        if target.numel():
            with _damage_named(stored):
                self._file(stored).copy(stored.key, part.offset, target)
        # what was touched may be the whole tensor: a part is rarely one run of bytes
        self._read_bytes += stored.dtype.itemsize * torch.Size(stored.shape).numel()
        if self._read_bytes > _OPEN_BYTES:
            self.close()
        return target.to(device)

    def _file(self, stored: StoredTensor) -> _File:
        if stored.path not in self._files:
            self.close()
            self._files[stored.path] = _OPENERS[stored.format](stored.path)
        return self._files[stored.path]

    def close(self) -> None:
        """Close what is open."""
        self._files.clear()
        self._read_bytes = 0


@contextlib.contextmanager
def _damage_named(stored: StoredTensor) -> Iterator[None]:
    """Errors of reading a tensor name it."""
    try:
        yield
    except UsageError:
        raise
    except _ARCHIVE_ERRORS as error:
        raise UsageError(
            f"tensor {stored.key} cannot be read: {type(error).__name__}: {error}",
            where=stored.path,
            ways_out=("the file has changed or is damaged: fetch or write it again",),
        ) from error


def _unreadable(path: str, error: Exception) -> UsageError:
    line = (str(error).splitlines() or [""])[0]
    return UsageError(
        f"the weights cannot be read: {type(error).__name__}: {line}",
        where=path,
        ways_out=(
            "write them by torch.save(model.state_dict(), path)",
            "write them by safetensors.torch.save_file",
        ),
    )


def _slices(offset: tuple[int, ...], target: Tensor) -> tuple[slice, ...]:
    return tuple(
        slice(begin, begin + size) for begin, size in zip(offset, target.shape, strict=True)
    )
