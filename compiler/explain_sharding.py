"""What a person is told about the mesh of a plan and how tensors lie on it."""

from __future__ import annotations

from collections import Counter

from .ir.plan import Plan

__all__ = ["layouts_json"]


def layouts_json(plan: Plan) -> dict[str, object]:
    """How many parameters, other held tensors and nodes have which layout; those that are
    replicated in every respect are not in a plan, and not here."""
    parameters = Counter(
        (str(entry.held), str(entry.gradient), str(entry.state)) for entry in plan.parameter_layouts
    )
    held = Counter(str(entry.layout) for entry in plan.layouts)
    return {
        "axes": [axis.name for axis in plan.stage_mesh.axes],
        "parameters": [
            {"held": sides[0], "gradient": sides[1], "state": sides[2], "count": count}
            for sides, count in sorted(parameters.items())
        ],
        "held": dict(sorted(held.items())),
        "sharded_nodes": sum(len(group.nodes) for group in plan.node_layouts),
    }
