"""Rules of a set of programs: what must hold before anything runs.

Checked in this order, as later checks rely on earlier ones: the headers agree; the stages fit
together; ranks hold parts that make up the whole (`shards.py`); each rank defines, reads and frees
its registers rightly and completes its actions (`actions.py`); sends and receives match,
collectives match (`exchange.py`); values and gradients are summed where ranks have terms
(`sums.py`); no rank waits for ever; the step's tail is in order (`tail.py`); memory stays under the
limit.
"""

from __future__ import annotations

from ..graph import Mode, OutputKind, Value, ValueKind
from ..program import Free, Program, Recv, Register, StageProgram
from .actions import verify_actions
from .axes import verify_axes
from .exchange import (
    verify_collectives,
    verify_no_deadlock,
    verify_stage_collectives,
    verify_transfers,
)
from .graph import verify_graphs
from .recompute import verify_recomputed
from .registers import Registers, boundary_inputs, boundary_outputs
from .report import check, fail_at
from .shards import verify_shards
from .sums import verify_sums
from .tail import verify_tails

__all__ = ["held_bytes", "verify_programs"]


def verify_programs(
    programs: tuple[Program, ...], *, static_bytes: tuple[int, ...] | None = None
) -> None:
    """Check every rule of the level (see the module docstring).

    Args:
        programs: the programs of all ranks, in rank order.
        static_bytes: per rank, a bound of all memory but the registers; by default the parameters,
            buffers, constants and gradients that the rank holds.

    Raises:
        VerificationError: the first rule that is broken, with rank and instruction.
    """
    _verify_headers(programs)
    _verify_stages(programs)
    verify_shards(programs)
    registers = Registers(programs)
    for program in programs:
        verify_actions(program, registers)
    verify_transfers(programs)
    verify_collectives(programs)
    verify_stage_collectives(programs)
    verify_sums(programs)
    verify_no_deadlock(programs)
    verify_tails(programs)
    for program in programs:
        static = held_bytes(program) if static_bytes is None else static_bytes[program.rank]
        _verify_memory(program, registers, static)


def _verify_headers(programs: tuple[Program, ...]) -> None:
    check(bool(programs), "there are no programs", "programs")
    first = programs[0]
    for position, program in enumerate(programs):
        here = f"program {position}"
        check(program.rank == position, f"its rank is {program.rank}, not {position}", here)
        check(
            program.num_ranks == len(programs),
            f"it expects {program.num_ranks} ranks, there are {len(programs)} programs",
            here,
        )
        for name in ("plan_hash", "mode", "num_microbatches"):
            mine, others = getattr(program, name), getattr(first, name)
            check(mine == others, f"its {name} is {mine}, that of rank 0 is {others}", here)
        mine, others = len(program.stage_ranks), len(first.stage_ranks)
        check(mine == others, f"it knows {mine} stages, rank 0 knows {others}", here)
    check(first.num_microbatches >= 1, "there are no microbatches", "program 0")


def _verify_stages(programs: tuple[Program, ...]) -> None:
    """Each column of the in-stage mesh, by itself, is a pipeline of all stages, or all ranks
    together are, where stages have meshes of their own."""
    check(any(program.stages for program in programs), "no rank has a stage", "programs")
    graphs = {id(stage.graph): stage.graph for p in programs for stage in p.stages}
    verify_graphs(graphs.values(), is_stage=True)
    if programs[0].stage_ranks:
        _verify_columns(programs)
    else:
        _verify_own_meshes(programs)
    _verify_groups(programs)


def _verify_columns(programs: tuple[Program, ...]) -> None:
    columns: dict[tuple[int, ...], list[Program]] = {}
    for program in programs:
        if program.stages:
            columns.setdefault(program.stage_ranks, []).append(program)
    seen: dict[int, tuple[int, ...]] = {}
    for stage_ranks in columns:
        for rank in stage_ranks:
            other = seen.setdefault(rank, stage_ranks)
            told = f"it is in columns {other} and {stage_ranks}"
            check(other == stage_ranks, told, f"rank {rank}")
    for stage_ranks, members in columns.items():
        _verify_column(stage_ranks, members)


