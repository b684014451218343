"""Collective operators: value and adjoint on every rank, by hand, and how kernels hold them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cutset.compiler.ir import collectives
from cutset.compiler.ir.errors import RuntimeFailure
from cutset.compiler.ir.graph import Graph, Mode, OutputKind, Value
from cutset.compiler.ir.ops import op_named, resolve
from cutset.compiler.sharding.strategy import chunk_sizes
from cutset.runtime.collective_ops import StageCollectives
from cutset.runtime.communicator import Communicator
from cutset.runtime.kernels import StageKernels, trace_inference, trace_training
from tests.ir.builders import GraphBuilder
from tests.runtime.ranks import on_ranks
from tests.runtime.test_kernels import compile_stage, run_kernels, targets

CPU = torch.device("cpu")
F64 = torch.float64


def graph_of(op: str, shape: tuple[int, ...], *rest: object, mode: Mode = Mode.TRAIN) -> Graph:
    """A stage that applies one collective to its boundary input."""
    build = GraphBuilder(op, mode)
    h = build.boundary("h", shape, F64)
    out = build.op(f"cutset.{op}.default", h, *rest)
    build.output(out, OutputKind.BOUNDARY, target=out.name)
    return build.build()


def kernels_of(graph: Graph, end: Communicator, axes: dict[str, tuple[int, ...]]) -> StageKernels:
    bound = StageCollectives(end, axes, 0)
    trace = trace_training if graph.mode is Mode.TRAIN else trace_inference
    return trace(compile_stage(graph), graph, CPU, bound)


def running(
    kernels: StageKernels, operand: Tensor, tangent: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Runs the kernels of a stage with one input and one output: value and gradient."""

    def run() -> tuple[Tensor, Tensor]:
        outputs, inputs, _ = run_kernels(kernels, [operand], [tangent])
        return outputs[0], inputs[0]

    return run


