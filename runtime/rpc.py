"""The wire between the driver and its workers: whole messages over a stream socket.

The two ends are halves of a `socketpair` that the driver made before it started the worker, so
nobody else can connect and there is no address, key or port. A message is any nesting of plain
data, cutset's own dataclasses, enums and errors, torch dtypes and devices, and tensors:

    8 bytes n, 8 bytes k | n bytes: table of tensors (JSON) | k bytes: body | bytes of the tensors

The body is a pickle whose tensors are references into the table; equal references stay one
tensor. It is read by an unpickler that resolves names of `cutset` and of torch's value types
only, so no code travels. Bytes of tensors go from and to their storage without a copy in between
(a CUDA tensor is copied to the CPU first); every size fits, as lengths are 64 bits wide.
"""

from __future__ import annotations

import enum
import io
import json
import pickle
import socket
import struct
import sys
import time
from collections.abc import Callable
from importlib import import_module
from types import FunctionType
from typing import Any

import torch

from ..compiler.ir.types import DTYPES_BY_NAME, dtype_name

__all__ = ["Channel", "ConnectionLost", "decode", "encode"]

_HEADER = struct.Struct("<QQ")
_JOINED_BYTES = 1 << 16  # buffers smaller than this are joined into one system call
_BUILTINS = frozenset({"bytearray", "complex", "frozenset", "range", "set", "slice"})
_TORCH_TYPES = (torch.device, torch.Size)


class ConnectionLost(ConnectionError):
    """The process at the other end closed the connection or ended."""


class _Pickler(pickle.Pickler):
    """Replaces tensors by their index in `tensors`."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[torch.Tensor] = []
        self._index: dict[int, int] = {}

    def persistent_id(self, obj: object) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        if obj.layout is not torch.strided:
            raise TypeError(f"cannot send a tensor of layout {obj.layout}; only dense ones")
        if id(obj) not in self._index:
            self._index[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._index[id(obj)]

    def reducer_override(self, obj: object) -> Any:
        """Enum members by value: some releases of Python 3.11 pickle them through `getattr`."""
        if isinstance(obj, enum.Enum):
            return type(obj), (obj.value,)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Resolves tensors by index, and no global outside cutset and torch's value types."""

    def __init__(self, body: bytes, tensors: list[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(body))
        self._tensors = tensors

    def persistent_load(self, pid: int) -> torch.Tensor:
        return self._tensors[pid]

    def find_class(self, module: str, name: str) -> Any:
        if module == "builtins" and name in _BUILTINS:
            return super().find_class(module, name)
        if module == "collections" and name in ("OrderedDict", "defaultdict", "deque"):
            return super().find_class(module, name)
        if module == "torch" and "." not in name:
            value = getattr(torch, name)
            if isinstance(value, torch.dtype) or value in _TORCH_TYPES:
                return value
        if module.split(".")[0] == "cutset":
            value = getattr(import_module(module), name, None)
            if isinstance(value, type | FunctionType) and value.__module__ == module:
                return value
        raise pickle.UnpicklingError(f"{module}.{name} does not travel between processes")


def _raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy where it is contiguous."""
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # one element may have any stride
    return flat.view(torch.uint8).numpy().data


def encode(message: object) -> list[memoryview]:
    """The buffers of one message, in order; buffers of tensors alias the tensors' storage.

    Raises:
        TypeError, pickle.PicklingError: the message holds something that does not travel.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(message)
    rows = [
        [dtype_name(tensor.dtype), list(tensor.shape), tensor.is_meta] for tensor in pickler.tensors
    ]
    table = json.dumps(rows, separators=(",", ":")).encode()
    body = file.getbuffer()
    head = _HEADER.pack(len(table), len(body)) + table
    payload = [_raw(tensor) for tensor in pickler.tensors if not tensor.is_meta and tensor.numel()]
    return _joined([memoryview(head), body, *payload])


def _joined(buffers: list[memoryview]) -> list[memoryview]:
    """The same bytes with runs of small buffers joined."""
    result: list[memoryview] = []
    run = bytearray()
    for buffer in buffers:
        if len(buffer) < _JOINED_BYTES:
            run += buffer
            continue
        if run:
            result.append(memoryview(run))
            run = bytearray()
        result.append(buffer)
    return [*result, memoryview(run)] if run else result


def decode(data: bytes) -> Any:
    """Inverse of `b"".join(encode(message))`, for messages that travel as one block of bytes."""
    stream = io.BytesIO(data)

    def fill(view: memoryview) -> None:
        if stream.readinto(view) != len(view):
            raise pickle.UnpicklingError("truncated message")

    return _read(fill)()


def _read(fill: Callable[[memoryview], None]) -> Callable[[], Any]:
    """Reads one message by `fill(view)` calls; returns a function that decodes it.

    Decoding is a second step so that a message that cannot be decoded is yet consumed whole.
    """
    header = bytearray(_HEADER.size)
    fill(memoryview(header))
    table_bytes, body_bytes = _HEADER.unpack(header)
    block = bytearray(table_bytes + body_bytes)
    fill(memoryview(block))
    tensors = []
    for name, shape, is_meta in json.loads(bytes(block[:table_bytes])):
        device = "meta" if is_meta else "cpu"
        tensor = torch.empty(shape, dtype=DTYPES_BY_NAME[name], device=device)
        if tensor.numel() and not is_meta:
            fill(_raw(tensor))
        tensors.append(tensor)
    return _Unpickler(bytes(block[table_bytes:]), tensors).load


class Channel:
    """One end of a connection that carries whole messages in both directions.

    Not safe for concurrent use of one direction by several threads.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        """File descriptor, for `select`."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, message: object, timeout: float | None = None) -> None:
        """Sends one message.

        Raises:
            ConnectionLost: the other end is gone.
            TimeoutError: the other end did not take the bytes within `timeout` seconds.
        """
        buffers = encode(message)
        deadline = _deadline(timeout)
        try:
            for buffer in buffers:
                self._send_all(buffer, deadline)
        except TimeoutError:
            raise
        except OSError as error:
            raise ConnectionLost(str(error)) from error

    def recv(self, timeout: float | None = None) -> Any:
        """The next message.

        Raises:
            ConnectionLost: the other end is gone.
            TimeoutError: the message was not there within `timeout` seconds.
            pickle.UnpicklingError: it holds something that does not travel (it is consumed).
        """
        deadline = _deadline(timeout)

        def fill(view: memoryview) -> None:
            done = 0
            while done < len(view):
                self._socket.settimeout(_remaining(deadline))
                count = self._socket.recv_into(view[done:])
                if count == 0:
                    raise ConnectionLost("connection closed by the other end")
                done += count

        try:
            load = _read(fill)
        except (ConnectionLost, TimeoutError):
            raise
        except OSError as error:
            raise ConnectionLost(str(error)) from error
        return load()

    def _send_all(self, buffer: memoryview, deadline: float | None) -> None:
        done = 0
        while done < len(buffer):
            self._socket.settimeout(_remaining(deadline))
            done += self._socket.send(buffer[done:])


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _remaining(deadline: float | None) -> float | None:
    """Seconds left, never 0 (which would make a socket non-blocking)."""
    return None if deadline is None else max(deadline - time.monotonic(), sys.float_info.epsilon)
