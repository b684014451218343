"""Hypothesis strategies for the values of the IR, odd names and numbers included."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from cutset.compiler.ir.cluster import (
    Cluster,
    Device,
    DeviceType,
    Host,
    Link,
    LinkRule,
    OpCost,
    RateCurve,
)
from cutset.compiler.ir.corrections import Correction, Corrections, Signature
from cutset.compiler.ir.graph import (
    Graph,
    Mode,
    Node,
    Operand,
    Output,
    OutputKind,
    Value,
    ValueKind,
)
from cutset.compiler.ir.mesh import Layout, Mesh, MeshAxis, Partial, Replicate, Shard
from cutset.compiler.ir.ops import op_named
from cutset.compiler.ir.plan import (
    Alternative,
    Certificate,
    DeviceLoad,
    Fingerprint,
    MemoryPrediction,
    NodeLayout,
    Objective,
    OptimizerModel,
    ParameterLayout,
    Plan,
    Prediction,
    ProfiledBlock,
    ProfileReport,
    Stage,
    StageMesh,
    ValueLayout,
)
from cutset.compiler.ir.program import (
    AllGather,
    AllReduce,
    Await,
    Backward,
    BackwardInput,
    BackwardWeight,
    ClipGradients,
    Forward,
    Free,
    GradientNorm,
    GradientPart,
    OptimizerStep,
    Program,
    Recv,
    ReduceScatter,
    Register,
    Send,
    StageProgram,
    TensorShard,
)
from cutset.compiler.ir.schedule import Action, ActionKind, Schedule
from cutset.compiler.ir.types import DTYPE_NAMES, TensorType

texts = st.one_of(
    st.sampled_from(
        ["", "h", "layers.0.mlp", "true", "f32", "1", "a b", 'q"uo\\te', "x:", "%", "_"]
    ),
    st.text(max_size=8),
)
ids = st.integers(0, 40)
counts = st.integers(0, 10**13)
# One nan object: two of them would compare unequal.
floats = st.floats(allow_nan=False) | st.just(math.nan)
finite = st.floats(allow_nan=False, allow_infinity=False)
types = st.builds(
    TensorType,
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.sampled_from(sorted(DTYPE_NAMES, key=str)),
)
constants = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    floats,
    texts,
    st.sampled_from([*DTYPE_NAMES, torch.float8_e4m3fn, torch.strided, torch.sparse_coo]),
    st.sampled_from([torch.contiguous_format, torch.channels_last, torch.preserve_format]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda", 3), torch.device("meta")]),
)


def _nested(leaves: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)


@st.composite
def nodes(draw: st.DrawFn, number: int, readable: list[int], outputs: tuple[int, ...]) -> Node:
    """A node that reads some of `readable`; its inputs are in order of first appearance."""
    wanted = draw(st.lists(st.sampled_from(readable), max_size=3)) if readable else []
    inputs = tuple(dict.fromkeys(wanted))
    tensors = [Operand(inputs.index(value)) for value in wanted]
    args = [draw(_nested(constants)) for _ in range(draw(st.integers(0, 2)))]
    split = draw(st.integers(0, len(tensors)))
    nested = (tuple(tensors[:split]), *args) if split > 1 else (*tensors[:split], *args)
    keys = draw(st.lists(texts, unique=True, min_size=len(tensors) - split, max_size=3))
    kwargs = tuple(
        (key, tensors[split + position] if split + position < len(tensors) else draw(constants))
        for position, key in enumerate(keys)
    )
    return Node(
        id=number,
        name=draw(texts),
        op=op_named(
            draw(st.sampled_from(["aten.add.Tensor", "aten.dropout.default", "my.op.out"]))
        ),
        inputs=inputs,
        args=nested,
        kwargs=kwargs,
        outputs=outputs,
        module_path=draw(texts),
        source=draw(texts),
        random_draw=draw(st.none() | ids),
    )


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Graphs that are topological and well named, otherwise with anything in any field."""
    names = draw(st.lists(texts, unique=True, max_size=8))
    order = draw(st.permutations(range(len(names))))
    values: list[Value] = []
    made: list[Node] = []
    position = 0
    while position < len(names):
        is_result = draw(st.booleans())
        width = min(draw(st.integers(1, 2)), len(names) - position) if is_result else 1
        group = tuple(order[position : position + width])
        readable = [value.id for value in values]
        for value in group:
            kind = st.sampled_from([kind for kind in ValueKind if kind is not ValueKind.RESULT])
            values.append(
                Value(
                    id=value,
                    name=names[value],
                    type=draw(types),
                    kind=ValueKind.RESULT if is_result else draw(kind),
                    origin=draw(texts),
                    requires_grad=draw(st.booleans()),
                    batch_dim=draw(st.none() | ids),
                    aliases=tuple(draw(st.lists(texts, max_size=2))),
                )
            )
        if is_result:
            made.append(draw(nodes(len(made), readable, group)))
        position += width
    values.sort(key=lambda value: value.id)
    inputs = [value.id for value in values if value.kind is ValueKind.INPUT]
    results = st.builds(
        Output,
        st.sampled_from(OutputKind),
        st.sampled_from([value.id for value in values] or [0]),
        texts,
        st.none() | ids,
    )
    return Graph(
        name=draw(texts),
        mode=draw(st.sampled_from(Mode)),
        values=tuple(values),
        nodes=tuple(made),
        inputs=tuple(draw(st.permutations(inputs))),
        outputs=tuple(draw(st.lists(results, max_size=3))) if values else (),
    )


