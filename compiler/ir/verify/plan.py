"""Rules of a `Plan`. Passes fill plans in bit by bit: what is not decided yet is not checked."""

from __future__ import annotations

import math

from ..errors import VerificationError
from ..graph import Graph, Value, producers
from ..mesh import Mesh, Partial, Shard, chunk_sizes
from ..plan import ParameterLayout, Plan, Prediction
from ..replicable import replicable_nodes
from ..stage_edges import schedule_edges
from .cluster import verify_cluster, verify_layout, verify_mesh
from .recompute import verify_recomputed
from .report import check, fail_node, first_repeated
from .schedule import verify_schedule
from .stage_meshes import verify_shared_tensors, verify_stage_meshes

__all__ = ["verify_plan"]

_ROUNDING = 1e-9
_MOST_STATES = 1e6  # bytes of states for a byte of parameters


def verify_plan(plan: Plan, graph: Graph | None = None) -> None:
    """Check every rule of the level.

    Stages are numbered 0, 1, ... and stand on devices of the cluster, one stage a device unless
    the schedule runs several there. With `graph`: each node is in a stage, in exactly one unless
    it may be replicated, and no stage reads what a later one computes. The schedule is legal and
    runs each stage on the stage's device. Predicted memory fits the devices.

    Raises:
        VerificationError: the first rule that is broken.
    """
    verify_cluster(plan.cluster)
    verify_mesh(plan.mesh)
    check(plan.batch_size >= 1, f"batch_size is {plan.batch_size}", "plan")
    check(
        0 <= plan.num_microbatches <= plan.batch_size,
        f"num_microbatches is {plan.num_microbatches} for a batch of {plan.batch_size}",
        "plan",
    )
    states = plan.optimizer.state_bytes_per_parameter_byte
    check(
        0.0 <= states <= _MOST_STATES,
        f"the optimizer keeps {states} bytes of states for a byte of parameters",
        "optimizer of the plan",
    )
    _verify_stages(plan)
    if graph is not None:
        check(
            graph.mode is plan.mode,
            f"a plan to {plan.mode.value} for a graph to {graph.mode.value}",
            "plan",
        )
        if plan.stages:
            _verify_cover(plan, graph)
            _verify_edges(plan, graph)
    if plan.is_mixed:
        verify_stage_meshes(plan)
        for stage in plan.stages:
            _verify_layouts(plan.of_stage(stage), graph)
        if graph is not None:
            verify_shared_tensors(plan, graph)
    else:
        _verify_layouts(plan, graph)
    verify_recomputed(plan.recomputed, plan.mode, graph, "plan")
    if plan.schedule is not None:
        _verify_plan_schedule(plan, graph)
    if plan.prediction is not None:
        _verify_prediction(plan, plan.prediction)
    _verify_certificate(plan)


def _verify_stages(plan: Plan) -> None:
    num_devices = len(plan.cluster.devices)
    for position, stage in enumerate(plan.stages):
        here = f"stages[{position}] of the plan"
        check(stage.index == position, f"its index is {stage.index}, not {position}", here)
        size = plan.of_stage(stage).stage_mesh.size
        check(
            len(stage.devices) == size,
            f"it has {len(stage.devices)} devices for an in-stage mesh of {size}",
            here,
        )
        for device in stage.devices:
            check(
                0 <= device < num_devices,
                f"device {device} is not one of the cluster's {num_devices} devices",
                here,
            )
        twice = first_repeated(stage.devices)
        check(twice is None, f"device {twice} stands twice in its mesh", here)
        check(bool(stage.nodes), "the stage has no nodes", here)
        ascending = all(a < b for a, b in zip(stage.nodes, stage.nodes[1:], strict=False))
        check(ascending and stage.nodes[0] >= 0, "its node ids do not ascend", here)
    shared = first_repeated(device for stage in plan.stages for device in stage.devices)
    if shared is not None and plan.schedule is None:
        on_it = [stage.index for stage in plan.stages if shared in stage.devices]
        raise VerificationError(
            f"stages {on_it} stand on device {shared}, and no schedule says how they share it",
            where="stages of the plan",
        )


