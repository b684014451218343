"""Sums of gradients of which ranks keep parts travel while backward computes what comes next."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from cutset.compiler.ir import buckets
from cutset.runtime.communicator import Communicator
from cutset.runtime.kernels import StageKernels
from tests.runtime.late_sums import F64, LAYERS, ROWS, SIZE, traced
from tests.runtime.ranks import on_ranks
from tests.runtime.test_kernels import run_kernels


def course(kernels: StageKernels) -> list[str]:
    """What the weight gradients of `kernels` do, one after the other."""
    assert kernels.collectives is not None
    module = kernels.modules["weight"]
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    kernels.collectives.bind(graph)
    names = {"mm": "mm", "start_reduce_scatter": "start", "wait_for": "wait", "add_": "add"}
    called = [str(getattr(node.target, "__name__", node.target)) for node in graph.nodes]
    return [names[name.split(".")[0]] for name in called if name.split(".")[0] in names]


@pytest.mark.parametrize(
    ("least_bytes", "expected"),
    [
        (buckets._LEAST_BYTES, "mm start mm start mm start wait add wait add wait add"),
        (1, "mm start mm wait add start mm wait add start wait add"),
    ],
    ids=["all at once", "one at a time"],
)
def test_sums_are_waited_for_where_others_need_their_room(
    monkeypatch: pytest.MonkeyPatch, least_bytes: int, expected: str
) -> None:
    monkeypatch.setattr(buckets, "_LEAST_BYTES", least_bytes)

    def make(end: Communicator) -> Callable[[], str]:
        kernels = traced(end)
        return lambda: " ".join(course(kernels))

    assert on_ranks(2, make) == [expected] * 2


@pytest.mark.parametrize("least_bytes", [buckets._LEAST_BYTES, 1])
def test_each_rank_keeps_its_part_of_the_sum(
    monkeypatch: pytest.MonkeyPatch, least_bytes: int
) -> None:
    monkeypatch.setattr(buckets, "_LEAST_BYTES", least_bytes)
    torch.manual_seed(0)
    weights = [torch.randn(SIZE, SIZE, dtype=F64, requires_grad=True) for _ in range(LAYERS)]
    rows = [torch.randn(ROWS, SIZE, dtype=F64) for _ in range(2)]
    tangents = [torch.randn(ROWS, SIZE, dtype=F64) for _ in range(2)]
    for x, tangent in zip(rows, tangents, strict=True):
        for weight in weights:
            x = (x @ weight.T).tanh()
        x.backward(tangent)
    halves = [[w.detach().chunk(2)[rank].clone() for w in weights] for rank in range(2)]

    def make(end: Communicator) -> Callable[[], list[Tensor]]:
        kernels = traced(end)
        arguments = [rows[end.rank], *halves[end.rank]]
        return lambda: list(run_kernels(kernels, arguments, [tangents[end.rank]])[2].values())

    for rank, found in enumerate(on_ranks(2, make)):
        for gradient, weight in zip(found, weights, strict=True):
            assert weight.grad is not None
            torch.testing.assert_close(gradient, 2 * weight.grad.chunk(2)[rank])  # it adds twice
