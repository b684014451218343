"""From an exported program to the IR: a `Graph` of typed values and table operators.

Every call becomes a `Node` (`getitem` of a multi-output call names one of its outputs). Random ops
are numbered in program order before dead code is removed, since the eager model makes the dead
draws too. A device in a call is always written `cpu`: it stands for the device of the rank
that runs the stage, and interpreter and codegen put that in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, InputSpec
from torch.export.graph_signature import OutputKind as ExportedKind

from ...runtime.rng import draws_inside, num_draws, random_op
from ..ir.errors import CaptureError
from ..ir.graph import Attribute, Graph, Mode, Node, Operand, Output, OutputKind, Value, ValueKind
from ..ir.ops import op_named
from ..ir.types import TensorType
from .export import MODEL_PREFIX, Exported
from .names import Names, canonical_names, identifier
from .places import module_path, mutation_error, place, refusal, source_line, static_type
from .prune import without_dead_code, without_idle_gradients
from .signature import InputSignature, TensorLeaf

__all__ = ["DEVICE", "Lowered", "lower"]

DEVICE = torch.device("cpu")
"""Stands in a graph for the device of whoever runs it."""

_CHECKS = frozenset(
    "_assert_tensor_metadata _assert_async _assert_scalar sym_constrain_range "
    "sym_constrain_range_for_size".split()
)
# Operators whose float results carry no gradient though their inputs may; and those of which only
# the first result does.
_NO_GRADIENT = frozenset(
    "detach zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros "
    "new_ones new_full new_empty new_empty_strided bernoulli uniform exponential random "
    "normal_functional".split()
)
_FIRST_ONLY = frozenset(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
    "_native_batch_norm_legit_no_training _batch_norm_with_update_functional "
    "rrelu_with_noise_functional".split()
)
_KINDS = {
    InputKind.PARAMETER: (ValueKind.PARAMETER, "p_"),
    InputKind.BUFFER: (ValueKind.BUFFER, "b_"),
    InputKind.CONSTANT_TENSOR: (ValueKind.CONSTANT, "c_"),
}


@dataclass(frozen=True, slots=True)
class Lowered:
    """A graph, the parameters, buffers and constants it reads by name, and how much it draws."""

    graph: Graph
    tensors: Mapping[str, Tensor]
    num_draws: int


def lower(
    exported: Exported, model: nn.Module, inputs: InputSignature, *, mode: Mode, name: str
) -> Lowered:
    """Lower an exported program.

    Args:
        model: tells which of the parameters and buffers are one tensor under several names.

    Raises:
        CaptureError: the program changes an input or a parameter, has a shape that depends on
            data, or uses an operator that the IR has no place for; names node and source line.
    """
    return _Lowering(exported, model, inputs, mode).run(name)


@dataclass(frozen=True, slots=True)
class _Call:
    target: torch._ops.OpOverload
    args: tuple[Attribute, ...]
    kwargs: tuple[tuple[str, Attribute], ...]
    inputs: tuple[int, ...]

    @property
    def packet(self) -> str:
        return str(self.target.overloadpacket.__name__)


class _Lowering:
    def __init__(
        self, exported: Exported, model: nn.Module, inputs: InputSignature, mode: Mode
    ) -> None:
        self.exported, self.results = exported, exported.outputs
        self.mode, self.rows = mode, inputs.rows
        self.canonical = canonical_names(model)
        self.origins = iter(inputs.tensor_leaves)
        self.model_tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.names = Names()
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.tensors: dict[str, Tensor] = {}
        self.given: dict[str, int] = {}  # canonical name -> value
        self.single: dict[fx.Node, int] = {}
        self.multiple: dict[fx.Node, tuple[int, ...]] = {}
        self.draws = 0

    def run(self, name: str) -> Lowered:
        specs = {spec.arg.name: spec for spec in self.exported.signature.input_specs}
        outputs: tuple[Output, ...] = ()
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self.placeholder(node, specs[node.name])
            elif node.op == "output":
                outputs = tuple(self.outputs(node))
            elif node.op == "call_function":
                self.call(node)
            elif node.users:
                raise refusal(node, f"the traced module's attribute {node.target} is used")
        graph = Graph(
            name=name,
            mode=self.mode,
            values=tuple(self.values),
            nodes=tuple(self.nodes),
            inputs=tuple(value.id for value in self.values if value.kind is ValueKind.INPUT),
            outputs=outputs,
        )
        graph = without_idle_gradients(without_dead_code(graph))
        return Lowered(graph, self.tensors, self.draws)

    def placeholder(self, node: fx.Node, spec: InputSpec) -> None:
        if spec.kind is InputKind.USER_INPUT:
            leaf = next(self.origins)
            self.single[node] = self.add_input(leaf)
            return
        if spec.kind not in _KINDS:
            raise refusal(node, f"an input of kind {spec.kind.name} is needed")
        kind, prefix = _KINDS[spec.kind]
        path = str(spec.target).removeprefix(f"{MODEL_PREFIX}.")
        origin, aliases = self.canonical.get(path, (path, ()))
        if origin not in self.given:
            self.given[origin] = len(self.values)
            tensor = self.tensors[origin] = self.tensor(origin, str(spec.target))
            trained = kind is ValueKind.PARAMETER and self.mode is Mode.TRAIN
            self.values.append(
                Value(
                    id=len(self.values),
                    name=self.names.take(prefix + identifier(origin)),
                    type=TensorType.of(tensor),
                    kind=kind,
                    origin=origin,
                    requires_grad=trained and tensor.requires_grad,
                    aliases=aliases,
                )
            )
        self.single[node] = self.given[origin]

    def add_input(self, leaf: TensorLeaf) -> int:
        name = self.names.take(identifier(leaf.origin.removeprefix("kwargs.")))
        self.values.append(
            Value(
                id=len(self.values),
                name=name,
                type=leaf.type,
                kind=ValueKind.INPUT,
                origin=leaf.origin,
                batch_dim=leaf.batch_dim,
            )
        )
        return len(self.values) - 1

    def tensor(self, origin: str, target: str) -> Tensor:
        found = self.model_tensors.get(origin)
        found = self.exported.tensors[target] if found is None else found
        assert isinstance(found, Tensor)
        return found

    def call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node) and isinstance(index, int)
            self.single[node] = self.multiple[source][index]
            return
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise refusal(node, "it is not an operator")
        if target.namespace not in ("aten", "prims"):
            raise refusal(
                node,
                "it is not torch's own, and the processes that run stages do not load it",
                "choose an implementation in plain torch (experts of transformers: "
                'config._experts_implementation = "batched_mm")',
            )
        packet = target.overloadpacket.__name__
        if packet in _CHECKS:
            return
        if packet == "copy":
            self.copy(node)
            return
        if packet == "as_strided":
            self.as_strided(node)
            return
        if packet == "_to_copy" and _moves_only(node):
            (source,) = node.args
            assert isinstance(source, fx.Node)
            self.single[node] = self.single[source]
            return
        inputs: list[int] = []
        args = tuple(self.attribute(node, item, inputs) for item in node.args)
        kwargs = tuple(
            (name, self.attribute(node, item, inputs))
            for name, item in node.kwargs.items()
            if not (name == "pin_memory" and not item)
        )
        call = _Call(target, args, kwargs, tuple(inputs))
        result = node.meta.get("val")
        if result is None and not node.users:
            return  # a call that failed and whose error the model caught
        if isinstance(result, (list, tuple)) and len(result) == 1:
            self.multiple[node] = (self.emit(node, _one_of_one(node, call), result[0])[0],)
        elif isinstance(result, (list, tuple)):
            self.multiple[node] = self.emit(node, call, *result)
        else:
            (self.single[node],) = self.emit(node, call, result)

    def copy(self, node: fx.Node) -> None:
        """`copy(target, source)`, which has no derivative: the source in the target's type."""
        target, source = node.args[:2]
        assert isinstance(target, fx.Node) and isinstance(source, fx.Node)
        wanted, found = node.meta["val"], source.meta["val"]
        value = self.single[source]
        if found.dtype != wanted.dtype:
            cast = (("dtype", wanted.dtype),)
            call = _Call(torch.ops.aten._to_copy.default, (Operand(0),), cast, (value,))
            (value,) = self.emit(node, call, found.to(wanted.dtype))
        if found.shape != wanted.shape:
            args = (Operand(0), tuple(wanted.shape))
            call = _Call(torch.ops.aten.expand.default, args, (), (value,))
            (value,) = self.emit(node, call, wanted)
        self.single[node] = value

    def as_strided(self, node: fx.Node) -> None:
        """`as_strided`, whose result depends on the input's strides, on a copy that has them.

        A stage may receive the input, or compute it by other kernels, with strides of its own.
        """
        given_args: tuple[Any, ...] = node.args
        source, size, stride, *rest = given_args
        assert isinstance(source, fx.Node)
        input: Tensor = source.meta["val"]
        order = tuple(sorted(range(input.ndim), key=input.stride, reverse=True))
        given: Any = rest[0] if rest else node.kwargs.get("storage_offset")
        begin = 0 if given is None else given - input.storage_offset()
        end = begin + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if begin < 0 or end >= input.numel() or not input.permute(order).is_contiguous():
            raise refusal(node, "it reads memory beyond its input")
        value = self.single[source]
        if order != tuple(range(input.ndim)):
            call = _Call(torch.ops.aten.permute.default, (Operand(0), order), (), (value,))
            (value,) = self.emit(node, call, input.permute(order))
        dense = (("memory_format", torch.contiguous_format),)
        call = _Call(torch.ops.aten.clone.default, (Operand(0),), dense, (value,))
        (value,) = self.emit(node, call, input.permute(order))
        args = (Operand(0), tuple(size), tuple(stride), begin)
        call = _Call(torch.ops.aten.as_strided.default, args, (), (value,))
        (self.single[node],) = self.emit(node, call, node.meta["val"])

    def emit(self, node: fx.Node, call: _Call, *results: Any) -> tuple[int, ...]:
        """Add the node of `call`, which stands for `node`; returns the values of its results."""
        name = self.names.take(identifier(node.name))
        outputs = tuple(self.add_results(node, name, call, results))
        self.nodes.append(
            Node(
                id=len(self.nodes),
                name=name,
                op=op_named(str(call.target)),
                inputs=call.inputs,
                args=call.args,
                kwargs=call.kwargs,
                outputs=outputs,
                module_path=module_path(node),
                source=source_line(node),
                random_draw=self.draw(node, call),
            )
        )
        return outputs

    def draw(self, node: fx.Node, call: _Call) -> int | None:
        """Ordinal of the call's first draw, if it draws."""
        random = torch.Tag.nondeterministic_seeded in call.target.tags
        if not random and not draws_inside(call.packet):
            return None
        draws = num_draws(call.packet, call.args, dict(call.kwargs))
        if not draws:
            return None
        try:
            random_op(str(call.target))
        except CaptureError as error:
            raise CaptureError(error.cause, where=place(node), ways_out=error.ways_out) from None
        self.draws += draws
        return self.draws - draws

    def add_results(
        self, node: fx.Node, name: str, call: _Call, results: tuple[Any, ...]
    ) -> Iterator[int]:
        grad = call.packet not in _NO_GRADIENT and any(
            self.values[value].requires_grad for value in call.inputs
        )
        for position, tensor in enumerate(results):
            if not isinstance(tensor, Tensor):
                raise refusal(node, f"a result is not a tensor but a {type(tensor).__name__}")
            type_ = static_type(node, tensor)
            counts = type_.is_float and not (position and call.packet in _FIRST_ONLY)
            unique = name if len(results) == 1 else self.names.take(f"{name}_{position}")
            self.values.append(
                Value(
                    id=len(self.values),
                    name=unique,
                    type=type_,
                    kind=ValueKind.RESULT,
                    requires_grad=grad and counts,
                )
            )
            yield len(self.values) - 1

    def attribute(self, node: fx.Node, item: Any, inputs: list[int]) -> Attribute:
        """An argument as the IR has it; values it refers to are added to `inputs`."""
        if isinstance(item, fx.Node):
            if item not in self.single:
                raise refusal(node, f"its argument {item.name} is not a tensor")
            value = self.single[item]
            if value not in inputs:
                inputs.append(value)
            return Operand(inputs.index(value))
        if isinstance(item, (list, tuple)):
            return tuple(self.attribute(node, entry, inputs) for entry in item)
        if isinstance(item, torch.device):
            return DEVICE
        plain = (bool, int, float, str, torch.dtype, torch.layout, torch.memory_format)
        if item is None or isinstance(item, plain):
            return item
        raise refusal(node, f"its argument {item!r} is a {type(item).__name__}")

    def outputs(self, node: fx.Node) -> Iterator[Output]:
        """Typed outputs: the loss first, then those of the user, then new contents of buffers."""
        specs = self.exported.signature.output_specs
        (results,) = node.args
        assert isinstance(results, (list, tuple))
        leaves = iter(leaf for leaf in self.results.leaves if isinstance(leaf, TensorLeaf))
        changed: list[Output] = []
        loss_found = self.mode is Mode.INFER
        for result, spec in zip(results, specs, strict=True):
            assert isinstance(result, fx.Node)
            value = self.single[result]
            if spec.kind is ExportedKind.BUFFER_MUTATION:
                path = str(spec.target).removeprefix(f"{MODEL_PREFIX}.")
                target = self.canonical.get(path, (path, ()))[0]
                changed.append(Output(OutputKind.BUFFER, value, target))
            elif spec.kind is not ExportedKind.USER_OUTPUT:
                raise mutation_error(result, spec)
            elif not loss_found:
                loss_found = True
                yield Output(OutputKind.LOSS, value)
            else:
                leaf = next(leaves)
                yield Output(OutputKind.USER, value, leaf.origin, leaf.batch_dim)
        yield from changed


def _moves_only(node: fx.Node) -> bool:
    """Whether a `_to_copy` changes nothing but the device, of which a stage has one."""
    (source,) = node.args
    assert isinstance(source, fx.Node)
    same_type = source.meta["val"].dtype == node.meta["val"].dtype
    return "device" in node.kwargs and same_type and {*node.kwargs} <= {"dtype", "layout", "device"}


def _one_of_one(node: fx.Node, call: _Call) -> _Call:
    """A call that returns a list of one tensor, as one that returns the tensor."""
    if call.packet == "unbind":
        dim = call.args[1] if len(call.args) > 1 else 0
        return replace(call, target=torch.ops.aten.select.int, args=(call.args[0], dim, 0))
    if call.packet == "meshgrid" and isinstance(call.args[0], tuple):
        args = call.args[0]
        return replace(call, target=torch.ops.aten.alias.default, args=args, kwargs=())
    if call.packet in ("split", "split_with_sizes", "chunk", "tensor_split"):
        return replace(call, target=torch.ops.aten.alias.default, args=call.args[:1], kwargs=())
    raise refusal(node, "it returns a list of one tensor")
