"""Which tensors travel together."""

from __future__ import annotations

import torch

from cutset.compiler.codegen.buckets import bound_in_flight, make_buckets
from cutset.compiler.codegen.copies import Copy
from cutset.compiler.ir.buckets import BUCKET_BYTES
from cutset.compiler.ir.program import AllReduce, Await, OptimizerStep, ReduceScatter
from cutset.compiler.ir.types import TensorType


def copy(
    first_use: int,
    size: int = 1,
    ranks: tuple[int, ...] = (0, 1),
    dtype: torch.dtype = torch.float32,
) -> Copy:
    return Copy(
        held=TensorType((size,), dtype),
        first_use=first_use,
        terms=ranks,
        update=None,
        dim=0,
        peers=ranks[:1],
        is_scattered=False,
        summed=ranks,
        is_tied=False,
        is_owner=True,
        is_offloaded=False,
    )


def names(entries: dict[str, Copy], limit: int = BUCKET_BYTES) -> list[str]:
    buckets = make_buckets(
        entries.items(),
        key=lambda item: (item.summed, item.held.dtype),
        size=lambda item: item.held.num_bytes,
        limit=limit,
    )
    return [" ".join(name for name, _ in bucket) for bucket in buckets]


def test_gradients_come_in_the_order_in_which_backward_completes_them() -> None:
    assert names({"a": copy(0), "b": copy(5), "c": copy(3), "d": copy(5)}) == ["b d c a"]


def test_a_bucket_is_of_one_group_and_one_dtype() -> None:
    entries = {
        "a": copy(0),
        "b": copy(1, ranks=(0, 2)),
        "c": copy(2, dtype=torch.float16),
        "d": copy(3),
    }
    assert names(entries) == ["d a", "c", "b"]


def test_the_oldest_is_awaited_where_too_much_would_be_under_way() -> None:
    a, b, c = (AllReduce((name,), (0, 1)) for name in "abc")
    sizes = {a: 4, b: 4, c: 9}
    assert list(bound_in_flight([a, b, OptimizerStep(), c], sizes.__getitem__, lambda _: 8)) == [
        a,
        b,
        OptimizerStep(),
        c,
    ]
    assert list(bound_in_flight([a, b, c], sizes.__getitem__, lambda _: 8)) == [
        a,
        b,
        Await(("a",)),
        Await(("b",)),
        c,
    ]
    scatter = ReduceScatter(("a",), (0,), (0, 1))  # the sum of its part awaits it anyway
    sizes[scatter] = 8
    assert list(bound_in_flight([scatter, a], sizes.__getitem__, lambda _: 8)) == [scatter, a]


def test_a_bucket_has_a_limit_that_one_tensor_may_exceed() -> None:
    entries = {"a": copy(4, 2), "b": copy(3, 1), "c": copy(2, 9), "d": copy(1, 1), "e": copy(0, 2)}
    assert names(entries, limit=12) == ["a b", "c", "d e"]
    assert names(entries, limit=11) == ["a", "b", "c", "d", "e"]
