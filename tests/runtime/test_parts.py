"""Buckets: what several tensors become as one message is what each would become alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cutset.runtime.communicator import Communicator, Pending
from cutset.runtime.local_communicator import LocalNetwork
from cutset.runtime.parts import start_all_gather, start_all_reduce, start_reduce_scatter

SHAPES = ((4, 6), (7, 3), (5,), (3, 2, 9))
DIMS = (1, 0, 0, 2)
COUNT = 3


def tensors() -> list[list[Tensor]]:
    """For each rank, one tensor a shape; the second is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    made = [[torch.randn(s, generator=generator) for s in SHAPES] for _ in range(COUNT)]
    return [
        [item.mT.contiguous().mT if i == 1 else item for i, item in enumerate(row)] for row in made
    ]


def run(start: Callable[[Communicator, list[Tensor]], Pending], ranks: list[list[Tensor]]) -> None:
    network = LocalNetwork(COUNT)
    pending = [start(network.communicator(rank), row) for rank, row in enumerate(ranks)]
    for item in pending:
        assert item.done()
        item.wait()
        item.wait()  # results are written once


def parts(tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
    found = torch.chunk(tensor, COUNT, dim)
    assert len(found) == COUNT
    return found


@pytest.mark.parametrize("count", [1, 4])
def test_all_reduce(count: int) -> None:
    ranks = [row[:count] for row in tensors()]
    expected = [sum(column[1:], column[0]) for column in zip(*ranks, strict=True)]
    run(lambda c, row: start_all_reduce(c, row, range(COUNT), "sum", label="x"), ranks)
    for row in ranks:
        for found, wanted in zip(row, expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_reduce_scatter_leaves_the_sum_of_the_own_part(order: tuple[int, ...]) -> None:
    ranks, before = tensors(), tensors()
    run(lambda c, row: start_reduce_scatter(c, row, DIMS, order, label="x"), ranks)
    for rank, row in enumerate(ranks):
        for index, dim in enumerate(DIMS):
            own = parts(row[index], dim)[order.index(rank)]
            terms = [parts(other[index], dim)[order.index(rank)] for other in before]
            assert torch.allclose(own, sum(terms[1:], terms[0]))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_all_gather_brings_the_parts_of_others(order: tuple[int, ...]) -> None:
    ranks, before = tensors(), tensors()
    run(lambda c, row: start_all_gather(c, row, DIMS, order, label="x"), ranks)
    for row in ranks:
        for index, dim in enumerate(DIMS):
            shares = [parts(before[rank][index], dim)[i] for i, rank in enumerate(order)]
            assert torch.equal(row[index], torch.cat(shares, dim))
