"""Stages with meshes of their own: right plans and programs pass, each broken one is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeGuard

import pytest

from cutset.compiler.codegen.programs import generate_programs
from cutset.compiler.ir.cluster import Cluster
from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.graph import Graph, Mode, OutputKind, ValueKind
from cutset.compiler.ir.mesh import Layout, Mesh, format_stage_meshes, parse_stage_meshes
from cutset.compiler.ir.ops import op_named
from cutset.compiler.ir.plan import (
    Fingerprint,
    NodeLayout,
    OptimizerModel,
    ParameterLayout,
    Plan,
    Stage,
    StageMesh,
    ValueLayout,
)
from cutset.compiler.ir.program import (
    GRADIENT_NORM,
    AllReduce,
    Program,
    Recv,
    Send,
    TensorShard,
)
from cutset.compiler.ir.schedule import Action, Schedule
from cutset.compiler.ir.text import parse_plan, parse_program, print_plan, print_program
from cutset.compiler.ir.verify import verify_plan, verify_programs
from cutset.compiler.ir.verify.sums import verify_sums
from cutset.compiler.plan_json import plan_from_json, plan_to_json
from cutset.cost_models import parse_devices, simulate
from tests.ir.builders import GraphBuilder

ROWS, WIDTH = 4, 8


def model() -> Graph:
    """Two linears; the second's result is averaged to the loss."""
    build = GraphBuilder("two", Mode.TRAIN)
    x = build.input("x", (ROWS, WIDTH))
    w, v = build.parameter("w", (WIDTH, WIDTH)), build.parameter("v", (WIDTH, WIDTH))
    h = build.op("aten.linear.default", x, w, name="h")
    y = build.op("aten.linear.default", h, v, name="y")
    build.loss(build.op("aten.mean.default", y, name="loss"))
    return build.build()


ProgramChange = Callable[[tuple[Program, ...]], tuple[Program, ...]]
GRAPH = model()
SPLIT = Layout.parse


def over(mesh: str, nodes: tuple[NodeLayout, ...] = (), **tables: object) -> StageMesh:
    return StageMesh(Mesh.parse(mesh), node_layouts=nodes, **tables)  # type: ignore[arg-type]


DATA = over(
    "data=2",
    (
        NodeLayout((1,), (SPLIT("[S(0)]"), SPLIT("[R]")), (SPLIT("[S(0)]"),)),
        NodeLayout((2,), (SPLIT("[S(0)]"),), (SPLIT("[P(sum)]"),)),
    ),
)
COLUMNS = over(
    "tensor=2",
    (NodeLayout((0,), (SPLIT("[R]"), SPLIT("[S(0)]")), (SPLIT("[S(1)]"),)),),
    parameter_layouts=(ParameterLayout("w", *[SPLIT("[S(0)]")] * 3),),
)


def plan_of(first: StageMesh, second: StageMesh) -> Plan:
    """`w` in the first stage, `v` in the second; two microbatches."""
    sizes = first.mesh.size, second.mesh.size
    rows = {0: "F0.0 F0.1 B0.0 B0.1", sizes[0]: "F1.0 B1.0 F1.1 B1.1"}
    actions = tuple(
        tuple(map(Action.parse, rows.get(rank, "").split())) for rank in range(sum(sizes))
    )
    return Plan(
        fingerprint=Fingerprint("two", "0" * 64, "1" * 64, 128, 512),
        cluster=cluster(sum(sizes)),
        mode=Mode.TRAIN,
        batch_size=2 * ROWS,
        optimizer=OptimizerModel("sgd", 0.0),
        num_microbatches=2,
        mesh=Mesh.parse("pipeline=2"),
        stages=(
            Stage(0, tuple(range(sizes[0])), (0,), first),
            Stage(1, tuple(range(sizes[0], sum(sizes))), (1, 2), second),
        ),
        schedule=Schedule("1f1b", 2, 2, actions),
    )


def cluster(count: int) -> Cluster:
    return parse_devices(f"cpu:{count}")


PLAN = plan_of(COLUMNS, DATA)


def programs_of(plan: Plan, graph: Graph = GRAPH, clip: float | None = 1.0) -> tuple[Program, ...]:
    return generate_programs(graph, plan, plan_hash="hash", clip_grad_norm=clip)


def test_plans_and_programs_pass_and_print_and_parse_back() -> None:
    verify_plan(PLAN, GRAPH)
    assert parse_plan(print_plan(PLAN)) == PLAN
    assert plan_from_json(plan_to_json(PLAN)) == PLAN
    programs = programs_of(PLAN)
    verify_programs(programs)
    for program in programs:
        assert parse_program(print_program(program)) == program


