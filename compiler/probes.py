"""Small stages whose times tell how fast a device is: each repeats one operator in a chain.

They run through the kernels of `runtime/kernels.py`, as stages of a model do, so that what is
measured is what is predicted. `work_of` asks the cost model itself what it counts of a stage, so
that a fit and a price can never disagree about bytes or operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..cost_models.ops import price
from ..cost_models.stages import in_weights
from .ir.cluster import PHASES, DeviceType, OpCost
from .ir.graph import Attribute, Graph, Mode, Node, Operand, Output, OutputKind, Value, ValueKind
from .ir.ops import Category, op_named
from .ir.program import (
    BackwardInput,
    BackwardWeight,
    Forward,
    Program,
    StageProgram,
)
from .ir.types import DTYPES_BY_NAME, TensorType

__all__ = [
    "Probe",
    "Work",
    "instruction_program",
    "op_probes",
    "rate_probes",
    "tiny_probe",
    "work_of",
]

_SIDES = {"matmul": (32, 64, 128, 256, 384), "attention": (16, 32, 64, 128, 256)}
_ROWS = 4  # of a product, for one of its other sides
_HEADS = 32  # of all rows of a batch
_CHANNELS = ((8, 8), (16, 16), (32, 24), (64, 32))  # and the side of the image
_MEMORY_BYTES = tuple(float(1 << power) for power in (12, 15, 18, 20, 22, 24, 26))
_OP_ELEMENTS = tuple(1 << power for power in (8, 13, 17, 21))
_LARGER_ON_CUDA = {"matmul": (768, 1536, 3072), "attention": (512, 1024, 2048)}
_MORE_ON_CUDA = (1 << 23, 1 << 25)
_COLD_BYTES, _MOST_COPIES = 1 << 25, 16
_MOST_FLOPS, _MOST_BYTES = 2e8, 1.6e7  # of the forward of all copies
_COLUMNS = 256
_CHAIN = 4


@dataclass(frozen=True, slots=True)
class Probe:
    """One stage to time.

    Args:
        kind: one of `CURVES`, or `op`.
        name: what is repeated: an operator, or a category of them.
        dtype: short name.
        size: operations or bytes of one operator, to order probes by.
        repeats: how often the operator is in the stage.
        program: with that one stage.
        phases: which say something about it: 0 forward, 1 input gradients, 2 weight gradients.
    """

    kind: str
    name: str
    dtype: str
    size: float
    repeats: int
    program: Program
    phases: tuple[int, ...] = (0, 1, 2)

    @property
    def copies(self) -> int:
        """Sets of tensors to run on in turn, so that what a stage is given has left the caches.

        So it is in a model, where only what was just made is in them. A large stage runs on few.
        """
        values = self.program.stages[0].graph.values
        given = sum(v.type.num_bytes for v in values if v.kind is not ValueKind.RESULT)
        most = _MOST_FLOPS if self.kind in _SIDES else _MOST_BYTES
        return int(
            max(1, min(_COLD_BYTES / given, most / (self.size * self.repeats), _MOST_COPIES))
        )

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.size:.3g}"


@dataclass(frozen=True, slots=True)
class Work:
    """What the cost model counts of a phase of a probe, for one operator.

    Args:
        flops: of products.
        num_bytes: read and written, where `passes` are one.
        kernels: how often the overhead counts, where `kernels` are one.
    """

    flops: float
    num_bytes: float
    kernels: float


# every operator passes over memory once, in one kernel
_UNIT = DeviceType(
    "unit",
    "cpu",
    1,
    1.0,
    (("f32", math.inf),),
    op_costs=(
        OpCost("random", PHASES[0], 0.0, ((1.0, math.inf),)),
        *(OpCost(category.value, phase, 1.0) for category in Category for phase in PHASES),
    ),
)


def work_of(probe: Probe) -> tuple[Work, ...]:
    """By phase, what one operator of `probe` does as the cost model counts it."""
    graph = probe.program.stages[0].graph
    dtypes = tuple((name, math.inf) for name in DTYPES_BY_NAME)
    bytes_alone = replace(_UNIT, flops_per_second=dtypes)
    flops_alone = replace(
        _UNIT, memory_bytes_per_second=math.inf, flops_per_second=tuple((d, 1.0) for d, _ in dtypes)
    )
    kernels_alone = replace(bytes_alone, memory_bytes_per_second=math.inf, overhead_seconds=1.0)
    columns = [_phases(graph, kind) for kind in (flops_alone, bytes_alone, kernels_alone)]
    return tuple(Work(*(column[phase] / probe.repeats for column in columns)) for phase in range(3))


def _phases(graph: Graph, kind: DeviceType) -> tuple[float, float, float]:
    costs = price(graph, kind)
    forward = sum(cost.forward_seconds for cost in costs)
    if graph.mode is Mode.INFER:
        return forward, 0.0, 0.0
    weights = sum(in_weights(graph, costs))
    return forward, sum(cost.backward_seconds for cost in costs) - weights, weights


# -- stages ----------------------------------------------------------------------------------------


class _Chain:
    """A stage graph built value by value."""

    def __init__(self, name: str, mode: Mode) -> None:
        self._name, self._mode = name, mode
        self._values: list[Value] = []
        self._nodes: list[Node] = []
        self._draws = 0

    def value(
        self,
        kind: ValueKind,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        trained: bool = True,
    ) -> Value:
        """A tensor that is given; `trained`: it has a gradient, in training."""
        name = f"v{len(self._values)}"
        type = TensorType(shape, dtype)
        wants = trained and self._mode is Mode.TRAIN and type.is_float
        origin = "" if kind is ValueKind.BOUNDARY else name
        batch_dim = 0 if kind is ValueKind.INPUT else None
        self._values.append(Value(len(self._values), name, type, kind, origin, wants, batch_dim))
        return self._values[-1]

    def op(
        self,
        target: str,
        shape: tuple[int, ...],
        *args: object,
        draws: bool = False,
        others: tuple[tuple[int, ...], ...] = (),
    ) -> Value:
        """The first result, of `shape` and with the dtype of the first float operand; `others` are
        shapes of further ones, which nobody reads."""
        inputs: list[Value] = []

        def placed(item: object) -> Attribute:
            if isinstance(item, tuple | list):
                return tuple(placed(entry) for entry in item)
            if not isinstance(item, Value):
                return item  # type: ignore[return-value]
            if item not in inputs:
                inputs.append(item)
            return Operand(inputs.index(item))

        arguments = tuple(placed(item) for item in args)
        floats = [value for value in inputs if value.type.is_float]
        wants = any(value.requires_grad for value in inputs)
        number = len(self._nodes)
        results = [
            Value(
                len(self._values) + place,
                f"v{len(self._values) + place}",
                TensorType(made, floats[0].type.dtype),
                ValueKind.RESULT,
                requires_grad=wants and not place,
            )
            for place, made in enumerate((shape, *others))
        ]
        self._values += results
        self._nodes.append(
            Node(
                number,
                f"n{number}",
                op_named(target),
                tuple(value.id for value in inputs),
                arguments,
                (),
                tuple(result.id for result in results),
                random_draw=self._draws if draws else None,
            )
        )
        self._draws += draws
        return results[0]

    def program(self, result: Value) -> Program:
        """A program with this one stage, which returns `result`."""
        output = Output(OutputKind.BOUNDARY, result.id, result.name)
        graph = Graph(
            self._name, self._mode, tuple(self._values), tuple(self._nodes), (), (output,)
        )
        stage = StageProgram(
            0,
            graph,
            ((result.name, (1,)),),
            tuple((value.name, 0) for value in graph.values_of(ValueKind.BOUNDARY)),
        )
        return Program.unscheduled(self._mode, (stage,))


def rate_probes(kind: str, dtype: str, *, on_cuda: bool) -> Iterator[Probe]:
    """Probes for a curve of `kind`, from small to large."""
    element = DTYPES_BY_NAME[dtype]
    if kind == "memory":
        yield from _memory_probes(dtype, element, on_cuda)
        return
    if kind == "convolution":
        for channels, side in _CHANNELS:
            yield _convolution(channels, side, dtype, element)
        return
    sides = _SIDES[kind] + (_LARGER_ON_CUDA[kind] if on_cuda else ())
    for side in sides:
        yield (_matmul if kind == "matmul" else _attention)(side, dtype, element)


def _memory_probes(dtype: str, element: torch.dtype, on_cuda: bool) -> Iterator[Probe]:
    sizes = _MEMORY_BYTES + ((float(1 << 28), float(1 << 30)) if on_cuda else ())
    for size in sizes:
        elements = int(size) // (3 * element.itemsize)
        chain = _Chain("add", Mode.INFER)
        first, second = (chain.value(ValueKind.BOUNDARY, (elements,), element) for _ in range(2))
        for _ in range(_CHAIN):
            first = chain.op("aten.add.Tensor", (elements,), first, second)
        yield Probe("memory", "add", dtype, size, _CHAIN, chain.program(first), (0,))


def _matmul(side: int, dtype: str, element: torch.dtype) -> Probe:
    chain = _Chain("linear", Mode.TRAIN)
    shape = (_ROWS * side, side)
    value = chain.value(ValueKind.BOUNDARY, shape, element)
    for _ in range(_CHAIN):
        weight = chain.value(ValueKind.PARAMETER, (side, side), element)
        value = chain.op("aten.linear.default", shape, value, weight)
    size = 2.0 * _ROWS * side**3
    return Probe("matmul", "linear", dtype, size, _CHAIN, chain.program(value))


def _attention(length: int, dtype: str, element: torch.dtype) -> Probe:
    chain = _Chain("attention", Mode.TRAIN)
    shape = (_HEADS // 4, 4, length, 64)
    query, key, value = (chain.value(ValueKind.BOUNDARY, shape, element) for _ in range(3))
    target = "aten.scaled_dot_product_attention.default"
    result = chain.op(target, shape, query, key, value)
    size = 4.0 * _HEADS * length * length * 64
    return Probe("attention", "attention", dtype, size, 1, chain.program(result), (0, 1))


def _convolution(channels: int, side: int, dtype: str, element: torch.dtype) -> Probe:
    chain = _Chain("conv2d", Mode.TRAIN)
    shape = (4, channels, side, side)
    value = chain.value(ValueKind.BOUNDARY, shape, element)
    for _ in range(2):
        weight = chain.value(ValueKind.PARAMETER, (channels, channels, 3, 3), element)
        value = chain.op("aten.conv2d.default", shape, value, weight, None, (1, 1), (1, 1))
    size = 2.0 * math.prod(shape) * channels * 9
    return Probe("convolution", "conv2d", dtype, size, 2, chain.program(value))


def tiny_probe(repeats: int) -> Probe:
    """So little work, `repeats` times, that its time is that of issuing it."""
    chain = _Chain("tiny", Mode.INFER)
    first, second = (chain.value(ValueKind.BOUNDARY, (8,), torch.float32) for _ in range(2))
    for _ in range(repeats):
        first = chain.op("aten.add.Tensor", (8,), first, second)
    return Probe("op", "tiny", "f32", 96.0, repeats, chain.program(first), (0,))


def instruction_program(mode: Mode, count: int, memory_limit_bytes: int) -> Program:
    """A step of `count` microbatches of next to no work: what is left is what instructions take."""
    chain = _Chain("instructions", mode)
    given = chain.value(ValueKind.INPUT, (1, 8), torch.float32, trained=False)
    weight = chain.value(ValueKind.PARAMETER, (8, 8), torch.float32)
    result = chain.op("aten.linear.default", (1, 8), given, weight)
    if mode is Mode.TRAIN:
        result = chain.op("aten.mean.default", (), result)
    program = chain.program(result)
    (stage,) = program.stages
    kind = OutputKind.LOSS if mode is Mode.TRAIN else OutputKind.USER
    output = Output(kind, result.id, "" if mode is Mode.TRAIN else result.name)
    graph = replace(stage.graph, outputs=(output,), inputs=(given.id,))
    kinds = (Forward, BackwardInput, BackwardWeight) if mode is Mode.TRAIN else (Forward,)
    instructions = [kind(0, microbatch) for microbatch in range(count) for kind in kinds]
    return replace(
        program,
        num_microbatches=count,
        stages=(replace(stage, graph=graph, consumers=(), producers=()),),
        instructions=tuple(instructions),
        memory_limit_bytes=memory_limit_bytes,
    )


# -- kinds of operators ----------------------------------------------------------------------------

# (name of the cost, operator): what takes one tensor and gives one of the same shape
_UNARY = (
    ("relu", "aten.relu.default"),
    ("gelu", "aten.gelu.default"),
    ("silu", "aten.silu.default"),
    ("tanh", "aten.tanh.default"),
)


def op_probes(dtype: str, *, on_cuda: bool) -> Iterator[list[Probe]]:
    """Probes of every kind of operator that has a cost of its own, from small to large."""
    element = DTYPES_BY_NAME[dtype]
    counts = _OP_ELEMENTS + (_MORE_ON_CUDA if on_cuda else ())
    shapes = [(elements // _COLUMNS, _COLUMNS) for elements in counts]
    for name, target in _UNARY:
        yield [_chained(name, target, shape, dtype, element) for shape in shapes]
    yield [_chained("softmax", "aten.softmax.int", s, dtype, element, -1) for s in shapes]
    for target in ("mul", "add"):
        yield [_binary(target, shape, dtype, element) for shape in shapes]
    for make in (_norm, _random, _embedding, _loss, _copy, _clone, _reduction, _index):
        yield [make(shape, dtype, element) for shape in shapes]
    for make in (_batch_norm, _pooling):
        yield [make(shape, dtype, element) for shape in shapes[1:]]


def _probe(name: str, dtype: str, shape: tuple[int, ...], count: int, program: Program) -> Probe:
    size = float(math.prod(shape) * DTYPES_BY_NAME[dtype].itemsize)
    return Probe("op", name, dtype, size, count, program)


def _chained(
    name: str,
    target: str,
    shape: tuple[int, ...],
    dtype: str,
    element: torch.dtype,
    *more: object,
) -> Probe:
    chain = _Chain(name, Mode.TRAIN)
    value = chain.value(ValueKind.BOUNDARY, shape, element)
    for _ in range(_CHAIN):
        value = chain.op(target, shape, value, *more)
    return _probe(name, dtype, shape, _CHAIN, chain.program(value))


def _norm(shape: tuple[int, ...], dtype: str, element: torch.dtype) -> Probe:
    chain = _Chain("layer_norm", Mode.TRAIN)
    value = chain.value(ValueKind.BOUNDARY, shape, element)
    for _ in range(_CHAIN):
        scale, shift = (chain.value(ValueKind.PARAMETER, shape[1:], element) for _ in range(2))
        value = chain.op("aten.layer_norm.default", shape, value, shape[1:], scale, shift)
    return _probe("norm", dtype, shape, _CHAIN, chain.program(value))


def _random(shape: tuple[int, ...], dtype: str, element: torch.dtype) -> Probe:
    chain = _Chain("dropout", Mode.TRAIN)
    value = chain.value(ValueKind.BOUNDARY, shape, element)
    for _ in range(2):
        value = chain.op("aten.dropout.default", shape, value, 0.1, True, draws=True)
    return _probe("random", dtype, shape, 2, chain.program(value))


def _embedding(shape: tuple[int, ...], dtype: str, element: torch.dtype) -> Probe:
    chain = _Chain("embedding", Mode.TRAIN)
    table = chain.value(ValueKind.PARAMETER, (4 * shape[0], shape[1]), element)
    rows = chain.value(ValueKind.BOUNDARY, shape[:1], torch.int64)
    result = chain.op("aten.embedding.default", shape, table, rows)
    return _probe("embedding", dtype, shape, 1, chain.program(result))


def _loss(shape: tuple[int, ...], dtype: str, element: torch.dtype) -> Probe:
    chain = _Chain("cross_entropy_loss", Mode.TRAIN)
    scores = chain.value(ValueKind.BOUNDARY, shape, element)
    classes = chain.value(ValueKind.BOUNDARY, shape[:1], torch.int64)
    result = chain.op("aten.cross_entropy_loss.default", (), scores, classes)
    return _probe("loss", dtype, shape, 1, chain.program(result))


def _binary(name: str, shape: tuple[int, ...], dtype: str, element: torch.dtype) -> Probe:
    chain = _Chain(name, Mode.TRAIN)
    value = chain.value(ValueKind.BOUNDARY, shape, element)
    for _ in range(_CHAIN):
        other = chain.value(ValueKind.BOUNDARY, shape, element)
        value = chain.op(f"aten.{name}.Tensor", shape, value, other)
    title = "elementwise" if name == "mul" else name
    return _probe(title, dtype, shape, _CHAIN, chain.program(value))


def _copy(shape: tuple[int, ...], dtype: str, element: torch.dtype) -> Probe:
    chain = _Chain("cat", Mode.TRAIN)
    half = (2 * shape[0], shape[1] // 4)
    first, second = (chain.value(ValueKind.BOUNDARY, half, element) for _ in range(2))
    result = chain.op("aten.cat.default", (half[0], 2 * half[1]), (first, second), 1)
    return _probe("copy", dtype, shape, 1, chain.program(result))


def _clone(shape: tuple[int, ...], dtype: str, element: torch.dtype) -> Probe:
    """Of a permuted tensor, as heads of attention are brought together."""
    chain = _Chain("clone", Mode.TRAIN)
    rows, width = shape[0] * 4, shape[1] // 4
    value = chain.value(ValueKind.BOUNDARY, (rows // 4, 4, width), element)
    for _ in range(2):
        moved = (value.type.shape[1], value.type.shape[0], width)
        turned = chain.op("aten.transpose.int", moved, value, 0, 1)
        value = chain.op("aten.contiguous.default", moved, turned)
    return _probe("clone", dtype, shape, 2, chain.program(value))


def _reduction(shape: tuple[int, ...], dtype: str, element: torch.dtype) -> Probe:
    chain = _Chain("mean", Mode.TRAIN)
    value = chain.value(ValueKind.BOUNDARY, shape, element)
    result = chain.op("aten.mean.dim", (shape[0], 1), value, (-1,), True)
    return _probe("reduction", dtype, shape, 1, chain.program(result))


def _index(shape: tuple[int, ...], dtype: str, element: torch.dtype) -> Probe:
    chain = _Chain("index", Mode.TRAIN)
    value = chain.value(ValueKind.BOUNDARY, shape, element)
    rows = chain.value(ValueKind.BOUNDARY, shape[:1], torch.int64)
    result = chain.op("aten.index.Tensor", shape, value, (rows,))
    return _probe("indexing", dtype, shape, 1, chain.program(result))


def _image(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As many numbers as images of 8 x 8."""
    return (shape[0] // 32, 2 * shape[1] // 4, 8, 8)


def _batch_norm(shape: tuple[int, ...], dtype: str, element: torch.dtype) -> Probe:
    chain = _Chain("batch_norm", Mode.TRAIN)
    image = _image(shape)
    value = chain.value(ValueKind.BOUNDARY, image, element)
    scale, shift = (chain.value(ValueKind.PARAMETER, image[1:2], element) for _ in range(2))
    mean, variance = (
        chain.value(ValueKind.CONSTANT, image[1:2], element, trained=False) for _ in range(2)
    )
    target = "aten._native_batch_norm_legit_functional.default"
    others = (image[1:2],) * 4
    arguments = (value, scale, shift, mean, variance, True, 0.1, 1e-5)
    result = chain.op(target, image, *arguments, others=others)
    return _probe("_native_batch_norm_legit_functional", dtype, shape, 1, chain.program(result))


def _pooling(shape: tuple[int, ...], dtype: str, element: torch.dtype) -> Probe:
    chain = _Chain("max_pool2d", Mode.TRAIN)
    image = _image(shape)
    value = chain.value(ValueKind.BOUNDARY, image, element)
    smaller = (*image[:2], 4, 4)
    result = chain.op("aten.max_pool2d.default", smaller, value, (3, 3), (2, 2), (1, 1))
    return _probe("max_pool2d", dtype, shape, 1, chain.program(result))
