"""Sums of gradients that start inside backward: right programs pass, each broken one is caught."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cutset.compiler.codegen.programs import generate_programs
from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.mesh import Mesh, MeshAxis
from cutset.compiler.ir.program import BackwardInput, BackwardWeight, Instruction, Program
from cutset.compiler.ir.text import parse_program, print_instruction, print_program
from cutset.compiler.ir.verify import verify_programs
from tests.ir.builders import GraphBuilder
from tests.ir.pipelines import cluster, make_plan
from tests.sharding.choices import zero_layouts_of

Programs = tuple[Program, ...]
WIDTH = 160  # a weight is more than the least bucket, so that each travels alone


@functools.cache
def graph() -> Graph:
    build = GraphBuilder("mlp", Mode.TRAIN)
    hidden = build.input("x", (2, WIDTH))
    for block in range(6):
        weight = build.parameter(f"blocks.{block}.weight", (WIDTH, WIDTH))
        hidden = build.op("aten.tanh.default", build.op("aten.linear.default", hidden, weight))
    build.loss(build.op("aten.mean.default", hidden, name="loss"))
    return build.build()


@functools.cache
def programs(stages: int = 1, level: int = 0, split: bool = True) -> Programs:
    """Two microbatches; every stage on two ranks of a data axis."""
    mesh = Mesh.parse("data=2")
    layouts = zero_layouts_of(graph(), mesh, level)
    plan = make_plan(graph(), stages, 2, split=split)
    devices = 2 * stages
    plan = replace(
        plan,
        cluster=cluster(devices, 1 << 24),
        mesh=Mesh((*mesh.axes, MeshAxis("pipeline", stages))),
        stages=tuple(replace(s, devices=(s.index, s.index + stages)) for s in plan.stages),
        layouts=layouts.values,
        node_layouts=layouts.nodes,
        parameter_layouts=layouts.parameters,
        prediction=None,
    )
    return generate_programs(graph(), plan, plan_hash="hash", clip_grad_norm=1.0)


def lines(program: Program) -> list[str]:
    return [print_instruction(item) for item in program.instructions]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("stages", [1, 2])
def test_right_programs_pass_and_print(stages: int, level: int, split: bool) -> None:
    made = programs(stages, level, split)
    verify_programs(made)
    assert tuple(parse_program(print_program(entry)) for entry in made) == made


@pytest.mark.parametrize(("level", "kind"), [(0, "AllReduce"), (1, "ReduceScatter")])
@pytest.mark.parametrize("stages", [1, 2])
def test_sums_start_inside_the_last_backward(stages: int, level: int, kind: str) -> None:
    for program in programs(stages, level):
        parts = program.stages[0].parts
        assert len(parts) == 6 // stages
        text = lines(program)
        weights = [i for i, line in enumerate(text) if line.startswith("BackwardWeight")]
        sums = [i for i, line in enumerate(text) if line.startswith(f"{kind} blocks")]
        assert len(sums) == len(parts)
        assert [text[i].partition(" part=")[2] for i in weights] == [
            "",
            *map(str, range(6 // stages)),
        ]
        for part, begin, end in zip(weights[1:], sums, [*weights[2:], len(text)], strict=True):
            assert part < begin < end


def test_two_buckets_are_under_way_at_most() -> None:
    text = [line.split()[0] for line in lines(programs()[0]) if "Norm" not in line]
    under_way = most = 0
    for kind in text:
        under_way += {"AllReduce": 1, "Await": -1}.get(kind, 0)
        most = max(most, under_way)
    assert most <= 2


def test_a_whole_backward_is_taken_apart_where_it_ends_a_stage() -> None:
    for program in programs(2, 0, split=False):
        kinds = [type(item).__name__ for item in program.instructions]
        assert [kinds.count(k) for k in ("Backward", "BackwardInput", "BackwardWeight")] == [
            1,
            1,
            3,
        ]


def test_microbatches_in_flight_end_with_the_last_part() -> None:
    assert [program.most_in_flight(program.stages[0].index) for program in programs(2)] == [
        2,
        1,
    ] * 2


def test_levels_that_sum_in_backward_have_no_parts() -> None:
    assert all(not program.stages[0].parts for program in programs(1, 2))


def edited(
    edit: Callable[[list[Instruction]], None], *ranks: int
) -> Callable[[Programs], Programs]:
    def change(made: Programs) -> Programs:
        changed = list(made)
        for rank in ranks or range(len(made)):
            items = list(made[rank].instructions)
            edit(items)
            changed[rank] = replace(made[rank], instructions=tuple(items))
        return tuple(changed)

    return change


def position(items: list[Instruction], text: str) -> int:
    return next(i for i, item in enumerate(items) if print_instruction(item).startswith(text))


def move(text: str, to: str, *ranks: int) -> Callable[[Programs], Programs]:
    def edit(items: list[Instruction]) -> None:
        item = items.pop(position(items, text))
        items.insert(position(items, to), item)

    return edited(edit, *ranks)


def drop(text: str, *ranks: int) -> Callable[[Programs], Programs]:
    return edited(lambda items: items.pop(position(items, text)) and None, *ranks)


def become(text: str, item: Instruction) -> Callable[[Programs], Programs]:
    return edited(lambda items: items.__setitem__(position(items, text), item))


def with_parts(change: Callable[[tuple[tuple[str, ...], ...]], Any], *ranks: int) -> Any:
    def edit(made: Programs) -> Programs:
        changed = list(made)
        for rank in ranks or range(len(made)):
            (stage,) = made[rank].stages
            changed[rank] = replace(made[rank], stages=(replace(stage, parts=change(stage.parts)),))
        return tuple(changed)

    return edit


LAST, FIRST = "AllReduce blocks.5.weight", "AllReduce blocks.0.weight"
BROKEN: dict[str, tuple[Callable[[Programs], Programs], str]] = {
    "summed before its part": (
        move(LAST, "BackwardWeight 0.1 part=0"),
        "still adds to the gradient",
    ),
    "summed a part early": (
        move("AllReduce blocks.3.weight", "BackwardWeight 0.1 part=2"),
        "still adds to the gradient",
    ),
    "summed before the last part": (
        move(FIRST, "BackwardWeight 0.1 part=5"),
        "still adds to the gradient",
    ),
    "a part completes another's gradient": (
        with_parts(lambda parts: (parts[1], parts[0], *parts[2:])),
        "still adds to the gradient",
    ),
    "another order on one rank": (
        move(LAST, "BackwardWeight 0.1 part=2", 1),
        "of the group differs",
    ),
    "a part too few": (drop("BackwardWeight 0.1 part=3"), "BackwardWeight part 3 of stage 0"),
    "no parts at all": (
        edited(lambda items: items.__setitem__(slice(0, len(items)), _without_parts(items))),
        "BackwardWeight of stage 0 on microbatch 1 is missing",
    ),
    "a part too many": (
        become("BackwardWeight 0.0", BackwardWeight(0, 0, 6)),
        "stage 0 has 6 parts",
    ),
    "a part and the whole": (
        become("BackwardWeight 0.1 part=5", BackwardWeight(0, 1)),
        "does a part of it",
    ),
    "a part twice": (
        become("BackwardWeight 0.1 part=5", BackwardWeight(0, 1, 4)),
        "does the same",
    ),
    "parts in another order": (
        move("BackwardWeight 0.1 part=5", "BackwardWeight 0.1 part=4"),
        "it comes before its BackwardWeight part 4",
    ),
    "a part before the input half": (
        move("BackwardWeight 0.1 part=0", "BackwardInput 0.1"),
        "it comes before its BackwardInput",
    ),
    "norm before the last part": (
        move("BackwardWeight 0.1 part=5", "ClipGradients"),
        "still adds to",
    ),
    "a part of a stranger": (
        with_parts(lambda parts: (("blocks.7.weight",), *parts[1:])),
        "the stage does not train ['blocks.7.weight']",
    ),
    "completed twice": (
        with_parts(lambda parts: (*parts[:-1], parts[-1] + parts[0])),
        "two of them complete the gradient of 'blocks.5.weight'",
    ),
    "cut elsewhere on one rank": (
        with_parts(lambda parts: (parts[0] + parts[1], *parts[2:], ()), 1),
        "in parts other than those on rank 0",
    ),
}


def _without_parts(items: list[Instruction]) -> list[Instruction]:
    return [item for item in items if not isinstance(item, BackwardWeight) or item.part is None]


@pytest.mark.parametrize("way", BROKEN)
def test_broken_programs_are_caught(way: str) -> None:
    mutate, message = BROKEN[way]
    broken = mutate(programs())
    assert broken != programs()
    with pytest.raises(VerificationError) as caught:
        verify_programs(broken)
    assert message in caught.value.cause


def test_the_input_half_comes_first_where_nothing_is_sent_back() -> None:
    items = programs()[0].instructions
    assert items.index(BackwardInput(0, 1)) < items.index(BackwardWeight(0, 1, 0))