def _verify_cover(plan: Plan, graph: Graph) -> None:
    homes: dict[int, list[int]] = {}
    for stage in plan.stages:
        last = stage.nodes[-1]
        check(
            last < len(graph.nodes),
            f"node {last} is not one of the {len(graph.nodes)} nodes of graph {graph.name}",
            f"stages[{stage.index}] of the plan",
        )
        for node in stage.nodes:
            homes.setdefault(node, []).append(stage.index)
    may_repeat = replicable_nodes(graph)
    for entry in graph.nodes:
        found = homes.get(entry.id, [])
        if not found:
            fail_node(graph, entry, "the node is in no stage")
        if len(found) > 1 and entry.id not in may_repeat:
            fail_node(
                graph,
                entry,
                f"the node is in stages {found}; it depends on a parameter, randomness or data "
                "and may be in one only",
            )


def _verify_edges(plan: Plan, graph: Graph) -> None:
    made_by = producers(graph)
    first_home: dict[int, int] = {}
    for stage in plan.stages:
        for node in stage.nodes:
            first_home.setdefault(node, stage.index)
    for stage in plan.stages:
        own = set(stage.nodes)
        for node in stage.nodes:
            for value in graph.nodes[node].inputs:
                source = made_by.get(value)
                if source is None or source in own or first_home[source] < stage.index:
                    continue
                fail_node(
                    graph,
                    graph.nodes[node],
                    f"stage {stage.index} reads %{graph.values[value].name}, which stage "
                    f"{first_home[source]} computes; values flow to later stages only",
                )


def _verify_layouts(plan: Plan, graph: Graph | None) -> None:
    laid_out = [entry.value for entry in plan.layouts]
    laid_out += [entry.value for entry in plan.parameter_layouts]
    repeated = first_repeated(laid_out)
    check(repeated is None, f"%{repeated} has two layouts", "layouts of the plan")
    if graph is None:
        return
    values = graph.by_name()
    for entry in plan.layouts:
        here = f"layout {entry.layout} of %{entry.value}"
        check(entry.value in values, f"graph {graph.name} has no value of this name", here)
        verify_layout(entry.layout, values[entry.value].type, plan.stage_mesh, where=here)
    for parameter in plan.parameter_layouts:
        for name in ("held", "gradient", "state"):
            layout = getattr(parameter, name)
            here = f"{name} layout {layout} of parameter %{parameter.value}"
            check(parameter.value in values, f"graph {graph.name} has no such value", here)
            verify_layout(layout, values[parameter.value].type, plan.stage_mesh, where=here)
        _verify_division(plan.stage_mesh, parameter, values[parameter.value])
    _verify_node_layouts(plan, graph)


def _verify_division(mesh: Mesh, entry: ParameterLayout, value: Value) -> None:
    """Gradients and states are of what is held, but for shares of that along one axis (ZeRO)."""
    here = f"parameter %{entry.value}"
    layouts = entry.held, entry.gradient, entry.state
    shared = []
    sides = zip(mesh.axes, *(layout.placements for layout in layouts), strict=True)
    for axis, held, gradient, state in sides:
        told = f"over {axis.name} it is held as {held}, its gradient as {gradient}, states {state}"
        if isinstance(held, Shard):
            check(held == gradient == state, f"{told}; they must be alike", here)
            continue
        alike = not isinstance(gradient, Shard) or gradient == state
        check(
            alike and not isinstance(state, Partial), f"{told}; states must be shared alike", here
        )
        if isinstance(state, Shard):
            shared.append(axis.name)
            check(state not in entry.held.placements, f"{told}; another axis shards the dim", here)
            size = value.type.shape[state.dim]
            many = min(chunk_sizes(size, axis.size)) > 0
            check(many, f"{told}, but {axis.size} ranks cannot share {size} rows", here)
    check(len(shared) <= 1, f"states are shared over several axes: {shared}", here)


def _verify_node_layouts(plan: Plan, graph: Graph) -> None:
    repeated = first_repeated(node for group in plan.node_layouts for node in group.nodes)
    check(repeated is None, f"node {repeated} has two layouts", "node layouts of the plan")
    for group in plan.node_layouts:
        for number in group.nodes:
            check(0 <= number < len(graph.nodes), f"there is no node {number}", "node layouts")
            node = graph.nodes[number]
            for kind, ids, layouts in (
                ("input", node.inputs, group.inputs),
                ("output", node.outputs, group.outputs),
            ):
                if len(ids) != len(layouts):
                    fail_node(graph, node, f"{len(layouts)} {kind} layouts for {len(ids)} {kind}s")
                for value, layout in zip(ids, layouts, strict=True):
                    here = f"{kind} %{graph.values[value].name} of node {node.name}"
                    verify_layout(layout, graph.values[value].type, plan.stage_mesh, where=here)


