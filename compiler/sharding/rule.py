"""A sharding rule: the strategies of an operator and how it is computed on parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .lowering import Lowering, Ref
from .strategy import StrategyRule

__all__ = ["Rule", "Table", "same_call"]


def same_call(lowering: Lowering) -> Sequence[Ref]:
    """The operator itself with the same attributes, on local operands."""
    return lowering.same()


@dataclass(frozen=True, slots=True)
class Rule:
    """How one operator can be computed on parts of tensors.

    Args:
        strategies: all ways to run it over one axis, without replication; only legal ones.
        lower: emits the local computation; it is called for any combination of strategies over the
            axes of a mesh that shards no dim twice.
    """

    strategies: StrategyRule
    lower: Callable[[Lowering], Sequence[Ref]] = same_call


Table = dict[str, Rule]
"""Rules by operator packet (`linear`, `softmax`)."""
