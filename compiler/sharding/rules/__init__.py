"""The table of sharding rules, and what follows from it for one node."""

from __future__ import annotations

from ...ir.graph import Graph, Node
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView, replicated
from .attention import ATTENTION
from .class_losses import CLASS_LOSSES
from .convolutions import CONVOLUTIONS
from .elementwise import ELEMENTWISE
from .factories import FACTORIES
from .indexing import INDEXING
from .losses import LOSSES
from .norms import NORMS
from .pieces import PIECES
from .products import PRODUCTS
from .random import RANDOM
from .recurrent import RECURRENT
from .reductions import REDUCTIONS
from .shapes import SHAPES
from .softmax import SOFTMAX

__all__ = ["RULES", "rule_of", "strategies_of"]

RULES: Table = {
    **ATTENTION,
    **CLASS_LOSSES,
    **CONVOLUTIONS,
    **ELEMENTWISE,
    **FACTORIES,
    **INDEXING,
    **LOSSES,
    **NORMS,
    **PIECES,
    **PRODUCTS,
    **RANDOM,
    **RECURRENT,
    **REDUCTIONS,
    **SHAPES,
    **SOFTMAX,
}


def rule_of(node: Node) -> Rule | None:
    """The rule of a node's operator; None: it is replicated, with a warning."""
    return RULES.get(node.op.packet) if node.op.name.startswith("aten.") else None


def strategies_of(graph: Graph, node: Node, parts: int) -> tuple[OpStrategy, ...]:
    """All strategies of a node over an axis of `parts` ranks; replication comes first."""
    whole = replicated(node)
    rule = rule_of(node)
    found = () if rule is None or parts == 1 else rule.strategies(OpView(graph, node), parts)
    return tuple(dict.fromkeys((whole, *found)))
