"""Decides what backward computes again instead of keeping it: nothing, all of each segment, or what
is cheap (`segments.py`).

It comes before the stages, which are then chosen under the memory and the time that this leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Graph, Mode
from ..compiler.ir.plan import Plan
from .context import RECOMPUTES, Context
from .segments import full_recompute, selective_recompute

__all__ = ["ChooseRecompute", "choose_recompute"]


def choose_recompute(graph: Graph, how: str) -> tuple[int, ...]:
    """Nodes of `graph` to recompute: `none`, `full` or `selective`; for `auto` none yet, as the
    search of meshes decides.

    Raises:
        UsageError: there is no such way.
    """
    if how not in RECOMPUTES:
        raise UsageError(
            f"there is no way to recompute called {how!r}",
            where="recompute",
            ways_out=(f"one of: {', '.join(RECOMPUTES)}",),
        )
    if how in ("auto", "none") or graph.mode is not Mode.TRAIN:
        return ()
    groups = full_recompute(graph) if how == "full" else selective_recompute(graph)
    return tuple(sorted(node for nodes in groups for node in nodes))


@dataclass(frozen=True, slots=True)
class ChooseRecompute:
    """Pass: fills `plan.recomputed`."""

    name: str = "recompute"

    def run(self, plan: Plan, context: Context) -> Plan:
        nodes = choose_recompute(context.graph, context.options.recompute)
        return replace(plan, recomputed=nodes)
