"""Gradients that stay terms of a sum until something sums them: small nets in which it matters who
does."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.sharding.sharding import make_sharding
from tests.models.exact import ROWS, ExactModel

from .choices import picked_layouts
from .whole import check_layouts, whole_of

LINE = Mesh.parse("tensor=2")
BY_ROWS = "S(0),R -> S(0)"  # of `linear`: the gradient of the weight is a term a rank


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(6, 4))
        self.q = nn.Parameter(torch.randn(6, 4))


class Chain(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.p.exp())


class Forked(_Net):
    def forward(self, x: Tensor) -> Tensor:
        left, right = self.p.split(3)
        return F.linear(x, left).sum() + (right * right).sum()


class Alike(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.p.exp().type_as(self.q)).sum() + self.q.sum()


class TwoReaders(_Net):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.p.exp()
        return F.linear(x, weight).sum() + weight.tanh().sum()


class Stopped(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.p * self.p.detach().exp())


CASES: list[tuple[type[_Net], dict[str, str], dict[str, str]]] = [
    (Chain, {"linear": BY_ROWS}, {"p": "[S(0)]"}),
    (Chain, {"linear": BY_ROWS}, {"p": "[R]"}),
    (Chain, {"linear": BY_ROWS, "exp": "S(1) -> S(1)"}, {"p": "[R]"}),
    (Forked, {"linear": BY_ROWS}, {"p": "[S(1)]"}),
    (Forked, {"linear": BY_ROWS}, {"p": "[R]"}),
    (Alike, {"linear": BY_ROWS, "type_as": "R!,S(0) -> R"}, {"q": "[S(0)]"}),
    (TwoReaders, {"linear": BY_ROWS}, {"p": "[R]"}),
    (TwoReaders, {"linear": BY_ROWS, "tanh": "S(0) -> S(0)"}, {"p": "[S(1)]"}),
    (Stopped, {"linear": BY_ROWS}, {"p": "[S(1)]"}),
]


def made(kind: type[_Net]) -> ExactModel:
    x, target = torch.randn(ROWS, 4), torch.randn(ROWS, 1)
    return ExactModel(kind(), (x, target), {}, lambda y, target: (y * y - target.sum()).mean())


@pytest.mark.parametrize(
    ("kind", "strategies", "held"), CASES, ids=[f"{c[0].__name__}-{c[2]}" for c in CASES]
)
def test_gradients(
    kind: type[_Net], strategies: Mapping[str, str], held: Mapping[str, str]
) -> None:
    subject = whole_of(lambda: made(kind))
    layouts = picked_layouts(subject.graph, LINE, [strategies], held)
    check_layouts(subject, LINE, layouts, 1e-12)


def deferred(kind: type[_Net], strategies: Mapping[str, str]) -> set[str]:
    graph: Graph = whole_of(lambda: made(kind)).graph
    layouts = picked_layouts(graph, LINE, [strategies], {})
    sharding = make_sharding(graph, LINE, layouts.nodes, layouts.values, layouts.parameters)
    return set(sharding.deferred)


def test_sums_are_deferred_past_what_is_computed_from_parameters() -> None:
    assert deferred(Chain, {"linear": BY_ROWS}) == {"p_p", "exp"}
    assert deferred(Chain, {}) == set()
    assert deferred(TwoReaders, {"linear": BY_ROWS}) == set()
