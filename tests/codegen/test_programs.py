"""Cutting graphs into stages and lowering schedules to instructions."""

from __future__ import annotations

import torch

from cutset.compiler.codegen.cut import cut_stages
from cutset.compiler.codegen.programs import generate_programs
from cutset.compiler.codegen.python import emit_python
from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.compiler.ir.graph import Graph, Mode, OutputKind, ValueKind
from cutset.compiler.ir.plan import Fingerprint, OptimizerModel, Plan, Stage
from cutset.compiler.ir.program import (
    AllReduce,
    BackwardInput,
    BackwardWeight,
    ClipGradients,
    Forward,
    OptimizerStep,
    Program,
    Recv,
    Send,
)
from cutset.compiler.ir.schedule import Action, Schedule
from tests.ir.builders import GraphBuilder


def skip_model() -> Graph:
    """Three linears; the first result is also added at the end; first and last weight are tied."""
    build = GraphBuilder("skip", Mode.TRAIN)
    x = build.input("x", (2, 8))
    w, v = build.parameter("w", (8, 8), aliases=("tied",)), build.parameter("v", (8, 8))
    mask = build.op("aten.ones.default", [8], name="mask")
    a = build.op("aten.linear.default", x, w, name="a", module="first", source="m.py:1")
    b = build.op("aten.linear.default", build.op("aten.mul.Tensor", a, mask), v, name="b")
    c = build.op("aten.linear.default", build.op("aten.mul.Tensor", b, mask), w, name="c")
    build.loss(build.op("aten.mean.default", build.op("aten.add.Tensor", a, c)))
    return build.build()


def schedule(rows: list[str], stages: int, microbatches: int) -> Schedule:
    ranks = tuple(tuple(Action.parse(item) for item in row.split()) for row in rows)
    return Schedule("test", stages, microbatches, ranks)


def plan_of(graph: Graph, stages: tuple[Stage, ...], timetable: Schedule) -> Plan:
    kind = DeviceType("cpu", "cpu", 1 << 30, 1e10, (("f32", 1e10),))
    devices = tuple(Device(i, "cpu", "host") for i in range(len(stages)))
    return Plan(
        fingerprint=Fingerprint("skip", "g", "s", 128, 512),
        cluster=Cluster("c", (kind,), devices, (LinkRule(Link(1e-5, 1e9)),)),
        mode=graph.mode,
        batch_size=2 * timetable.num_microbatches,
        optimizer=OptimizerModel("sgd", 0.0),
        num_microbatches=timetable.num_microbatches,
        stages=stages,
        schedule=timetable,
    )


def three_stages() -> tuple[Stage, ...]:
    """Nodes: 0 mask, 1 a, 2 mul, 3 b, 4 mul, 5 c, 6 add, 7 mean; the mask is in stages 1 and 2."""
    return Stage(0, (0,), (1,)), Stage(1, (1,), (0, 2, 3)), Stage(2, (2,), (0, 4, 5, 6, 7))


ROWS = [
    "F0.0 F0.1 I0.0 W0.0 I0.1 W0.1",
    "F1.0 F1.1 I1.0 W1.0 I1.1 W1.1",
    "F2.0 I2.0 W2.0 F2.1 I2.1 W2.1",
]


def programs(clip: float | None = None) -> tuple[Program, ...]:
    graph = skip_model()
    plan = plan_of(graph, three_stages(), schedule(ROWS, 3, 2))
    return generate_programs(graph, plan, plan_hash="hash", clip_grad_norm=clip)


def of_type(program: Program, kind: type) -> list:
    return [item for item in program.instructions if isinstance(item, kind)]


def test_skip_connection_goes_straight_to_both_consumers() -> None:
    first, middle, last = cut_stages(skip_model(), three_stages())
    assert first.consumers == (("a", (1, 2)),)
    assert dict(last.producers) == {"a": 0, "b": 1}
    assert [v.name for v in last.graph.values_of(ValueKind.BOUNDARY)] == ["a", "b"]
    assert [o.kind for o in middle.graph.outputs] == [OutputKind.BOUNDARY]


def test_replicated_node_is_computed_where_it_is_read() -> None:
    stages = cut_stages(skip_model(), three_stages())
    assert ["mask" in {n.name for n in s.graph.nodes} for s in stages] == [False, True, True]


def test_tied_parameter_is_held_and_reduced_by_both_ranks() -> None:
    stages = cut_stages(skip_model(), three_stages())
    held = [[value.origin for value in s.graph.values_of(ValueKind.PARAMETER)] for s in stages]
    assert held == [["w"], ["v"], ["w"]]
    reductions = [of_type(program, AllReduce) for program in programs()]
    assert reductions == [[AllReduce(("w",), (0, 2))], [], [AllReduce(("w",), (0, 2))]]


def test_every_send_has_its_receive() -> None:
    made = programs()
    sends = {(p.rank, s.peer, s.tag, s.register) for p in made for s in of_type(p, Send)}
    receives = {(r.peer, p.rank, r.tag, r.register) for p in made for r in of_type(p, Recv)}
    assert sends == receives
    assert len({tag for _, _, tag, _ in sends}) == len(sends) == 2 * 2 * 3


def test_input_gradients_leave_before_weight_gradients_are_computed() -> None:
    kinds = [type(item) for item in programs()[1].instructions]
    begin = kinds.index(BackwardInput)
    assert kinds[begin : begin + 3].count(Send) == 1
    assert kinds.index(BackwardWeight) > kinds.index(Send, begin)


def test_receives_are_posted_one_action_ahead() -> None:
    instructions = programs()[1].instructions
    order = [
        (type(i).__name__, getattr(i, "microbatch", None))
        for i in instructions
        if isinstance(i, Recv | Forward)
    ]
    assert order[:4] == [("Recv", None), ("Recv", None), ("Forward", 0), ("Recv", None)]


def test_clipping_reduces_the_norm_once_per_parameter() -> None:
    made = programs(clip=1.0)
    tails = [[type(item).__name__ for item in p.instructions][-4:] for p in made]
    assert all(t == ["GradientNorm", "AllReduce", "ClipGradients", "OptimizerStep"] for t in tails)
    assert of_type(made[0], ClipGradients) == [ClipGradients(1.0)]
    owned = [
        item.parameters for p in made for item in p.instructions if hasattr(item, "parameters")
    ]
    assert owned == [("w",), ("v",), ()]
    assert of_type(made[0], OptimizerStep)


def test_generated_python_runs_and_says_where_it_comes_from() -> None:
    program = programs()[2]
    source = emit_python(program)
    namespace: dict = {}
    exec(compile(source.replace("from cutset.runtime import rng", ""), "rank2", "exec"), namespace)
    tensors = [torch.randn(8, 8), torch.randn(2, 8), torch.randn(2, 8)]
    order = [v.name for v in program.stages[0].graph.values if v.kind is not ValueKind.RESULT]
    assert order == ["w", "a", "b"]
    (loss,) = namespace["stage_2"](torch.tensor(0), torch.device("cpu"), *tensors)
    w, a, b = tensors
    assert torch.allclose(loss, (a + b @ w.T).mean(), atol=1e-6)
    assert "# first (m.py:1)" in emit_python(programs()[0])
