"""The kernels of a set of nodes, forward and backward, as steps over storages.

From a graph, a set of its nodes and the rules in `adjoints.py` to three step lists that mirror
what a rank runs for one stage and microbatch:

* F, the forward;
* B, the steps that gradients of the stage's differentiable boundary inputs depend on;
* W, the rest: weight gradients, each added to its buffer at once; perhaps cut into parts.

Copies of the forward steps of recomputed nodes stand in B and W, see `recompute.py`.

Storages are named by numbers: a value's root storage by the value's id, everything else (saved
extras, gradients) by numbers above all value ids.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..compiler.ir.graph import Graph, Mode, Node, OutputKind, ValueKind
from ..compiler.ir.ops import Category
from .adjoint_types import Adjoint
from .analysis import Storages
from .liveness import Step
from .prefetch import finish_late, start_early
from .recompute import insert_copies, weights_with_inputs

__all__ = ["StageSteps", "stage_steps"]

_HELD = (ValueKind.PARAMETER, ValueKind.BUFFER, ValueKind.CONSTANT, ValueKind.INPUT)
_ACCUMULATED_IN_PLACE = ("linear", "addmm", "mm", "matmul")


@dataclass(frozen=True, slots=True)
class StageSteps:
    """Steps and storages of one stage and one microbatch.

    Args:
        forward, backward_input, weight_parts: see the module docstring.
        received: boundary values that the stage reads, storage -> bytes.
        outputs: storages that the stage returns (boundary, loss, buffers, user outputs).
        sent_bytes: bytes of its boundary outputs.
        arriving: gradients of its outputs, storage -> bytes (all consumers' registers).
        returned: storages of gradients of its boundary inputs, with bytes.
        saved: storages made or received in forward that a backward step reads, with bytes.
        passed: storages made in B (or arriving), or in a part of W, that a later part of W reads,
            with bytes.
        user_outputs_bytes: results for the user.
        copies: storages that are recomputed.
        under_way: storages of the buffers of sums of gradients inside backward.
        rerun: nodes that B or W runs again.
    """

    forward: tuple[Step, ...]
    backward_input: tuple[Step, ...]
    weight_parts: tuple[tuple[Step, ...], ...]
    received: dict[int, float]
    outputs: frozenset[int]
    sent_bytes: float
    arriving: dict[int, float]
    returned: dict[int, float]
    saved: dict[int, float]
    passed: dict[int, float]
    user_outputs_bytes: float
    copies: frozenset[int] = frozenset()
    under_way: frozenset[int] = frozenset()
    rerun: frozenset[int] = frozenset()

    @property
    def backward_weight(self) -> tuple[Step, ...]:
        return tuple(step for part in self.weight_parts for step in part)


@dataclass(slots=True)
class _Build:
    """Working state of `stage_steps`."""

    graph: Graph
    nodes: tuple[Node, ...]
    adjoints: Sequence[Adjoint]
    root: Mapping[int, int]
    sizes: Sequence[float]
    next_storage: int
    kept: Mapping[int, float]
    backward: list[Step] = field(default_factory=list)
    summed: dict[int, float] = field(default_factory=dict)  # gradients of `kept`, with bytes
    under_way: list[int] = field(default_factory=list)
    gradient: dict[int, int] = field(default_factory=dict)
    contributions: Counter[int] = field(default_factory=Counter)

    def new(self) -> int:
        self.next_storage += 1
        return self.next_storage - 1

    def roots(self, values: Iterable[int]) -> tuple[int, ...]:
        """Storages of `values` that are not held between steps anyway."""
        found = dict.fromkeys(self.root[index] for index in values)
        return tuple(r for r in found if self.graph.values[r].kind not in _HELD)

    def extra(self, node: Node) -> int:
        return len(self.graph.values) + node.id


def stage_steps(
    graph: Graph,
    nodes: Iterable[int],
    *,
    adjoints: Sequence[Adjoint],
    storages: Storages,
    sizes: Sequence[float],
    consumers: Mapping[int, int] | None = None,
    recomputed: Collection[int] = (),
    kept: Mapping[int, float] | None = None,
    parts: Sequence[Collection[int]] = (),
) -> StageSteps:
    """Steps of the stage that consists of `nodes` of `graph` (a whole graph or a stage's own).

    Args:
        adjoints: by node id.
        sizes: bytes by value id.
        consumers: sent value id -> stages that read it, where more than one: each returns a
            gradient, and they are summed.
        recomputed: nodes whose results backward computes again.
        kept: parameters of whose gradients backward keeps parts, summed over ranks as soon as they
            are complete (ZeRO 2), and bytes of the buffers for that.
        parts: parameters whose gradients each part of W completes; empty: W is in one piece.
    """
    ordered = tuple(graph.nodes[index] for index in sorted(nodes))
    made = {value for node in ordered for value in node.outputs}
    read = {value for node in ordered for value in node.inputs}
    received = {
        value: sizes[value]
        for value in sorted(read - made)
        if graph.values[value].kind in (ValueKind.RESULT, ValueKind.BOUNDARY)
    }
    build = _Build(
        graph=graph,
        nodes=ordered,
        adjoints=adjoints,
        root={value: _root(value, storages.base, received) for value in (*read, *made)},
        sizes=sizes,
        next_storage=len(graph.values) + len(graph.nodes),
        kept=kept or {},
    )
    sent = _sent_values(graph, ordered, made)
    ends = {output.value for output in graph.outputs if output.value in made}
    forward = _forward_steps(build)
    arriving: dict[int, float] = {}
    if graph.mode is Mode.TRAIN:
        arriving = _arriving(build, sent, ends, consumers or {})
    returned = _backward_steps(build, received) if arriving else {}
    backward, copies = insert_copies(build.backward, forward, recomputed, build.new)
    first, second = _split(backward, returned, copies)
    pieces = _pieces(build, second, parts)
    forward, first, *pieces = (
        _with_gathers_ahead(build, steps) for steps in (forward, first, *pieces)
    )
    first, *pieces = (_with_sums_behind(build, steps) for steps in (first, *pieces))
    passed = [
        _crossing([made], pieces[number:], arriving if number == 0 else {})
        for number, made in enumerate((first, *pieces))
    ]
    return StageSteps(
        forward=forward,
        backward_input=first,
        weight_parts=tuple(pieces),
        received=received,
        outputs=frozenset(build.roots(sent | _returned_values(graph, ends))),
        sent_bytes=sum(sizes[value] for value in sent),
        arriving=arriving,
        returned=returned,
        saved=_crossing([forward], [first, *pieces], received),
        passed={storage: size for table in passed for storage, size in table.items()},
        user_outputs_bytes=sum(
            sizes[output.value]
            for output in graph.outputs
            if output.kind is OutputKind.USER and output.value in ends
        ),
        copies=copies,
        under_way=frozenset(build.under_way),
        rerun=frozenset(s.node for s in backward if any(made in copies for made, _ in s.writes)),
    )


def _with_gathers_ahead(build: _Build, steps: Sequence[Step]) -> tuple[Step, ...]:
    """`steps` with the buffers of gathers of parameters from when they start, ahead of use."""
    graph = build.graph
    sizes: list[float] = []
    for step in steps:
        made = sum(size for _, size in step.writes)
        whole = _gathered_bytes(build, graph.nodes[step.node])
        sizes.append(whole if made == whole else 0.0)  # its adjoint makes a part
    return start_early(steps, sizes, build.new) if any(sizes) else tuple(steps)


def _with_sums_behind(build: _Build, steps: Sequence[Step]) -> tuple[Step, ...]:
    """`steps` of backward with the buffers of sums of gradients until they are waited for."""

    def under_way() -> int:
        build.under_way.append(build.new())
        return build.under_way[-1]

    sizes: list[float] = []
    for step in steps:
        node = build.graph.nodes[step.node]
        whole, made = _gathered_bytes(build, node), sum(size for _, size in step.writes)
        sums = bool(whole and node.args[5] and step.writes and made != whole)
        kept = 0.0 if step.writes else sum(build.summed.get(item, 0.0) for item in step.reads)
        sizes.append(whole if sums else kept)
    return finish_late(steps, sizes, under_way) if any(sizes) else tuple(steps)


def _gathered_bytes(build: _Build, node: Node) -> float:
    """Of the parameter that `node` gathers from parts; 0 if it does not."""
    gathers = node.op.packet == "all_gather" and node.op.category is Category.COLLECTIVE
    gathers = gathers and build.graph.values[node.inputs[0]].kind is ValueKind.PARAMETER
    return build.sizes[node.outputs[0]] if gathers else 0.0


def _root(value: int, base: Sequence[int], received: Mapping[int, float]) -> int:
    """The value that owns the storage within the stage: received tensors stand alone."""
    while value not in received and base[value] != value:
        value = base[value]
    return value


def _returned_values(graph: Graph, ends: set[int]) -> set[int]:
    """Values that the stage returns; a training step returns nothing to the user but the loss."""
    train = graph.mode is Mode.TRAIN
    return {
        output.value
        for output in graph.outputs
        if output.value in ends and not (train and output.kind is OutputKind.USER)
    }


def _sent_values(graph: Graph, nodes: tuple[Node, ...], made: set[int]) -> set[int]:
    """Values of `made` that a node outside reads, or that the graph sends to other stages."""
    inside = {node.id for node in nodes}
    sent = {o.value for o in graph.outputs if o.kind is OutputKind.BOUNDARY and o.value in made}
    if len(inside) < len(graph.nodes):
        for node in graph.nodes:
            if node.id not in inside:
                sent.update(value for value in node.inputs if value in made)
    return sent


def _forward_steps(build: _Build) -> tuple[Step, ...]:
    steps = []
    for node in build.nodes:
        rule = build.adjoints[node.id]
        writes = [
            (value, build.sizes[value]) for value in node.outputs if build.root[value] == value
        ]
        if rule.extra_bytes:
            writes.append((build.extra(node), rule.extra_bytes))
        reads = build.roots(node.inputs)
        steps.append(Step(node.id, reads, tuple(writes), rule.forward_temporary_bytes))
    return tuple(steps)


def _arriving(
    build: _Build, sent: set[int], ends: set[int], consumers: Mapping[int, int]
) -> dict[int, float]:
    """Gradients that the stage is given; the loss's is a scalar.

    Several consumers' gradients lie beside their sum until B is done.
    """
    table: dict[int, float] = {}
    losses = {o.value for o in build.graph.outputs if o.kind is OutputKind.LOSS} & ends
    for value in sorted(sent | losses):
        if build.graph.values[value].requires_grad:
            storage = build.new()
            build.gradient[value] = storage
            table[storage] = build.sizes[value]
            if consumers.get(value, 1) > 1:
                table[build.new()] = consumers[value] * build.sizes[value]
    return table


def _backward_steps(build: _Build, received: dict[int, float]) -> dict[int, float]:
    """Fill `build.backward`; returns the gradients of boundary inputs, storage -> bytes."""
    for node in build.nodes:
        build.contributions.update(item.operand for item in build.adjoints[node.id].gradients)
    for node in reversed(build.nodes):
        arrivals = [build.gradient[value] for value in node.outputs if value in build.gradient]
        if arrivals:
            _node_backward(build, node, tuple(dict.fromkeys(arrivals)))
    _finish_parameters(build)
    return {
        build.gradient[value]: build.sizes[value] for value in received if value in build.gradient
    }


def _node_backward(build: _Build, node: Node, arrivals: tuple[int, ...]) -> None:
    rule = build.adjoints[node.id]
    extra = (build.extra(node),) if rule.extra_bytes else ()
    if rule.joint:
        _joint_backward(build, node, rule, (*arrivals, *extra))
        return
    for item in rule.gradients:
        index = item.operand
        if index in rule.aliased and len(arrivals) == 1:
            _contribute(build, node, index, arrivals[0])
            continue
        reads = (*arrivals, *build.roots(item.reads), *extra)
        if _in_place(build, node, index):
            build.backward.append(Step(node.id, reads, (), item.temporary_bytes))
            build.contributions[index] = 0
            continue
        storage = build.new()
        writes = ((storage, build.sizes[index]),)
        build.backward.append(Step(node.id, reads, writes, item.temporary_bytes))
        _contribute(build, node, index, storage)


def _joint_backward(build: _Build, node: Node, rule: Adjoint, arrivals: tuple[int, ...]) -> None:
    """One step that writes all gradients of the node."""
    reads = build.roots(value for item in rule.gradients for value in item.reads)
    fresh = {item.operand: build.new() for item in rule.gradients}
    writes = tuple((storage, build.sizes[index]) for index, storage in fresh.items())
    temporary = sum(item.temporary_bytes for item in rule.gradients)
    build.backward.append(Step(node.id, (*arrivals, *reads), writes, temporary))
    for index, storage in fresh.items():
        _contribute(build, node, index, storage)


def _in_place(build: _Build, node: Node, index: int) -> bool:
    """Whether the weight gradient is a product that is added to its buffer as it is computed."""
    return (
        build.graph.values[index].kind is ValueKind.PARAMETER
        and node.op.packet in _ACCUMULATED_IN_PLACE
        and len(build.graph.values[index].type.shape) == 2
        and build.contributions[index] == 1
        and index not in build.kept
    )


def _contribute(build: _Build, node: Node, index: int, storage: int) -> None:
    """Add `storage` to the gradient of value `index`."""
    if index in build.gradient:
        total = build.new()
        build.backward.append(
            Step(node.id, (build.gradient[index], storage), ((total, build.sizes[index]),))
        )
        storage = total
    build.gradient[index] = storage
    build.contributions[index] -= 1
    if build.graph.values[index].kind is ValueKind.PARAMETER and not build.contributions[index]:
        _accumulate(build, node.id, index)


def _accumulate(build: _Build, node: int, index: int) -> None:
    """Add the gradient of parameter `index`, which is complete, to its buffer."""
    summing = build.kept.get(index, 0.0)
    gradient = build.gradient.pop(index)
    if summing:
        build.summed[gradient] = build.sizes[index]
    build.backward.append(Step(node, (gradient,), (), summing))


def _finish_parameters(build: _Build) -> None:
    """Parameters some of whose readers had no gradient to contribute."""
    for value in build.graph.values_of(ValueKind.PARAMETER):
        if value.id in build.gradient:
            _accumulate(build, build.nodes[0].id, value.id)


def _split(
    steps: Sequence[Step], returned: dict[int, float], copies: Collection[int]
) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """B: the steps that the returned gradients depend on. W: all others."""
    needed = set(returned)
    inside = set()
    for position in reversed(range(len(steps))):
        step = steps[position]
        if any(storage in needed for storage, _ in step.writes):
            inside.add(position)
            needed.update(step.reads)
    if copies and inside:
        inside = weights_with_inputs(steps, inside, copies)
    first = tuple(step for position, step in enumerate(steps) if position in inside)
    second = tuple(step for position, step in enumerate(steps) if position not in inside)
    return first, second


def _pieces(
    build: _Build, steps: Sequence[Step], parts: Sequence[Collection[int]]
) -> list[tuple[Step, ...]]:
    """W cut after the last gradient that each part completes (see `runtime/fx_cut.py`)."""
    first_use: dict[int, int] = {}
    for node in reversed(build.nodes):
        first_use.update(dict.fromkeys(node.inputs, node.id))
    completes = {step.node: position for position, step in enumerate(steps) if not step.writes}
    cuts = [0]
    for part in parts[:-1]:
        ends = (completes.get(first_use.get(value, -1), -1) + 1 for value in part)
        cuts.append(max([cuts[-1], *ends]))
    cuts.append(len(steps))
    return [tuple(steps[a:b]) for a, b in itertools.pairwise(cuts)]


def _crossing(
    before: Sequence[Sequence[Step]],
    after: Sequence[Sequence[Step]],
    given: dict[int, float],
) -> dict[int, float]:
    """Storages written in `before` (or `given`) that `after` reads, with their bytes."""
    sizes = dict(given)
    sizes.update(
        (storage, size) for steps in before for step in steps for storage, size in step.writes
    )
    read = {storage for steps in after for step in steps for storage in step.reads}
    return {storage: size for storage, size in sizes.items() if storage in read}
