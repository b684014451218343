"""Programs: right ones pass; each way of breaking one is caught, deadlocks with their cycle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutset.compiler.codegen.programs import generate_programs
from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.graph import Mode, Output, OutputKind, ValueKind
from cutset.compiler.ir.program import (
    GRADIENT_NORM,
    AllReduce,
    Backward,
    BackwardWeight,
    ClipGradients,
    Forward,
    Free,
    Instruction,
    OptimizerStep,
    Program,
    Recv,
    Register,
    Send,
    StageProgram,
)
from cutset.compiler.ir.text import print_instruction
from cutset.compiler.ir.types import TensorType
from cutset.compiler.ir.verify import held_bytes, verify_plan, verify_programs
from cutset.compiler.ir.verify.waits import find_deadlock, program_waits
from cutset.compiler.ir.views import event_view
from tests.ir.pipelines import cluster, make_plan, make_programs, skip_graph

Programs = tuple[Program, ...]
RIGHT = make_programs()
TIED = "blocks.0.weight"  # on ranks 0 and 2


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 3), (3, 4), (4, 8)])
def test_right_programs_pass(stages: int, microbatches: int, split: bool, mode: Mode) -> None:
    verify_programs(make_programs(stages, microbatches, split=split, mode=mode))
    verify_programs(make_programs(stages, microbatches, split=split, mode=mode, clip=None))


def program(programs: Programs, rank: int, /, **changes: object) -> Programs:
    """The programs with fields of one of them replaced."""
    changed = list(programs)
    changed[rank] = replace(programs[rank], **changes)
    return tuple(changed)


def lines(programs: Programs, rank: int, edit: Callable[[list[Instruction]], None]) -> Programs:
    """The programs with the instruction list of one of them edited."""
    instructions = list(programs[rank].instructions)
    edit(instructions)
    return program(programs, rank, instructions=tuple(instructions))


def find(programs: Programs, rank: int, text: str) -> int:
    """Position of the first instruction of `rank` whose text starts with `text`."""
    for position, item in enumerate(programs[rank].instructions):
        if print_instruction(item).startswith(text):
            return position
    raise AssertionError(f"rank {rank} has no instruction {text}")


def drop(rank: int, text: str) -> Callable[[Programs], Programs]:
    return lambda programs: lines(
        programs, rank, lambda items: items.pop(find(programs, rank, text))
    )


def insert(rank: int, text: str, *added: Instruction) -> Callable[[Programs], Programs]:
    """Insert before the instruction that starts with `text`; an empty text means at the end."""

    def mutate(programs: Programs) -> Programs:
        here = find(programs, rank, text) if text else len(programs[rank].instructions)
        return lines(programs, rank, lambda items: items.__setitem__(slice(here, here), added))

    return mutate


def change(rank: int, text: str, **changes: object) -> Callable[[Programs], Programs]:
    """Replace fields of the instruction that starts with `text`."""

    def mutate(programs: Programs) -> Programs:
        here = find(programs, rank, text)
        new = replace(programs[rank].instructions[here], **changes)
        return lines(programs, rank, lambda items: items.__setitem__(here, new))

    return mutate


def move(rank: int, text: str, to: str) -> Callable[[Programs], Programs]:
    """Move an instruction to just before another."""

    def mutate(programs: Programs) -> Programs:
        item = programs[rank].instructions[find(programs, rank, text)]
        return insert(rank, to, item)(drop(rank, text)(programs))

    return mutate


def both(*steps: Callable[[Programs], Programs]) -> Callable[[Programs], Programs]:
    def mutate(programs: Programs) -> Programs:
        for step in steps:
            programs = step(programs)
        return programs

    return mutate


def stage(rank: int, **changes: object) -> Callable[[Programs], Programs]:
    return lambda programs: program(
        programs, rank, stages=(replace(programs[rank].stages[0], **changes),)
    )


def graph(rank: int, edit: Callable[[StageProgram], dict]) -> Callable[[Programs], Programs]:
    def mutate(programs: Programs) -> Programs:
        entry = programs[rank].stages[0]
        return stage(rank, graph=replace(entry.graph, **edit(entry)))(programs)

    return mutate


def stage_consumers(rank: int) -> Callable[[Programs], Programs]:
    return stage(rank, consumers=())


def retyped(entry: StageProgram) -> dict:
    """Changes of the stage's graph that make its first boundary value a double."""
    name = entry.producers[0][0]
    return {
        "values": tuple(
            replace(value, type=TensorType(value.type.shape, torch.float64))
            if value.name == name
            else value
            for value in entry.graph.values
        )
    }


