"""Rules of recomputation: it names nodes that are there, once each, and only in training.

More is not asked: graphs are functional, so computing a node again changes nothing, and what it
draws at random follows from its ordinal.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..graph import Graph, Mode
from .report import check

__all__ = ["verify_recomputed"]


def verify_recomputed(
    recomputed: Sequence[int], mode: Mode, graph: Graph | None, here: str
) -> None:
    """Check the nodes to compute again of a plan or stage. Raises VerificationError."""
    check(
        mode is Mode.TRAIN or not recomputed,
        "nodes are recomputed, but there is no backward to do it",
        here,
    )
    pairs = zip(recomputed, recomputed[1:], strict=False)
    ascending = all(first < second for first, second in pairs)
    check(ascending, f"recomputed nodes do not ascend: {list(recomputed)}", here)
    missing = [] if graph is None else [n for n in recomputed if not 0 <= n < len(graph.nodes)]
    check(not missing, f"recomputed nodes {missing} do not exist", here)
