"""One small training graph per op, to compare its memory rule with measured memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cutset.compiler.ir.graph import Graph, Mode, OutputKind, Value, ValueKind
from tests.ir.builders import GraphBuilder

__all__ = ["CASES", "LOOSE", "case_graph", "case_tensors"]

ROWS, WIDE = 64, 128


class Case:
    """Builds the graph of one case; operands are boundary values, so all gradients are wanted."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.build = GraphBuilder("op", Mode.TRAIN)
        self.dtype = dtype

    def x(self, name: str = "x", shape: tuple[int, ...] = (ROWS, WIDE)) -> Value:
        return self.build.boundary(name, shape, self.dtype)

    def fixed(self, name: str, shape: tuple[int, ...]) -> Value:
        return self.build.boundary(name, shape, self.dtype, requires_grad=False)

    def ids(self, name: str, shape: tuple[int, ...]) -> Value:
        return self.build.boundary(name, shape, torch.int64, requires_grad=False)

    def mask(self, name: str, shape: tuple[int, ...]) -> Value:
        return self.build.boundary(name, shape, torch.bool, requires_grad=False)

    def w(self, name: str, shape: tuple[int, ...]) -> Value:
        return self.build.parameter(name, shape, self.dtype)

    def op(self, name: str, *args: object, **options: object) -> Value:
        return self.build.op(f"aten.{name}", *args, **options)

    def first(self, name: str, *args: object, **options: object) -> Value:
        return self.build.ops(f"aten.{name}", *args, **options)[0]


Maker = Callable[[Case], Value]


def case_graph(name: str, dtype: torch.dtype) -> Graph:
    """The graph of case `name`; its result is a boundary output."""
    case = Case(dtype)
    result = CASES[name](case)
    case.build.output(result, OutputKind.BOUNDARY, target=result.name)
    return case.build.build()


def case_tensors(graph: Graph) -> dict[str, Tensor]:
    """Operands by name or origin: small positive numbers, legal indices."""
    torch.manual_seed(0)
    tensors = {}
    for value in graph.values:
        if value.kind is ValueKind.RESULT:
            continue
        shape, dtype = value.type.shape, value.type.dtype
        if dtype == torch.int64:
            tensor = torch.randint(0, 8, shape)
        elif dtype == torch.bool:
            tensor = torch.rand(shape) > 0.3
        else:
            tensor = torch.rand(shape, dtype=dtype) * 0.5 + 0.25
        tensors[value.origin or value.name] = tensor
    return tensors


def _unary(name: str, *args: object, **options: object) -> Maker:
    return lambda c: c.op(name, c.x(), *args, **options)


def _binary(name: str) -> Maker:
    return lambda c: c.op(name, c.x("x"), c.x("y"))


def _attention(
    *rest: object,
    shape: tuple[int, ...] = (4, 4, 32, 16),
    keys: tuple[int, ...] | None = None,
    mask: Callable[[Case], Value] | None = None,
    **options: object,
) -> Maker:
    def make(c: Case) -> Value:
        operands = [c.x("q", shape), c.x("k", keys or shape), c.x("v", keys or shape)]
        given = [] if mask is None else [mask(c)]
        return c.op("scaled_dot_product_attention.default", *operands, *given, *rest, **options)

    return make


def _heads(c: Case) -> Value:
    turned = [c.op("transpose.int", c.x(name, (4, 32, 4, 16)), 1, 2) for name in "qkv"]
    return c.op("scaled_dot_product_attention.default", *turned, None, 0.1, random_draw=0)


