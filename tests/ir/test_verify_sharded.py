"""Programs over a mesh: right ones pass, each way of breaking one is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cutset.compiler.codegen.programs import generate_programs
from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.fingerprint import plan_hash
from cutset.compiler.ir.graph import Graph, Mode, Node
from cutset.compiler.ir.mesh import Mesh, MeshAxis
from cutset.compiler.ir.ops import op_named
from cutset.compiler.ir.program import AllReduce, Instruction, Program
from cutset.compiler.ir.schedule import Action, ActionKind, Schedule
from cutset.compiler.ir.text import print_instruction
from cutset.compiler.ir.types import TensorType
from cutset.compiler.ir.verify import verify_programs
from tests.ir.builders import GraphBuilder
from tests.ir.pipelines import cluster, make_plan
from tests.sharding.choices import picked_layouts

Programs = tuple[Program, ...]
Mutation = Callable[[Programs], Programs]
MESH = Mesh.parse("data=2,tensor=2")


def net(mode: Mode = Mode.TRAIN) -> Graph:
    """Columns then rows, twice, on whole rows between: what a pair of Megatron blocks is."""
    build = GraphBuilder("net", mode)
    hidden = build.input("x", (4, 8))
    for block in range(2):
        wide = build.parameter(f"blocks.{block}.wide", (16, 8))
        narrow = build.parameter(f"blocks.{block}.narrow", (8, 16))
        scale = build.parameter(f"blocks.{block}.scale", (8,))
        inner = build.op("aten.linear.default", hidden, wide, name=f"wide{block}")
        inner = build.op("aten.relu.default", inner, name=f"relu{block}")
        outer = build.op("aten.linear.default", inner, narrow, name=f"narrow{block}")
        outer = build.op("aten.layer_norm.default", outer, (8,), scale, name=f"norm{block}")
        hidden = build.op("aten.add.Tensor", hidden, outer, name=f"add{block}")
    build.output(hidden)
    if mode is Mode.TRAIN:
        build.loss(build.op("aten.mean.default", hidden, name="loss"))
    return build.build()


STRATEGIES: list[dict[str, str]] = [
    {
        "linear": "S(0),R -> S(0)",
        "relu": "S(0) -> S(0)",
        "layer_norm": "S(0),R -> S(0)",
        "add": "S(0),S(0) -> S(0)",
        "mean": "S(0) -> P(sum)",
    },
    {
        **{f"wide{block}": "R,S(0) -> S(1)" for block in range(2)},
        "relu": "S(1) -> S(1)",
        **{f"narrow{block}": "S(1),S(1) -> P(sum)" for block in range(2)},
    },
]
"""Per axis of `MESH`."""


def held() -> dict[str, str]:
    """Layouts of parameters and inputs."""
    table = {"args[0]": "[S(0),R]"}
    for block in range(2):
        table |= {f"blocks.{block}.wide": "[R,S(0)]", f"blocks.{block}.narrow": "[R,S(1)]"}
    return table


def programs(stages: int = 2, mode: Mode = Mode.TRAIN, ranks: int | None = None) -> Programs:
    """Over `MESH`, with so many stages, on `ranks` ranks a column (fewer: they take turns)."""
    graph, per_column = net(mode), ranks or stages
    plan = make_plan(graph, stages, 2)
    layouts = picked_layouts(graph, MESH, STRATEGIES, held())
    plan = replace(
        plan,
        cluster=cluster(per_column * MESH.size),
        mesh=Mesh((*MESH.axes, MeshAxis("pipeline", per_column))),
        stages=tuple(
            replace(
                stage,
                devices=tuple(
                    column * per_column + stage.index % per_column for column in range(MESH.size)
                ),
            )
            for stage in plan.stages
        ),
        layouts=layouts.values,
        parameter_layouts=layouts.parameters,
        node_layouts=layouts.nodes,
        prediction=None,
        certificate=None,
    )
    if per_column == 1 and stages > 1:
        plan = replace(plan, schedule=turns(stages, mode))
    return generate_programs(graph, plan, plan_hash=plan_hash(plan), clip_grad_norm=None)


def turns(stages: int, mode: Mode) -> Schedule:
    """All stages on one rank."""
    row = [Action(ActionKind.FORWARD, stage, m) for m in range(2) for stage in range(stages)]
    if mode is Mode.TRAIN:
        row += [
            Action(ActionKind.BACKWARD, stage, m) for m in range(2) for stage in range(stages)[::-1]
        ]
    return Schedule("turns", stages, 2, (tuple(row),))


RIGHT = programs()


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("stages", [1, 2])
def test_right_programs_pass(stages: int, mode: Mode) -> None:
    verify_programs(programs(stages, mode))
    verify_programs(programs(stages, mode, ranks=1))


# -- mutations -------------------------------------------------------------------------------------


def every(edit: Callable[[Program], Program]) -> Mutation:
    return lambda items: tuple(map(edit, items))


def one(rank: int, edit: Callable[[Program], Program]) -> Mutation:
    return lambda items: tuple(edit(item) if item.rank == rank else item for item in items)


def graphs(edit: Callable[[Graph], Graph]) -> Callable[[Program], Program]:
    return lambda program: replace(
        program,
        stages=tuple(replace(stage, graph=edit(stage.graph)) for stage in program.stages),
    )


def nodes(packet: str, edit: Callable[[Node], Node]) -> Callable[[Program], Program]:
    """Edit the first collective called `packet` of every stage."""

    def change(graph: Graph) -> Graph:
        found = [node.id for node in graph.nodes if node.op.packet == packet][:1]
        return replace(graph, nodes=tuple(edit(n) if n.id in found else n for n in graph.nodes))

    return graphs(change)


def as_alias(node: Node) -> Node:
    """The node with its collective taken out."""
    return replace(node, op=op_named("aten.alias.default"), args=node.args[:1])


def as_all_reduce(node: Node) -> Node:
    return replace(node, op=op_named("cutset.all_reduce.default"), args=(*node.args, "sum"))


def argument(position: int, value: object) -> Callable[[Node], Node]:
    return lambda node: replace(
        node, args=(*node.args[:position], value, *node.args[position + 1 :])
    )


def instructions(
    edit: Callable[[tuple[Instruction, ...]], tuple[Instruction, ...]],
) -> Callable[[Program], Program]:
    return lambda program: replace(program, instructions=edit(program.instructions))


def without_sums(items: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    return tuple(item for item in items if not isinstance(item, AllReduce))


def sums_over(ranks: tuple[int, ...]) -> Callable[[Program], Program]:
    def change(program: Program) -> Program:
        return replace(
            program,
            instructions=tuple(
                replace(item, ranks=ranks) if isinstance(item, AllReduce) else item
                for item in program.instructions
            ),
            gradient_terms=tuple((name, ranks) for name, _ in program.gradient_terms),
        )

    return change


def unsummed(program: Program) -> Program:
    """All ranks forget, alike, that they have terms."""
    kept = without_sums(program.instructions)
    return replace(program, instructions=kept, gradient_terms=())


def summed_too_often(program: Program) -> Program:
    """All ranks sum what the ranks of axis `tensor` have whole."""
    ranks = tuple(range(program.rank % 2, 8, 2))
    changed = sums_over(ranks)(program)
    return changed if program.rank % 2 == 0 else program


def axes(name: str, ranks: tuple[int, ...]) -> Callable[[Program], Program]:
    return lambda program: replace(
        program,
        stages=tuple(
            replace(stage, axes=tuple((n, ranks if n == name else r) for n, r in stage.axes))
            for stage in program.stages
        ),
    )


def shards(**changes: object) -> Callable[[Program], Program]:
    return lambda program: replace(
        program, shards=(replace(program.shards[-1], **changes), *program.shards[:-1])
    )


def copied(copies: tuple[int, ...]) -> Callable[[Program], Program]:
    """All sums take terms for copies."""
    return instructions(
        lambda items: tuple(
            replace(item, copies=copies) if isinstance(item, AllReduce) else item for item in items
        )
    )


def crosswise(items: Programs) -> Programs:
    """Ranks 0 and 2, one after the other along `tensor`, hold each other's parts."""
    other = {0: 2, 2: 0}
    return tuple(replace(p, shards=items[other.get(p.rank, p.rank)].shards) for p in items)


