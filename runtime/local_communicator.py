"""Ranks of one process that talk through mailboxes: for verification and for tests.

The ranks may run in turns (a scheduler advances those whose pendings are `done()`) or in one
thread each. What arrives is checked against what is expected; tensors are copied on the way, as
between processes, and reductions sum in the order of ranks, so results do not depend on timing.

With threads nobody waits in vain: a rank that fails ends the waits of all (`fail`), and if all
threads (`running`) wait for what none of them will do any more, that is a deadlock and told so.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch

from ..compiler.ir.errors import VerificationError, WaitTimeout
from ..compiler.ir.program import Program
from ..compiler.ir.types import TensorType
from .communicator import PeerLost, Split
from .contract import Contract, agree

__all__ = ["LocalCommunicator", "LocalNetwork"]


class _Rendezvous:
    """One collective: tensors deposited by rank, and the ranks that have taken the result."""

    def __init__(self, signature: tuple[object, ...], ranks: tuple[int, ...]) -> None:
        self.signature = signature
        self.ranks = ranks
        self.deposits: dict[int, torch.Tensor] = {}
        self.taken = 0

    @property
    def complete(self) -> bool:
        return len(self.deposits) == len(self.ranks)


class LocalNetwork:
    """Mailboxes of `num_ranks` ranks. `communicator(rank)` gives each rank its end.

    Args:
        timeout_seconds: longest wait; matters only for ranks that run in threads.
    """

    def __init__(self, num_ranks: int, timeout_seconds: float = 60.0) -> None:
        self.num_ranks = num_ranks
        self.timeout_seconds = timeout_seconds
        self.changed = threading.Condition()
        self.mail: dict[tuple[int, int, int], deque[torch.Tensor]] = {}
        self.collectives: dict[tuple[tuple[int, ...], int], _Rendezvous] = {}
        self.contracts: dict[int, dict[int, Contract]] = {}
        self._running: int | None = None
        self._waiting: dict[int, tuple[Callable[[], bool], str]] = {}
        self._failure: str | None = None

    def communicator(self, rank: int, device: torch.device | None = None) -> LocalCommunicator:
        """The end of `rank`; what it receives is put on `device` (default: CPU)."""
        return LocalCommunicator(self, rank, device or torch.device("cpu"))

    def start_threads(self, count: int) -> None:
        """From here on each of `count` threads runs one rank, to the end (`end_thread`)."""
        with self.changed:
            self._running = count

    def end_thread(self, failure: str | None = None) -> None:
        """To be called by each thread at its end; with `failure`, the others end their waits."""
        with self.changed:
            assert self._running is not None
            self._running -= 1
            self._failure = self._failure or failure
            self._check_deadlock()
            self.changed.notify_all()

    def wait_for(self, ready: Callable[[], bool], limit_seconds: float, description: str) -> None:
        """Wait, with `changed` held, until `ready`.

        Raises:
            PeerLost: another rank has failed.
            WaitTimeout: it takes longer than the limit.
            VerificationError: all threads wait for each other.
        """
        own = threading.get_ident()
        self._waiting[own] = (ready, description)
        try:
            self._check_deadlock()
            done = self.changed.wait_for(lambda: ready() or bool(self._failure), limit_seconds)
        finally:
            del self._waiting[own]
        if ready():
            return
        if self._failure:
            raise PeerLost(f"{self._failure}, which {description} was waiting for")
        assert not done
        raise WaitTimeout(f"waited {limit_seconds:g} s for {description}")

    def _check_deadlock(self) -> None:
        stuck = [text for ready, text in self._waiting.values() if not ready()]
        if self._running and len(stuck) == self._running and not self._failure:
            self._failure = "no rank can go on"
            self.changed.notify_all()
            raise VerificationError(f"no rank can go on; they wait for {'; '.join(sorted(stuck))}")

    def undelivered(self) -> tuple[tuple[int, int, int], ...]:
        """(sender, receiver, tag) of the messages that nobody has received."""
        return tuple(sorted(key for key, box in self.mail.items() if box))


class _Sent:
    """A send is complete at once: the mailbox holds a copy."""

    def done(self) -> bool:
        return True

    def wait(self, timeout_seconds: float | None = None) -> None:
        return None


class _Awaited:
    """A receive or collective: complete once `ready`, whose result `take` fetches once."""

    def __init__(
        self,
        network: LocalNetwork,
        *,
        ready: Callable[[], bool],
        take: Callable[[], torch.Tensor],
        description: str,
    ) -> None:
        self._network = network
        self._ready = ready
        self._take = take
        self._description = description
        self._result: torch.Tensor | None = None

    def done(self) -> bool:
        return self._result is not None or self._ready()

    def wait(self, timeout_seconds: float | None = None) -> torch.Tensor:
        limit = self._network.timeout_seconds if timeout_seconds is None else timeout_seconds
        with self._network.changed:
            if self._result is None:
                self._network.wait_for(self._ready, limit, self._description)
                self._result = self._take()
            return self._result


class LocalCommunicator:
    """The end of one rank; see `Communicator`."""

    def __init__(self, network: LocalNetwork, rank: int, device: torch.device) -> None:
        self._network = network
        self._rank = rank
        self._device = device
        self._posted: dict[tuple[int, ...], int] = {}
        self._prepared = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def num_ranks(self) -> int:
        return self._network.num_ranks

    def prepare(self, program: Program) -> None:
        """Check `program` against those that other ranks have prepared so far."""
        contract = Contract.of(program, self._device.type)
        with self._network.changed:
            others = self._network.contracts.setdefault(self._prepared, {})
            agree(contract, others.values())
            others[self._rank] = contract
        self._prepared += 1

    def send(self, tensor: torch.Tensor, peer: int, tag: int, *, label: str) -> _Sent:
        with self._network.changed:
            box = self._network.mail.setdefault((self._rank, peer, tag), deque())
            box.append(tensor.detach().clone())
            self._network.changed.notify_all()
        return _Sent()

    def recv(self, type: TensorType, peer: int, tag: int, *, label: str) -> _Awaited:
        box = self._network.mail.setdefault((peer, self._rank, tag), deque())
        description = f"{label} ({type}, tag {tag}) from rank {peer} on rank {self._rank}"

        def take() -> torch.Tensor:
            tensor = box.popleft()
            if TensorType.of(tensor) != type:
                raise VerificationError(f"received {TensorType.of(tensor)} for {description}")
            return tensor.to(self._device)

        return _Awaited(self._network, ready=lambda: bool(box), take=take, description=description)

    def start_all_reduce(
        self, tensor: torch.Tensor, ranks: Sequence[int], reduction: str, *, label: str
    ) -> _Awaited:
        def combine(terms: list[torch.Tensor]) -> torch.Tensor:
            with torch.no_grad():
                return tensor.copy_(_reduced(terms, reduction))

        kind = ("all-reduce", reduction, str(TensorType.of(tensor)))
        return self._meet(tensor, sorted(ranks), kind, combine, label)

    def all_reduce(
        self, tensor: torch.Tensor, ranks: Sequence[int], reduction: str, *, label: str
    ) -> torch.Tensor:
        return self.start_all_reduce(tensor, ranks, reduction, label=label).wait()

    def start_all_gather(
        self, tensor: torch.Tensor, ranks: Sequence[int], split: Split, *, label: str
    ) -> _Awaited:
        split.check(tensor, split.sizes[list(ranks).index(self._rank)], label)
        kind = ("all-gather", split, tensor.dtype)
        return self._meet(tensor, ranks, kind, lambda parts: torch.cat(parts, split.dim), label)

    def start_reduce_scatter(
        self, tensor: torch.Tensor, ranks: Sequence[int], split: Split, *, label: str
    ) -> _Awaited:
        split.check(tensor, sum(split.sizes), label)
        index = list(ranks).index(self._rank)
        order = sorted(range(len(ranks)), key=list(ranks).__getitem__)

        def combine(terms: list[torch.Tensor]) -> torch.Tensor:
            parts = [split.parts(terms[position])[index] for position in order]
            return _reduced(parts, "sum").contiguous()

        kind = ("reduce-scatter", split, str(TensorType.of(tensor)))
        return self._meet(tensor, ranks, kind, combine, label)

    def start_all_to_all(
        self,
        tensor: torch.Tensor,
        ranks: Sequence[int],
        *,
        gathered: Split,
        split: Split,
        label: str,
    ) -> _Awaited:
        index = list(ranks).index(self._rank)
        gathered.check(tensor, gathered.sizes[index], label)
        split.check(tensor, sum(split.sizes), label)

        def combine(all: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([split.parts(item)[index] for item in all], gathered.dim)

        kind = ("all-to-all", gathered, split, tensor.dtype)
        return self._meet(tensor, ranks, kind, combine, label)

    def broadcast(
        self, tensor: torch.Tensor, source: int, ranks: Sequence[int], *, label: str
    ) -> torch.Tensor:
        position = list(ranks).index(source)

        def combine(all: list[torch.Tensor]) -> torch.Tensor:
            with torch.no_grad():
                return tensor.copy_(all[position])

        kind = ("broadcast", source, str(TensorType.of(tensor)))
        return self._meet(tensor, ranks, kind, combine, label).wait()

    def is_capturable(self, ranks: Sequence[int]) -> bool:
        return False  # what arrives is copied by the host

    def group_name(self, ranks: Sequence[int]) -> None:
        return None

    def barrier(self, *, label: str) -> None:
        ranks = range(self.num_ranks)
        self.all_reduce(torch.zeros(()), ranks, "sum", label=label)

    def _meet(
        self,
        tensor: torch.Tensor,
        ranks: Sequence[int],
        kind: tuple[object, ...],
        combine: Callable[[list[torch.Tensor]], torch.Tensor],
        label: str,
    ) -> _Awaited:
        """Deposit a copy of `tensor`; the result is `combine` of all, in the order of `ranks`."""
        group = tuple(sorted(ranks))
        key = (group, self._posted.get(group, 0))
        self._posted[group] = key[1] + 1
        signature = (*kind, tuple(ranks), label)
        network = self._network
        with network.changed:
            meeting = network.collectives.setdefault(key, _Rendezvous(signature, group))
            if meeting.signature != signature:
                raise VerificationError(
                    f"rank {self._rank} does {signature} where other ranks do {meeting.signature}",
                    where=f"collective {key[1]} of ranks {_listed(group)}",
                )
            meeting.deposits[self._rank] = tensor.detach().clone()
            network.changed.notify_all()

        def take() -> torch.Tensor:
            result = combine([meeting.deposits[rank].to(self._device) for rank in ranks])
            meeting.taken += 1
            if meeting.taken == len(meeting.ranks):
                del network.collectives[key]
            return result

        return _Awaited(
            network,
            ready=lambda: meeting.complete,
            take=take,
            description=f"{label} over ranks {_listed(ranks)} on rank {self._rank}",
        )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _reduced(tensors: list[torch.Tensor], reduction: str) -> torch.Tensor:
    """Reduction in the order of ranks."""
    result = tensors[0].clone()
    for tensor in tensors[1:]:
        if reduction in ("sum", "avg"):
            result += tensor
        else:
            result = result.maximum(tensor) if reduction == "max" else result.minimum(tensor)
    return result / len(tensors) if reduction == "avg" else result