def _verify_own_meshes(programs: tuple[Program, ...]) -> None:
    """Every rank has one stage; the ranks of a stage read and make the same values, and know which
    part of them they have."""
    first: dict[int, StageProgram] = {}
    for program in programs:
        here = f"program {program.rank}"
        check(len(program.stages) <= 1, "it has several stages, each with a mesh of its own", here)
        for stage in program.stages:
            _verify_stage(program, stage)
            same = first.setdefault(stage.index, stage)
            crossing = stage.consumers, stage.producers
            alike = crossing == (same.consumers, same.producers)
            check(alike, f"stage {stage.index} has other boundaries on other ranks", here)
            _verify_parts(program, stage)
    check(sorted(first) == list(range(len(first))), f"there are stages {sorted(first)}", "programs")
    _verify_pipeline({index: first[index] for index in sorted(first)}, programs[0].mode)


def _verify_parts(program: Program, stage: StageProgram) -> None:
    """Parts of boundary values are of the types that the stage computes with."""
    here = f"boundaries of stage {stage.index} on rank {program.rank}"
    types = {v.name: v.type for v in (*boundary_inputs(stage), *boundary_outputs(stage))}
    parts = {shard.name: shard.part for shard in stage.boundaries}
    check(types == parts, f"it computes with {types}, and has the parts {parts}", here)


def _verify_stage(program: Program, stage: StageProgram) -> None:
    here = f"stage {stage.index} of rank {program.rank}"
    check(stage.graph.mode is program.mode, "its graph is of another mode", here)
    verify_axes(program, stage)
    verify_recomputed(stage.recomputed, program.mode, stage.graph, here)


def _verify_groups(programs: tuple[Program, ...]) -> None:
    """The ranks along an axis agree that they are, and hold the same stage."""
    groups = {
        (program.rank, stage.index): dict(stage.axes)
        for program in programs
        for stage in program.stages
    }
    for (rank, stage), axes in groups.items():
        for name, ranks in axes.items():
            here = f"axis {name} of stage {stage} on rank {rank}"
            check(len(set(ranks)) == len(ranks), f"ranks {ranks} repeat", here)
            check(rank in ranks, f"the rank is not in its own group {ranks}", here)
            for other in ranks:
                theirs = groups.get((other, stage), {}).get(name)
                check(theirs == ranks, f"it is {ranks} here and {theirs} on rank {other}", here)


def _verify_column(stage_ranks: tuple[int, ...], programs: list[Program]) -> None:
    stages: dict[int, StageProgram] = {}
    for program in programs:
        for stage in program.stages:
            here = f"stage {stage.index} of rank {program.rank}"
            check(stage.index in range(len(stage_ranks)), "there is no such stage", here)
            home = stage_ranks[stage.index]
            check(home == program.rank, f"the stage belongs to rank {home}", here)
            check(stage.index not in stages, "the rank holds the stage twice", here)
            _verify_stage(program, stage)
            stages[stage.index] = stage
    for index, rank in enumerate(stage_ranks):
        check(index in stages, f"rank {rank} does not hold stage {index}", f"program {rank}")
    _verify_pipeline(stages, programs[0].mode)


def _verify_pipeline(stages: dict[int, StageProgram], mode: Mode) -> None:
    """Stages, one rank of each, fit together."""
    _verify_boundaries(stages)
    _verify_buffers(stages)
    losses = [index for index, stage in stages.items() if stage.graph.outputs_of(OutputKind.LOSS)]
    expected = 1 if mode is Mode.TRAIN else 0
    check(
        len(losses) == expected, f"{len(losses)} stages return a loss: {losses}", "stage programs"
    )


