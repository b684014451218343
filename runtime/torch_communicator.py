"""Ranks in processes of their own that talk through `torch.distributed`: gloo, and NCCL on CUDA.

Which transport carries a message follows from its two ends: NCCL when both ranks compute on CUDA
and the job's backend is NCCL, else gloo (a CUDA tensor is then staged through pinned memory).

* gloo: one group, messages told apart by tag.
* NCCL ignores tags and runs the operations of one group one after the other, so every directed
  pair of ranks and every set of reducing ranks has a group of its own. `prepare` makes those that
  a program needs, on all ranks in one sorted order, and uses each once, as NCCL connects at first
  use and blocks until the other side comes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..compiler.ir.errors import RuntimeFailure, WaitTimeout
from ..compiler.ir.program import Program
from ..compiler.ir.types import TensorType
from .communicator import Contract, Message, PeerLost, Reduction, agree
from .stores import Store

__all__ = ["TorchCommunicator"]

_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,  # divided afterwards: gloo has no average
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
_MAX_OUTSTANDING = 8  # gloo sends to one rank
_UNUSED_TAG = (1 << 31) - 1  # nobody sends with it
_Group = Any  # dist.ProcessGroup; its stub lacks what new_group returns for non-members


@dataclasses.dataclass(frozen=True, slots=True)
class _Wait:
    """What is waited for, for messages and limits."""

    description: str
    limit_seconds: float
    blocks_host: bool  # gloo: wait returns when the bytes are here; NCCL: orders CUDA streams


class _TorchPending:
    """One `dist.Work`. `finish` makes the result from the buffer; `buffer` is kept alive."""

    def __init__(
        self,
        work: dist.Work,
        wait: _Wait,
        buffer: torch.Tensor,
        finish: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> None:
        self._work: dist.Work | None = work
        self._wait = wait
        self._buffer: torch.Tensor | None = buffer
        self._finish = finish
        self._result: torch.Tensor | None = None

    def done(self) -> bool:
        """Gloo does not tell before it was waited for: False until then."""
        return self._work is None or (not self._wait.blocks_host and self._work.is_completed())

    def wait(self, timeout_seconds: float | None = None) -> torch.Tensor | None:
        if self._work is not None:
            assert self._buffer is not None
            self._complete(self._work, timeout_seconds)
            self._result = self._finish(self._buffer)
            self._work = self._buffer = None
        return self._result

    def _complete(self, work: dist.Work, timeout_seconds: float | None) -> None:
        limit = self._wait.limit_seconds if timeout_seconds is None else timeout_seconds
        began = time.monotonic()
        try:
            if self._wait.blocks_host:
                work.wait(timedelta(seconds=limit))
            else:
                work.wait()
        except RuntimeError as error:
            waited = time.monotonic() - began
            if "timed out" in str(error).lower() or waited >= limit:
                raise WaitTimeout(
                    f"waited {limit:g} s for {self._wait.description}",
                    ways_out=("raise timeout_seconds if the other rank is merely slow",),
                ) from error
            raise PeerLost(
                f"the connection broke while waiting for {self._wait.description}"
            ) from error


class TorchCommunicator:
    """The end of one rank; see `Communicator`.

    Args:
        rank, num_ranks: of the job.
        device: where this rank computes; tensors to send and receive live there.
        backend: `gloo` or `nccl`, the same on all ranks.
        store: where ranks exchange their contracts.
        gloo: a gloo group of all ranks; None: the default group is one.
        timeout_seconds: longest wait for another rank.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        device: torch.device,
        *,
        backend: str,
        store: Store,
        gloo: _Group = None,
        timeout_seconds: float = 300.0,
    ) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._device = device
        self._backend = backend
        self._store = store
        self._gloo = gloo
        self._timeout = timeout_seconds
        self._prepared = 0
        self._links: dict[tuple[int, int], _Group] = {}  # NCCL groups by (sender, receiver)
        self._groups: dict[tuple[int, ...], tuple[str, _Group]] = {}  # backend and group
        self._groups[tuple(range(num_ranks))] = ("gloo", gloo)
        self._outstanding: dict[int, deque[_TorchPending]] = {}  # gloo sends by receiver

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def num_ranks(self) -> int:
        return self._num_ranks

    # -- agreement -----------------------------------------------------------------------------

    def prepare(self, program: Program) -> None:
        own = Contract.of(program, self._device.type)
        contracts = self._exchange(own)
        agree(own, (other for other in contracts if other.rank != self._rank))
        on_cuda = {contract.rank for contract in contracts if contract.device_type == "cuda"}
        fast = on_cuda if self._backend == "nccl" else set()
        self._connect_links(contracts, fast)
        self._connect_groups(contracts, fast)

    def _exchange(self, own: Contract) -> list[Contract]:
        """Contracts of all ranks for the same `prepare` call."""
        prefix = f"cutset/contract/{self._prepared}"
        self._prepared += 1
        self._store.set(f"{prefix}/{self._rank}", json.dumps(dataclasses.asdict(own)))
        contracts = []
        for rank in range(self._num_ranks):
            key = f"{prefix}/{rank}"
            try:
                self._store.wait([key], timedelta(seconds=self._timeout))
            except RuntimeError as error:
                raise WaitTimeout(
                    f"waited {self._timeout:g} s for rank {rank} to load plan {own.plan_hash[:12]}"
                ) from error
            contracts.append(_contract(json.loads(self._store.get(key))))
        return contracts

    def _connect_links(self, contracts: list[Contract], fast: set[int]) -> None:
        pairs = {
            (contract.rank, message.peer)
            for contract in contracts
            for message in contract.sends
            if {contract.rank, message.peer} <= fast
        }
        for pair in sorted(pairs - self._links.keys()):
            group = dist.new_group(
                sorted(pair),
                backend="nccl",
                timeout=timedelta(seconds=self._timeout),
                group_desc=f"cutset {pair[0]} to {pair[1]}",
            )
            self._links[pair] = group
            if self._rank in pair:
                self._use_once(group, pair)

    def _use_once(self, group: _Group, pair: tuple[int, int]) -> None:
        token = torch.zeros(1, device=self._device)
        if self._rank == pair[0]:
            dist.send(token, pair[1], group=group)
        else:
            dist.recv(token, pair[0], group=group)
        torch.cuda.synchronize(self._device)

    def _connect_groups(self, contracts: list[Contract], fast: set[int]) -> None:
        wanted = {
            tuple(sorted(reduction.ranks))
            for contract in contracts
            for reduction in contract.reductions
        }
        for ranks in sorted(wanted):
            backend = "nccl" if set(ranks) <= fast else "gloo"
            if self._groups.get(ranks, ("", None))[0] == backend:
                continue
            group = dist.new_group(
                list(ranks),
                backend=backend,
                timeout=timedelta(seconds=self._timeout),
                group_desc=f"cutset reduce {','.join(map(str, ranks))}",
            )
            self._groups[ranks] = (backend, group)
            if backend == "nccl" and self._rank in ranks:
                dist.all_reduce(torch.zeros(1, device=self._device), group=group)
                torch.cuda.synchronize(self._device)

    # -- messages ------------------------------------------------------------------------------

    def send(self, tensor: torch.Tensor, peer: int, tag: int, *, label: str) -> _TorchPending:
        self._check_device(tensor, label)
        group = self._links.get((self._rank, peer))
        wait = self._wait(f"rank {peer} to take {label}", group)
        buffer = tensor.detach().contiguous()
        if group is not None:
            work = self._post(lambda: dist.isend(buffer, peer, group=group), label)
            return _TorchPending(work, wait, buffer, _nothing)
        self._make_room(peer)
        buffer = _on_host(buffer)
        work = self._post(lambda: dist.isend(buffer, peer, group=self._gloo, tag=tag), label)
        pending = _TorchPending(work, wait, buffer, _nothing)
        self._outstanding.setdefault(peer, deque()).append(pending)
        return pending

    def _make_room(self, peer: int) -> None:
        """Bound the tensors that wait to leave, as gloo does not tell when one has left.

        Waiting for an old message cannot deadlock: programs are proven to run even if every send
        blocked until its receive is posted.
        """
        outstanding = self._outstanding.get(peer, deque())
        while outstanding and (outstanding[0].done() or len(outstanding) >= _MAX_OUTSTANDING):
            outstanding.popleft().wait()

    def recv(self, type: TensorType, peer: int, tag: int, *, label: str) -> _TorchPending:
        group = self._links.get((peer, self._rank))
        wait = self._wait(f"{label} from rank {peer}", group)
        if group is not None:
            buffer = torch.empty(type.shape, dtype=type.dtype, device=self._device)
            work = self._post(lambda: dist.irecv(buffer, peer, group=group), label)
            return _TorchPending(work, wait, buffer, lambda received: received)
        pinned = self._device.type == "cuda"
        buffer = torch.empty(type.shape, dtype=type.dtype, pin_memory=pinned)
        work = self._post(lambda: dist.irecv(buffer, peer, group=self._gloo, tag=tag), label)
        return _TorchPending(work, wait, buffer, lambda received: received.to(self._device))

    def start_all_reduce(
        self, tensor: torch.Tensor, ranks: Sequence[int], reduction: str, *, label: str
    ) -> _TorchPending:
        self._check_device(tensor, label)
        backend, group = self._group(ranks, label)
        buffer = tensor.detach() if tensor.is_contiguous() else tensor.detach().contiguous()
        if backend == "gloo":
            buffer = _on_host(buffer)
        operation = _OPERATIONS[reduction]
        work = self._post(
            lambda: dist.all_reduce(buffer, operation, group=group, async_op=True), label
        )

        def finish(reduced: torch.Tensor) -> torch.Tensor:
            if reduction == "avg":
                reduced = reduced / len(ranks)
            return _written_back(tensor, reduced)

        wait = self._wait(f"{label} over ranks {', '.join(map(str, ranks))}", group, backend)
        return _TorchPending(work, wait, buffer, finish)

    def all_reduce(
        self, tensor: torch.Tensor, ranks: Sequence[int], reduction: str, *, label: str
    ) -> torch.Tensor:
        self.start_all_reduce(tensor, ranks, reduction, label=label).wait()
        return tensor

    def broadcast(
        self, tensor: torch.Tensor, source: int, ranks: Sequence[int], *, label: str
    ) -> torch.Tensor:
        self._check_device(tensor, label)
        backend, group = self._group(ranks, label)
        buffer = tensor.detach().contiguous()
        if backend == "gloo":
            buffer = _on_host(buffer)
        work = self._post(lambda: dist.broadcast(buffer, source, group=group, async_op=True), label)
        wait = self._wait(f"{label} from rank {source}", group, backend)
        _TorchPending(work, wait, buffer, lambda got: _written_back(tensor, got)).wait()
        return tensor

    def barrier(self, *, label: str) -> None:
        token = torch.zeros(1)
        work = self._post(lambda: dist.all_reduce(token, group=self._gloo, async_op=True), label)
        _TorchPending(work, self._wait(f"all ranks at {label}", None), token, lambda t: t).wait()

    def abort(self) -> None:
        """Break all connections, so that ranks that wait for this one fail at once.

        Gloo closes the connections of a group when a wait of the application times out; that is
        its only way to do so while operations are pending.
        """
        everyone = (tuple(range(self._num_ranks)), ("gloo", self._gloo))
        mine = [entry for entry in self._groups.items() if self._rank in entry[0]]
        for ranks, (backend, group) in [everyone, *mine]:
            if backend == "gloo" and len(ranks) > 1:
                other = next(rank for rank in ranks if rank != self._rank)
                with contextlib.suppress(RuntimeError):
                    work = dist.irecv(torch.empty(1), other, group=group, tag=_UNUSED_TAG)
                    assert work is not None
                    work.wait(timedelta(milliseconds=1))
        nccl = [group for pair, group in self._links.items() if self._rank in pair]
        nccl += [group for _, (backend, group) in mine if backend == "nccl"]
        for group in nccl:
            with contextlib.suppress(RuntimeError):
                group.abort()

    def _group(self, ranks: Sequence[int], label: str) -> tuple[str, _Group]:
        try:
            return self._groups[tuple(sorted(ranks))]
        except KeyError:
            raise RuntimeFailure(
                f"{label}: no group of ranks {', '.join(map(str, ranks))} was prepared",
                where=f"rank {self._rank}",
            ) from None

    def _check_device(self, tensor: torch.Tensor, label: str) -> None:
        if tensor.device.type != self._device.type:
            raise RuntimeFailure(
                f"{label} is on {tensor.device}, but rank {self._rank} computes and communicates "
                f"on {self._device}",
                where=f"rank {self._rank}",
            )

    def _wait(self, description: str, group: _Group, backend: str | None = None) -> _Wait:
        is_gloo = group is None or backend == "gloo"
        return _Wait(f"{description} (on rank {self._rank})", self._timeout, is_gloo)

    def _post(self, start: Callable[[], dist.Work | None], label: str) -> dist.Work:
        """Starts an operation; a connection that is already broken shows here."""
        try:
            work = start()
        except RuntimeError as error:
            raise PeerLost(f"the connection broke before {label} (on rank {self._rank})") from error
        assert work is not None, "this rank is not a member of the group"
        return work


def _contract(fields: dict[str, Any]) -> Contract:
    """Inverse of `dataclasses.asdict` on a contract that went through JSON."""
    return Contract(
        rank=fields["rank"],
        plan_hash=fields["plan_hash"],
        device_type=fields["device_type"],
        sends=tuple(Message(**entry) for entry in fields["sends"]),
        receives=tuple(Message(**entry) for entry in fields["receives"]),
        reductions=tuple(
            Reduction(entry["target"], tuple(entry["ranks"]), entry["reduction"])
            for entry in fields["reductions"]
        ),
    )


def _nothing(sent: torch.Tensor) -> None:
    """Result of a send."""


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself if on the CPU, else a copy in pinned memory, complete on return."""
    if tensor.device.type == "cpu":
        return tensor
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    staged.copy_(tensor)
    return staged


def _written_back(tensor: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Puts `result` into `tensor` unless it shares its storage."""
    if result.data_ptr() != tensor.data_ptr():
        with torch.no_grad():
            tensor.copy_(result)
    return tensor
