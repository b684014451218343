"""What a worker process does with what it is told: join the job, call methods of its Rank.

A worker reads requests from its channel until that closes, and answers each by `("ok", value)` or
`("error", Failure)`:

    ("start", WorkerSpec)            join the job, make the Rank; answers the process id
    ("call", method, arguments)      call a public method of the Rank
    ("exit",)                        end; no answer
"""

from __future__ import annotations

import importlib
import os
import pickle
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from ..compiler.ir.errors import CutsetError, UsageError
from .rpc import Channel, ConnectionLost
from .stores import join_group, join_store
from .torch_communicator import TorchCommunicator

__all__ = ["Failure", "WorkerSpec", "call_method", "failure_of", "load_factory", "serve"]


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker must know to join the job.

    Args:
        rank, num_ranks: of the job.
        device: torch device name.
        backend: `gloo` or `nccl`.
        store_host, store_port: where the launcher's TCPStore listens.
        timeout_seconds: longest wait for another rank.
        num_threads: compute threads of this process.
        factory: `module:Class` of the object whose methods are called.
    """

    rank: int
    num_ranks: int
    device: str
    backend: str
    store_host: str
    store_port: int
    timeout_seconds: float
    num_threads: int
    factory: str


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception on its way to another process: the error itself only if it is cutset's own."""

    error: CutsetError | None
    kind: str
    message: str
    traceback: str


def failure_of(error: BaseException) -> Failure:
    """Describes an exception that is being handled."""
    text = "".join(traceback.format_exception(error))
    own = error if isinstance(error, CutsetError) else None
    return Failure(own, type(error).__name__, str(error), text)


def load_factory(name: str) -> Any:
    """The class called `name` (`module:Class`)."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def call_method(target: object, method: str, arguments: dict[str, Any]) -> Any:
    """Calls a public method by name."""
    if method.startswith("_") or not callable(getattr(target, method, None)):
        raise UsageError(f"{type(target).__name__} has no public method {method!r}")
    return getattr(target, method)(**arguments)


def serve(channel: Channel) -> None:
    """Answer requests until told to exit or the channel closes."""
    service = _Service(channel)
    while service.answer_next():
        pass


class _Service:
    """Keeps no request or answer beyond its time: they may hold large tensors."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._rank: object = None

    def answer_next(self) -> bool:
        """Answer one request; False when there will be no more."""
        try:
            request = self._channel.recv()
            if request[0] == "exit":
                return False
            answer = ("ok", self._execute(request))
        except ConnectionLost:
            return False
        except pickle.UnpicklingError as error:  # the request was consumed: all is in step
            answer = ("error", failure_of(UsageError(str(error))))
        except Exception as error:
            answer = ("error", failure_of(error))
        try:
            self._channel.send(answer)
        except ConnectionLost:
            return False
        except Exception as error:  # the answer cannot be encoded; nothing was sent yet
            self._channel.send(("error", failure_of(error)))
        return True

    def _execute(self, request: tuple[Any, ...]) -> Any:
        if request[0] == "start":
            self._rank = _join(request[1])
            return os.getpid()
        return call_method(self._rank, request[1], request[2])


def _join(spec: WorkerSpec) -> object:
    """Joins the job and makes the Rank."""
    torch.set_num_threads(spec.num_threads)
    device = torch.device(spec.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=spec.timeout_seconds)
    store = join_store(spec.store_host, spec.store_port, limit)
    join_group(store, spec.rank, spec.num_ranks, limit)
    communicator = TorchCommunicator(
        spec.rank,
        spec.num_ranks,
        device,
        backend=spec.backend,
        store=store,
        timeout_seconds=spec.timeout_seconds,
    )
    return load_factory(spec.factory)(
        spec.rank, spec.num_ranks, device, communicator, spec.timeout_seconds
    )
