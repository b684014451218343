"""Whole tensors and the parts of them that ranks hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .ir.program import Program, TensorShard

__all__ = ["batch_part", "first_holders", "joined", "part_of", "shards_by_name"]


def shards_by_name(program: Program) -> dict[str, TensorShard]:
    """The parts that the rank of `program` holds of what it does not hold whole."""
    return {shard.name: shard for shard in program.shards}


def part_of(whole: Tensor, shard: TensorShard | None) -> Tensor:
    """The part of `whole` that `shard` describes (a view); all of it for None."""
    if shard is None:
        return whole
    part = whole
    for dim, (begin, size) in enumerate(zip(shard.offset, shard.part.shape, strict=True)):
        part = part.narrow(dim, begin, size)
    return part


def batch_part(whole: Tensor, shard: TensorShard | None, batch_dim: int | None) -> Tensor:
    """The parts of all microbatches of the input `whole`, joined along `batch_dim`.

    `shard` is a part of one microbatch.
    """
    if shard is None or batch_dim is None:
        return part_of(whole, shard)
    rows = shard.whole.shape[batch_dim]
    microbatches = torch.split(whole, rows, dim=batch_dim)
    return torch.cat([part_of(item, shard) for item in microbatches], dim=batch_dim)


def joined(parts: Iterable[tuple[TensorShard | None, Tensor]]) -> Tensor:
    """The whole tensor from parts that cover it; a part that is the whole comes as None."""
    result: Tensor | None = None
    for shard, tensor in parts:
        if shard is None or tuple(tensor.shape) != shard.part.shape:
            return tensor
        if result is None:
            result = tensor.new_empty(shard.whole.shape)
        part_of(result, shard).copy_(tensor)
    assert result is not None, "no part"
    return result


def first_holders(ranks: Iterable[int], shards: Mapping[int, TensorShard]) -> tuple[int, ...]:
    """Of `ranks`, those that together hold every part once; one without a shard has the whole."""
    table: dict[tuple[int, ...] | None, int] = {}
    for rank in ranks:
        shard = shards.get(rank)
        table.setdefault(None if shard is None else shard.offset, rank)
    return (table[None],) if None in table else tuple(table.values())