def test_meshes_of_stages_print_and_parse_back() -> None:
    meshes = parse_stage_meshes("data=2,tensor=2/tensor=1/data=3")
    assert [mesh.size for mesh in meshes] == [4, 1, 3]
    assert format_stage_meshes(meshes) == "data=2,tensor=2/data=1/data=3"
    assert PLAN.mesh_text == "tensor=2/data=2"
    for text in ("data=2/", "/data=2", "data=2/3", "data=0/data=1"):
        with pytest.raises(ValueError, match="not a mesh"):
            parse_stage_meshes(text)


def test_each_receiver_takes_what_it_wants_of_what_others_have() -> None:
    """Columns on ranks 0 and 1, rows on ranks 2 and 3."""
    programs = programs_of(PLAN)
    received = [
        (item.peer, item.offset, item.type.shape)
        for item in programs[3].instructions
        if isinstance(item, Recv) and item.register.microbatch == 0
    ]
    assert received == [(0, (2, 0), (2, 4)), (1, (2, 4), (2, 4))]
    back = [
        (item.peer, item.offset, item.type.shape)
        for item in programs[1].instructions
        if isinstance(item, Recv) and item.register.microbatch == 0
    ]
    assert back == [(2, (0, 4), (2, 4)), (3, (2, 4), (2, 4))]


def test_copies_are_sent_by_one_rank_each_and_evenly() -> None:
    plan = plan_of(over("data=2"), DATA)
    sends = [
        [item.peer for item in program.instructions if isinstance(item, Send)]
        for program in programs_of(plan)
    ]
    assert sends[:2] == [[2, 2], [3, 3]]  # each has all of the value
    assert sorted(sends[2]) == sorted(sends[3]) == [0, 0, 1, 1]  # each has half the gradient
    verify_programs(programs_of(plan))


def test_simulated_transfers_move_the_bytes_of_the_parts() -> None:
    simulation = simulate(programs_of(PLAN, clip=None), cluster=PLAN.cluster)
    size = 2 * 4 * 4 * 2  # a quarter of the value in float32, twice
    for edge in ((0, 2), (0, 3), (1, 2), (1, 3)):
        moved = dict(simulation.link_bytes)
        assert moved[edge] == moved[edge[::-1]] == size
    assert simulation.step_seconds > 0


def stage(position: int, **changes: object) -> Callable[[Plan], Plan]:
    def change(plan: Plan) -> Plan:
        stages = list(plan.stages)
        stages[position] = replace(stages[position], **changes)
        return replace(plan, stages=tuple(stages))

    return change


BROKEN_PLANS: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "one without": (stage(1, own=None, devices=(2,)), "stages [1] have no mesh of their own"),
    "axes for all": (lambda p: replace(p, mesh=Mesh.parse("data=2")), "the plan has axes ['data']"),
    "layouts for all": (
        lambda p: replace(p, layouts=(ValueLayout("x", Layout(())),)),
        "or layouts for all",
    ),
    "shared device": (stage(1, devices=(1, 2)), "device 1 has several stages"),
    "pipeline inside": (stage(0, own=over("pipeline=2")), "it has 2 devices"),
    "too few devices": (stage(0, devices=(0,)), "it has 1 devices for an in-stage mesh of 2"),
    "layout of another mesh": (
        stage(1, own=over("data=2", layouts=(ValueLayout("x", SPLIT("[R,R]")),))),
        "has 2 placements, mesh data=2 has 1 axes",
    ),
    "node of another stage": (
        stage(1, own=replace(DATA, node_layouts=COLUMNS.node_layouts)),
        "[0]",
    ),
}


@pytest.mark.parametrize("way", BROKEN_PLANS)
def test_broken_plans_are_caught(way: str) -> None:
    mutate, message = BROKEN_PLANS[way]
    broken = mutate(PLAN)
    with pytest.raises(VerificationError) as caught:
        verify_plan(broken, GRAPH)
    assert message in caught.value.cause


def tied() -> Graph:
    """One weight in both linears."""
    build = GraphBuilder("tied", Mode.TRAIN)
    x, w = build.input("x", (ROWS, WIDTH)), build.parameter("w", (WIDTH, WIDTH))
    h = build.op("aten.linear.default", x, w, name="h")
    build.loss(build.op("aten.mean.default", build.op("aten.linear.default", h, w, name="y")))
    return build.build()


def test_parts_of_a_tied_parameter_in_unlike_stages_are_refused() -> None:
    with pytest.raises(VerificationError, match=r"stages \[0, 1\] hold it.* \[0\] only parts"):
        verify_plan(PLAN, tied())


def test_copies_of_a_tied_parameter_count_once_where_they_have_one_term() -> None:
    rows = NodeLayout((0,), (SPLIT("[S(0)]"), SPLIT("[R]")), (SPLIT("[S(0)]"),))
    for first, copies in ((over("data=2", (rows,)), ()), (over("data=2"), (2, 2, 1))):
        programs = programs_of(plan_of(first, over("")), tied())
        verify_programs(programs)
        for program in programs:
            (total,) = (item for item in program.instructions if is_sum(item, "w"))
            assert (total.ranks, total.copies) == ((0, 1, 2), copies)
            assert parse_program(print_program(program)) == program


