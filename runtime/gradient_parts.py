"""Backward that keeps parts of gradients (ZeRO 2): into the joint graph of a stage.

The collective that sums the gradients of a parameter over an axis and leaves each rank its part is
put right after what makes the gradient, so that the whole of it is alive for a moment only. The
order of gradients follows from the order of forward, like that of backward's other collectives, so
it is the same on all ranks of the axis (docs/decisions/0008-collectives-inside-stages.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..compiler.ir.mesh import chunk_sizes
from ..compiler.ir.program import StageProgram

__all__ = ["PartOf", "keep_early", "parts_kept"]

operators = torch.ops.cutset


@dataclass(frozen=True, slots=True)
class PartOf:
    """Of a gradient of size `sum(sizes)` along `dim`, the part at `index` among ranks along `axis`.

    Args:
        summed: whether the ranks' gradients are terms.
    """

    axis: str
    dim: int
    sizes: tuple[int, ...]
    index: int
    summed: bool

    def of(self, gradient: Tensor) -> Tensor:
        """The part, as an operator of a traced graph."""
        operator = operators.reduce_scatter if self.summed else operators.shard
        arguments = (self.axis, self.dim, list(self.sizes), self.index)
        return operator(gradient, *arguments)  # type: ignore[no-any-return]


def parts_kept(stage: StageProgram, rank: int) -> dict[str, PartOf]:
    """By parameter, the parts of gradients that backward of `stage` keeps on `rank`."""
    axes = dict(stage.axes)
    shapes = {value.origin: value.type.shape for value in stage.graph.values if value.origin}
    table = {}
    for part in stage.kept:
        ranks = axes[part.axis]
        sizes = chunk_sizes(shapes[part.name][part.dim], len(ranks))
        table[part.name] = PartOf(part.axis, part.dim, sizes, ranks.index(rank), part.summed)
    return table


def keep_early(graph: fx.Graph, from_end: Iterable[int]) -> None:
    """Move the results that are parts to right after what they are parts of.

    All ranks of an axis move them in the same order.

    Args:
        graph: its outputs end in one gradient a parameter.
        from_end: positions of parts among the outputs, counted from the end.
    """
    *nodes, output = graph.nodes
    results = _flat(output.args[0])
    last_input = [node for node in nodes if node.op == "placeholder"][-1]
    for position in sorted(from_end):
        node = results[-position]
        if isinstance(node, fx.Node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            (last_input if source.op == "placeholder" else source).append(node)


def _flat(item: object) -> list[object]:
    if isinstance(item, (list, tuple)):
        return [entry for part in item for entry in _flat(part)]
    return [item]
