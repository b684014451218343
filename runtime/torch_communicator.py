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
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..compiler.ir.errors import RuntimeFailure, WaitTimeout
from ..compiler.ir.messages import MAX_SENDS_UNDER_WAY
from ..compiler.ir.program import Program
from ..compiler.ir.types import TensorType
from . import torch_collectives as collectives
from . import torch_messages as messages
from .communicator import PeerLost, Split
from .contract import Contract, agree, contract_from
from .memory import until_unused, uses
from .stores import Store
from .torch_pending import TorchPending, Wait

__all__ = ["TorchCommunicator"]

_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,  # divided afterwards: gloo has no average
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
_POLL_SECONDS = 5e-5
_CHANNELS_OF_LINK = 4
_UNUSED_TAG = (1 << 31) - 1  # nobody sends with it
_FIRST_TAG, _NUM_TAGS = 1 << 30, 1 << 29  # of messages that make up collectives
_Group = Any  # dist.ProcessGroup; its stub lacks what new_group returns for non-members


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
        self._outstanding: dict[int, deque[TorchPending]] = {}  # sends by receiver
        self._turns: Counter[tuple[int, ...]] = Counter()  # collectives made of messages

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def num_ranks(self) -> int:
        return self._num_ranks

    # -- agreement -----------------------------------------------------------------------------

    def prepare(self, program: Program) -> None:
        own = Contract.of(program, self._device.type)
        contracts = self._contracts(own)
        agree(own, (other for other in contracts if other.rank != self._rank))
        on_cuda = {contract.rank for contract in contracts if contract.device_type == "cuda"}
        fast = on_cuda if self._backend == "nccl" else set()
        self._connect_links(contracts, fast)
        self._connect_groups(contracts, fast)

    def _contracts(self, own: Contract) -> list[Contract]:
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
            contracts.append(contract_from(json.loads(self._store.get(key))))
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
                pg_options=_narrow(),
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
            tuple(sorted(meeting.ranks))
            for contract in contracts
            for meeting in (*contract.meetings, *contract.collectives)
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

    def send(self, tensor: torch.Tensor, peer: int, tag: int, *, label: str) -> TorchPending:
        self._check_device(tensor, label)
        group = self._links.get((self._rank, peer))
        wait = self._wait(f"rank {peer} to take {label}", group)
        self._make_room(peer)
        buffer = tensor.detach().contiguous()
        if group is not None:
            work = self._post(lambda: dist.isend(buffer, peer, group=group), label)
        else:
            buffer = _on_host(buffer)
            work = self._post(lambda: dist.isend(buffer, peer, group=self._gloo, tag=tag), label)
        pending = TorchPending(work, wait, buffer, _nothing)
        self._outstanding.setdefault(peer, deque()).append(pending)
        return pending

    def _make_room(self, peer: int) -> None:
        """Bound the tensors that wait to leave, as senders keep them until they see that they have.

        Gloo does not tell when one has left, and over NCCL the host runs ahead of the device: there
        it waits by asking, so that the device's stream does not. Waiting for an old message cannot
        deadlock: programs are proven to run even if every send blocked until its receive is posted.
        """
        outstanding = self._outstanding.get(peer, deque())
        while outstanding and (outstanding[0].done() or len(outstanding) >= MAX_SENDS_UNDER_WAY):
            oldest = outstanding.popleft()
            if oldest.blocks_host:
                oldest.wait()
            else:
                oldest.wait_on_host(_POLL_SECONDS)

    def recv(self, type: TensorType, peer: int, tag: int, *, label: str) -> TorchPending:
        group = self._links.get((peer, self._rank))
        wait = self._wait(f"{label} from rank {peer}", group)
        if group is not None:
            buffer = torch.empty(type.shape, dtype=type.dtype, device=self._device)
            work = self._post(lambda: dist.irecv(buffer, peer, group=group), label)
            return TorchPending(work, wait, buffer, lambda received: received)
        pinned = self._device.type == "cuda"
        buffer = torch.empty(type.shape, dtype=type.dtype, pin_memory=pinned)
        work = self._post(lambda: dist.irecv(buffer, peer, group=self._gloo, tag=tag), label)
        return TorchPending(work, wait, buffer, lambda received: received.to(self._device))

    def start_all_reduce(
        self, tensor: torch.Tensor, ranks: Sequence[int], reduction: str, *, label: str
    ) -> TorchPending:
        self._check_device(tensor, label)
        backend, group = self._group(ranks, label)
        buffer = tensor.detach().to(collectives.wire_dtype(tensor.dtype)).contiguous()
        if backend == "gloo":
            buffer = _on_host(buffer)
        operation = _OPERATIONS[reduction]
        before = uses(buffer)
        work = self._post(
            lambda: dist.all_reduce(buffer, operation, group=group, async_op=True), label
        )

        def finish(reduced: torch.Tensor) -> torch.Tensor:
            if backend == "gloo":
                until_unused(reduced, before)
            if reduction == "avg":
                reduced = reduced / len(ranks)
            return _written_back(tensor, reduced)

        wait = self._wait(_over(label, ranks), group, backend)
        return TorchPending(work, wait, buffer, finish)

    def all_reduce(
        self, tensor: torch.Tensor, ranks: Sequence[int], reduction: str, *, label: str
    ) -> torch.Tensor:
        self.start_all_reduce(tensor, ranks, reduction, label=label).wait()
        return tensor

    def start_all_gather(
        self, tensor: torch.Tensor, ranks: Sequence[int], split: Split, *, label: str
    ) -> TorchPending:
        place = self._place(tensor, ranks, label)
        split.check(tensor, split.sizes[place.index], label)
        gather = messages.all_gather if place.on_host else collectives.all_gather
        return self._exchange(gather(tensor, place, split), ranks, label)

    def start_reduce_scatter(
        self, tensor: torch.Tensor, ranks: Sequence[int], split: Split, *, label: str
    ) -> TorchPending:
        place = self._place(tensor, ranks, label)
        split.check(tensor, sum(split.sizes), label)
        reduce = messages.reduce_scatter if place.on_host else collectives.reduce_scatter
        return self._exchange(reduce(tensor, place, split), ranks, label)

    def start_all_to_all(
        self,
        tensor: torch.Tensor,
        ranks: Sequence[int],
        *,
        gathered: Split,
        split: Split,
        label: str,
    ) -> TorchPending:
        place = self._place(tensor, ranks, label)
        gathered.check(tensor, gathered.sizes[place.index], label)
        split.check(tensor, sum(split.sizes), label)
        swap = messages.all_to_all if place.on_host else collectives.all_to_all
        return self._exchange(swap(tensor, place, gathered, split), ranks, label)

    def _place(self, tensor: torch.Tensor, ranks: Sequence[int], label: str) -> collectives.Place:
        self._check_device(tensor, label)
        backend, _ = self._group(ranks, label)
        return collectives.Place(tuple(ranks), self._rank, self._device, backend == "gloo")

    def _exchange(
        self, exchange: collectives.Exchange, ranks: Sequence[int], label: str
    ) -> TorchPending:
        backend, group = self._group(ranks, label)
        turn = self._turns[tuple(sorted(ranks))]  # the same on all ranks
        self._turns[tuple(sorted(ranks))] += 1
        work = self._post(lambda: exchange.start(group, _FIRST_TAG + turn % _NUM_TAGS), label)
        wait = self._wait(_over(label, ranks), group, backend)
        return TorchPending(work, wait, exchange.received, exchange.result)

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
        TorchPending(work, wait, buffer, lambda got: _written_back(tensor, got)).wait()
        return tensor

    def barrier(self, *, label: str) -> None:
        token = torch.zeros(1)
        work = self._post(lambda: dist.all_reduce(token, group=self._gloo, async_op=True), label)
        TorchPending(work, self._wait(f"all ranks at {label}", None), token, lambda t: t).wait()

    def is_capturable(self, ranks: Sequence[int]) -> bool:
        return self._groups.get(tuple(sorted(ranks)), ("", None))[0] == "nccl"

    def group_name(self, ranks: Sequence[int]) -> str | None:
        backend, group = self._groups.get(tuple(sorted(ranks)), ("", None))
        takes = backend == "nccl" or (backend == "gloo" and self._device.type == "cpu")
        if not takes or list(ranks) != sorted(ranks):
            return None
        if group is None:
            group = dist.group.WORLD
        assert group is not None
        return str(group.group_name)

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

    def _wait(self, description: str, group: _Group, backend: str | None = None) -> Wait:
        is_gloo = group is None or backend == "gloo"
        return Wait(f"{description} (on rank {self._rank})", self._timeout, is_gloo)

    def _post(self, start: Callable[[], dist.Work | None], label: str) -> dist.Work:
        """Starts an operation; a connection that is already broken shows here."""
        try:
            work = start()
        except RuntimeError as error:
            raise PeerLost(f"the connection broke before {label} (on rank {self._rank})") from error
        assert work is not None, "this rank is not a member of the group"
        return work


def _narrow() -> Any:
    """Options of a group whose transfers wait on the device beside kernels.

    A receive is posted early, and until its message comes it holds as many multiprocessors as it
    has channels; NCCL's own choice made the kernels beside it 15 % slower, and no transfer faster
    (`benchmarks/gpu_llama.py --plans pipeline=2`).
    """
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = _CHANNELS_OF_LINK
    return options


def _over(label: str, ranks: Sequence[int]) -> str:
    return f"{label} over ranks {', '.join(map(str, ranks))}"


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