def is_sum(item: object, name: str) -> TypeGuard[AllReduce]:
    return isinstance(item, AllReduce) and name in item.targets


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ((), "it is whole on ranks"),
        ((1, 1, 1), "for one of 1 alike, there are 2"),
        ((2, 2, 2), "for one of 2 alike, there are 1"),
        ((2, 2), "are not numbers of copies"),
    ],
)
def test_wrong_numbers_of_copies_are_caught(copies: tuple[int, ...], message: str) -> None:
    programs = programs_of(plan_of(over("data=2"), over("")), tied())
    with pytest.raises(VerificationError) as caught:
        verify_programs(tuple(with_copies(program, copies) for program in programs))
    assert message in caught.value.cause


def test_copies_of_norms_are_refused() -> None:
    own = programs_of(plan_of(over("data=2"), DATA))
    counted = tuple(with_copies(program, (1,) * 4, GRADIENT_NORM) for program in own)
    with pytest.raises(VerificationError, match="norms of ranks are no copies"):
        verify_programs(counted)


def with_copies(program: Program, copies: tuple[int, ...], target: str = "w") -> Program:
    items = (
        replace(item, copies=copies) if is_sum(item, target) else item
        for item in program.instructions
    )
    return replace(program, instructions=tuple(items))


def instruction(
    rank: int, kind: type, turn: int, change: Callable[[Send | Recv], tuple[Send | Recv, ...]]
) -> ProgramChange:
    """Replace one transfer of a program."""

    def mutate(programs: tuple[Program, ...]) -> tuple[Program, ...]:
        items = list(programs[rank].instructions)
        place = [at for at, item in enumerate(items) if isinstance(item, kind)][turn]
        items[place : place + 1] = change(items[place])  # type: ignore[arg-type]
        changed = replace(programs[rank], instructions=tuple(items))
        return (*programs[:rank], changed, *programs[rank + 1 :])

    return mutate


def boundary(rank: int, **changes: object) -> ProgramChange:
    def mutate(programs: tuple[Program, ...]) -> tuple[Program, ...]:
        parts = programs[rank].stages[0].boundaries
        return with_boundaries(programs, rank, tuple(replace(p, **changes) for p in parts))

    return mutate


def with_boundaries(
    programs: tuple[Program, ...], rank: int, parts: tuple[TensorShard, ...]
) -> tuple[Program, ...]:
    (held,) = programs[rank].stages
    changed = replace(programs[rank], stages=(replace(held, boundaries=parts),))
    return (*programs[:rank], changed, *programs[rank + 1 :])


def crosswise(programs: tuple[Program, ...]) -> tuple[Program, ...]:
    """Ranks 2 and 3 have each other's parts, and all transfers follow."""
    other = {0: 0, 1: 1, 2: 3, 3: 2}
    changed = []
    for program in programs:
        (held,), (theirs,) = program.stages, programs[other[program.rank]].stages
        taken = iter(transfers(programs[other[program.rank]]))
        items = tuple(
            replace(item := next(taken), peer=other[item.peer])
            if isinstance(old, Send | Recv)
            else old
            for old in program.instructions
        )
        held = replace(held, boundaries=theirs.boundaries)
        changed.append(replace(program, stages=(held,), instructions=items))
    return tuple(changed)


def transfers(program: Program) -> list[Send | Recv]:
    return [item for item in program.instructions if isinstance(item, Send | Recv)]


def graph_of(rank: int, change: Callable[[Graph], Graph]) -> ProgramChange:
    def mutate(programs: tuple[Program, ...]) -> tuple[Program, ...]:
        (held,) = programs[rank].stages
        held = replace(held, graph=change(held.graph))
        return (
            *programs[:rank],
            replace(programs[rank], stages=(held,)),
            *programs[rank + 1 :],
        )

    return mutate


def another_operator(graph: Graph) -> Graph:
    """Of as many operands."""
    node = replace(graph.nodes[0], op=op_named("aten.mm.default"))
    return replace(graph, nodes=(node, *graph.nodes[1:]))


def another_input(graph: Graph) -> Graph:
    values = (
        replace(value, origin="args[9]") if value.kind is ValueKind.INPUT else value
        for value in graph.values
    )
    return replace(graph, values=tuple(values))


