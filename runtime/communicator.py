"""How ranks talk to each other: the interface, and what they agree on before the first step.

A `Communicator` belongs to one rank. `send`, `recv` and `start_all_reduce` never block; they
return a `Pending`. Implementations: `torch_communicator.TorchCommunicator` (gloo and NCCL) and
`local_communicator.LocalNetwork` (several ranks in one process).

`prepare` is called once per program, before its first step, by all ranks in the same order. As
gloo never complains (a wrong size, dtype or order corrupts in silence), ranks exchange a
`Contract` there, the list of what each is going to send, receive and reduce, and refuse to run
when two contracts contradict each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..compiler.ir.errors import RuntimeFailure, VerificationError
from ..compiler.ir.program import AllReduce, Program, Recv, Send
from ..compiler.ir.types import TensorType

__all__ = ["Communicator", "Contract", "Message", "PeerLost", "Pending", "Reduction", "agree"]


class PeerLost(RuntimeFailure):
    """The connection to another rank broke, most often because that rank failed first."""


class Pending(Protocol):
    """A communication under way."""

    def done(self) -> bool:
        """Whether `wait` would return at once. Backends that cannot tell say False until waited."""
        ...

    def wait(self, timeout_seconds: float | None = None) -> torch.Tensor | None:
        """Wait until complete; may be called again.

        Returns:
            The tensor received or reduced; None for a send. On CUDA it is ready on the current
            stream.

        Raises:
            WaitTimeout: not complete within `timeout_seconds` (None: the communicator's limit).
            PeerLost: the other rank's process is gone.
        """
        ...


class Communicator(Protocol):
    """One rank's connection to the others. `label` says what travels, for error messages."""

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def prepare(self, program: Program) -> None:
        """Agree with all ranks on `program` and make the connections that it needs.

        Raises:
            VerificationError: plan, shapes, dtypes, tags or collectives differ between ranks.
        """
        ...

    def send(self, tensor: torch.Tensor, peer: int, tag: int, *, label: str) -> Pending:
        """Start sending; `tensor` must not change until the result is complete."""
        ...

    def recv(self, type: TensorType, peer: int, tag: int, *, label: str) -> Pending:
        """Post the receive of the message that `peer` sends with `tag`."""
        ...

    def start_all_reduce(
        self, tensor: torch.Tensor, ranks: Sequence[int], reduction: str, *, label: str
    ) -> Pending:
        """Start reducing `tensor` in place over `ranks` (`sum`, `avg`, `max` or `min`)."""
        ...

    def all_reduce(
        self, tensor: torch.Tensor, ranks: Sequence[int], reduction: str, *, label: str
    ) -> torch.Tensor:
        """Reduce `tensor` in place over `ranks` and return it."""
        ...

    def broadcast(
        self, tensor: torch.Tensor, source: int, ranks: Sequence[int], *, label: str
    ) -> torch.Tensor:
        """Overwrite `tensor` on all `ranks` by that of rank `source` and return it."""
        ...

    def barrier(self, *, label: str) -> None:
        """Wait until all ranks are here."""
        ...


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a step, as its sender or its receiver sees it."""

    peer: int
    tag: int
    type: str
    register: str


@dataclass(frozen=True, slots=True)
class Reduction:
    target: str
    ranks: tuple[int, ...]
    reduction: str


@dataclass(frozen=True, slots=True)
class Contract:
    """What one rank is going to communicate in every step of a program."""

    rank: int
    plan_hash: str
    device_type: str
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    reductions: tuple[Reduction, ...]

    @staticmethod
    def of(program: Program, device_type: str) -> Contract:
        """The contract of `program`, in the order of its instructions."""
        messages: dict[type, list[Message]] = {Send: [], Recv: []}
        reductions = []
        for item in program.instructions:
            if isinstance(item, Send | Recv):
                message = Message(item.peer, item.tag, str(item.type), str(item.register))
                messages[type(item)].append(message)
            elif isinstance(item, AllReduce):
                reductions.append(Reduction(item.target, item.ranks, item.reduction))
        return Contract(
            rank=program.rank,
            plan_hash=program.plan_hash,
            device_type=device_type,
            sends=tuple(messages[Send]),
            receives=tuple(messages[Recv]),
            reductions=tuple(reductions),
        )


def agree(own: Contract, others: Iterable[Contract]) -> None:
    """Check the contract of one rank against those of others.

    Raises:
        VerificationError: naming the two ranks and what differs.
    """
    for other in others:
        if other.plan_hash != own.plan_hash:
            raise VerificationError(
                f"rank {own.rank} runs plan {own.plan_hash[:12]}, rank {other.rank} runs plan "
                f"{other.plan_hash[:12]}",
                where=f"ranks {own.rank} and {other.rank}",
                ways_out=("give all ranks the same plan, model and version of cutset",),
            )
        _check_messages(own, other)
        _check_messages(other, own)
        _check_reductions(own, other)


def _check_messages(sender: Contract, receiver: Contract) -> None:
    sent = _by_tag(sender.sends, receiver.rank)
    received = _by_tag(receiver.receives, sender.rank)
    for tag in sorted(sent.keys() | received.keys()):
        if sent.get(tag) != received.get(tag):
            raise VerificationError(
                f"rank {sender.rank} sends {_told(sent, tag)} to rank {receiver.rank}, which "
                f"expects {_told(received, tag)} (tag {tag})",
                where=f"ranks {sender.rank} and {receiver.rank}",
                ways_out=("generate the programs of all ranks again from one plan",),
            )


def _by_tag(messages: Iterable[Message], peer: int) -> dict[int, tuple[str, str]]:
    """Tag -> (register, type) of the messages to or from `peer`."""
    table: dict[int, tuple[str, str]] = {}
    for message in messages:
        if message.peer == peer:
            if message.tag in table:
                raise VerificationError(
                    f"tag {message.tag} is used by {table[message.tag][0]} and {message.register}",
                    where=f"messages to or from rank {peer}",
                )
            table[message.tag] = (message.register, message.type)
    return table


def _told(messages: Mapping[int, tuple[str, str]], tag: int) -> str:
    return " ".join(messages[tag]) if tag in messages else "nothing"


def _check_reductions(one: Contract, two: Contract) -> None:
    pair = {one.rank, two.rank}
    lists = [
        [reduction for reduction in contract.reductions if pair <= set(reduction.ranks)]
        for contract in (one, two)
    ]
    if lists[0] != lists[1]:
        first = next(i for i in range(max(map(len, lists))) if _at(lists[0], i) != _at(lists[1], i))
        raise VerificationError(
            f"the collectives of ranks {one.rank} and {two.rank} differ: number {first} is "
            f"{_at(lists[0], first) or 'missing'} on one, {_at(lists[1], first) or 'missing'} on "
            "the other",
            where=f"ranks {one.rank} and {two.rank}",
        )


def _at(reductions: Sequence[Reduction], position: int) -> Reduction | None:
    return reductions[position] if position < len(reductions) else None
