"""Graphs made by hand, for tests of everything that reads graphs.

    build = GraphBuilder("mlp", Mode.TRAIN)
    x = build.input("x", (4, 8))
    w = build.parameter("w", (8, 8))
    h = build.op("aten.linear.default", x, w, module="layers.0")
    build.loss(build.op("aten.mean.default", h))
    graph = build.build()

Result types follow from running the operator on fake tensors.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cutset.compiler.ir.graph import (
    Attribute,
    Graph,
    Mode,
    Node,
    Operand,
    Output,
    OutputKind,
    Value,
    ValueKind,
)
from cutset.compiler.ir.ops import op_named, resolve
from cutset.compiler.ir.types import TensorType

__all__ = ["GraphBuilder", "mlp", "residual", "tied_embedding"]


class GraphBuilder:
    """Builds a `Graph` value by value; every method returns the `Value`s that it makes."""

    def __init__(self, name: str = "model", mode: Mode = Mode.INFER) -> None:
        self.name = name
        self.mode = mode
        self._values: list[Value] = []
        self._nodes: list[Node] = []
        self._outputs: list[Output] = []
        self._taken: set[str] = set()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def input(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        *,
        batch_dim: int | None = 0,
        origin: str | None = None,
        requires_grad: bool = False,
    ) -> Value:
        """An input, by default the next positional argument, split along dim 0."""
        position = sum(value.kind is ValueKind.INPUT for value in self._values)
        return self._add(
            name,
            TensorType(shape, dtype),
            ValueKind.INPUT,
            origin=f"args[{position}]" if origin is None else origin,
            requires_grad=requires_grad,
            batch_dim=batch_dim,
        )

    def parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        *,
        aliases: tuple[str, ...] = (),
        requires_grad: bool | None = None,
    ) -> Value:
        """A parameter called `name`; it requires a gradient in TRAIN mode unless told otherwise."""
        wants = self.mode is Mode.TRAIN if requires_grad is None else requires_grad
        return self._add(
            name.replace(".", "_"),
            TensorType(shape, dtype),
            ValueKind.PARAMETER,
            origin=name,
            requires_grad=wants,
            aliases=aliases,
        )

    def buffer(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Value:
        type = TensorType(shape, dtype)
        return self._add(name.replace(".", "_"), type, ValueKind.BUFFER, origin=name)

    def constant(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Value:
        type = TensorType(shape, dtype)
        return self._add(name.replace(".", "_"), type, ValueKind.CONSTANT, origin=name)

    def boundary(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        *,
        requires_grad: bool | None = None,
    ) -> Value:
        """A value received from another stage (stage graphs only)."""
        type = TensorType(shape, dtype)
        train = self.mode is Mode.TRAIN and type.is_float
        wants = train if requires_grad is None else requires_grad
        return self._add(name, type, ValueKind.BOUNDARY, requires_grad=wants)

    def op(self, target: str, *args: object, **options: object) -> Value:
        """A call of operator `target` that returns one tensor.

        Options `name`, `module`, `source` and `random_draw` describe the node; all others are
        keyword arguments of the operator. Tensor arguments are `Value`s, nested where need be.
        """
        results = self.ops(target, *args, **options)
        assert len(results) == 1, f"{target} returns {len(results)} tensors: use GraphBuilder.ops"
        return results[0]

    def ops(self, target: str, *args: object, **options: object) -> tuple[Value, ...]:
        """As `op`, for operators that return several tensors."""
        op = op_named(target)
        name = self._unique(str(options.pop("name", None) or op.packet))
        module = str(options.pop("module", ""))
        source = str(options.pop("source", ""))
        draw = options.pop("random_draw", None)
        inputs: list[int] = []
        call = tuple(_attribute(item, inputs) for item in args)
        kwargs = tuple((key, _attribute(item, inputs)) for key, item in options.items())
        grad = any(self._values[value].requires_grad for value in inputs)
        types = self._infer(op_named(target).name, args, options)
        results = tuple(
            self._add(
                name if len(types) == 1 else f"{name}_{position}",
                type,
                ValueKind.RESULT,
                requires_grad=grad and type.is_float and op.packet != "detach",
                reserved=len(types) == 1,
            )
            for position, type in enumerate(types)
        )
        self._nodes.append(
            Node(
                id=len(self._nodes),
                name=name,
                op=op,
                inputs=tuple(inputs),
                args=call,
                kwargs=kwargs,
                outputs=tuple(value.id for value in results),
                module_path=module,
                source=source,
                random_draw=draw if isinstance(draw, int) else None,
            )
        )
        return results

    def output(
        self,
        value: Value,
        kind: OutputKind = OutputKind.USER,
        *,
        target: str | None = None,
        batch_dim: int | None = 0,
    ) -> Value:
        """Return `value` from the graph; USER outputs are numbered unless `target` is given."""
        if target is None:
            number = sum(output.kind is OutputKind.USER for output in self._outputs)
            target = str(number) if kind is OutputKind.USER else ""
        dim = batch_dim if value.type.shape else None
        self._outputs.append(Output(kind, value.id, target, dim))
        return value

    def loss(self, value: Value) -> Value:
        """Return `value` as the loss."""
        return self.output(value, OutputKind.LOSS)

    def build(self) -> Graph:
        inputs = tuple(value.id for value in self._values if value.kind is ValueKind.INPUT)
        return Graph(
            self.name,
            self.mode,
            tuple(self._values),
            tuple(self._nodes),
            inputs,
            tuple(self._outputs),
        )

    def _add(
        self,
        name: str,
        type: TensorType,
        kind: ValueKind,
        *,
        origin: str = "",
        requires_grad: bool = False,
        batch_dim: int | None = None,
        aliases: tuple[str, ...] = (),
        reserved: bool = False,
    ) -> Value:
        value = Value(
            len(self._values),
            name if reserved else self._unique(name),
            type,
            kind,
            origin,
            requires_grad,
            batch_dim,
            aliases,
        )
        self._values.append(value)
        return value

    def _unique(self, name: str) -> str:
        candidate, number = name, 0
        while candidate in self._taken:
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        return candidate

    def _infer(
        self, target: str, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[TensorType, ...]:
        with self._fake:
            fakes: dict[int, torch.Tensor] = {}
            call = [_fake(item, fakes) for item in args]
            named = {key: _fake(item, fakes) for key, item in kwargs.items()}
            result = resolve(op_named(target))(*call, **named)
        tensors = [result] if isinstance(result, torch.Tensor) else list(result)
        return tuple(TensorType.of(item) for item in tensors if isinstance(item, torch.Tensor))


def _attribute(item: object, inputs: list[int]) -> Attribute:
    """`item` with `Value`s replaced by operands, whose ids are appended to `inputs`."""
    if isinstance(item, Value):
        if item.id not in inputs:
            inputs.append(item.id)
        return Operand(inputs.index(item.id))
    if isinstance(item, (tuple, list)):
        return tuple(_attribute(part, inputs) for part in item)
    return item  # type: ignore[return-value]


def _fake(item: object, fakes: dict[int, torch.Tensor]) -> object:
    if isinstance(item, Value):
        if item.id not in fakes:
            fakes[item.id] = torch.empty(item.type.shape, dtype=item.type.dtype)
        return fakes[item.id]
    if isinstance(item, (tuple, list)):
        return [_fake(part, fakes) for part in item]
    return item


def mlp(num_layers: int = 4, width: int = 8, batch: int = 4, mode: Mode = Mode.TRAIN) -> Graph:
    """`num_layers` times linear + relu; in TRAIN mode with a mean-square loss to a target."""
    build = GraphBuilder("mlp", mode)
    hidden = build.input("x", (batch, width))
    target = build.input("y", (batch, width), origin="targets[0]") if mode is Mode.TRAIN else None
    for layer in range(num_layers):
        weight = build.parameter(f"layers.{layer}.weight", (width, width))
        bias = build.parameter(f"layers.{layer}.bias", (width,))
        place = {"module": f"layers.{layer}", "source": "model.py:7"}
        hidden = build.op("aten.linear.default", hidden, weight, bias, **place)
        hidden = build.op("aten.relu.default", hidden, **place)
    build.output(hidden)
    if target is not None:
        build.loss(build.op("aten.mse_loss.default", hidden, target, source="model.py:9"))
    return build.build()


def residual(num_blocks: int = 3, width: int = 8, batch: int = 4) -> Graph:
    """A training graph with a skip around every block, one skip from first to last, and dropout."""
    build = GraphBuilder("residual", Mode.TRAIN)
    first = hidden = build.input("x", (batch, width))
    for block in range(num_blocks):
        weight = build.parameter(f"blocks.{block}.weight", (width, width))
        path = f"blocks.{block}"
        branch = build.op("aten.linear.default", hidden, weight, module=path)
        branch = build.op("aten.dropout.default", branch, 0.1, True, module=path, random_draw=block)
        hidden = build.op("aten.add.Tensor", hidden, branch, module=path)
        if block == 0:
            first = hidden
    hidden = build.op("aten.add.Tensor", hidden, first, alpha=0.5)
    build.loss(build.op("aten.mean.default", hidden))
    return build.build()


def tied_embedding(vocabulary: int = 16, width: int = 8, batch: int = 2, length: int = 5) -> Graph:
    """Embedding, a causal mask from factories, one attention, and a tied output projection."""
    build = GraphBuilder("tied", Mode.TRAIN)
    ids = build.input("ids", (batch, length), torch.int64, origin="kwargs.ids")
    weight = build.parameter("wte.weight", (vocabulary, width), aliases=("head.weight",))
    mixer = build.parameter("mix.weight", (width, width))
    hidden = build.op("aten.embedding.default", weight, ids, module="wte")
    ones = build.op("aten.ones.default", (length, length), dtype=torch.bool, name="mask")
    mask = build.op("aten.tril.default", ones)
    query = build.op("aten.linear.default", hidden, mixer, module="mix")
    query = build.op("aten.unsqueeze.default", query, 1, module="mix")
    mixed = build.op(
        "aten.scaled_dot_product_attention.default", query, query, query, mask, module="mix"
    )
    mixed = build.op("aten.view.default", mixed, (batch * length, width), module="mix")
    logits = build.op("aten.linear.default", mixed, weight, module="head")
    flat = build.op("aten.view.default", ids, (batch * length,))
    build.output(logits)
    build.loss(build.op("aten.cross_entropy_loss.default", logits, flat, module="head"))
    return build.build()