def run_op(
    op: str, operands: list[Tensor], rests: list[tuple[object, ...]], tangents: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients of every rank; `rests` are the further arguments of each."""
    count = len(operands)
    graphs = [graph_of(op, tuple(operands[r].shape), *rests[r]) for r in range(count)]

    def make(end: Communicator) -> Callable[[], tuple[Tensor, Tensor]]:
        kernels = kernels_of(graphs[end.rank], end, {"t": tuple(range(count))})
        return running(kernels, operands[end.rank], tangents[end.rank])

    values, gradients = zip(*on_ranks(count, make), strict=True)
    return list(values), list(gradients)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def per_rank(count: int, *shape: int, seed: int = 1) -> list[Tensor]:
    return [random(*shape, seed=100 * seed + rank) for rank in range(count)]


def equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("count", [2, 4])
class TestEveryOperator:
    def test_all_reduce(self, count: int) -> None:
        x, g = per_rank(count, 3, 5), per_rank(count, 3, 5, seed=2)
        values, gradients = run_op("all_reduce", x, [("t", "sum")] * count, g)
        equal(values, [sum(x)] * count)
        equal(gradients, g)

    def test_sum_gradient(self, count: int) -> None:
        x, g = per_rank(count, 3, 5), per_rank(count, 3, 5, seed=2)
        values, gradients = run_op("sum_gradient", x, [("t",)] * count, g)
        equal(values, x)
        equal(gradients, [sum(g)] * count)

    def test_as_partial(self, count: int) -> None:
        x, g = [random(3, 5)] * count, per_rank(count, 3, 5, seed=2)
        values, gradients = run_op("as_partial", x, [(rank,) for rank in range(count)], g)
        equal(values, [x[0]] + [torch.zeros_like(x[0])] * (count - 1))
        equal(gradients, g)

    @pytest.mark.parametrize(("dim", "size"), [(0, 8), (1, 7), (2, 9)])
    def test_shard(self, count: int, dim: int, size: int) -> None:
        whole, sizes, rests = split_case(count, dim, size)
        parts = list(random(*whole, seed=7).split(sizes, dim))
        x = [random(*whole)] * count
        values, gradients = run_op("shard", x, rests, parts)
        equal(values, list(x[0].split(sizes, dim)))
        equal(gradients, [torch.cat(parts, dim)] * count)

    @pytest.mark.parametrize("partial", [False, True])
    @pytest.mark.parametrize(("dim", "size"), [(0, 8), (1, 7), (2, 9)])
    def test_all_gather(self, count: int, dim: int, size: int, partial: bool) -> None:
        whole, sizes, rests = split_case(count, dim, size)
        parts, g = list(random(*whole).split(sizes, dim)), per_rank(count, *whole, seed=2)
        values, gradients = run_op("all_gather", parts, [(*rest, partial) for rest in rests], g)
        equal(values, [torch.cat(parts, dim)] * count)
        terms = [sum(g)] * count if partial else g
        equal(gradients, [terms[r].split(sizes, dim)[r] for r in range(count)])

    @pytest.mark.parametrize(("dim", "size"), [(0, 8), (1, 7), (2, 9)])
    def test_reduce_scatter(self, count: int, dim: int, size: int) -> None:
        whole, sizes, rests = split_case(count, dim, size)
        parts, x = list(random(*whole, seed=7).split(sizes, dim)), per_rank(count, *whole)
        values, gradients = run_op("reduce_scatter", x, rests, parts)
        equal(values, list(sum(x).split(sizes, dim)))
        equal(gradients, [torch.cat(parts, dim)] * count)

    @pytest.mark.parametrize(("from_dim", "to_dim"), [(0, 1), (1, 0), (2, 0)])
    def test_all_to_all(self, count: int, from_dim: int, to_dim: int) -> None:
        whole = (7, 9, 10)
        x, g = random(*whole), random(*whole, seed=3)
        before, after = (chunk_sizes(whole[dim], count) for dim in (from_dim, to_dim))
        rests = [("t", from_dim, before, to_dim, after, rank) for rank in range(count)]
        values, gradients = run_op(
            "all_to_all", list(x.split(before, from_dim)), rests, list(g.split(after, to_dim))
        )
        equal(values, list(x.split(after, to_dim)))
        equal(gradients, list(g.split(before, from_dim)))


def split_case(
    count: int, dim: int, size: int
) -> tuple[tuple[int, ...], tuple[int, ...], list[tuple[object, ...]]]:
    """(shape of the whole, sizes of parts, further arguments of each rank)."""
    shape = [3, 4, 5]
    shape[dim] = size
    sizes = chunk_sizes(size, count)
    return tuple(shape), sizes, [("t", dim, sizes, rank) for rank in range(count)]


@pytest.mark.parametrize("reduction", ["max", "min"])
def test_maximum_has_no_gradient(reduction: str) -> None:
    build = GraphBuilder("max", Mode.TRAIN)
    h = build.boundary("h", (3,), F64)
    top = build.op("cutset.all_reduce.default", h, "t", reduction)
    out = build.op("aten.sub.Tensor", h, top)
    build.output(out, OutputKind.BOUNDARY, target=out.name)
    graph = build.build()
    x, g = per_rank(2, 3), per_rank(2, 3, seed=2)

    def make(end: Communicator) -> Callable[[], tuple[Tensor, Tensor]]:
        return running(kernels_of(graph, end, {"t": (0, 1)}), x[end.rank], g[end.rank])

    extreme = getattr(torch, f"{reduction}imum")(*x)
    for rank, (value, gradient) in enumerate(on_ranks(2, make)):
        assert torch.equal(value, x[rank] - extreme)
        assert torch.equal(gradient, g[rank])


def test_parts_lie_in_the_order_of_the_axis_not_of_ranks() -> None:
    parts = list(random(7).split((4, 3)))
    graphs = [graph_of("all_gather", (4 - i,), "t", 0, (4, 3), i, True) for i in range(2)]
    g = per_rank(2, 7, seed=2)

    def make(end: Communicator) -> Callable[[], tuple[Tensor, Tensor]]:
        index = 1 - end.rank
        kernels = kernels_of(graphs[index], end, {"t": (1, 0)})
        return running(kernels, parts[index], g[index])

    for rank, (value, gradient) in enumerate(on_ranks(2, make)):
        assert torch.equal(value, torch.cat(parts))
        torch.testing.assert_close(gradient, sum(g).split((4, 3))[1 - rank])


def test_inference_stage_is_bound_too() -> None:
    x = per_rank(2, 3)
    graph = graph_of("all_reduce", (3,), "t", "sum", mode=Mode.INFER)

    def make(end: Communicator) -> Callable[[], Sequence[Tensor | None]]:
        kernels = kernels_of(graph, end, {"t": (0, 1)})
        return lambda: kernels.forward([torch.tensor(0), x[end.rank]])

    equal([value for (value,) in on_ranks(2, make) if value is not None], [sum(x)] * 2)


def test_inputs_stay_as_they_are() -> None:
    """An all-reduce works in place only on what nothing else reads."""
    build = GraphBuilder("used", Mode.TRAIN)
    h = build.boundary("h", (3, 3), F64)
    y = build.op("aten.mm.default", h, h)
    total = build.op("cutset.all_reduce.default", y, "t", "sum")
    out = build.op("aten.mul.Tensor", total, y)
    build.output(out, OutputKind.BOUNDARY, target=out.name)
    graph = build.build()
    x = per_rank(2, 3, 3)

    def make(end: Communicator) -> Callable[[], tuple[Tensor, Tensor]]:
        return running(kernels_of(graph, end, {"t": (0, 1)}), given[end.rank], x[end.rank])

    given = [item.clone() for item in x]
    squares = [item @ item for item in x]
    results = on_ranks(2, make)
    equal([value for value, _ in results], [sum(squares) * item for item in squares])
    equal(given, x)


def row_parallel(build: GraphBuilder, h: Value, index: int) -> Value:
    w = build.parameter("w", (6, 4), F64)
    shared = build.op("cutset.sum_gradient.default", h, "t")
    part = build.op("cutset.shard.default", shared, "t", 1, (4, 4), index)
    return build.op(
        "cutset.all_reduce.default", build.op("aten.linear.default", part, w), "t", "sum"
    )


@pytest.mark.parametrize("index", [0, 1])
def test_kernels_of_all_ranks_hold_the_same_collectives(index: int) -> None:
    build = GraphBuilder("row", Mode.TRAIN)
    out = row_parallel(build, build.boundary("h", (2, 8), F64), index)
    bias = build.op("cutset.as_partial.default", out, index)
    out = build.op("cutset.all_reduce.default", bias, "t", "sum")
    build.output(out, OutputKind.BOUNDARY, target=out.name)
    graph = build.build()
    kernels = trace_training(compile_stage(graph), graph, CPU)
    held = {
        part: [name.split(".")[1] for name in targets(kernels, part) if name.startswith("cutset")]
        for part in kernels.modules
    }
    assert held == {
        "forward": ["all_reduce", "all_reduce"],
        "input": ["all_gather", "all_reduce"],
        "weight": [],
    }


def test_weight_gradient_that_is_summed_at_once() -> None:
    build = GraphBuilder("weight", Mode.TRAIN)
    h = build.boundary("h", (2, 3), F64)
    w = build.op("cutset.sum_gradient.default", build.parameter("w", (4, 3), F64), "t")
    out = build.op("aten.linear.default", h, w)
    build.output(out, OutputKind.BOUNDARY, target=out.name)
    graph = build.build()
    x, w0, g = per_rank(2, 2, 3), random(4, 3), per_rank(2, 2, 4, seed=2)

    def make(end: Communicator) -> Callable[[], list[Tensor]]:
        kernels = kernels_of(graph, end, {"t": (0, 1)})
        assert "cutset.all_reduce.default" in targets(kernels, "weight")
        return lambda: list(run_kernels(kernels, [x[end.rank], w0], [g[end.rank]])[2].values())

    # run_kernels adds twice
    total = 2 * sum(mine.T @ theirs for mine, theirs in zip(g, x, strict=True))
    equal([gradient for (gradient,) in on_ranks(2, make)], [total] * 2)


def test_unbound_operators_say_so() -> None:
    with pytest.raises(RuntimeError, match="cutset::all_reduce was called outside of a stage"):
        torch.ops.cutset.all_reduce(torch.ones(2), "t", "sum")


def test_axis_that_the_program_lacks() -> None:
    graph = graph_of("all_reduce", (3,), "x", "sum")

    with pytest.raises(RuntimeFailure, match="over mesh axis 'x'"):
        on_ranks(1, lambda end: running(kernels_of(graph, end, {"t": (0,)}), random(3), random(3)))


def test_wrong_part_is_refused_while_tracing() -> None:
    with pytest.raises(ValueError, match=r"dim 0 of \(3, 2\) is not 4 long"):
        graph_of("all_gather", (3, 2), "t", 0, (4, 3), 0, True)


def test_importing_twice_changes_nothing() -> None:
    before = resolve(op_named("cutset.all_to_all.default"))
    importlib.reload(collectives)
    assert resolve(op_named("cutset.all_to_all.default")) is before
