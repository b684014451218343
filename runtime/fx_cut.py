"""Surgery on joint forward-and-backward fx graphs: cut into F / B / W, accumulate, box."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen

from .recompute import copy_marked, late_order, rerun_nodes, weights_with_inputs

__all__ = [
    "BackwardParts",
    "WeightPart",
    "boxed_module",
    "cut_backward",
    "mutates",
    "simplify",
    "split_joint_ops",
    "use_addmm",
]

aten = torch.ops.aten
Source = tuple[str, int]


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A part of W: `accumulated` are indices of the weight gradients that it computes, whose
    buffers it takes last, in that order; `passed` are the indices of its results among all that is
    passed on to later parts."""

    module: fx.GraphModule
    sources: tuple[Source, ...]
    accumulated: tuple[int, ...]
    passed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BackwardParts:
    """The graphs of a stage and what the backward ones read.

    Sources are ("argument" | "saved" | "tangent" | "passed", index). `accumulated_early` are
    indices of the weight gradients that B adds to their buffers, because it recomputes what they
    read. `zero_inputs` are indices into the input gradients that are structurally zero.
    """

    forward: fx.GraphModule
    input: fx.GraphModule
    weights: tuple[WeightPart, ...]
    input_sources: tuple[Source, ...]
    accumulated_early: tuple[int, ...]
    zero_inputs: tuple[int, ...]