registers = st.builds(Register, texts, ids, st.none() | ids)
several = st.lists(texts, max_size=3).map(tuple)
numbers = st.lists(ids, max_size=3).map(tuple)
shards = st.lists(st.builds(TensorShard, texts, types, numbers, types), max_size=2).map(tuple)
instructions = st.one_of(
    st.builds(Forward, ids, ids),
    st.builds(Backward, ids, ids),
    st.builds(BackwardInput, ids, ids),
    st.builds(BackwardWeight, ids, ids, st.none() | ids),
    st.builds(Send, registers, ids, ids, types, st.none() | numbers),
    st.builds(Recv, registers, ids, ids, types, st.none() | numbers),
    st.builds(Free, st.lists(registers, max_size=3).map(tuple)),
    st.builds(GradientNorm, st.lists(texts, max_size=3).map(tuple)),
    st.builds(AllReduce, several, numbers, st.sampled_from(["sum"]), numbers),
    st.builds(ReduceScatter, several, numbers, numbers),
    st.builds(AllGather, several, numbers, numbers),
    st.builds(Await, several),
    st.builds(ClipGradients, finite),
    st.just(OptimizerStep()),
)
stage_programs = st.builds(
    StageProgram,
    ids,
    graphs(),
    st.lists(st.tuples(texts, st.lists(ids, max_size=3).map(tuple)), max_size=2).map(tuple),
    st.lists(st.tuples(texts, ids), max_size=2).map(tuple),
    st.lists(st.tuples(texts, st.lists(ids, max_size=3).map(tuple)), max_size=2).map(tuple),
    st.lists(ids, max_size=9).map(tuple),
    st.lists(st.builds(GradientPart, texts, texts, ids, st.booleans()), max_size=2).map(tuple),
    st.lists(several, max_size=3).map(tuple),
    shards,
)
programs = st.builds(
    Program,
    rank=ids,
    num_ranks=ids,
    mode=st.sampled_from(Mode),
    num_microbatches=ids,
    stages=st.lists(stage_programs, max_size=2).map(tuple),
    stage_ranks=st.lists(ids, max_size=3).map(tuple),
    shards=shards,
    updates=shards,
    gradient_terms=st.lists(st.tuples(texts, st.lists(ids, max_size=3).map(tuple)), max_size=2).map(
        tuple
    ),
    offloaded=several,
    instructions=st.lists(instructions, max_size=6).map(tuple),
    plan_hash=texts,
    memory_limit_bytes=counts,
)

