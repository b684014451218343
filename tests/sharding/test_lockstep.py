"""The harness: it must see wrong results, wrong gradients and wrong types."""

from __future__ import annotations

import pytest
import torch

from cutset.compiler.ir.graph import Value, ValueKind
from cutset.compiler.ir.mesh import Layout, Mesh, Partial, Replicate, Shard
from cutset.compiler.ir.types import TensorType
from cutset.compiler.sharding.lowering import LocalGraph, Ref
from cutset.compiler.sharding.strategy import OpStrategy

from .checks import check_flags, check_pairs, check_strategy, one_node, randn
from .lockstep import RankGraph, assemble, coordinates, distribute, run_lockstep

MESH = Mesh.parse("data=2,tensor=3")
LINE = Mesh.parse("tensor=2")
R, P = Replicate(), Partial()


@pytest.mark.parametrize("layout", ["[S(0),S(1)]", "[P(sum),S(0)]", "[S(1),P(sum)]", "[R,P(sum)]"])
def test_parts_make_the_whole(layout: str) -> None:
    whole = randn(5, 7)
    parts = distribute(whole, Layout.parse(layout), MESH)
    assert len(parts) == 6
    torch.testing.assert_close(assemble(parts, Layout.parse(layout), MESH), whole)


def test_wrong_strategies_are_found() -> None:
    case = one_node("aten.linear.default", randn(4, 6), randn(8, 6), randn(8))
    with pytest.raises(AssertionError, match="replicas differ"):
        wrong = OpStrategy((Shard(0), R, R), (Shard(0),), full_gradients=(2,))
        check_strategy(case, (wrong,), LINE)
    with pytest.raises(AssertionError, match="gradient of input 2"):
        check_strategy(case, (OpStrategy((Shard(1), Shard(1), R), (P,)),), LINE)
    with pytest.raises(AssertionError, match="is not f64"):
        check_strategy(
            one_node("aten.relu.default", randn(4)), (OpStrategy((Shard(0),), (R,)),), LINE
        )
    with pytest.raises(AssertionError, match="Tensor-likes"):
        check_strategy(one_node("aten.relu.default", randn(4)), (OpStrategy((P,), (P,)),), LINE)


def test_pairs_shard_no_dim_twice() -> None:
    # replication, two leading dims, columns, rows, terms; less a sharding with itself
    assert check_pairs(one_node("aten.linear.default", randn(4, 3, 6), randn(5, 6))) == 6 * 6 - 4


def _collectives(mesh: Mesh, coordinate: tuple[int, ...]) -> tuple[LocalGraph, list[Ref]]:
    """Conversions of one tensor [4, 6] along `tensor`, from and back to Shard(0) on `data`."""
    local = LocalGraph(mesh, coordinate)
    like = one_node("aten.relu.default", randn(4)).node
    type = TensorType((2, 6), torch.float64)
    x = local.add_value("x", type, ValueKind.INPUT, requires_grad=True)
    parts = local.shard(x, "tensor", 1, like)
    turned = local.all_to_all(parts, "tensor", from_dim=1, from_size=6, to_dim=0, like=like)
    whole = local.all_gather(turned, "tensor", 0, 2, like)
    terms = local.as_partial(whole, "tensor", like)
    scattered = local.reduce_scatter(terms, "tensor", 1, like)
    gathered = local.all_gather(scattered, "tensor", 1, 6, like, partial_gradient=True)
    return local, [x, parts, turned, whole, scattered, gathered]


def test_conversions_are_inverse_and_so_are_their_adjoints() -> None:
    mesh = Mesh.parse("data=2,tensor=2")
    built = [_collectives(mesh, coordinate) for coordinate in coordinates(mesh)]
    whole = randn(4, 6)
    parts = [
        item.clone().requires_grad_() for item in distribute(whole, Layout.parse("[S(0),R]"), mesh)
    ]
    known = run_lockstep(
        [RankGraph(local.values, local.nodes) for local, _ in built],
        [{0: part} for part in parts],
        mesh,
    )
    found = [mine[refs[-1].id] for mine, (_, refs) in zip(known, built, strict=True)]
    torch.testing.assert_close(
        assemble([item.detach() for item in found], Layout.parse("[S(0),R]"), mesh), whole
    )
    upstream = randn(4, 6)
    terms = distribute(upstream, Layout.parse("[S(0),P(sum)]"), mesh)
    gradients = torch.autograd.grad(found, parts, terms)
    torch.testing.assert_close(assemble(gradients, Layout.parse("[S(0),R]"), mesh), upstream)


def test_a_gradient_that_the_graph_denies_is_found() -> None:
    values = [Value(0, "x", TensorType((2,), torch.float64), ValueKind.INPUT)]
    with pytest.raises(AssertionError, match="denies"):
        check_flags(RankGraph(values, []), {0: randn(2).requires_grad_()})
