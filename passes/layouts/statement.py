"""What a layout problem is stated from: graph, mesh, what earlier axes decided, what is fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...compiler.ir.graph import Graph
from ...compiler.ir.mesh import Mesh, Placement, Shard
from ...compiler.ir.plan import OptimizerModel
from ...compiler.sharding.strategy import OpStrategy
from ...cost_models.overlap import LEAST_EXPOSED

__all__ = ["Decided", "LayoutOptions", "LayoutStatement"]


@dataclass(frozen=True, slots=True)
class LayoutOptions:
    """What the caller fixes.

    Args:
        num_microbatches: of a step: the sum of gradients and the update are spread over them; a
            fraction, where a microbatch is smaller than `batch_fraction` says.
        batch_fraction: rows of a microbatch, as a multiple of those that were captured.
        in_flight: microbatches whose saved tensors are alive at once; a fraction, if they are
            smaller than the one that was captured.
        memory_bytes: limit of one device; None: none.
        optimizer: states a parameter.
        update_share: of the update of what a rank holds, what it does itself.
        sum_share: of the sums of gradients, what counts; of backward, `backward_share`. The last
            backward hides sums, so that a step takes no less than with most of them left out, nor
            than with all of them and that backward left out.
        batch_axes: mesh axes over which batched inputs are split by rows and parameters are
            replicated (data parallelism).
        bucket_bytes: of the buckets in which gradients are summed, at most.
        held: by value name, placements over an axis, by its name, that are not left to choose.
    """

    num_microbatches: float = 1
    batch_fraction: float = 1.0
    in_flight: float = 1.0
    memory_bytes: int | None = None
    optimizer: OptimizerModel = OptimizerModel("adamw", 2.0)
    update_share: float = 1.0
    sum_share: float = LEAST_EXPOSED
    backward_share: float = 1.0
    batch_axes: tuple[str, ...] = ("data",)
    bucket_bytes: float = math.inf
    held: Mapping[str, Mapping[str, Placement]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decided:
    """Layouts over the axes that were decided before.

    Args:
        strategies: by node id, one an axis.
        held: by id of a value that no node makes, its placements.
        deferred: by value id, axes on which its gradient stays a term a rank.
    """

    strategies: tuple[tuple[OpStrategy, ...], ...]
    held: Mapping[int, tuple[Placement, ...]]
    deferred: Mapping[int, frozenset[int]]

    @staticmethod
    def nothing(graph: Graph) -> Decided:
        return Decided(((),) * len(graph.nodes), {}, {})

    def allows(self, node: int, strategy: OpStrategy) -> bool:
        """Whether no tensor dim would be split over two axes."""
        return not any(
            isinstance(new, Shard) and new == old
            for earlier in self.strategies[node]
            for new, old in (
                *zip(strategy.inputs, earlier.inputs, strict=True),
                *zip(strategy.outputs, earlier.outputs, strict=True),
            )
        )


@dataclass(frozen=True, slots=True)
class LayoutStatement:
    """The last axis of `mesh` is to be decided; `decided` says what happens on the others."""

    graph: Graph
    mesh: Mesh
    decided: Decided
    options: LayoutOptions

    @property
    def axis(self) -> int:
        return len(self.mesh.axes) - 1

    @property
    def parts(self) -> int:
        return self.mesh.axes[-1].size

    @property
    def splits_batch(self) -> bool:
        return self.mesh.axes[-1].name in self.options.batch_axes
