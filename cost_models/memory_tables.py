"""What memory prediction derives once from a graph: storages, and rules of what backward keeps.

A `MemoryModel` makes the steps of any stage of its graph; who counts them is `action_memory.py`
(actions of a stage), `memory.py` (the bound of a rank) and `node_memory.py` (figures per node).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..compiler.ir.graph import Graph
from ..compiler.ir.memo import once_per_object
from .adjoint_types import Adjoint, NodeContext
from .adjoints import adjoint
from .analysis import Storages, batch_values, find_storages, weight_like_values
from .backward import StageSteps, stage_steps

__all__ = ["MemoryModel", "memory_model", "rerun_nodes"]


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """What memory prediction derives once from a graph; make it with `memory_model`."""

    graph: Graph
    backend: str
    sizes: tuple[float, ...]
    storages: Storages
    adjoints: tuple[Adjoint, ...]
    weights: frozenset[int]

    def steps(
        self,
        nodes: Iterable[int],
        consumers: Mapping[int, int] | None = None,
        recomputed: Collection[int] = (),
        kept: Mapping[int, float] | None = None,
        parts: Sequence[Collection[int]] = (),
    ) -> StageSteps:
        """Kernels of the stage made of `nodes`; other arguments as in `stage_steps`.

        A boundary value arrives contiguous; where it is not so in the whole graph, copies differ,
        and the stage's storages and rules are derived anew.
        """
        chosen = tuple(sorted(nodes))
        storages, adjoints = self.storages, self.adjoints
        if self._arrives_otherwise(chosen):
            storages = find_storages(self.graph, chosen)
            own = {node: self._adjoint(node, storages) for node in chosen}
            adjoints = tuple(own.get(node.id, Adjoint()) for node in self.graph.nodes)
        return stage_steps(
            self.graph,
            chosen,
            adjoints=adjoints,
            storages=storages,
            sizes=self.sizes,
            consumers=consumers,
            recomputed=recomputed,
            kept=kept,
            parts=parts,
        )

    def _arrives_otherwise(self, nodes: tuple[int, ...]) -> bool:
        made = {value for node in nodes for value in self.graph.nodes[node].outputs}
        read = {value for node in nodes for value in self.graph.nodes[node].inputs}
        return any(
            not self.storages.stands_contiguous(self.graph.values[value]) for value in read - made
        )

    def _adjoint(self, node: int, storages: Storages) -> Adjoint:
        context = NodeContext(
            self.graph, self.graph.nodes[node], storages, self.sizes, self.backend
        )
        return adjoint(context)


def memory_model(graph: Graph, *, batch_fraction: float = 1.0, backend: str = "cpu") -> MemoryModel:
    """Prepare memory prediction of `graph`.

    Args:
        batch_fraction: predict for this multiple of the microbatch it was captured at.
        backend: torch device type that runs it; kernels differ in what they save.
    """
    return MemoryModel(graph, backend, *_memory_tables(graph, batch_fraction, backend))


@once_per_object
def _memory_tables(
    graph: Graph, batch_fraction: float, backend: str
) -> tuple[tuple[float, ...], Storages, tuple[Adjoint, ...], frozenset[int]]:
    """The other fields of `MemoryModel`; they do not hold the graph, which would never die."""
    batched = batch_values(graph)
    sizes = tuple(
        value.type.num_bytes * (batch_fraction if value.id in batched else 1.0)
        for value in graph.values
    )
    storages = find_storages(graph)
    adjoints = tuple(
        adjoint(NodeContext(graph, node, storages, sizes, backend)) for node in graph.nodes
    )
    return sizes, storages, adjoints, weight_like_values(graph)


def rerun_nodes(graph: Graph, recomputed: Collection[int]) -> frozenset[int]:
    """Those of `recomputed` whose results backward really needs again."""
    return _rerun_nodes(graph, frozenset(recomputed)) if recomputed else frozenset()


@once_per_object
def _rerun_nodes(graph: Graph, recomputed: frozenset[int]) -> frozenset[int]:
    model = memory_model(graph)
    return model.steps(range(len(graph.nodes)), recomputed=recomputed).rerun