def cut_backward(
    joint: fx.GraphModule,
    *,
    num_arguments: int,
    num_outputs: int,
    num_input_gradients: int,
    weight_groups: Collection[frozenset[int]] = (),
    weight_parts: Sequence[Collection[int]] = (),
) -> BackwardParts:
    """Cut a joint graph by reachability.

    Args:
        joint: placeholders are `num_arguments` arguments (the key first) and then tangents;
            its flat outputs are outputs, input gradients, weight gradients (None if absent).
        weight_groups: of weight gradients, by index, that stay together in B or W.
        weight_parts: weight gradients, by index, that each part of W has to complete; what is left
            is computed in the last. Empty: W is one part.
    """
    simplify(joint.graph)
    split_joint_ops(joint.graph)
    joint.graph.eliminate_dead_code()
    placeholders = [node for node in joint.graph.nodes if node.op == "placeholder"]
    flat = _flat_outputs(next(iter(reversed(joint.graph.nodes))))
    outputs = flat[:num_outputs]
    input_grads = flat[num_outputs : num_outputs + num_input_gradients]
    weight_grads = flat[num_outputs + num_input_gradients :]

    boundary = set(placeholders)
    forward_set = _with_items(_ancestors(outputs, boundary))
    copies = copy_marked(joint.graph, forward_set)
    again = rerun_nodes(copies, placeholders[num_arguments:])
    outside = forward_set | boundary
    input_set = _with_items(_ancestors(input_grads, outside))
    own = [_ancestors([grad], outside | input_set) for grad in weight_grads]
    early = weights_with_inputs(own, input_set, again, weight_groups)
    weight_set = set().union(*own) - input_set
    order = _order(joint.graph, forward_set, placeholders[num_arguments:], bool(copies))

    backward = input_set | weight_set
    saved = _ordered(
        {source for node in backward for source in node.all_input_nodes if source in forward_set}
        | {grad for grad in _nodes(flat[num_outputs:]) if grad in forward_set},
        order,
    )
    saved = [node for node in saved if _is_tensor(node)]
    early_grads = [weight_grads[index] for index in early]
    accumulated = tuple(
        index for index, grad in enumerate(weight_grads) if grad is not None and index not in early
    )
    pieces = _pieces(
        _ordered(weight_set, order),
        {index: weight_grads[index] for index in accumulated},
        weight_parts or ((),),
        order,
    )
    passed = _passed([input_set, *(set(piece.nodes) for piece in pieces)], pieces, order)
    source_of: dict[fx.Node, Source] = {}
    for position, node in enumerate(placeholders):
        kind = "argument" if position < num_arguments else "tangent"
        source_of[node] = (kind, position if kind == "argument" else position - num_arguments)
    source_of |= {node: ("saved", position) for position, node in enumerate(saved)}
    for position, node in enumerate(node for nodes in passed for node in nodes):
        source_of.setdefault(node, ("passed", position))

    input_reads = _reads(input_set, [*input_grads, *early_grads], source_of, order)
    kept_grads = [grad for grad in input_grads if grad is not None]
    first = _ordered(input_set, order)
    return BackwardParts(
        forward=_extract(
            joint, _ordered(forward_set, order), placeholders[:num_arguments], [*outputs, *saved]
        ),
        input=_extract(joint, first, input_reads, [*kept_grads, *passed[0]], early_grads),
        weights=tuple(
            _weight_part(joint, piece, nodes, source_of, order)
            for piece, nodes in zip(pieces, passed[1:], strict=True)
        ),
        input_sources=tuple(source_of[node] for node in input_reads),
        accumulated_early=tuple(early),
        zero_inputs=tuple(i for i, grad in enumerate(input_grads) if grad is None),
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """Nodes of a part of W, and the weight gradients that it accumulates, by index."""

    nodes: list[fx.Node]
    grads: dict[int, fx.Node]


def _pieces(
    nodes: Sequence[fx.Node],
    grads: Mapping[int, fx.Node],
    parts: Sequence[Collection[int]],
    order: Mapping[fx.Node, int],
) -> list[_Piece]:
    """W, whose nodes run in the same order, cut after the last gradient that each part completes.

    The order stays, so that what is alive, and where ranks meet, does not depend on the cuts.
    """
    ends: list[int] = []
    for part in parts[:-1]:
        found = [order[grads[index]] for index in part if index in grads]
        ends.append(max([*ends[-1:], *found], default=-1))
    home: dict[fx.Node, int] = {}
    pieces = [_Piece([], {}) for _ in parts]
    for node in nodes:
        home[node] = bisect.bisect_left(ends, order[node])
        if node.target is operator.getitem:  # tuples never cross a cut
            home[node] = home.get(node.all_input_nodes[0], home[node])
        pieces[home[node]].nodes.append(node)
    for index, grad in grads.items():
        pieces[home.get(grad, 0)].grads[index] = grad
    return pieces


def _passed(
    made: Sequence[set[fx.Node]], pieces: Sequence[_Piece], order: dict[fx.Node, int]
) -> list[list[fx.Node]]:
    """What B and each part of W make (`made`, in this order) that a later part reads."""
    read = [
        {source for node in piece.nodes for source in node.all_input_nodes}
        | set(piece.grads.values())
        for piece in pieces
    ]
    return [
        _ordered(nodes & set().union(*read[number:]), order) for number, nodes in enumerate(made)
    ]


def _weight_part(
    joint: fx.GraphModule,
    piece: _Piece,
    passed: Sequence[fx.Node],
    source_of: Mapping[fx.Node, Source],
    order: dict[fx.Node, int],
) -> WeightPart:
    grads = list(piece.grads.values())
    reads = _reads(set(piece.nodes), grads, source_of, order)
    return WeightPart(
        module=_extract(joint, piece.nodes, reads, passed, grads),
        sources=tuple(source_of[node] for node in reads),
        accumulated=tuple(piece.grads),
        passed=tuple(source_of[node][1] for node in passed),
    )


def _order(
    graph: fx.Graph, forward: set[fx.Node], tangents: list[fx.Node], recomputes: bool
) -> dict[fx.Node, int]:
    """Positions in which the nodes run."""
    nodes = list(graph.nodes)
    if recomputes:
        backward = [node for node in nodes if node.op == "call_function" and node not in forward]
        late = late_order(backward, tangents)
        nodes = [node for node in nodes if node not in set(backward)] + late
    return {node: position for position, node in enumerate(nodes)}


def _flat_outputs(node: fx.Node) -> list[Any]:
    flat: list[Any] = []

    def visit(item: Any) -> None:
        if isinstance(item, (list, tuple)):
            for entry in item:
                visit(entry)
        else:
            flat.append(item)

    visit(node.args[0])
    return flat


def _nodes(items: Iterable[Any]) -> list[fx.Node]:
    return [item for item in items if isinstance(item, fx.Node)]


def _ancestors(items: Iterable[Any], outside: Collection[fx.Node]) -> set[fx.Node]:
    """Nodes among `items` and what they depend on, up to those `outside`."""
    found: set[fx.Node] = set()
    stack = _nodes(items)
    while stack:
        node = stack.pop()
        if node not in found and node not in outside:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _with_items(nodes: set[fx.Node]) -> set[fx.Node]:
    """`nodes` and the `getitem`s that unpack their results: tuples never cross a cut."""
    return nodes | {
        user for node in nodes for user in node.users if user.target is operator.getitem
    }


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _ordered(nodes: Iterable[fx.Node], order: dict[fx.Node, int]) -> list[fx.Node]:
    return sorted(nodes, key=order.__getitem__)


def _reads(
    inside: set[fx.Node],
    results: Sequence[Any],
    source_of: Mapping[fx.Node, Source],
    order: dict[fx.Node, int],
) -> list[fx.Node]:
    """Nodes outside `inside` that it, or its results, read."""
    read = {source for node in inside for source in node.all_input_nodes if source not in inside}
    read |= {node for node in _nodes(results) if node not in inside}
    missing = [node for node in read if node not in source_of]
    assert not missing, f"backward reads {missing}, which nothing saves"
    return _ordered(read, order)


def _extract(
    joint: fx.GraphModule,
    inside: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    results: Sequence[Any],
    grads: Sequence[fx.Node] = (),
) -> fx.GraphModule:
    """The nodes `inside` as a graph of their own.

    Each of `grads` is added to its buffer right after the node that computes it; the buffers come
    last among the placeholders.
    """
    graph = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        table[node] = graph.placeholder(node.name)
        table[node].meta = dict(node.meta)
    for node in inside:
        if node not in table:
            table[node] = graph.node_copy(node, lambda source: table[source])
    _accumulate(graph, [table[grad] for grad in grads])
    graph.output([table[item] if isinstance(item, fx.Node) else item for item in results])
    return fx.GraphModule(joint, graph)


def _accumulate(graph: fx.Graph, grads: Sequence[fx.Node]) -> None:
    last_placeholder = next((n for n in reversed(list(graph.nodes)) if n.op == "placeholder"), None)
    buffers = []
    for index in range(len(grads)):
        with graph.inserting_after(last_placeholder) if last_placeholder else _start(graph):
            last_placeholder = graph.placeholder(f"buffer_{index}")
        buffers.append(last_placeholder)
    for buffer, grad in zip(buffers, grads, strict=True):
        after = buffers[-1] if grad.op == "placeholder" else grad
        with graph.inserting_after(after):
            graph.call_function(aten.add_.Tensor, (buffer, grad))


def _start(graph: fx.Graph) -> Any:
    return graph.inserting_before(next(iter(graph.nodes), None))


def mutates(graph: fx.Graph) -> list[fx.Node]:
    """Nodes whose op writes to an argument; cutting by reachability needs a graph without them."""
    return [
        node
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]


def simplify(graph: fx.Graph) -> None:
    """Drop `detach` (kernels run without autograd), pairs of transposes, chains of views.

    `view` becomes `reshape`: fake tensors do not always have the strides of real kernels.
    """
    for node in list(graph.nodes):
        if node.target is aten.view.default:
            node.target = aten.reshape.default
            source = node.args[0]
            if source.target is aten.reshape.default:
                node.args = (source.args[0], *node.args[1:])
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.t.default and node.args[0].target is aten.t.default:
            node.replace_all_uses_with(node.args[0].args[0])
            graph.erase_node(node)


def split_joint_ops(graph: fx.Graph) -> None:
    """Replace ops that compute input and weight gradients at once by one op for each.

    `convolution_backward(..., output_mask)` becomes two calls with complementary masks; kernels
    compute the parts separately anyway, so nothing is computed twice.
    """
    for node in list(graph.nodes):
        if node.target is not aten.convolution_backward.default:
            continue
        mask = list(node.args[-1])
        if not (mask[0] and (mask[1] or mask[2])):
            continue
        with graph.inserting_before(node):
            only_input = graph.node_copy(node)
            only_input.args = (*node.args[:-1], [True, False, False])
            only_weight = graph.node_copy(node)
            only_weight.args = (*node.args[:-1], [False, mask[1], mask[2]])
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_input_with(node, only_input if user.args[1] == 0 else only_weight)
        graph.erase_node(node)


def use_addmm(module: fx.GraphModule) -> None:
    """Rewrite `buffer.add_(transposes(mm(a, b)))` to `buffer.addmm_(a, b)`.

    One pass over memory less per weight and microbatch. With an odd number of transposes the
    buffer's transposed view is updated.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is not aten.add_.Tensor:
            continue
        buffer, source = node.args[:2]
        flips = 0
        while source.target is aten.t.default and len(source.users) == 1:
            source, flips = source.args[0], flips + 1
        if source.target is not aten.mm.default or len(source.users) != 1:
            continue
        if _dtype(source) != _dtype(source.args[0]):
            continue
        with graph.inserting_before(node):
            view = graph.call_function(aten.t.default, (buffer,)) if flips % 2 else buffer
            graph.call_function(aten.addmm_.default, (view, *source.args))
        graph.erase_node(node)
    _erase_unused(graph)
    module.recompile()


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _erase_unused(graph: fx.Graph) -> None:
    """Dead-code elimination that keeps in-place ops (fx's own would as well, but only if pure)."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users:
            continue
        if node.target in (aten.t.default, aten.mm.default):
            graph.erase_node(node)


# A call through `torch.ops` converts its arguments twice; these bindings convert them once.
_DIRECT: dict[Any, Callable[..., Any]] = {
    aten.reshape.default: torch.reshape,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.expand.default: Tensor.expand,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.unbind.int: torch.unbind,
    aten.clone.default: torch.clone,
    aten.cat.default: torch.cat,
    aten.stack.default: torch.stack,
    aten.mm.default: torch.mm,
    aten.bmm.default: torch.bmm,
    aten.addmm.default: torch.addmm,
    aten.addmm_.default: Tensor.addmm_,
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: Tensor.add_,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.neg.default: torch.neg,
    aten.rsqrt.default: torch.rsqrt,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.relu.default: torch.relu,
    aten.tanh.default: torch.tanh,
    aten.sigmoid.default: torch.sigmoid,
    aten.sum.dim_IntList: torch.sum,
    aten.mean.dim: torch.mean,
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.embedding.default: torch.embedding,
}


class _Boxed(CodeGen):
    """Generates `forward(self, arguments)`, which empties the list it is given."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        names = [name for name in free_vars if name != "self"]
        lines = ["def forward(self, arguments):"]
        if names:
            bare = [name.split(":")[0].strip() for name in names]
            lines.append(f"    {', '.join(bare)}, = arguments")
        lines.append("    arguments.clear()")
        return "\n".join(lines)

    def process_inputs(self, *args: Any) -> Any:
        return args


def boxed_module(
    module: fx.GraphModule, bind: Callable[[fx.Graph], None] | None = None
) -> Callable[[list[Tensor | None]], Sequence[Any]]:
    """A callable of one list, run without autograd; a tensor dies after its last use.

    `bind` may give nodes of the copied graph other targets first.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    if bind is not None:
        bind(graph)
    for node in graph.nodes:
        node.target = _DIRECT.get(node.target, node.target)
    graph.set_codegen(_Boxed())
    boxed = fx.GraphModule(module, graph)

    def run(arguments: list[Tensor | None]) -> Sequence[Any]:
        with torch.no_grad():
            return boxed.forward(arguments)  # type: ignore[no-any-return]

    return run
