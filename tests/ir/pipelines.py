"""Right graphs, plans and programs of small pipelines, for tests that then break them."""

from __future__ import annotations

from cutset.compiler.codegen.programs import generate_programs
from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.compiler.ir.fingerprint import fingerprint, plan_hash
from cutset.compiler.ir.graph import Graph, Mode, producers
from cutset.compiler.ir.plan import (
    Certificate,
    MemoryPrediction,
    OptimizerModel,
    Plan,
    Prediction,
    Stage,
)
from cutset.compiler.ir.program import Program
from cutset.compiler.ir.replicable import replicable_nodes
from cutset.compiler.ir.schedule import Action, ActionKind, Schedule
from tests.ir.builders import GraphBuilder

__all__ = ["cluster", "make_plan", "make_programs", "one_f_one_b", "skip_graph"]

MEMORY = 1 << 20


def skip_graph(num_blocks: int = 4, mode: Mode = Mode.TRAIN) -> Graph:
    """Masked linear blocks; the first result skips to the end, where the first weight is tied."""
    build = GraphBuilder("skip", mode)
    x = build.input("x", (2, 8))
    mask = build.op("aten.ones.default", [8], name="mask")
    weights = [build.parameter(f"blocks.{i}.weight", (8, 8)) for i in range(num_blocks)]
    first = hidden = build.op("aten.linear.default", x, weights[0], name="first", source="m.py:3")
    for block in range(1, num_blocks):
        place = {"module": f"blocks.{block}", "source": f"m.py:{block + 4}"}
        hidden = build.op("aten.linear.default", hidden, weights[block], name=f"h{block}", **place)
        hidden = build.op("aten.mul.Tensor", hidden, mask, name=f"m{block}", **place)
    hidden = build.op("aten.linear.default", hidden, weights[0], name="tied")
    hidden = build.op("aten.add.Tensor", hidden, first, name="add")
    build.output(hidden)
    if mode is Mode.TRAIN:
        build.loss(build.op("aten.mean.default", hidden, name="loss"))
    return build.build()


def cluster(num_devices: int, memory_bytes: int = MEMORY) -> Cluster:
    kind = DeviceType("cpu", "cpu", memory_bytes, 1e10, (("f32", 1e10),))
    devices = tuple(Device(index, "cpu", "host") for index in range(num_devices))
    return Cluster("test", (kind,), devices, (LinkRule(Link(1e-5, 1e9)),), local=True)


def one_f_one_b(
    num_stages: int, num_microbatches: int, *, mode: Mode = Mode.TRAIN, split: bool = True
) -> Schedule:
    """1F1B, with backward in halves or whole; forward only to infer."""
    ranks = []
    for stage in range(num_stages):
        row: list[Action] = []
        ahead = num_stages - stage if mode is Mode.TRAIN else num_microbatches
        kinds = [ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT]
        for step in range(num_microbatches + ahead):
            if step >= ahead and mode is Mode.TRAIN:
                whole = [ActionKind.BACKWARD]
                row += [Action(kind, stage, step - ahead) for kind in (kinds if split else whole)]
            if step < num_microbatches:
                row.append(Action(ActionKind.FORWARD, stage, step))
        ranks.append(tuple(row))
    return Schedule("1f1b", num_stages, num_microbatches, tuple(ranks))


def cut(graph: Graph, num_stages: int) -> tuple[Stage, ...]:
    """Stages of about equal length; replicable nodes go to every stage that needs them."""
    free = replicable_nodes(graph)
    body = [node.id for node in graph.nodes if node.id not in free]
    made_by = producers(graph)
    stages = []
    placed: set[int] = set()
    for index in range(num_stages):
        first, last = (len(body) * (index + step) // num_stages for step in (0, 1))
        nodes = set(body[first:last])
        for node in reversed(graph.nodes):
            if node.id in nodes:
                nodes |= free.intersection(made_by.get(value, -1) for value in node.inputs)
        placed |= nodes
        if index == num_stages - 1:
            nodes |= free - placed  # nobody reads these
        stages.append(Stage(index, (index,), tuple(sorted(nodes))))
    return tuple(stages)


def make_plan(
    graph: Graph, num_stages: int = 3, num_microbatches: int = 4, *, split: bool = True
) -> Plan:
    stages = cut(graph, num_stages)
    figures = tuple(0.25 for _ in stages)
    memory = tuple(MemoryPrediction(stage.device, 64, 64, 128, 32, 8, 8) for stage in stages)
    return Plan(
        fingerprint=fingerprint(graph, "Skip"),
        cluster=cluster(num_stages),
        mode=graph.mode,
        batch_size=2 * num_microbatches,
        optimizer=OptimizerModel("adamw", 2.0),
        num_microbatches=num_microbatches,
        stages=stages,
        schedule=one_f_one_b(num_stages, num_microbatches, mode=graph.mode, split=split),
        prediction=Prediction(1.5, 0.25, figures, figures, memory),
        certificate=Certificate(1.5, 1.5, 0.0, "contiguous stages", "test 1.0", 0.5),
    )


def make_programs(
    num_stages: int = 3,
    num_microbatches: int = 4,
    *,
    mode: Mode = Mode.TRAIN,
    split: bool = True,
    clip: float | None = 1.0,
) -> tuple[Program, ...]:
    graph = skip_graph(mode=mode)
    plan = make_plan(graph, num_stages, num_microbatches, split=split)
    clip = clip if mode is Mode.TRAIN else None
    return generate_programs(graph, plan, plan_hash=plan_hash(plan), clip_grad_norm=clip)
