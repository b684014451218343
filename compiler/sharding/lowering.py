"""What a rule is given to rewrite one node to its local part, and the graph that it builds.

A `LocalGraph` collects the values and nodes of one rank's graph. A `Lowering` is handed to a rule:
operands are local values already in the layout that the node's strategies ask for, and the rule
emits whatever computes the local results, collectives included.

Collectives are nodes of namespace `cutset` whose adjoints are collectives too (see
`compiler/ir/collectives.py`). All take the name of the mesh axis whose ranks take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..ir.graph import Attribute, Node, Operand, Value, ValueKind
from ..ir.mesh import Layout, Mesh, Partial, Placement, Replicate, Shard, local_offset, local_type
from ..ir.ops import op_named
from ..ir.types import TensorType
from .strategy import OpView, chunk_sizes

__all__ = ["LocalGraph", "Lowering", "Ref"]


_Kind = type[Shard] | type[Partial] | type[Replicate]


_Question = tuple[Any, ...]  # a function, and its arguments before mesh and coordinate


def _answer(question: _Question, mesh: Mesh, coordinate: tuple[int, ...]) -> Any:
    ask, *arguments = question
    return ask(*arguments, mesh, coordinate)


def _start(
    type: TensorType, layout: Layout, dim: int, mesh: Mesh, coordinate: tuple[int, ...]
) -> int:
    return local_offset(type, layout, mesh, coordinate)[dim]


def _index(axis: int, mesh: Mesh, coordinate: tuple[int, ...]) -> int:
    """The own index along axis number `axis`."""
    return coordinate[axis]


@dataclass(frozen=True, slots=True)
class Ref:
    """A local value inside the arguments of an emitted node."""

    id: int


@dataclass(slots=True)
class LocalGraph:
    """The local graph of one rank while it is built."""

    mesh: Mesh
    coordinate: tuple[int, ...]
    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    reserved: frozenset[str] = frozenset()  # names that helpers must not take
    names: set[str] = field(default_factory=set)
    step: int = 0  # of who builds it
    answers: dict[_Question, object] = field(default_factory=dict)  # of what the coordinate says
    askers: dict[_Question, set[int]] = field(default_factory=dict)  # the steps that asked

    def part_type(self, type: TensorType, layout: Layout) -> TensorType:
        """Type of the own part of a tensor of `type` in `layout`."""
        return self._ask((local_type, type, layout))  # type: ignore[no-any-return]

    def part_offset(self, type: TensorType, layout: Layout) -> tuple[int, ...]:
        """Where that part begins in the whole, per dim."""
        return self._ask((local_offset, type, layout))  # type: ignore[no-any-return]

    def part_start(self, type: TensorType, layout: Layout, dim: int) -> int:
        """The same in one dim, which fewer ranks differ in."""
        return self._ask((_start, type, layout, dim))  # type: ignore[no-any-return]

    def _ask(self, question: _Question) -> Any:
        if question not in self.answers:
            self.answers[question] = _answer(question, self.mesh, self.coordinate)
            self.askers[question] = set()
        self.askers[question].add(self.step)
        return self.answers[question]

    def ask_as(self, other: LocalGraph) -> None:
        """Ask what `other` was built with, for the steps that are taken over from it."""
        for question, steps in other.askers.items():
            if question not in self.answers:
                self.answers[question] = _answer(question, self.mesh, self.coordinate)
            self.askers.setdefault(question, set()).update(steps)

    def steps_that_differ(self, coordinate: tuple[int, ...]) -> set[int]:
        """The steps that would be told something else there; others would do the same."""
        changed = (
            question
            for question, answer in self.answers.items()
            if _answer(question, self.mesh, coordinate) != answer
        )
        return {step for question in changed for step in self.askers[question]}

    def type(self, ref: Ref) -> TensorType:
        return self.values[ref.id].type

    def add_value(self, name: str, type: TensorType, kind: ValueKind, **fields: Any) -> Ref:
        """A value called `name`, which must be free."""
        assert name not in self.names, name
        self.names.add(name)
        self.values.append(Value(len(self.values), name, type, kind, **fields))
        return Ref(len(self.values) - 1)

    def free_name(self, stem: str) -> str:
        """`stem`, or if it is taken `stem` with a number."""
        name, number = stem, 1
        while name in self.names or name in self.reserved:
            name, number = f"{stem}_{number}", number + 1
        return name

    def named(self, ref: Ref, name: str, like: Node) -> Ref:
        """`ref` under the name of a value of the whole graph; rules call results what they like."""
        value = self.values[ref.id]
        if value.name == name:
            return ref
        if value.kind is not ValueKind.RESULT or value.name in self.reserved:
            (ref,) = self.emit("aten.alias.default", [ref], [value.type], names=[name], like=like)
            return ref
        self.names.remove(value.name)
        self.names.add(name)
        self.values[ref.id] = replace(value, name=name)
        return ref

    def emit(
        self,
        op: str,
        args: Sequence[Any],
        types: Sequence[TensorType],
        *,
        kwargs: Sequence[tuple[str, Any]] = (),
        names: Sequence[str] = (),
        requires_grad: bool | Sequence[bool] | None = None,
        like: Node,
        random_draw: int | None = None,
    ) -> tuple[Ref, ...]:
        """Append a node; `Ref`s may stand anywhere in `args` and `kwargs`.

        Args:
            types: of its results.
            names: of its results; by default made from the name of `like`.
            requires_grad: of its results; by default a float result does if an operand does.
            like: the global node that it is for: module path, source line, base of names.
        """
        inputs: dict[int, int] = {}

        def fill(item: Any) -> Attribute:
            if isinstance(item, Ref):
                return Operand(inputs.setdefault(item.id, len(inputs)))
            if isinstance(item, (tuple, list)):
                return tuple(fill(entry) for entry in item)
            return item  # type: ignore[no-any-return]

        filled = tuple(map(fill, args)), tuple((name, fill(item)) for name, item in kwargs)
        carried = any(self.values[value].requires_grad for value in inputs)
        flags = [carried and type.is_float for type in types]
        if isinstance(requires_grad, bool):
            flags = [requires_grad] * len(types)
        elif requires_grad is not None:
            flags = list(requires_grad)
        stem = f"{like.name}_{op.split('.')[1]}"
        results = tuple(
            self.add_value(
                names[position] if names else self.free_name(stem),
                type,
                ValueKind.RESULT,
                requires_grad=flag,
            )
            for position, (type, flag) in enumerate(zip(types, flags, strict=True))
        )
        number = len(self.nodes)
        self.nodes.append(
            Node(
                id=number,
                name=self.values[results[0].id].name if results else f"{like.name}_{number}",
                op=op_named(op),
                inputs=tuple(inputs),
                args=filled[0],
                kwargs=filled[1],
                outputs=tuple(ref.id for ref in results),
                module_path=like.module_path,
                source=like.source,
                random_draw=random_draw,
            )
        )
        return results

    # -- collectives over one axis -------------------------------------------------------------

    def _axis(self, axis: str) -> tuple[int, int]:
        """(number of parts, own index) along `axis`."""
        position = [entry.name for entry in self.mesh.axes].index(axis)
        return self.mesh.axes[position].size, self._ask((_index, position))

    def all_reduce(self, ref: Ref, axis: str, like: Node, reduction: str = "sum") -> Ref:
        """Partial -> Replicate. Its gradient passes unchanged; max and min have none."""
        carries = self.values[ref.id].requires_grad and reduction == "sum"
        (result,) = self.emit(
            "cutset.all_reduce.default",
            (ref, axis, reduction),
            (self.type(ref),),
            requires_grad=carries,
            like=like,
        )
        return result

    def sum_gradient(self, ref: Ref, axis: str, like: Node) -> Ref:
        """Replicate for use on parts: the identity, whose adjoint sums the gradient's terms."""
        if not self.values[ref.id].requires_grad:
            return ref
        (result,) = self.emit(
            "cutset.sum_gradient.default", (ref, axis), (self.type(ref),), like=like
        )
        return result

    def as_partial(self, ref: Ref, axis: str, like: Node) -> Ref:
        """Replicate -> Partial: the value on the first rank, zeros elsewhere. Its gradient passes
        unchanged on all ranks."""
        index = self._axis(axis)[1]
        (result,) = self.emit(
            "cutset.as_partial.default", (ref, index), (self.type(ref),), like=like
        )
        return result

    def pad_part(self, ref: Ref, axis: str, dim: int, size: int, like: Node) -> Ref:
        """Shard(dim) -> Partial: the own part among zeros, `size` long in `dim`. The gradient of a
        term is complete on every rank, so the own part of it is that of the part."""
        parts, index = self._axis(axis)
        type = self.type(ref)
        before = sum(chunk_sizes(size, parts)[:index])
        pads = (before, size - before - type.shape[dim])
        (result,) = self.emit(
            "aten.constant_pad_nd.default",
            (ref, (0, 0) * (len(type.shape) - 1 - dim) + pads),
            (_resized(type, dim, size),),
            like=like,
        )
        return result

    def shard(self, ref: Ref, axis: str, dim: int, like: Node) -> Ref:
        """Replicate -> Shard(dim): the own part. Adjoint: all-gather."""
        parts, index = self._axis(axis)
        type = self.type(ref)
        sizes = chunk_sizes(type.shape[dim], parts)
        (result,) = self.emit(
            "cutset.shard.default",
            (ref, axis, dim, sizes, index),
            (_resized(type, dim, sizes[index]),),
            like=like,
        )
        return result

    def all_gather(
        self,
        ref: Ref,
        axis: str,
        dim: int,
        size: int,
        like: Node,
        *,
        partial_gradient: bool = False,
    ) -> Ref:
        """Shard(dim) -> Replicate, `size` long in `dim`.

        Adjoint: the own part of a complete gradient; with `partial_gradient`, reduce-scatter.
        """
        parts, index = self._axis(axis)
        sizes = chunk_sizes(size, parts)
        (result,) = self.emit(
            "cutset.all_gather.default",
            (ref, axis, dim, sizes, index, partial_gradient),
            (_resized(self.type(ref), dim, size),),
            like=like,
        )
        return result

    def reduce_scatter(self, ref: Ref, axis: str, dim: int, like: Node) -> Ref:
        """Partial -> Shard(dim). Adjoint: all-gather."""
        parts, index = self._axis(axis)
        type = self.type(ref)
        sizes = chunk_sizes(type.shape[dim], parts)
        (result,) = self.emit(
            "cutset.reduce_scatter.default",
            (ref, axis, dim, sizes, index),
            (_resized(type, dim, sizes[index]),),
            like=like,
        )
        return result

    def all_to_all(
        self, ref: Ref, axis: str, *, from_dim: int, from_size: int, to_dim: int, like: Node
    ) -> Ref:
        """Shard(from_dim) -> Shard(to_dim). Adjoint: the way back.

        `from_size` is the size of `from_dim` when whole.
        """
        parts, index = self._axis(axis)
        type = self.type(ref)
        gathered, split = chunk_sizes(from_size, parts), chunk_sizes(type.shape[to_dim], parts)
        result_type = _resized(_resized(type, from_dim, from_size), to_dim, split[index])
        (result,) = self.emit(
            "cutset.all_to_all.default",
            (ref, axis, from_dim, gathered, to_dim, split, index),
            (result_type,),
            like=like,
        )
        return result