points = st.lists(st.tuples(finite, finite), max_size=2).map(tuple)
rates = st.lists(st.tuples(st.sampled_from(["f32", "bf16"]), finite), max_size=2).map(tuple)
factors = st.none() | st.floats(1e-3, 1e3).map(lambda number: float(f"{number:.4g}"))
corrections = st.lists(
    st.builds(
        Correction,
        st.builds(
            Signature,
            st.sampled_from(["aten.mm.default", "aten.add.Tensor"]),
            st.sampled_from(["", "(%0, %1)", '(%0, "a b", ((1, 2),)) random']),
            st.lists(st.sampled_from(["f32[2,3]", "f32[]^", "bf16[4]^w"]), max_size=2).map(tuple),
            st.just(("f32[1]",)),
        ),
        factors,
        factors,
        factors,
    ),
    min_size=1,
    max_size=3,
).map(lambda entries: Corrections(tuple(entries)))
device_types = st.builds(
    DeviceType,
    texts,
    texts,
    counts,
    finite,
    rates,
    finite,
    st.lists(texts, max_size=2).map(tuple),
    st.none() | st.builds(Host, st.builds(Link, finite, finite), counts, finite),
    st.none() | ids,
    st.none() | ids,
    finite,
    finite,
    st.lists(st.builds(RateCurve, texts, texts, points), max_size=2).map(tuple),
    st.lists(st.builds(OpCost, texts, texts, finite, points), max_size=2).map(tuple),
    st.none() | corrections,
)
links = st.builds(Link, finite, finite)
link_rules = st.builds(
    LinkRule,
    links,
    texts,
    texts,
    st.none() | st.booleans(),
    st.lists(st.tuples(texts, links), max_size=2).map(tuple),
    st.none() | finite,
    finite,
)
clusters = st.builds(
    Cluster,
    texts,
    st.lists(device_types, max_size=2).map(tuple),
    st.lists(st.builds(Device, ids, texts, texts), max_size=4).map(tuple),
    st.lists(link_rules, max_size=2).map(tuple),
    st.booleans(),
)
actions = st.builds(Action, st.sampled_from(ActionKind), ids, ids)
schedules = st.builds(
    Schedule,
    st.sampled_from(["1f1b", "gpipe", "zero-bubble"]),
    ids,
    ids,
    st.lists(st.lists(actions, max_size=4).map(tuple), max_size=3).map(tuple),
)
placements = st.one_of(
    st.builds(Shard, st.integers(0, 5)),
    st.just(Replicate()),
    st.builds(Partial, st.sampled_from(["sum", "avg", "max", "min"])),
)
meshes = st.lists(
    st.builds(MeshAxis, st.sampled_from(["data", "pipeline", "tensor"]), st.integers(1, 9)),
    max_size=3,
).map(lambda axes: Mesh(tuple(axes)))
layouts = st.lists(placements, max_size=3).map(lambda items: Layout(tuple(items)))
memory = st.builds(MemoryPrediction, ids, counts, counts, counts, counts, counts, counts)
predictions = st.builds(
    Prediction,
    finite,
    finite,
    st.lists(finite, max_size=3).map(tuple),
    st.lists(finite, max_size=3).map(tuple),
    st.lists(memory, max_size=2).map(tuple),
    st.lists(st.builds(DeviceLoad, ids, finite, finite), max_size=2).map(tuple),
)
phases = st.tuples(finite, finite, finite)
value_layouts = st.lists(st.builds(ValueLayout, texts, layouts), max_size=2).map(tuple)
parameter_layouts = st.lists(
    st.builds(ParameterLayout, texts, layouts, layouts, layouts, st.booleans()), max_size=2
).map(tuple)
node_layouts = st.lists(
    st.builds(
        NodeLayout,
        st.lists(ids, max_size=9).map(tuple),
        st.lists(layouts, max_size=3).map(tuple),
        st.lists(layouts, max_size=2).map(tuple),
    ),
    max_size=2,
).map(tuple)
plans = st.builds(
    Plan,
    fingerprint=st.builds(Fingerprint, texts, texts, texts, counts, counts),
    cluster=clusters,
    mode=st.sampled_from(Mode),
    batch_size=ids,
    optimizer=st.builds(OptimizerModel, texts, finite),
    objective=st.sampled_from(Objective),
    num_microbatches=ids,
    mesh=meshes,
    stages=st.lists(
        st.builds(
            Stage,
            ids,
            st.lists(ids, min_size=1, max_size=3).map(tuple),
            st.lists(ids, max_size=9).map(tuple),
            st.none()
            | st.builds(StageMesh, meshes, value_layouts, parameter_layouts, node_layouts),
        ),
        max_size=3,
    ).map(tuple),
    layouts=value_layouts,
    parameter_layouts=parameter_layouts,
    node_layouts=node_layouts,
    recomputed=st.lists(ids, max_size=9).map(tuple),
    schedule=st.none() | schedules,
    prediction=st.none() | predictions,
    certificate=st.none() | st.builds(Certificate, finite, finite, finite, texts, texts, finite),
    alternatives=st.lists(
        st.builds(Alternative, meshes, ids, ids, finite, st.booleans()), max_size=2
    ).map(tuple),
    profile=st.none()
    | st.builds(
        ProfileReport,
        texts,
        ids,
        ids,
        ids,
        finite,
        texts,
        st.lists(texts, max_size=2).map(tuple),
        st.builds(Alternative, meshes, ids, ids, finite, st.booleans()),
        finite,
        st.lists(st.builds(ProfiledBlock, texts, texts, ids, ids, phases, phases), max_size=2).map(
            tuple
        ),
    ),
    warnings=st.lists(texts, max_size=2).map(tuple),
)
