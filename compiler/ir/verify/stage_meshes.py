"""Rules of plans whose stages have meshes of their own.

All stages have one, then; the plan itself has no layouts and no axis but `pipeline`, and every
device has one stage. A parameter or buffer that several stages use is held whole by each: parts of
it in unlike layouts would have to be summed and saved as parts of each other.
"""

from __future__ import annotations

from ..errors import VerificationError
from ..graph import Graph, Value, ValueKind, users
from ..mesh import Replicate
from ..plan import PIPELINE, Plan, Stage
from .cluster import verify_mesh
from .report import check, first_repeated

__all__ = ["verify_shared_tensors", "verify_stage_meshes"]


def verify_stage_meshes(plan: Plan) -> None:
    """Check what needs no graph. Raises VerificationError."""
    here = "stages of the plan"
    without = [stage.index for stage in plan.stages if stage.own is None]
    check(not without, f"stages {without} have no mesh of their own, others have", here)
    others = [axis.name for axis in plan.mesh.axes if axis.name != PIPELINE]
    tables = plan.layouts, plan.parameter_layouts, plan.node_layouts
    told = f"stages have meshes of their own, but the plan has axes {others} or layouts for all"
    check(not others and not any(tables), told, here)
    shared = first_repeated(device for stage in plan.stages for device in stage.devices)
    told = f"device {shared} has several stages; with meshes of their own it may have one only"
    check(shared is None, told, here)
    for stage in plan.stages:
        assert stage.own is not None
        verify_mesh(stage.own.mesh)
        names = [axis.name for axis in stage.own.mesh.axes]
        inside = f"mesh {stage.own.mesh} of stage {stage.index}"
        check(PIPELINE not in names, "there is no pipeline inside a stage", inside)
        laid_out = {node for group in stage.own.node_layouts for node in group.nodes}
        alien = sorted(laid_out - set(stage.nodes))
        check(not alien, f"it lays out nodes {alien[:5]}, which are not in the stage", inside)


def verify_shared_tensors(plan: Plan, graph: Graph) -> None:
    """What several stages hold is whole in each. Raises VerificationError."""
    read_by = users(graph)
    for value in graph.values:
        if value.kind not in (ValueKind.PARAMETER, ValueKind.BUFFER):
            continue
        nodes = set(read_by[value.id])
        stages = [stage for stage in plan.stages if not nodes.isdisjoint(stage.nodes)]
        parts = [stage.index for stage in stages if not _is_whole(stage, value)]
        if len(stages) > 1 and parts:
            indices = [stage.index for stage in stages]
            raise VerificationError(
                f"stages {indices} hold it, each over its own mesh, and {parts} only parts of it",
                where=f"{value.kind.value} {value.origin!r}",
                ways_out=(
                    "replicate it in these stages, without ZeRO",
                    "put the nodes that use it into one stage",
                    "give all stages the same mesh",
                ),
            )


def _is_whole(stage: Stage, value: Value) -> bool:
    assert stage.own is not None
    layouts = [entry.layout for entry in stage.own.layouts if entry.value == value.name]
    for entry in stage.own.parameter_layouts:
        if entry.value == value.name:
            layouts += [entry.held, entry.state]
    return all(isinstance(p, Replicate) for layout in layouts for p in layout.placements)