def without_loss(entry: StageProgram) -> dict:
    kept = [output for output in entry.graph.outputs if output.kind is not OutputKind.LOSS]
    return {"outputs": tuple(kept)}


ELSEWHERE = Register("first", 0)
ACTIVATION = TensorType((2, 8), torch.float32)
HEADERS = {
    "no programs": (lambda p: (), "there are no programs"),
    "rank": (lambda p: program(p, 1, rank=2), "its rank is 2, not 1"),
    "num_ranks": (lambda p: program(p, 1, num_ranks=4), "it expects 4 ranks, there are 3"),
    "rank lost": (lambda p: p[:2], "it expects 3 ranks, there are 2"),
    "plan hash": (lambda p: program(p, 2, plan_hash="other"), "its plan_hash is other"),
    "mode": (lambda p: program(p, 2, mode=Mode.INFER), "its mode is"),
    "microbatches": (lambda p: program(p, 2, num_microbatches=3), "its num_microbatches is 3"),
    "stage ranks": (
        lambda p: program(p, 2, stage_ranks=(0, 2, 1)),
        "it is in columns (0, 1, 2) and (0, 2, 1)",
    ),
    "no columns and no parts": (
        lambda p: tuple(replace(x, stage_ranks=()) for x in p),
        "and has the parts {}",
    ),
    "no microbatches": (
        lambda p: tuple(replace(x, num_microbatches=0) for x in p),
        "there are no microbatches",
    ),
}
STAGES = {
    "stage of another rank": (stage(1, index=0), "the stage belongs to rank 0"),
    "unknown stage": (stage(1, index=3), "there is no such stage"),
    "stage lost": (lambda p: program(p, 1, stages=()), "rank 1 does not hold stage 1"),
    "stage twice": (lambda p: program(p, 1, stages=p[1].stages * 2), "holds the stage twice"),
    "broken graph": (graph(1, lambda s: {"nodes": s.graph.nodes[:-1]}), "computes this result"),
    "graph of other mode": (graph(0, lambda s: {"mode": Mode.INFER}), "its graph is of another"),
    "no loss": (graph(2, without_loss), "0 stages return a loss"),
    "producer not listed": (stage(1, producers=()), "its table of producers does not list"),
    "other producer": (stage(2, producers=(("first", 1), ("h3", 1))), "it comes from stage 0"),
    "consumer not listed": (stage(0, consumers=(("first", (2,)), ("m1", ()))), "its table of"),
    "nobody sends it": (
        both(graph(0, lambda s: {"outputs": ()}), stage_consumers(0)),
        "no stage sends it",
    ),
    "sent twice": (
        graph(0, lambda s: {"outputs": (*s.graph.outputs, s.graph.outputs[0])}),
        "two outputs send a value of this name",
    ),
    "recomputed node is missing": (stage(1, recomputed=(0, 99)), "[99] do not exist"),
    "recomputed nodes in disorder": (stage(1, recomputed=(1, 0)), "do not ascend: [1, 0]"),
    "types differ": (graph(2, retyped), "it is f64[2,8] (gradient: True), but stage 0 sends f32"),
}
REGISTERS = {
    "recv lost": (drop(1, "Recv %m1@0"), "%m1@0 is used before it is defined"),
    "recv late": (move(1, "Recv %m1@0", to="Send"), "%m1@0 is used before it is defined"),
    "recv twice": (
        insert(1, "OptimizerStep", Recv(Register("m1", 0), 0, 0, ACTIVATION)),
        "m1@0 is defined again",
    ),
    "send before compute": (move(0, "Send %m1@0", to="Forward 0.0"), "%m1@0 is used before"),
    "send after free": (move(0, "Send %m1@0", to="Forward 0.1"), "is used after instruction"),
    "free before use": (move(0, "Free", to="Send %first@0"), "is used after instruction"),
    "free twice": (insert(0, "Forward 0.1", Free((ELSEWHERE,))), "is used after instruction"),
    "free listed twice": (change(0, "Free", registers=(ELSEWHERE,) * 2), "a register is freed twi"),
    "free of nothing": (insert(0, "Forward 0.0", Free((ELSEWHERE,))), "used before it is defined"),
    "unknown register": (
        change(0, "Send %first@0", register=Register("ghost", 0)),
        "%ghost@0 is used before it is defined",
    ),
    "send to itself": (change(0, "Send %m1@0", peer=0), "rank 0 is not another rank of this run"),
    "send to nobody": (change(0, "Send %m1@0", peer=3), "rank 3 is not another rank of this run"),
    "recv from nobody": (change(1, "Recv %m1@0", peer=-1), "rank -1 is not another rank"),
    "send as other type": (
        change(0, "Send %m1@0", type=TensorType((2, 9), torch.float32)),
        "%m1@0 is f32[2,8], not f32[2,9]",
    ),
    "recv as other dtype": (
        change(1, "Recv %m1@0", type=TensorType((2, 8), torch.float16)),
        "%m1@0 is f32[2,8], not f16[2,8]",
    ),
    "nobody reads it": (
        both(
            drop(0, "Send %m1@3"),
            change(0, "Free %first@3 %m1@3", registers=(Register("first", 3),)),
        ),
        "%m1@3 is defined but neither used nor freed",
    ),
}
ACTIONS = {
    "forward lost": (drop(2, "Forward 2.3"), "Forward of stage 2 on microbatch 3 is missing"),
    "forward twice": (insert(0, "OptimizerStep", Forward(0, 0)), "%first@0 is defined again"),
    "weight half lost": (
        drop(1, "BackwardWeight 1.2"),
        "BackwardWeight of stage 1 on microbatch 2",
    ),
    "weight half twice": (insert(1, "AllReduce", BackwardWeight(1, 2)), "does the same"),
    "whole and halves": (insert(2, "OptimizerStep", Backward(2, 0)), "%first@0!2 is defined again"),
    "weight half first": (
        move(0, "BackwardWeight 0.0", to="BackwardInput 0.0"),
        "it comes before its BackwardInput",
    ),
    "stage of another rank": (insert(0, "OptimizerStep", BackwardWeight(1, 0)), "does not hold"),
    "unknown microbatch": (insert(0, "OptimizerStep", BackwardWeight(0, 4)), "are 4 microbatches"),
}
EXCHANGE = {
    "tag": (change(0, "Send %m1@1", tag=99), "the send has tag 99"),
    "tag used twice": (
        both(
            *(change(0, f"Send %m1@{m}", tag=99) for m in (0, 1)),
            *(change(1, f"Recv %m1@{m}", tag=99) for m in (0, 1)),
        ),
        "tag 99 is that of instruction",
    ),
    "order of receives": (move(1, "Recv %m1@1", to="Recv %m1@0"), "transfer 0 from rank 0 to rank"),
    "wrong peer": (change(0, "Send %m1@3", peer=2), "rank 0 never sends this"),
    "never received": (
        insert(0, "Free %first@3", Send(Register("m1", 3), 1, 999, ACTIVATION)),
        "rank 1 never receives this",
    ),
    "group without member": (change(0, f"AllReduce {TIED}", ranks=(1, 2)), "is not a member"),
    "group out of order": (change(0, f"AllReduce {TIED}", ranks=(2, 0)), "not an ascending group"),
    "group of unknown rank": (change(0, f"AllReduce {TIED}", ranks=(0, 7)), "not a group of ranks"),
    "member missing": (drop(2, f"AllReduce {TIED}"), "rank 2 does not take part"),
    "other member missing": (drop(0, f"AllReduce {TIED}"), "rank 0 does not take part"),
    "collectives differ": (change(2, f"AllReduce {TIED}", reduction="avg"), "collective 0 of the"),
}
TAIL = {
    "tied gradient not reduced": (
        both(drop(0, f"AllReduce {TIED}"), drop(2, f"AllReduce {TIED}")),
        "ranks (0, 2) hold 'blocks.0.weight', but its gradient is not reduced",
    ),
    "reduced too early": (move(0, f"AllReduce {TIED}", to="BackwardWeight 0.3"), "still adds to"),
    "reduced twice": (
        both(*(insert(r, "GradientNorm", AllReduce((TIED,), (0, 2))) for r in (0, 2))),
        "was reduced before",
    ),
    "reduced otherwise": (
        both(*(change(r, f"AllReduce {TIED}", reduction="avg") for r in (0, 2))),
        "copies' gradients are terms of a sum",
    ),
    "reduced by a wrong name": (
        both(*(change(r, f"AllReduce {TIED}", targets=("wte",)) for r in (0, 2))),
        "the rank trains no parameter 'wte'",
    ),
    "reduced over all": (
        both(*(change(r, f"AllReduce {TIED}", ranks=(0, 1, 2)) for r in (0, 2))),
        "collective 0 of the group differs",
    ),
    "no optimizer step": (drop(1, "OptimizerStep"), "it has 0 optimizer steps, not 1"),
    "two optimizer steps": (insert(1, "", OptimizerStep()), "it has 2 optimizer steps, not 1"),
    "step too early": (move(1, "OptimizerStep", to="ClipGradients"), "after the optimizer step"),
    "one rank does not clip": (drop(1, "ClipGradients"), "the ranks clip to different norms"),
    "another norm": (change(1, "ClipGradients", max_norm=2.0), "the ranks clip to different norms"),
    "clip twice": (insert(1, "OptimizerStep", ClipGradients(1.0)), "it clips gradients twice"),
    "no norm": (drop(1, "GradientNorm"), "clipping takes GradientNorm, AllReduce, ClipGradients"),
    "norm before reduction": (
        move(0, "GradientNorm", to=f"AllReduce {TIED}"),
        "a gradient is reduced after the norm was taken",
    ),
    "norm too early": (move(1, "GradientNorm", to="BackwardWeight 1.3"), "still adds to gradients"),
    "norm not summed": (
        both(*(drop(r, 'AllReduce "gradient norm"') for r in (0, 1, 2))),
        "clipping takes GradientNorm, AllReduce, ClipGradients",
    ),
    "norm of some": (
        both(
            drop(0, 'AllReduce "gradient norm"'),
            *(change(r, 'AllReduce "gradient norm"', ranks=(1, 2)) for r in (1, 2)),
        ),
        "clipping takes GradientNorm, AllReduce, ClipGradients",
    ),
    "norm forgets": (change(1, "GradientNorm", parameters=()), "no rank counts 'blocks."),
    "norm counts twice": (
        change(2, "GradientNorm", parameters=(TIED,)),
        "two ranks count 'blocks.0.weight'",
    ),
    "norm of a stranger": (
        change(1, "GradientNorm", parameters=(TIED,)),
        "the rank trains no parameter 'blocks.0.weight'",
    ),
}
BROKEN = {**HEADERS, **STAGES, **REGISTERS, **ACTIONS, **EXCHANGE, **TAIL}


