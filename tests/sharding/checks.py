"""Check a sharding rule: every strategy it offers, against the operator on whole tensors.

    case = one_node("aten.linear.default", randn(4, 6), randn(8, 6), randn(8))
    check_rule(case)                       # all strategies over 2 and 3 ranks, all pairs over 2x2
    assert "R,S(0),S(0) -> S(1)" in strategy_texts(case, 2)

Everything is float64. Outputs and gradients of all float operands are compared by the gradient
conventions of `compiler/sharding/strategy.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutset.compiler.capture.interpret import execute_node
from cutset.compiler.ir.graph import Attribute, Graph, Mode, Node, Operand, Value, ValueKind
from cutset.compiler.ir.mesh import (
    Layout,
    Mesh,
    MeshAxis,
    Partial,
    Placement,
    Replicate,
    Shard,
    local_type,
)
from cutset.compiler.ir.ops import Category, op_named
from cutset.compiler.ir.types import TensorType
from cutset.compiler.sharding.lowering import LocalGraph, Lowering
from cutset.compiler.sharding.rule import same_call
from cutset.compiler.sharding.rules import rule_of, strategies_of
from cutset.compiler.sharding.strategy import OpStrategy, OpView
from cutset.runtime.random_ops import draws_inside, num_draws
from cutset.runtime.rng import make_key

from .lockstep import RankGraph, assemble, coordinates, distribute, run_lockstep

__all__ = [
    "Case",
    "check_flags",
    "check_pairs",
    "check_rule",
    "check_strategy",
    "collectives",
    "one_node",
    "randn",
    "strategy_texts",
]

KEY = make_key(7, 0, 0)
RELATIVE_ERROR = 1e-9


@dataclass(frozen=True, slots=True)
class Case:
    """A graph of one node and tensors for its inputs, in the order of `node.inputs`."""

    graph: Graph
    tensors: tuple[Tensor, ...]

    @property
    def node(self) -> Node:
        return self.graph.nodes[0]


def randn(*shape: int) -> Tensor:
    """Random float64 numbers that follow from the shape."""
    generator = torch.Generator().manual_seed(sum(shape) + 7 * len(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


# -- one-node graphs -------------------------------------------------------------------------------


def one_node(op: str, *args: Any, constant: Sequence[Tensor] = (), **kwargs: Any) -> Case:
    """A graph of the one call `op(*args, **kwargs)`; tensors may stand in lists.

    Args:
        constant: float tensors among the arguments that need no gradient (running statistics).
            A float result carries a gradient where the operator says so.
    """
    tensors: list[Tensor] = []

    def fill(item: Any) -> Attribute:
        if isinstance(item, Tensor):
            known = [position for position, other in enumerate(tensors) if other is item]
            if not known:
                tensors.append(item)
            return Operand(known[0] if known else len(tensors) - 1)
        if isinstance(item, (list, tuple)):
            return tuple(fill(entry) for entry in item)
        return item  # type: ignore[no-any-return]

    filled = tuple(map(fill, args)), tuple((name, fill(item)) for name, item in kwargs.items())
    packet = op.split(".")[1]
    draws = draws_inside(packet) and num_draws(packet, args, kwargs) > 0
    needs = [item.is_floating_point() and all(item is not c for c in constant) for item in tensors]
    node = Node(
        id=0,
        name="node",
        op=op_named(op),
        inputs=tuple(range(len(tensors))),
        args=filled[0],
        kwargs=filled[1],
        outputs=(),
        random_draw=0 if draws else None,
    )
    leaves = [item.detach().requires_grad_(g) for item, g in zip(tensors, needs, strict=True)]
    results = execute_node(node, leaves, KEY, torch.device("cpu"))
    values = [
        Value(i, f"in{i}", TensorType.of(item), ValueKind.INPUT, f"args[{i}]", needs[i])
        for i, item in enumerate(tensors)
    ]
    values += [
        Value(
            len(tensors) + i,
            f"out{i}",
            TensorType.of(item),
            ValueKind.RESULT,
            requires_grad=item.requires_grad,
        )
        for i, item in enumerate(results)
    ]
    outputs = tuple(range(len(tensors), len(values)))
    node = _with_outputs(node, outputs)
    graph = Graph("case", Mode.TRAIN, tuple(values), (node,), node.inputs, ())
    return Case(graph, tuple(tensors))


def _with_outputs(node: Node, outputs: tuple[int, ...]) -> Node:
    return Node(
        id=node.id,
        name=node.name,
        op=node.op,
        inputs=node.inputs,
        args=node.args,
        kwargs=node.kwargs,
        outputs=outputs,
        random_draw=node.random_draw,
    )


# -- drivers ---------------------------------------------------------------------------------------


def strategy_texts(case: Case, parts: int = 2) -> list[str]:
    """The strategies over an axis of `parts` ranks, replication aside, as text."""
    return [str(item) for item in strategies_of(case.graph, case.node, parts)[1:]]


def check_rule(
    case: Case,
    *,
    parts: Sequence[int] = (2, 3),
    pairs: bool = True,
    relative_error: float = RELATIVE_ERROR,
) -> None:
    """Check all strategies over each number of parts and, with `pairs`, all pairs over 2x2."""
    for count in parts:
        mesh = Mesh((MeshAxis("tensor", count),))
        for strategy in strategies_of(case.graph, case.node, count):
            check_strategy(case, (strategy,), mesh, relative_error=relative_error)
    if pairs:
        check_pairs(case, relative_error=relative_error)


def check_pairs(case: Case, *, relative_error: float = RELATIVE_ERROR) -> int:
    """Check all legal pairs of strategies over a 2x2 mesh; returns how many there are."""
    mesh = Mesh((MeshAxis("data", 2), MeshAxis("tensor", 2)))
    found = strategies_of(case.graph, case.node, 2)
    legal = [pair for pair in itertools.product(found, found) if _shards_no_dim_twice(pair)]
    for pair in legal:
        check_strategy(case, pair, mesh, relative_error=relative_error)
    return len(legal)


def _shards_no_dim_twice(strategies: Sequence[OpStrategy]) -> bool:
    rows = [(*item.inputs, *item.outputs) for item in strategies]
    for placements in zip(*rows, strict=True):
        dims = [item.dim for item in placements if isinstance(item, Shard)]
        if len(dims) != len(set(dims)):
            return False
    return True


# -- one strategy an axis --------------------------------------------------------------------------


def check_strategy(
    case: Case,
    strategies: Sequence[OpStrategy],
    mesh: Mesh,
    *,
    relative_error: float = RELATIVE_ERROR,
) -> None:
    """Compare results and gradients under one strategy an axis with those of the whole node.

    Args:
        relative_error: allowed, relative to the largest element (or to 1, if that is smaller).

    Raises:
        AssertionError: with the strategies in its message.
    """
    title = f"{case.node.op} {case.node.args} under [{'; '.join(map(str, strategies))}] on {mesh}"
    try:
        _check(case, strategies, mesh, relative_error)
    except Exception as error:
        raise AssertionError(f"{title}: {error}") from error


def collectives(
    case: Case, strategies: Sequence[OpStrategy], mesh: Mesh
) -> list[tuple[str, TensorType]]:
    """Collectives that the first rank takes part in, with the types of their operands."""
    inputs = _layouts(strategies, len(case.node.inputs))
    outputs = _layouts(strategies, len(case.node.outputs), of_outputs=True)
    local, _ = _lower(case, inputs, outputs, mesh, (0,) * len(mesh.axes))
    return [
        (node.op.name, local.values[node.inputs[0]].type)
        for node in local.nodes
        if node.op.category is Category.COLLECTIVE
    ]


def _layouts(
    strategies: Sequence[OpStrategy], count: int, *, of_outputs: bool = False
) -> tuple[Layout, ...]:
    return tuple(
        Layout(tuple((s.outputs if of_outputs else s.inputs)[position] for s in strategies))
        for position in range(count)
    )


def _gradient_layout(strategies: Sequence[OpStrategy], position: int) -> Layout:
    """How the gradient of an input comes out of the node."""
    placements: list[Placement] = []
    for strategy in strategies:
        mine = strategy.inputs[position]
        if isinstance(mine, Shard):
            placements.append(mine)
        else:
            partial = strategy.has_partial_gradient(position)
            placements.append(Partial() if partial else Replicate())
    return Layout(tuple(placements))


def _check(case: Case, strategies: Sequence[OpStrategy], mesh: Mesh, relative_error: float) -> None:
    torch.manual_seed(0)
    graph, node = case.graph, case.node
    input_layouts = _layouts(strategies, len(node.inputs))
    output_layouts = _layouts(strategies, len(node.outputs), of_outputs=True)
    lowered = [
        _lower(case, input_layouts, output_layouts, mesh, coordinate)
        for coordinate in coordinates(mesh)
    ]

    whole = [
        _leaf(graph.values[i], item) for i, item in zip(node.inputs, case.tensors, strict=True)
    ]
    expected = execute_node(node, list(whole), KEY, torch.device("cpu"))
    parts = [
        [_leaf(graph.values[i], part) for part in distribute(item.detach(), layout, mesh)]
        for i, item, layout in zip(node.inputs, whole, input_layouts, strict=True)
    ]
    graphs = [RankGraph(local.values, local.nodes) for local, _ in lowered]
    tensors = [dict(enumerate(column)) for column in zip(*parts, strict=True)]
    known = run_lockstep(graphs, tensors or [{} for _ in lowered], mesh, key=KEY)
    for graph_of_rank, mine in zip(graphs, known, strict=True):
        check_flags(graph_of_rank, mine)
    found = [
        [mine[refs[position]] for mine, (_, refs) in zip(known, lowered, strict=True)]
        for position in range(len(node.outputs))
    ]
    for position, layout in enumerate(output_layouts):
        _compare(
            assemble(_detached(found[position]), layout, mesh),
            expected[position],
            position,
            relative_error,
        )
    _check_gradients(case, strategies, mesh, whole, parts, expected, found, relative_error)


def check_flags(graph: RankGraph, known: Mapping[int, Tensor]) -> None:
    """A value that carries a gradient says so; the localizer relies on it."""
    for value in graph.values:
        denied = known[value.id].requires_grad and not value.requires_grad
        assert not denied, f"{value.name} carries a gradient that its graph denies"


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [item.detach() for item in tensors]


def _leaf(value: Value, tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(value.requires_grad)


def _lower(
    case: Case,
    input_layouts: tuple[Layout, ...],
    output_layouts: tuple[Layout, ...],
    mesh: Mesh,
    coordinate: tuple[int, ...],
) -> tuple[LocalGraph, list[int]]:
    """Local graph of one rank, and the ids of the node's results in it."""
    local = LocalGraph(mesh, coordinate)
    values = [case.graph.values[number] for number in case.node.inputs]
    refs = tuple(
        local.add_value(
            value.name,
            local_type(value.type, layout, mesh, coordinate),
            value.kind,
            requires_grad=value.requires_grad,
        )
        for value, layout in zip(values, input_layouts, strict=True)
    )
    lowering = Lowering(OpView(case.graph, case.node), local, refs, input_layouts, output_layouts)
    rule = rule_of(case.node)
    results = (rule.lower if rule is not None else same_call)(lowering)
    for position, ref in enumerate(results):
        wanted = lowering.output_type(position)
        assert local.type(ref) == wanted, f"result {position} is typed {local.type(ref)}"
    return local, [ref.id for ref in results]


