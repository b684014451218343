"""States what a placement of operators proves, and over which placements, for a plan."""

from __future__ import annotations

from ...compiler.ir.plan import Certificate
from .from_graph import PlacementStatement
from .result import PlacementResult

__all__ = ["certificate_of"]


def certificate_of(
    statement: PlacementStatement, result: PlacementResult, *, contiguous: bool
) -> Certificate:
    """That of `result`; `contiguous`: over placements with one piece a device."""
    single = all(len(nodes) == 1 for nodes in statement.units)
    space = (
        f"all {'contiguous ' if contiguous else ''}placements of {len(statement.units)} "
        f"{'operators' if single else 'blocks'} ({len(statement.graph.nodes)} nodes, "
        f"{len(statement.replicated)} computed wherever they are needed) on "
        f"{len(statement.devices)} devices of {len(statement.workload.kinds)} kinds whose "
        f"parameters fit{_beside(statement)}; communication is added to computation, each result "
        "by the worst link of its kind of device"
    )
    return Certificate(
        objective=result.value,
        lower_bound=result.lower_bound,
        gap=result.gap,
        search_space=space,
        solver=result.method,
        solver_seconds=result.seconds,
    )


def _beside(statement: PlacementStatement) -> str:
    """What is kept free for activations, in words."""
    kept = [f"{size} bytes on each {name}" for name, size in sorted(statement.reserve.items())]
    return f" beside {', '.join(kept)} for activations" if kept else ""