@pytest.mark.parametrize("way", BROKEN)
def test_broken_programs_are_caught(way: str) -> None:
    mutate, message = BROKEN[way]
    broken = mutate(RIGHT)
    assert broken != RIGHT
    with pytest.raises(VerificationError) as caught:
        verify_programs(broken)
    assert message in caught.value.cause
    assert caught.value.where


def test_order_of_sends_between_two_ranks_is_fixed() -> None:
    right = make_programs(2)
    swapped = move(0, "Send %m2@0", to="Send %first@0")
    if find(right, 0, "Send %m2@0") < find(right, 0, "Send %first@0"):
        swapped = move(0, "Send %first@0", to="Send %m2@0")
    with pytest.raises(VerificationError, match="transfer 0 from rank 0 to rank 1 does not match"):
        verify_programs(swapped(right))


def test_no_instruction_can_be_left_out() -> None:
    for rank, entry in enumerate(RIGHT):
        for position, item in enumerate(entry.instructions):
            if isinstance(item, Free):  # legal: the register lives to the end of the step
                continue
            with pytest.raises(VerificationError):
                verify_programs(lines(RIGHT, rank, lambda items, at=position: items.pop(at)))


def test_no_instruction_can_be_repeated() -> None:
    for rank, entry in enumerate(RIGHT):
        for position, item in enumerate(entry.instructions):
            with pytest.raises(VerificationError):
                verify_programs(
                    lines(RIGHT, rank, lambda items, at=position, new=item: items.insert(at, new))
                )