def _check_gradients(
    case: Case,
    strategies: Sequence[OpStrategy],
    mesh: Mesh,
    whole: list[Tensor],
    parts: list[list[Tensor]],
    expected: list[Tensor],
    found: list[list[Tensor]],
    relative_error: float,
) -> None:
    carry = [i for i, item in enumerate(expected) if item.requires_grad]
    wanted = [i for i, item in enumerate(whole) if item.requires_grad]
    if not carry or not wanted:
        return
    upstream = [torch.randn_like(expected[i]) for i in carry]
    reference = torch.autograd.grad(
        [expected[i] for i in carry],
        [whole[i] for i in wanted],
        upstream,
        allow_unused=True,
        materialize_grads=True,
    )
    roots: list[Tensor] = []
    seeds: list[Tensor] = []
    for position, gradient in zip(carry, upstream, strict=True):
        # the gradient of a term of a sum is that of the sum
        placements = [s.outputs[position] for s in strategies]
        layout = Layout(tuple(p if isinstance(p, Shard) else Replicate() for p in placements))
        for result, seed in zip(found[position], distribute(gradient, layout, mesh), strict=True):
            if result.requires_grad:
                roots.append(result)
                seeds.append(seed)
    leaves = [leaf for i in wanted for leaf in parts[i]]
    gradients = torch.autograd.grad(roots, leaves, seeds, allow_unused=True, materialize_grads=True)
    for order, position in enumerate(wanted):
        mine = gradients[order * mesh.size : (order + 1) * mesh.size]
        layout = _gradient_layout(strategies, position)
        whole_gradient = assemble(mine, layout, mesh)
        title = f"gradient of input {position}"
        _compare(whole_gradient, reference[order], title, relative_error)


def _compare(found: Tensor, expected: Tensor, what: object, relative_error: float) -> None:
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(found, expected), f"{what} differs"
        return
    scale = max(1.0, float(expected.detach().abs().nan_to_num().amax())) if expected.numel() else 1
    torch.testing.assert_close(
        found,
        expected.detach(),
        rtol=0.0,
        atol=relative_error * scale,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )
