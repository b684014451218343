"""Programs that share updates among ranks (ZeRO): right ones pass, each broken one is caught."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cutset.compiler.codegen.programs import generate_programs
from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.mesh import Layout, Mesh, MeshAxis
from cutset.compiler.ir.plan import ParameterLayout, Plan
from cutset.compiler.ir.program import AllGather, Instruction, OptimizerStep, Program
from cutset.compiler.ir.text import parse_program, print_instruction, print_program
from cutset.compiler.ir.verify import verify_plan, verify_programs
from cutset.compiler.ir.verify.program import held_bytes
from tests.ir.pipelines import cluster, make_plan, skip_graph
from tests.sharding.choices import zero_layouts_of

Programs = tuple[Program, ...]
TIED = "blocks.0.weight"  # on all ranks: in stages 0 (ranks 0 and 2) and 1 (ranks 1 and 3)
GRAPH = skip_graph()


@functools.cache
def zero_plan(level: int) -> Plan:
    """Two stages over two ranks of a data axis each."""
    mesh = Mesh.parse("data=2")
    layouts = zero_layouts_of(GRAPH, mesh, level)
    plan = make_plan(GRAPH, 2, 2)
    return replace(
        plan,
        cluster=cluster(4),
        mesh=Mesh((*mesh.axes, MeshAxis("pipeline", 2))),
        stages=tuple(replace(s, devices=(s.index, s.index + 2)) for s in plan.stages),
        layouts=layouts.values,
        node_layouts=layouts.nodes,
        parameter_layouts=layouts.parameters,
        prediction=None,
    )


@functools.cache
def zero_programs(level: int) -> Programs:
    return generate_programs(GRAPH, zero_plan(level), plan_hash="hash", clip_grad_norm=1.0)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_right_programs_pass_and_print(level: int) -> None:
    verify_plan(zero_plan(level), GRAPH)
    programs = zero_programs(level)
    verify_programs(programs)
    assert tuple(parse_program(print_program(entry)) for entry in programs) == programs


def test_gradients_that_are_kept_in_parts_take_less() -> None:
    whole = 8 * 8 * 4
    held = [held_bytes(zero_programs(level)[0]) for level in (0, 1, 2, 3)]
    assert held == [3 * 2 * whole, 3 * 2 * whole, 3 * 1.5 * whole, 3 * whole]


def edited(
    programs: Programs, ranks: tuple[int, ...], edit: Callable[[list[Instruction], int], None]
) -> Programs:
    """The programs of `ranks` with their lists edited at the instruction that `edit` is given."""
    changed = list(programs)
    for rank in ranks:
        items = list(programs[rank].instructions)
        edit(items, rank)
        changed[rank] = replace(programs[rank], instructions=tuple(items))
    return tuple(changed)


def position(items: list[Instruction], text: str) -> int:
    return next(i for i, item in enumerate(items) if print_instruction(item).startswith(text))


def change(text: str, on: tuple[int, ...], **changes: Any) -> Callable[[Programs], Programs]:
    def edit(items: list[Instruction], rank: int) -> None:
        here = position(items, text)
        items[here] = replace(items[here], **changes)

    return lambda programs: edited(programs, on, edit)


def drop(text: str, ranks: tuple[int, ...]) -> Callable[[Programs], Programs]:
    return lambda programs: edited(
        programs, ranks, lambda items, _: items.pop(position(items, text)) and None
    )


def move(text: str, to: str, ranks: tuple[int, ...]) -> Callable[[Programs], Programs]:
    def edit(items: list[Instruction], rank: int) -> None:
        item = items.pop(position(items, text))
        items.insert(position(items, to), item)

    return lambda programs: edited(programs, ranks, edit)


def repeat(text: str, ranks: tuple[int, ...]) -> Callable[[Programs], Programs]:
    def edit(items: list[Instruction], rank: int) -> None:
        here = position(items, text)
        items.insert(here, items[here])

    return lambda programs: edited(programs, ranks, edit)


def without_updates(programs: Programs) -> Programs:
    return (replace(programs[0], updates=()), *programs[1:])


def other_share(programs: Programs) -> Programs:
    """Rank 0 updates the part of rank 2."""
    return (replace(programs[0], updates=programs[2].updates), *programs[1:])


def other_kept(**changes: Any) -> Callable[[Programs], Programs]:
    def edit(programs: Programs) -> Programs:
        changed = list(programs)
        for rank in FIRST:
            (stage,) = programs[rank].stages
            first, *rest = stage.kept
            stage = replace(stage, kept=(replace(first, **changes), *rest))
            changed[rank] = replace(programs[rank], stages=(stage,))
        return tuple(changed)

    return edit


FIRST, LAST, ALL = (0, 2), (1, 3), (0, 1, 2, 3)
LEVEL_1 = {
    "never scattered": (drop("ReduceScatter", FIRST), "hold terms of 'blocks.0.weight'"),
    "scattered twice": (repeat("ReduceScatter", FIRST), "was reduced before"),
    "scattered too early": (
        move("ReduceScatter", "BackwardWeight 0.1", FIRST),
        "still adds to the gradient",
    ),
    "scattered after the norm": (
        move("ReduceScatter", "ClipGradients", LAST),
        "was reduced before",  # by the sum over stages, which comes first now
    ),
    "one rank does not scatter": (drop("ReduceScatter", (0,)), "collective 0 of the group differs"),
    "other shares": (change("ReduceScatter", FIRST, ranks=(2, 0)), "its share among (2, 0) is"),
    "other dims": (change("ReduceScatter", FIRST, dims=(1, 1, 1)), "its share among (0, 2) is"),
    "no such dim": (change("ReduceScatter", FIRST, dims=(2, 0, 0)), "has no dim 2"),
    "dims of some": (change("ReduceScatter", FIRST, dims=(0,)), "3 targets have 1 dims"),
    "no targets": (change("ReduceScatter", FIRST, targets=(), dims=()), "has no targets"),
    "a target twice": (
        change("ReduceScatter", FIRST, targets=(TIED, TIED, TIED)),
        "has no targets, or one of them twice",
    ),
    "not summed over stages": (drop(f"AllReduce {TIED}", ALL), "hold terms of 'blocks.0.weight'"),
    "summed over the others, too": (
        change(f"AllReduce {TIED}", ALL, ranks=ALL),
        "missing or counted twice",
    ),
    "never gathered": (drop("AllGather", FIRST), "that it updates are not gathered"),
    "gathered twice": (repeat("AllGather", FIRST), "was gathered before"),
    "gathered too early": (
        move("AllGather", "OptimizerStep", FIRST),
        "comes before the optimizer step",
    ),
    "gathered but not updated": (without_updates, "updates all that it holds of"),
    "updates another share": (other_share, "its share among (0, 2) is f32[4,8] at (0, 0)"),
}
LEVEL_2 = {
    "kept along another dim": (other_kept(dim=1), "its share among (0, 2) is f32[8,4]"),
    "kept over no axis": (other_kept(axis="tensor"), "has no mesh axis 'tensor'"),
    "not summed": (other_kept(summed=False), "hold terms of 'blocks.0.weight'"),
    "updates another share": (other_share, "its share among (0, 2) is f32[4,8] at (0, 0)"),
}
CASES = [(1, way, *case) for way, case in LEVEL_1.items()]
CASES += [(2, way, *case) for way, case in LEVEL_2.items()]


@pytest.mark.parametrize(
    ("level", "way", "mutate", "message"), CASES, ids=[f"{level} {way}" for level, way, *_ in CASES]
)
def test_broken_programs_are_caught(
    level: int, way: str, mutate: Callable[[Programs], Programs], message: str
) -> None:
    broken = mutate(zero_programs(level))
    assert broken != zero_programs(level)
    with pytest.raises(VerificationError) as caught:
        verify_programs(broken)
    assert message in caught.value.cause


def test_nothing_but_gathering_follows_the_update() -> None:
    for entry in zero_programs(1):
        kinds = [type(item) for item in entry.instructions]
        assert set(kinds[kinds.index(OptimizerStep) + 1 :]) == {AllGather}


class TestPlans:
    """Layouts of a parameter that contradict each other."""

    @pytest.mark.parametrize(
        ("held", "gradient", "state", "words"),
        [
            ("[S(0)]", "[S(0)]", "[R]", "they must be alike"),
            ("[S(0)]", "[S(1)]", "[S(0)]", "they must be alike"),
            ("[R]", "[S(0)]", "[R]", "states must be shared alike"),
            ("[R]", "[S(0)]", "[S(1)]", "states must be shared alike"),
            ("[R]", "[P(sum)]", "[P(sum)]", "states must be shared alike"),
        ],
    )
    def test_are_caught(self, held: str, gradient: str, state: str, words: str) -> None:
        entry = zero_plan(1).parameter_layouts[0]
        layouts = map(Layout.parse, (held, gradient, state))
        plan = replace(zero_plan(1), parameter_layouts=(ParameterLayout(entry.value, *layouts),))
        with pytest.raises(VerificationError, match=words):
            verify_plan(plan, GRAPH)
