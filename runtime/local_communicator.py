"""Ranks of one process that talk through mailboxes: for verification and for tests.

The ranks may run in turns (a scheduler advances those whose pendings are `done()`) or in one
thread each. What arrives is checked against what is expected; tensors are copied on the way, as
between processes, and reductions sum in the order of ranks, so results do not depend on timing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch

from ..compiler.ir.errors import VerificationError, WaitTimeout
from ..compiler.ir.program import Program
from ..compiler.ir.types import TensorType
from .communicator import Contract, agree

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

    def communicator(self, rank: int, device: torch.device | None = None) -> LocalCommunicator:
        """The end of `rank`; what it receives is put on `device` (default: CPU)."""
        return LocalCommunicator(self, rank, device or torch.device("cpu"))

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
                if not self._network.changed.wait_for(self._ready, limit):
                    raise WaitTimeout(f"waited {limit:g} s for {self._description}")
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
        meeting = self._deposit(tensor, ranks, ("all-reduce", reduction), label)

        def take(tensors: list[torch.Tensor]) -> torch.Tensor:
            return _reduced(tensors, reduction)

        return self._collect(meeting, tensor, take, f"{label} over ranks {_listed(ranks)}")

    def all_reduce(
        self, tensor: torch.Tensor, ranks: Sequence[int], reduction: str, *, label: str
    ) -> torch.Tensor:
        return self.start_all_reduce(tensor, ranks, reduction, label=label).wait()

    def broadcast(
        self, tensor: torch.Tensor, source: int, ranks: Sequence[int], *, label: str
    ) -> torch.Tensor:
        meeting = self._deposit(tensor, ranks, ("broadcast", source), label)
        position = meeting[1].ranks.index(source)
        description = f"{label} from rank {source}"
        return self._collect(meeting, tensor, lambda all: all[position], description).wait()

    def barrier(self, *, label: str) -> None:
        ranks = range(self.num_ranks)
        self.all_reduce(torch.zeros(()), ranks, "sum", label=label)

    def _deposit(
        self, tensor: torch.Tensor, ranks: Sequence[int], kind: tuple[object, ...], label: str
    ) -> tuple[tuple[tuple[int, ...], int], _Rendezvous]:
        group = tuple(sorted(ranks))
        key = (group, self._posted.get(group, 0))
        self._posted[group] = key[1] + 1
        signature = (*kind, str(TensorType.of(tensor)), label)
        with self._network.changed:
            meeting = self._network.collectives.setdefault(key, _Rendezvous(signature, group))
            if meeting.signature != signature:
                raise VerificationError(
                    f"rank {self._rank} does {signature} where other ranks do {meeting.signature}",
                    where=f"collective {key[1]} of ranks {_listed(group)}",
                )
            meeting.deposits[self._rank] = tensor.detach().clone()
            self._network.changed.notify_all()
        return key, meeting

    def _collect(
        self,
        meeting: tuple[tuple[tuple[int, ...], int], _Rendezvous],
        tensor: torch.Tensor,
        combine: Callable[[list[torch.Tensor]], torch.Tensor],
        description: str,
    ) -> _Awaited:
        key, rendezvous = meeting

        def take() -> torch.Tensor:
            result = combine([rendezvous.deposits[rank] for rank in rendezvous.ranks])
            rendezvous.taken += 1
            if rendezvous.taken == len(rendezvous.ranks):
                del self._network.collectives[key]
            with torch.no_grad():
                return tensor.copy_(result)

        return _Awaited(
            self._network,
            ready=lambda: rendezvous.complete,
            take=take,
            description=f"{description} on rank {self._rank}",
        )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _reduced(tensors: list[torch.Tensor], reduction: str) -> torch.Tensor:
    """Reduction in the order of ranks."""
    result = tensors[0].clone()
    for tensor in tensors[1:]:
        other = tensor.to(result.device)
        if reduction in ("sum", "avg"):
            result += other
        else:
            result = torch.maximum(result, other) if reduction == "max" else result.minimum(other)
    return result / len(tensors) if reduction == "avg" else result