def _convolution(
    channels: int,
    filters: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    transposed: bool = False,
    size: int = 16,
    rows: int = 4,
) -> Maker:
    shape = (channels, filters) if transposed else (filters, channels // groups)

    def make(c: Case) -> Value:
        return c.op(
            "convolution.default",
            c.x("x", (rows, channels, size, size)), c.w("w", (*shape, kernel, kernel)),
            c.w("b", (filters,)), [stride] * 2, [padding] * 2, [1, 1], transposed, [0, 0], groups,
        )  # fmt: skip

    return make


def _image(name: str, *args: object, size: int = 16) -> Maker:
    return lambda c: c.op(name, c.x("x", (4, 16, size, size)), *args)


def _split(c: Case) -> Value:
    parts = c.build.ops("aten.split.Tensor", c.x(), 64, 1)
    return c.op("mul.Tensor", parts[0], parts[1])


def _square(c: Case) -> Value:
    x = c.x()
    return c.op("mul.Tensor", x, x)


def _turned_product(c: Case) -> Value:
    left = c.op("transpose.int", c.x("x", (4, 16, 4, 32)), 1, 2)
    right = c.op("transpose.int", c.x("y", (4, 4, 16, 32)), 2, 3)
    return c.op("matmul.default", left, right)


_ELEMENTWISE = (
    "neg abs exp log log1p expm1 sqrt rsqrt relu gelu silu sigmoid tanh softplus elu leaky_relu "
    "hardtanh hardswish hardsigmoid mish sin cos erf reciprocal log_sigmoid square relu6 selu "
    "exp2 log2 clone tril"
)
CASES: dict[str, Maker] = {
    **{name: _unary(f"{name}.default") for name in _ELEMENTWISE.split()},
    **{name: _binary(f"{name}.Tensor") for name in ("add", "sub", "mul", "div")},
    "pow": _unary("pow.Tensor_Scalar", 3),
    "clamp": _unary("clamp.default", 0.3, 0.6),
    "add scalar": _unary("add.Scalar", 1.0),
    "mul scalar": _unary("mul.Scalar", 2.0),
    "maximum": _binary("maximum.default"),
    "atan2": _binary("atan2.default"),
    "mul column": lambda c: c.op("mul.Tensor", c.x("x"), c.x("y", (ROWS, 1))),
    "mul weight": lambda c: c.op("mul.Tensor", c.x("x"), c.w("w", (WIDE,))),
    "add weight": lambda c: c.op("add.Tensor", c.x("x"), c.w("w", (WIDE,))),
    "mul itself": _square,
    "glu": _unary("glu.default", -1),
    "to double": _unary("_to_copy.default", dtype=torch.float64),
    "where": lambda c: c.op("where.self", c.mask("m", (ROWS, WIDE)), c.x("x"), c.x("y")),
    "masked_fill": lambda c: c.op("masked_fill.Scalar", c.x(), c.mask("m", (ROWS, WIDE)), 0.0),
    "dropout": _unary("dropout.default", 0.1, True, random_draw=0),
    "native_dropout": lambda c: c.first("native_dropout.default", c.x(), 0.1, True, random_draw=0),
    # reductions, softmax, losses
    "sum": _unary("sum.dim_IntList", [-1]),
    "mean": _unary("mean.dim", [-1]),
    "amax": _unary("amax.default", [-1]),
    "max": lambda c: c.first("max.dim", c.x(), -1),
    "var": _unary("var.correction", [-1], correction=1),
    "std": _unary("std.correction", [-1], correction=1),
    "norm": _unary("linalg_vector_norm.default", 2, [-1]),
    "cumsum": _unary("cumsum.default", -1),
    "prod": _unary("prod.dim_int", -1),
    "softmax": _unary("softmax.int", -1),
    "log_softmax": _unary("log_softmax.int", -1),
    "logsumexp": _unary("logsumexp.default", [-1]),
    "cross_entropy": lambda c: c.op("cross_entropy_loss.default", c.x(), c.ids("t", (ROWS,))),
    "nll_loss": lambda c: c.first(
        "nll_loss_forward.default", c.x(), c.ids("t", (ROWS,)), None, 1, -100
    ),
    "mse_loss": _binary("mse_loss.default"),
    "l1_loss": _binary("l1_loss.default"),
    "smooth_l1_loss": _binary("smooth_l1_loss.default"),
    "bce": _binary("binary_cross_entropy_with_logits.default"),
    # products
    "linear": lambda c: c.op("linear.default", c.x(), c.w("w", (256, WIDE)), c.w("b", (256,))),
    "linear 3d": lambda c: c.op("linear.default", c.x("x", (4, 16, WIDE)), c.w("w", (256, WIDE))),
    "linear turned": lambda c: c.op(
        "linear.default", c.op("transpose.int", c.x("x", (WIDE, ROWS)), 0, 1), c.w("w", (64, WIDE))
    ),
    "linear copied": lambda c: c.op(
        "linear.default", c.op("transpose.int", c.x("x", (16, 4, WIDE)), 0, 1), c.w("w", (64, WIDE))
    ),
    "addmm": lambda c: c.op("addmm.default", c.w("b", (256,)), c.x(), c.w("w", (WIDE, 256))),
    "mm": lambda c: c.op("mm.default", c.x(), c.w("w", (WIDE, 256))),
    "bmm": lambda c: c.op("bmm.default", c.x("x", (4, 16, WIDE)), c.x("y", (4, WIDE, 16))),
    "matmul 3d": lambda c: c.op("matmul.default", c.x("x", (4, 16, WIDE)), c.x("y", (4, WIDE, 16))),
    "matmul heads": _turned_product,
    "matmul weight": lambda c: c.op(
        "matmul.default", c.x("x", (4, 16, WIDE)), c.w("w", (WIDE, 64))
    ),
    "einsum": lambda c: c.op(
        "einsum.default", "bij,bjk->bik", [c.x("x", (4, 16, 32)), c.x("y", (4, 32, 16))]
    ),
    # attention
    "attention": _attention(),
    "attention causal": _attention(None, 0.0, True),
    "attention dropout": _attention(None, 0.1, True, random_draw=0),
    "attention bool mask": _attention(mask=lambda c: c.mask("m", (4, 1, 32, 32))),
    "attention float mask": _attention(mask=lambda c: c.fixed("m", (4, 1, 32, 32))),
    "attention bias": _attention(mask=lambda c: c.x("m", (1, 4, 32, 32))),
    "attention bool mask, dropout": _attention(
        0.1, mask=lambda c: c.mask("m", (4, 1, 32, 32)), random_draw=0
    ),
    "attention grouped": _attention(keys=(4, 2, 32, 16), enable_gqa=True),
    "attention turned, dropout": _heads,
    "attention 3d": _attention(shape=(16, 32, 16)),
    # norms
    "layer_norm": lambda c: c.op(
        "layer_norm.default", c.x(), [WIDE], c.w("w", (WIDE,)), c.w("b", (WIDE,))
    ),
    "rms_norm": lambda c: c.op("rms_norm.default", c.x(), [WIDE], c.w("w", (WIDE,)), 1e-6),
    "group_norm": lambda c: c.op(
        "group_norm.default", c.x("x", (4, 16, 8, 8)), 4, c.w("w", (16,)), c.w("b", (16,))
    ),
    "batch_norm": lambda c: c.first(
        "_native_batch_norm_legit_functional.default",
        c.x("x", (4, 16, 8, 8)),
        c.w("w", (16,)),
        c.w("b", (16,)),
        c.build.buffer("mean", (16,), c.dtype),
        c.build.buffer("var", (16,), c.dtype),
        True,
        0.1,
        1e-5,
    ),  # fmt: skip
    # convolution and pooling
    "conv 3x3": _convolution(16, 16, 3, padding=1),
    "conv 1x1": _convolution(16, 32, 1),
    "conv 1x1 large": _convolution(48, 24, 1, size=48, rows=16),
    "conv 1x1 of few channels": _convolution(3, 24, 1, size=48, rows=16),
    "conv depthwise": _convolution(32, 32, 3, padding=1, groups=32),
    "conv transposed": _convolution(16, 8, 2, stride=2, transposed=True),
    "conv strided": _convolution(16, 32, 3, stride=2, padding=1),
    "conv patches": _convolution(3, 64, 4, stride=4, size=32),
    "conv odd channels": _convolution(12, 20, 5, padding=2),
    "max_pool": lambda c: c.first(
        "max_pool2d_with_indices.default", c.x("x", (4, 16, 16, 16)), [2, 2], [2, 2]
    ),
    "avg_pool": _image("avg_pool2d.default", [2, 2], [2, 2]),
    "adaptive_avg_pool": _image("adaptive_avg_pool2d.default", [1, 1]),
    "upsample": _image("upsample_nearest2d.vec", None, [2.0, 2.0], size=8),
    # lookup and movement
    "embedding": lambda c: c.op("embedding.default", c.w("w", (512, WIDE)), c.ids("t", (4, 16))),
    "index": lambda c: c.op("index.Tensor", c.x(), [c.ids("t", (32,))]),
    "gather": lambda c: c.op("gather.default", c.x(), 1, c.ids("t", (ROWS, 32))),
    "index_select": lambda c: c.op("index_select.default", c.x(), 0, c.ids("t", (32,))),
    "topk": lambda c: c.first("topk.default", c.x(), 8),
    "scatter_add": lambda c: c.op(
        "scatter_add.default", c.x(), 1, c.ids("t", (ROWS, 32)), c.x("s", (ROWS, 32))
    ),
    "cat": lambda c: c.op("cat.default", [c.x("x"), c.x("y")], 1),
    "stack": lambda c: c.op("stack.default", [c.x("x"), c.x("y")], 1),
    "split": _split,
    "slice": _unary("slice.Tensor", 1, 0, 64),
    "select": _unary("select.int", 1, 0),
    "expand": lambda c: c.op("expand.default", c.x("x", (ROWS, 1)), [ROWS, WIDE]),
    "transpose": _unary("transpose.int", 0, 1),
    "pad": _unary("constant_pad_nd.default", [1, 1]),
    "repeat": _unary("repeat.default", [2, 1]),
    "roll": _unary("roll.default", [1]),
    "unfold": _unary("unfold.default", 1, 4, 2),
}

# Cases whose bound is generous on purpose: no rule of their own, or a workspace that depends on
# the kernel that torch picks.
LOOSE = frozenset(
    ("atan2", "clamp", "div", "erf", "einsum", "l1_loss", "logsumexp", "matmul weight", "norm")
    + ("prod", "scatter_add", "std", "var", "conv transposed", "conv patches", "conv depthwise")
    + ("conv 1x1", "conv odd channels", "max", "amax")
)