def test_inference_changes_nothing() -> None:
    right = make_programs(mode=Mode.INFER)
    for extra in (OptimizerStep(), ClipGradients(1.0), AllReduce((TIED,), (0, 2))):
        with pytest.raises(VerificationError):
            verify_programs(insert(0, "", extra)(right))
    with pytest.raises(VerificationError, match="an inference program runs backward"):
        verify_programs(insert(0, "", BackwardWeight(0, 0))(right))


def blocked() -> Programs:
    """Ranks 0 and 1 both send before they post their receives."""
    right = make_programs(2, 2)
    target = find(right, 0, "BackwardInput 0.0")
    late = right
    for item in [i for i in right[0].instructions[:target] if isinstance(i, Recv)]:
        late = move(0, print_instruction(item), to="BackwardInput 0.0")(late)
    for name in ("first", "m2"):
        late = move(1, f"Recv %{name}@1", to="Forward 1.1")(late)
    return late


def test_a_deadlock_prints_its_cycle() -> None:
    with pytest.raises(VerificationError) as caught:
        verify_programs(blocked())
    cause = caught.value.cause
    assert cause.startswith("the programs deadlock, each rank waiting for the next:\n  rank 0 at")
    assert "(Send %first@1 -> 1" in cause or "(Send %m2@1 -> 1" in cause
    assert "waits for rank 1 to post the Recv of" in cause
    assert "waits for rank 0 to post the Recv of" in cause
    assert caught.value.where == "programs of ranks 0, 1"