def _resized(type: TensorType, dim: int, size: int) -> TensorType:
    return TensorType((*type.shape[:dim], size, *type.shape[dim + 1 :]), type.dtype)


@dataclass(frozen=True, slots=True)
class Lowering:
    """One node on its way to a local graph.

    Args:
        view: the global node.
        local: the local graph; rules emit into it through the methods below.
        inputs: local values of `node.inputs`, laid out as `input_layouts` says. A replicated
            operand of a node that works on parts is already such that its gradient may be partial.
        input_layouts, output_layouts: one placement per mesh axis.
    """

    view: OpView
    local: LocalGraph
    inputs: tuple[Ref, ...]
    input_layouts: tuple[Layout, ...]
    output_layouts: tuple[Layout, ...]

    @property
    def mesh(self) -> Mesh:
        return self.local.mesh

    @property
    def node(self) -> Node:
        return self.view.node

    def input_placement(self, position: int, axis: int) -> Placement:
        return self.input_layouts[position].placements[axis]

    def output_type(self, position: int = 0) -> TensorType:
        """Type of the local part of result `position`."""
        layout = self.output_layouts[position]
        return self.local.part_type(self.view.output(position), layout)

    def output_offset(self, position: int = 0) -> tuple[int, ...]:
        """Where the local part of result `position` begins in the whole, per dim."""
        layout = self.output_layouts[position]
        return self.local.part_offset(self.view.output(position), layout)

    def input_start(self, position: int, dim: int) -> int:
        """Where the local part of operand `position` begins in `dim` of the whole."""
        return self.local.part_start(self.view.input(position), self.input_layouts[position], dim)

    def type(self, ref: Ref) -> TensorType:
        return self.local.type(ref)

    def filled(self, item: Attribute) -> Any:
        """An attribute of the node with `Ref`s in place of its operands."""
        if isinstance(item, Operand):
            return self.inputs[item.index]
        if isinstance(item, tuple):
            return tuple(self.filled(entry) for entry in item)
        return item

    def same(
        self,
        *,
        op: str | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Sequence[tuple[str, Any]] | None = None,
    ) -> tuple[Ref, ...]:
        """Emit the node itself on the local operands, results typed by their layouts.

        Args:
            op, args, kwargs: in place of the node's own.
        """
        node = self.node
        values = [self.view.graph.values[value] for value in node.outputs]
        return self.local.emit(
            op or node.op.name,
            self.filled(node.args) if args is None else args,
            [self.output_type(position) for position in range(len(node.outputs))],
            kwargs=[(k, self.filled(v)) for k, v in node.kwargs] if kwargs is None else kwargs,
            names=[value.name for value in values],
            requires_grad=[value.requires_grad for value in values],
            like=node,
            random_draw=node.random_draw,
        )

    def emit(
        self,
        op: str,
        args: Sequence[Any],
        type: TensorType,
        *,
        kwargs: Sequence[tuple[str, Any]] = (),
        requires_grad: bool | None = None,
    ) -> Ref:
        """Emit a helper node with one result."""
        (result,) = self.local.emit(
            op, args, (type,), kwargs=kwargs, requires_grad=requires_grad, like=self.node
        )
        return result

    def all_reduce(self, ref: Ref, axis: int, reduction: str = "sum") -> Ref:
        """Sum (or max, min) over mesh axis number `axis`: Partial -> Replicate."""
        return self.local.all_reduce(ref, self.mesh.axes[axis].name, self.node, reduction)

    def sum_gradient(self, ref: Ref, axis: int) -> Ref:
        """A replicated value for use on parts along mesh axis number `axis`."""
        return self.local.sum_gradient(ref, self.mesh.axes[axis].name, self.node)

    def as_partial(self, ref: Ref, axis: int) -> Ref:
        """A replicated value as terms along mesh axis number `axis`."""
        return self.local.as_partial(ref, self.mesh.axes[axis].name, self.node)

    def axes_with(self, kind: _Kind, layout: Layout) -> tuple[int, ...]:
        """Numbers of the mesh axes on which `layout` has a placement of that kind."""
        return tuple(i for i, item in enumerate(layout.placements) if isinstance(item, kind))

    def axes_sharding(self, layout: Layout, dim: int) -> tuple[int, ...]:
        """Numbers of the mesh axes that shard `dim` in `layout`."""
        return tuple(i for i, item in enumerate(layout.placements) if item == Shard(dim))