def _verify_plan_schedule(plan: Plan, graph: Graph | None) -> None:
    schedule = plan.schedule
    assert schedule is not None
    here = f"schedule {schedule.name} of the plan"
    for name, found, expected in (
        ("stages", schedule.num_stages, len(plan.stages)),
        ("microbatches", schedule.num_microbatches, plan.num_microbatches),
    ):
        check(found == expected, f"it is for {found} {name}, the plan has {expected}", here)
    num_devices = len(plan.cluster.devices)
    check(
        len(schedule.ranks) <= num_devices,
        f"it has {len(schedule.ranks)} ranks, the cluster {num_devices} devices",
        here,
    )
    verify_schedule(schedule, mode=plan.mode, edges=schedule_edges(plan, graph))
    for rank, actions in enumerate(schedule.ranks):
        for action in actions:
            device = plan.stages[action.stage].device
            if device != rank:
                raise VerificationError(
                    f"{action} runs on rank {rank}, but stage {action.stage} stands on device "
                    f"{device}",
                    where=here,
                )


def _verify_prediction(plan: Plan, prediction: Prediction) -> None:
    here = "prediction of the plan"
    for name, figures in (
        ("stage_forward_seconds", prediction.stage_forward_seconds),
        ("stage_backward_seconds", prediction.stage_backward_seconds),
        ("step_seconds", (prediction.step_seconds,)),
    ):
        good = all(math.isfinite(figure) and figure >= 0 for figure in figures)
        check(good, f"{name} has a figure that is negative or no number: {figures}", here)
        total = plan.num_microbatches * sum(figures)
        check(math.isfinite(total), f"{name} adds up to no number: {figures}", here)
        check(
            name == "step_seconds" or len(figures) in (0, len(plan.stages)),
            f"{name} has {len(figures)} figures for {len(plan.stages)} stages",
            here,
        )
    repeated = first_repeated(entry.device for entry in prediction.memory)
    check(repeated is None, f"device {repeated} has two memory predictions", here)
    for entry in prediction.memory:
        check(
            0 <= entry.device < len(plan.cluster.devices),
            f"memory of device {entry.device}, which the cluster does not have",
            here,
        )
        kind = plan.cluster.type_of(entry.device)
        limit = kind.memory_bytes
        check(entry.total_bytes >= 0, f"device {entry.device} needs less than no memory", here)
        check(
            entry.total_bytes <= limit,
            f"device {entry.device} needs {entry.total_bytes} bytes, "
            f"{entry.total_bytes - limit} more than its {limit}",
            here,
        )
        room = kind.host.memory_bytes if kind.host is not None else math.inf
        check(
            0 <= entry.host_bytes <= room,
            f"device {entry.device} offloads {entry.host_bytes} bytes, its host has room for "
            f"{room}",
            here,
        )
    repeated = first_repeated(entry.device for entry in prediction.loads)
    check(repeated is None, f"device {repeated} has two loads", here)
    for load in prediction.loads:
        check(
            0 <= load.device < len(plan.cluster.devices),
            f"load of device {load.device}, which the cluster does not have",
            here,
        )
        figures = load.compute_seconds, load.communication_seconds
        good = all(math.isfinite(figure) and figure >= 0 for figure in figures)
        check(good, f"device {load.device} has a load of {figures} seconds", here)
    known = {entry.device for entry in prediction.memory}
    missing = sorted({stage.device for stage in plan.stages} - known)
    check(not (known and missing), f"devices {missing} have stages but no memory prediction", here)


def _verify_certificate(plan: Plan) -> None:
    certificate = plan.certificate
    if certificate is None:
        return
    here = "certificate of the plan"
    figures = (certificate.objective, certificate.lower_bound, certificate.gap)
    check(all(map(math.isfinite, figures)), f"a figure is no number: {figures}", here)
    slack = _ROUNDING * max(1.0, abs(certificate.objective))
    check(
        certificate.lower_bound <= certificate.objective + slack,
        f"lower bound {certificate.lower_bound} exceeds the objective {certificate.objective}",
        here,
    )
    check(
        -_ROUNDING <= certificate.gap <= 1 + _ROUNDING,
        f"gap {certificate.gap} is not between 0 and 1",
        here,
    )
