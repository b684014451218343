"""Rules between ranks: transfers match in pairs, collectives in groups, nobody waits for ever.

Collectives of stage graphs run inside computations. The ranks along an axis must run the same
computations in the same order, and their graphs must hold the same collectives in the same order;
those of backward follow from the forward graph in the same way on all of them.

NCCL has no tags: between two ranks the n-th send meets the n-th receive whatever they carry. So
the two sides of each directed pair must list the same registers, tags and types in the same order.
"""

from __future__ import annotations

import itertools

from ..errors import VerificationError
from ..graph import Graph, Node
from ..ops import Category
from ..program import (
    GRADIENT_NORM,
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
from ..text import print_instruction
from .report import check, fail_at
from .waits import find_deadlock, program_waits

__all__ = [
    "verify_collectives",
    "verify_no_deadlock",
    "verify_stage_collectives",
    "verify_transfers",
]


def verify_transfers(programs: tuple[Program, ...]) -> None:
    """Sends and receives of each directed pair are equal one by one. Raises VerificationError."""
    sends: dict[tuple[int, int], list[int]] = {}
    receives: dict[tuple[int, int], list[int]] = {}
    for program in programs:
        for position, item in enumerate(program.instructions):
            if isinstance(item, Send):
                sends.setdefault((program.rank, item.peer), []).append(position)
            elif isinstance(item, Recv):
                receives.setdefault((item.peer, program.rank), []).append(position)
    for pair in sorted({*sends, *receives}):
        _verify_pair(programs, pair, sends.get(pair, []), receives.get(pair, []))


def _verify_pair(
    programs: tuple[Program, ...], pair: tuple[int, int], sends: list[int], receives: list[int]
) -> None:
    source, target = programs[pair[0]], programs[pair[1]]
    tags: dict[int, int] = {}
    for turn, (here, there) in enumerate(zip(sends, receives, strict=False)):
        send, recv = source.instructions[here], target.instructions[there]
        assert isinstance(send, Send) and isinstance(recv, Recv)
        for field in ("register", "tag", "type", "offset"):
            mine, other = getattr(send, field), getattr(recv, field)
            if mine != other:
                fail_at(
                    source,
                    here,
                    f"transfer {turn} from rank {pair[0]} to rank {pair[1]} does not match: "
                    f"the send has {field} {mine}, instruction {there} of rank {pair[1]} "
                    f"({print_instruction(recv)}) has {other}",
                )
        if tags.setdefault(send.tag, here) != here:
            fail_at(source, here, f"tag {send.tag} is that of instruction {tags[send.tag]} too")
    if len(sends) > len(receives):
        fail_at(source, sends[len(receives)], f"rank {pair[1]} never receives this")
    if len(receives) > len(sends):
        fail_at(target, receives[len(sends)], f"rank {pair[0]} never sends this")


def verify_collectives(programs: tuple[Program, ...]) -> None:
    """Every member of a group issues the same collectives on it, in the same order.

    Raises:
        VerificationError: the first collective that differs.
    """
    issued: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for program in programs:
        for position, item in enumerate(program.instructions):
            if isinstance(item, Collective):
                _verify_group(programs, program, position, item)
                members = issued.setdefault(tuple(sorted(item.ranks)), {})
                members.setdefault(program.rank, []).append(position)
    for group, members in issued.items():
        for rank in group[1:]:
            _verify_same_calls(programs, (group[0], rank), members)


def verify_stage_collectives(programs: tuple[Program, ...]) -> None:
    """Ranks of one axis compute alike and meet in the same collectives.

    Raises:
        VerificationError: the first stage, or computation, that differs.
    """
    held = {(p.rank, stage.index): stage for p in programs for stage in p.stages}
    for (rank, index), stage in held.items():
        for axis, ranks in stage.axes:
            first = held[ranks[0], index]
            here = f"stage {index} on rank {rank}, axis {axis}"
            mine, others = _along(stage, axis), _along(first, axis)
            check(
                stage.parts == first.parts,
                f"its weight gradients are computed in parts other than those on rank {ranks[0]}",
                here,
            )
            for position, (one, two) in enumerate(
                itertools.zip_longest(mine, others, fillvalue="nothing")
            ):
                check(
                    one == two,
                    f"collective {position} is {one}, on rank {ranks[0]} it is {two}",
                    here,
                )
            if mine:
                _verify_same_computations(programs[rank], programs[ranks[0]], index)


def _along(stage: StageProgram, axis: str) -> list[str]:
    """The collectives of a stage over `axis`, in order: what all its ranks have in common."""
    inside = [
        _met(stage.graph, node)
        for node in stage.graph.nodes
        if node.op.category is Category.COLLECTIVE and axis in node.args
    ]
    kept = [part for part in stage.kept if part.axis == axis]
    return [*inside, *(f"sum of the gradient of {p.name} along {p.dim}" for p in kept if p.summed)]


_INDEXED = ("shard", "all_gather", "reduce_scatter", "all_to_all")


def _met(graph: Graph, node: Node) -> str:
    """A collective but for the place of the rank and the size of its part."""
    type = graph.values[node.inputs[0]].type
    args = list(node.args[2:])
    if node.op.packet in _INDEXED:
        del args[4 if node.op.packet == "all_to_all" else 2]
    elif node.op.packet == "all_reduce":
        args.append(type.shape)
    return f"{node.op} of {node.name}, {type.dtype}: {args}"


def _verify_same_computations(program: Program, other: Program, stage: int) -> None:
    kinds = (Forward, Backward, BackwardInput, BackwardWeight)
    mine, theirs = (
        [item for item in entry.instructions if isinstance(item, kinds) and item.stage == stage]
        for entry in (program, other)
    )
    if mine != theirs:
        raise VerificationError(
            f"ranks {program.rank} and {other.rank} share collectives of stage {stage}, but run "
            "its computations in different orders",
            where=f"programs of ranks {program.rank} and {other.rank}",
        )


def _verify_group(
    programs: tuple[Program, ...], program: Program, position: int, item: Collective
) -> None:
    ranks = item.ranks
    if len(set(ranks)) < len(ranks) or not set(ranks) <= set(range(len(programs))):
        fail_at(program, position, f"{ranks} is not a group of ranks of this run")
    if isinstance(item, AllReduce) and list(ranks) != sorted(ranks):
        fail_at(program, position, f"{ranks} is not an ascending group")
    copies = item.copies if isinstance(item, AllReduce) else ()
    if copies and (len(copies) != len(ranks) or min(copies) < 1):
        fail_at(program, position, f"{copies} are not numbers of copies on ranks {ranks}")
    if copies and GRADIENT_NORM in item.targets:
        fail_at(program, position, "the norms of ranks are no copies of each other")
    if program.rank not in ranks:
        fail_at(program, position, f"rank {program.rank} is not a member of its group {ranks}")
    if not item.targets or len(set(item.targets)) < len(item.targets):
        fail_at(program, position, "it has no targets, or one of them twice")


def _verify_same_calls(
    programs: tuple[Program, ...], pair: tuple[int, int], members: dict[int, list[int]]
) -> None:
    first, second = (programs[rank] for rank in pair)
    mine, others = (members.get(rank, []) for rank in pair)
    for turn, (here, there) in enumerate(zip(mine, others, strict=False)):
        if first.instructions[here] != second.instructions[there]:
            fail_at(
                second,
                there,
                f"collective {turn} of the group differs from that of rank {pair[0]}: "
                f"{print_instruction(first.instructions[here])}",
            )
    if len(mine) > len(others):
        fail_at(first, mine[len(others)], f"rank {pair[1]} does not take part")
    if len(others) > len(mine):
        fail_at(second, others[len(mine)], f"rank {pair[0]} does not take part")


def verify_no_deadlock(programs: tuple[Program, ...]) -> None:
    """All ranks reach their end, even if every send blocked until its receive is posted.

    Raises:
        VerificationError: the cycle, rank by rank: where each stands and what it waits for.
    """
    cycle = find_deadlock(program_waits(programs))
    if not cycle:
        return
    lines = []
    for entry in cycle:
        text = print_instruction(programs[entry.rank].instructions[entry.position])
        lines.append(
            f"rank {entry.rank} at instruction {entry.position} ({text}) waits for "
            f"{entry.wait.reason}"
        )
    ranks = sorted({entry.rank for entry in cycle})
    raise VerificationError(
        "the programs deadlock, each rank waiting for the next:\n  " + "\n  ".join(lines),
        where=f"programs of ranks {', '.join(map(str, ranks))}",
        ways_out=("post the receives earlier", "run another schedule"),
    )
