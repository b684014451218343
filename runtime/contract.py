"""What ranks agree on before the first step of a program.

A `Contract` lists what one rank is going to communicate: its messages; the points of the program
where it meets others, in order (instructions that reduce, and compute instructions of stages that
hold collectives); and the collectives of those stages. Only what two ranks share is compared. The
collectives of backward need no entry: they follow from those of forward (see
`docs/decisions/0008-collectives-inside-stages.md`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..compiler.ir.errors import VerificationError
from ..compiler.ir.graph import Graph, Node
from ..compiler.ir.ops import Category
from ..compiler.ir.program import (
    AllReduce,
    Backward,
    BackwardInput,
    BackwardWeight,
    Collective,
    Forward,
    Program,
    Recv,
    Send,
    StageProgram,
)
from ..compiler.ir.text import print_instruction
from ..compiler.ir.types import TensorType

__all__ = ["Contract", "Meeting", "Message", "agree", "contract_from"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a step, as its sender or its receiver sees it."""

    peer: int
    tag: int
    type: str
    register: str


@dataclass(frozen=True, slots=True)
class Meeting:
    """What `ranks` do together, here: an instruction, or a collective inside a stage."""

    what: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contract:
    """What one rank is going to communicate in every step of a program."""

    rank: int
    plan_hash: str
    device_type: str
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    meetings: tuple[Meeting, ...]
    collectives: tuple[Meeting, ...]

    @staticmethod
    def of(program: Program, device_type: str) -> Contract:
        """The contract of `program`, in the order of its instructions."""
        messages: dict[type, list[Message]] = {Send: [], Recv: []}
        collectives = {stage.index: list(_collectives(stage)) for stage in program.stages}
        meetings = []
        for item in program.instructions:
            if isinstance(item, Send | Recv):
                place = "" if item.offset is None else f" at {item.offset}"
                text = f"{item.type}{place}"
                message = Message(item.peer, item.tag, text, str(item.register))
                messages[type(item)].append(message)
            elif isinstance(item, Collective):
                meetings.append(Meeting(_told_collective(item), item.ranks))
            elif isinstance(item, Forward | Backward | BackwardInput | BackwardWeight):
                groups = dict.fromkeys(entry.ranks for entry in collectives[item.stage])
                meetings += [Meeting(print_instruction(item), ranks) for ranks in groups]
        return Contract(
            rank=program.rank,
            plan_hash=program.plan_hash,
            device_type=device_type,
            sends=tuple(messages[Send]),
            receives=tuple(messages[Recv]),
            meetings=tuple(meetings),
            collectives=tuple(entry for entries in collectives.values() for entry in entries),
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
        for name in ("meetings", "collectives"):
            _check_meetings(own, other, name)


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


def _check_meetings(one: Contract, two: Contract, name: str) -> None:
    pair = {one.rank, two.rank}
    lists = [
        [entry for entry in getattr(contract, name) if pair <= set(entry.ranks)]
        for contract in (one, two)
    ]
    if lists[0] != lists[1]:
        first = next(i for i in range(max(map(len, lists))) if _at(lists[0], i) != _at(lists[1], i))
        raise VerificationError(
            f"the {name} of ranks {one.rank} and {two.rank} differ: number {first} is "
            f"{_at(lists[0], first) or 'missing'} on one, {_at(lists[1], first) or 'missing'} on "
            "the other",
            where=f"ranks {one.rank} and {two.rank}",
        )


def _at(meetings: Sequence[Meeting], position: int) -> Meeting | None:
    return meetings[position] if position < len(meetings) else None


def _collectives(stage: StageProgram) -> Iterator[Meeting]:
    """The collectives of a stage's forward graph in program order, as all their ranks see them,
    and the sums of gradients that backward keeps parts of."""
    axes = dict(stage.axes)
    for node in stage.graph.nodes:
        if node.op.category is Category.COLLECTIVE and node.op.packet != "as_partial":
            axis = node.args[1]
            assert isinstance(axis, str)
            call = f"{node.op.packet} in stage {stage.index} of {_whole(stage.graph, node)}"
            yield Meeting(call, axes[axis])
    for part in stage.kept:
        if part.summed:
            call = f"sum of the gradient of {part.name} in stage {stage.index} along {part.dim}"
            yield Meeting(call, axes[part.axis])


def _told_collective(item: Collective) -> str:
    kind = item.reduction if isinstance(item, AllReduce) else type(item).__name__
    how = f" along {item.dims}" if not isinstance(item, AllReduce) else ""
    if isinstance(item, AllReduce) and item.copies:
        how = f" of copies {item.copies}"
    return f"{kind} of {', '.join(item.targets)}{how}"


def _whole(graph: Graph, node: Node) -> str:
    """Type of the operand with the dims that ranks share at full length, and those dims."""
    type = graph.values[node.inputs[0]].type
    rest: tuple[Any, ...] = node.args[2:]
    match node.op.packet:
        case "all_gather" | "shard" | "reduce_scatter":
            splits = [rest[0:2]]
        case "all_to_all":
            splits = [rest[0:2], rest[2:4]]
        case _:
            return " ".join([str(type), *map(str, rest)])
    shape = list(type.shape)
    for dim, sizes in splits:
        shape[dim] = sum(sizes)
    texts = [f"dim {dim} as {list(sizes)}" for dim, sizes in splits]
    return ", ".join([str(TensorType(tuple(shape), type.dtype)), *texts])


def contract_from(fields: Mapping[str, Any]) -> Contract:
    """Inverse of `dataclasses.asdict` on a contract that went through JSON."""

    def meetings(name: str) -> tuple[Meeting, ...]:
        return tuple(Meeting(entry["what"], tuple(entry["ranks"])) for entry in fields[name])

    return Contract(
        rank=fields["rank"],
        plan_hash=fields["plan_hash"],
        device_type=fields["device_type"],
        sends=tuple(Message(**entry) for entry in fields["sends"]),
        receives=tuple(Message(**entry) for entry in fields["receives"]),
        meetings=meetings("meetings"),
        collectives=meetings("collectives"),
    )