def moved(text: str, to: str) -> Callable[[Program], Program]:
    """One instruction to just before another."""

    def change(items: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
        row = {print_instruction(item): item for item in items}
        item = row.pop(text)
        place = list(row).index(to)
        left = list(row.values())
        return (*left[:place], item, *left[place:])

    return instructions(change)


SUMS: dict[str, tuple[Mutation, str]] = {
    "lost on one rank": (one(0, instructions(without_sums)), "does not take part"),
    "lost on all ranks": (every(instructions(without_sums)), "not reduced"),
    "forgotten by all": (every(unsummed), "have terms of it that are not summed"),
    "of terms for copies": (every(copied((2, 2))), "are taken for copies"),
    "of terms for one copy each": (every(copied((1, 1))), "are taken for copies"),
    "over a rank alone": (one(0, sums_over((0,))), ""),
    "of what is whole": (every(summed_too_often), "whole on ranks"),
    "of a gradient inside, lost": (
        every(nodes("sum_gradient", as_alias)),
        "terms of its gradient meet whole gradients",
    ),
    "of a value inside, lost": (every(nodes("all_reduce", as_alias)), "each rank's own"),
    "of what is the same": (
        every(nodes("sum_gradient", as_all_reduce)),
        "it adds up what is the same on all ranks",
    ),
}
OPERATORS: dict[str, tuple[Mutation, str]] = {
    "another one on one rank": (
        one(0, nodes("relu", lambda node: replace(node, op=op_named("aten.neg.default")))),
        "another rank runs node relu0",
    ),
    "another draw on one rank": (
        one(0, nodes("relu", lambda node: replace(node, random_draw=3))),
        "another rank runs node relu0",
    ),
}
MEETINGS: dict[str, tuple[Mutation, str]] = {
    "one rank stays away": (one(0, nodes("all_reduce", as_alias)), "on rank 0 it is nothing"),
    "maximum for a sum": (one(2, nodes("all_reduce", argument(2, "max"))), "is cutset.all_reduce"),
    "another axis": (one(0, nodes("all_reduce", argument(1, "data"))), "collective 0 is"),
    "unknown axis": (one(0, nodes("all_reduce", argument(1, "expert"))), "has no mesh axis"),
}
GROUPS: dict[str, tuple[Mutation, str]] = {
    "not the same on both": (one(0, axes("tensor", (0, 4))), "it is (0, 4) here"),
    "without the rank": (one(0, axes("data", (2, 4))), "the rank is not on its axis 'data'"),
    "no ranks of this run": (one(0, axes("data", (0, 9))), "are not distinct ranks"),
    "other order": (one(0, axes("tensor", (2, 0))), "here and (0, 2) on rank 2"),
}
PARTS: dict[str, tuple[Mutation, str]] = {
    "out of range": (one(0, shards(offset=(99, 0))), "reaches out of"),
    "before the first": (one(0, shards(offset=(-1, 0))), "reaches out of"),
    "of another dtype": (
        one(0, shards(part=TensorType((8, 8), torch.float64))),
        "is no part of",
    ),
    "of another size": (
        one(0, shards(part=TensorType((2, 2), torch.float32))),
        "computes with",
    ),
    "whole": (one(0, lambda p: replace(p, shards=p.shards[:-1])), "holds all of it"),
    "twice": (one(0, lambda p: replace(p, shards=p.shards * 2)), "it holds two parts of"),
    "crosswise": (crosswise, "which is not their order along one dim"),
}


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        pytest.param(*entry, id=f"{title}: {name}")
        for title, table in (
            ("sums", SUMS),
            ("operators", OPERATORS),
            ("meetings", MEETINGS),
            ("groups", GROUPS),
            ("parts", PARTS),
        )
        for name, entry in table.items()
    ],
)
def test_broken_programs_are_caught(mutate: Mutation, message: str) -> None:
    broken = mutate(RIGHT)
    assert broken != RIGHT
    with pytest.raises(VerificationError) as caught:
        verify_programs(broken)
    assert message in str(caught.value)


def test_ranks_of_an_axis_that_meet_in_another_order_are_caught() -> None:
    within = one(0, moved("Forward 0.1", to="BackwardInput 0.0"))
    with pytest.raises(VerificationError, match="run its computations in different orders"):
        verify_programs(within(programs(1)))


def test_ranks_that_meet_in_two_stages_crosswise_deadlock() -> None:
    """Each stage by itself meets in one order."""
    broken = one(0, moved("Forward 0.1", to="Forward 1.0"))(programs(2, ranks=1))
    with pytest.raises(VerificationError, match="the programs deadlock") as caught:
        verify_programs(broken)
    assert "rank 0 at instruction 1 (Forward 0.1) waits for rank 1" in str(caught.value)