def test_collectives_in_different_orders_deadlock() -> None:
    """Two groups, each in its own order, but rank 0 waits for one before it starts the other."""
    norm = print_instruction(AllReduce((GRADIENT_NORM,), (0, 1, 2)))
    tied = f"AllReduce {TIED}"
    swapped = both(move(0, norm, to=tied), move(0, "GradientNorm", to=tied))(RIGHT)
    waits = find_deadlock(program_waits(swapped))
    assert {entry.rank for entry in waits} == {0, 2}
    with pytest.raises(VerificationError, match="the programs deadlock"):
        verify_programs(swapped)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.data())
def test_deadlocks_are_the_cycles_of_the_event_view(data: st.DataObject) -> None:
    """The verifier's execution by turns and the acyclicity of the event graph agree."""
    programs = make_programs(data.draw(st.integers(2, 4)), 3)
    for _ in range(data.draw(st.integers(0, 4))):
        rank = data.draw(st.integers(0, len(programs) - 1))
        length = len(programs[rank].instructions)
        source, target = (data.draw(st.integers(0, length - 1)) for _ in range(2))
        programs = lines(
            programs, rank, lambda items, a=source, b=target: items.insert(b, items.pop(a))
        )
    cyclic = not nx.is_directed_acyclic_graph(event_view(programs))
    assert bool(find_deadlock(program_waits(programs))) == cyclic


def test_held_bytes_count_shared_tensors_once() -> None:
    weight = 8 * 8 * 4
    assert [held_bytes(entry) for entry in RIGHT] == [2 * 2 * weight, 2 * 2 * weight, 2 * weight]
    assert held_bytes(make_programs(1)[0]) == 2 * 4 * weight


def test_memory_over_the_limit_names_instruction_and_excess() -> None:
    register = 2 * 8 * 4
    tight = program(RIGHT, 1, memory_limit_bytes=1024 + 2 * register)
    with pytest.raises(
        VerificationError, match="64 more than its limit of 1152: 1024 held"
    ) as caught:
        verify_programs(tight)
    assert caught.value.where == "rank 1, instruction 2 of its program: Forward 1.0"
    verify_programs(program(RIGHT, 1, memory_limit_bytes=1024 + 3 * register))
    with pytest.raises(VerificationError, match="holds 2000000 bytes before its first"):
        verify_programs(RIGHT, static_bytes=(0, 2_000_000, 0))


def test_registers_that_are_not_freed_count_to_the_end() -> None:
    entry = RIGHT[1]
    limit = 1024 + 4 * 2 * 8 * 4
    verify_programs(program(RIGHT, 1, memory_limit_bytes=limit))
    kept = tuple(item for item in entry.instructions if not isinstance(item, Free))
    with pytest.raises(VerificationError, match="more than its limit"):
        verify_programs(program(RIGHT, 1, memory_limit_bytes=limit, instructions=kept))


def test_boundary_gradients_agree_on_both_ends() -> None:
    def frozen(entry: StageProgram) -> dict:
        values = tuple(
            replace(value, requires_grad=False) if value.kind is ValueKind.BOUNDARY else value
            for value in entry.graph.values
        )
        return {"values": values}

    with pytest.raises(VerificationError, match=r"\(gradient: False\), but stage 0 sends"):
        verify_programs(graph(1, frozen)(RIGHT))


def test_outputs_of_stages_may_not_clash() -> None:
    clash = graph(1, lambda s: {"outputs": (*s.graph.outputs, Output(OutputKind.LOSS, 0))})
    with pytest.raises(VerificationError, match="not a floating-point scalar"):
        verify_programs(clash(RIGHT))


def test_ranks_without_stages_take_no_part() -> None:
    model = skip_graph()
    plan = make_plan(model, 2, 2)
    first, second = plan.stages
    assert plan.schedule is not None
    rows = (plan.schedule.ranks[0], (), plan.schedule.ranks[1])
    spread = replace(
        plan,
        cluster=cluster(3),
        stages=(first, replace(second, devices=(2,))),
        schedule=replace(plan.schedule, ranks=rows),
        prediction=None,
    )
    verify_plan(spread, model)
    verify_programs(generate_programs(model, spread, plan_hash="hash", clip_grad_norm=1.0))