def _verify_buffers(stages: dict[int, StageProgram]) -> None:
    """A buffer that the step changes is held by one stage: copies elsewhere would grow stale."""
    holders: dict[str, list[int]] = {}
    for index, stage in sorted(stages.items()):
        for value in stage.graph.values_of(ValueKind.BUFFER):
            holders.setdefault(value.origin, []).append(index)
    for index, stage in sorted(stages.items()):
        for output in stage.graph.outputs_of(OutputKind.BUFFER):
            held = holders.get(output.target, [index])
            check(
                held == [index],
                f"stage {index} changes the buffer, but stages {held} hold it",
                f"buffer {output.target!r}",
            )


def _verify_boundaries(stages: dict[int, StageProgram]) -> None:
    """Every boundary value has one producer, and both ends describe it alike."""
    made: dict[str, tuple[int, Value]] = {}
    wholes = {
        (index, shard.name): shard.whole
        for index, stage in stages.items()
        for shard in stage.boundaries
    }
    readers: dict[str, list[int]] = {}
    for index, stage in sorted(stages.items()):
        for value in boundary_outputs(stage):
            here = f"boundary %{value.name} of stage {index}"
            check(value.name not in made, "two outputs send a value of this name", here)
            made[value.name] = index, value
        for value in boundary_inputs(stage):
            readers.setdefault(value.name, []).append(index)
    for index, stage in sorted(stages.items()):
        sources = dict(stage.producers)
        received = boundary_inputs(stage)
        check(
            sorted(sources) == sorted(value.name for value in received),
            "its table of producers does not list its boundary values",
            f"stage {index}",
        )
        for value in received:
            here = f"boundary %{value.name} of stage {index}"
            check(value.name in made, "no stage sends it", here)
            source, origin = made[value.name]
            check(sources[value.name] == source, f"it comes from stage {source}", here)
            check(source < index, f"it comes from stage {source}, which is not earlier", here)
            mine = wholes.get((index, value.name), value.type)
            theirs = wholes.get((source, value.name), origin.type)
            check(
                (mine, value.requires_grad) == (theirs, origin.requires_grad),
                f"it is {mine} (gradient: {value.requires_grad}), but stage {source} sends "
                f"{theirs} (gradient: {origin.requires_grad})",
                here,
            )
        sent = {value.name: tuple(readers.get(value.name, ())) for value in boundary_outputs(stage)}
        listed = {name: tuple(sorted(consumers)) for name, consumers in stage.consumers}
        check(
            listed == sent,
            f"its table of consumers is {listed}, but the stages read {sent}",
            f"stage {index}",
        )


def held_bytes(program: Program) -> int:
    """Bytes of the parameters, buffers, constants and (training) gradients that a rank holds; a
    tensor that several of its stages use counts once."""
    held = {
        value.origin or value.name: value.type.num_bytes
        for stage in program.stages
        for value in stage.graph.values
        if value.kind in (ValueKind.PARAMETER, ValueKind.BUFFER, ValueKind.CONSTANT)
    }
    gradients = program.gradient_types().values()
    return sum(held.values()) + sum(type.num_bytes for type in gradients)


def _verify_memory(program: Program, registers: Registers, static: int) -> None:
    """A register takes memory from its definition (a received one from the posting of its `Recv`)
    until it is freed."""
    live: dict[Register, int] = {}
    total = static
    limit = program.memory_limit_bytes
    check(
        total <= limit,
        f"rank {program.rank} holds {total} bytes before its first instruction, "
        f"{total - limit} more than its limit of {limit}",
        f"program {program.rank}",
    )
    for position, item in enumerate(program.instructions):
        made = (item.register,) if isinstance(item, Recv) else registers.defines(item)
        for register in made:
            if register in live:
                continue  # another part of it
            type = registers.type_of(program.rank, register)
            live[register] = 0 if type is None else type.num_bytes
            total += live[register]
        if total > limit:
            largest = max(live, key=lambda register: live[register])
            fail_at(
                program,
                position,
                f"rank {program.rank} needs {total} bytes here, {total - limit} more than its "
                f"limit of {limit}: {static} held throughout and {len(live)} registers "
                f"(largest {largest}, {live[largest]} bytes)",
            )
        if isinstance(item, Free):
            total -= sum(live.pop(register) for register in item.registers)