BROKEN_PROGRAMS: dict[str, tuple[ProgramChange, str]] = {
    "part lost": (
        instruction(3, Recv, 0, lambda item: ()),
        "is used before all parts of it are received",
    ),
    "part twice": (instruction(3, Recv, 0, lambda item: (item, item)), "or twice there"),
    "part of another rank": (
        instruction(3, Recv, 0, lambda item: (replace(item, offset=(0, 0)),)),
        "which does not hold this",
    ),
    "other end": (
        instruction(0, Send, 0, lambda item: (replace(item, offset=(2, 0)),)),
        "the send has offset (2, 0)",
    ),
    "no place": (instruction(0, Send, 0, lambda item: (replace(item, offset=None),)), "is f32"),
    "part unknown": (boundary(2, name="g"), "and has the parts {'g'"),
    "part twice named": (
        lambda p: with_boundaries(p, 2, p[2].stages[0].boundaries * 2),
        "has two parts of %h",
    ),
    "parts that overlap": (boundary(3, offset=(1, 0)), "those of ranks 2 and 3 overlap"),
    "part outside": (boundary(3, offset=(3, 0)), "reaches out of 'h'"),
    "parts crosswise": (crosswise, "begin at [(2, 0), (0, 0)] on ranks (2, 3)"),
    "another operator": (graph_of(3, another_operator), "another rank runs node y"),
    "another input": (graph_of(1, another_input), "ranks read, return or differentiate other"),
    "whole unlike": (
        lambda p: boundary(0, whole=p[3].stages[0].graph.values[0].type)(p),
        "stage 0 sends",
    ),
}


@pytest.mark.parametrize("way", BROKEN_PROGRAMS)
def test_broken_programs_are_caught(way: str) -> None:
    mutate, message = BROKEN_PROGRAMS[way]
    with pytest.raises(VerificationError) as caught:
        verify_programs(mutate(programs_of(PLAN)))
    assert message in caught.value.cause


def test_parts_that_are_taken_for_copies_are_caught() -> None:
    broken = boundary(1, offset=(0, 0))(programs_of(PLAN))
    with pytest.raises(VerificationError, match="as parts that are taken for copies"):
        verify_sums(broken)


def test_gradients_that_leave_as_terms_are_caught() -> None:
    """The columns of `v` give each rank a term of the gradient of `h`, which nobody sums."""
    columns = over(
        "tensor=2",
        (
            NodeLayout((1,), (SPLIT("[R]"), SPLIT("[S(0)]")), (SPLIT("[S(1)]"),)),
            NodeLayout((2,), (SPLIT("[S(1)]"),), (SPLIT("[P(sum)]"),)),
        ),
        parameter_layouts=(ParameterLayout("v", *[SPLIT("[S(0)]")] * 3),),
    )
    programs = programs_of(plan_of(over(""), columns))
    verify_programs(programs)
    with pytest.raises(VerificationError, match="each rank has but a term of it"):
        verify_sums(tuple(map(without_sums, programs)))


def without_sums(program: Program) -> Program:
    """Pass terms of gradients on as they are."""
    (held,) = program.stages
    alias = op_named("aten.alias.default")
    nodes = tuple(
        replace(node, op=alias, args=node.args[:1]) if node.op.packet == "sum_gradient" else node
        for node in held.graph.nodes
    )
    return replace(program, stages=(replace(held, graph=replace(held.graph, nodes=nodes)),))


def test_buffers_that_would_differ_between_ranks_are_caught() -> None:
    """Each rank would add up its own rows."""
    build = GraphBuilder("running", Mode.TRAIN)
    x, w = build.input("x", (ROWS, WIDTH)), build.parameter("w", (WIDTH, WIDTH))
    build.buffer("seen", (WIDTH,))
    h = build.op("aten.linear.default", x, w, name="h")
    rows = build.op("aten.sum.dim_IntList", x, (0,), name="rows")
    build.output(rows, OutputKind.BUFFER, target="seen", batch_dim=None)
    build.loss(build.op("aten.mean.default", h, name="loss"))
    halves = over(
        "data=2",
        (
            NodeLayout((1,), (SPLIT("[S(0)]"),), (SPLIT("[P(sum)]"),)),
            NodeLayout((2,), (SPLIT("[S(0)]"),), (SPLIT("[P(sum)]"),)),
        ),
        layouts=(ValueLayout("x", SPLIT("[S(0)]")),),
    )
    programs = programs_of(plan_of(over(""), halves), build.build())
    verify_programs(programs)
    with pytest.raises(VerificationError, match="output rows_all_reduce is each rank's own"):
        verify_programs(tuple(without(program, "rows_all_reduce") for program in programs))


def without(program: Program, name: str) -> Program:
    """Of the rank's graph, one collective passes on what it gets."""
    (held,) = program.stages
    alias = op_named("aten.alias.default")
    nodes = tuple(
        replace(node, op=alias, args=node.args[:1]) if node.name == name else node
        for node in held.graph.nodes
    )
    return replace(program, stages=(replace(held, graph=replace(held.graph, nodes=nodes)),))
