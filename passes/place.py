"""Decides which device runs which operator, for a stream of samples or for one.

From the graph's operators, their seconds on each type of device and the links to stages (the pieces
that a device runs without waiting in between), schedule, prediction and certificate, by operator
placement (`placement/throughput.py`, `placement/latency.py`). Devices may differ in speed, memory
and in the operators that they support, and may run several disconnected pieces.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..compiler.ir.errors import InfeasibleError, UsageError
from ..compiler.ir.graph import Graph, Mode
from ..compiler.ir.plan import (
    DeviceLoad,
    MemoryPrediction,
    Objective,
    Plan,
    Prediction,
    Stage,
)
from ..compiler.ir.schedule import Schedule
from ..compiler.ir.stage_edges import StageEdge, stage_edges
from ..compiler.ir.workload import Placement
from ..cost_models.analysis import batch_rows
from ..cost_models.links import transfer_seconds
from ..cost_models.ops import price
from ..cost_models.placement import device_loads
from .context import Context, PlanOptions
from .placement.certificate import certificate_of
from .placement.from_graph import (
    GRANULARITIES,
    NodeSeconds,
    PlacementStatement,
    state_workload,
)
from .placement.latency import place_latency
from .placement.latency_incumbent import LatencyResult
from .placement.memory import placed_memory
from .placement.overheads import piece_overheads
from .placement.pieces import fused_pieces, make_pieces, ordered_pieces
from .placement.result import PlacementResult
from .placement.stream import StreamRun, stream_schedule
from .placement.throughput import place_throughput

__all__ = [
    "PlaceOperators",
    "check_placement",
    "place_by_hand",
    "preferred",
    "priced_again",
    "stream",
]

# Times the time of more pieces: so much longer than predicted did 37 pieces keep their devices
# than 3 did (docs/cost-models.md).
_WORTH_PIECES = 1.1
_CONTIGUOUS_SHARE = 0.25  # of the time, to place contiguously beside
_LEAST_SECONDS = 2.0  # once memory had to be set aside
_ROUNDS = 6  # of setting more memory aside


def check_placement(mode: Mode, options: PlanOptions) -> None:
    """Raises UsageError where options contradict placement of operators."""
    if mode is not Mode.INFER:
        raise UsageError(
            f"objective={options.objective.value!r} places operators for inference",
            where="objective",
            ways_out=("pass mode='infer'", "leave objective out to plan training"),
        )
    if options.granularity not in GRANULARITIES:
        raise UsageError(
            f"granularity = {options.granularity!r} is unknown",
            where="granularity",
            ways_out=(f"one of: {', '.join(GRANULARITIES)}",),
        )
    for name, given in (
        ("mesh", options.mesh),
        ("zero", options.zero),
        ("num_stages", options.num_stages),
        ("schedule", options.schedule),
        ("together", options.together or None),
        ("constraints on layouts", options.layout_pins or None),
    ):
        if given is not None:
            raise UsageError(
                f"{name} is not for objective={options.objective.value!r}, which places operators "
                "on devices one by one",
                where=name,
                ways_out=(f"leave {name} out", "leave objective out"),
            )


@dataclass(frozen=True, slots=True)
class PlaceOperators:
    """Pass: fills everything of a plan whose objective is throughput or latency."""

    name: str = "place"

    def run(self, plan: Plan, context: Context) -> Plan:
        check_placement(plan.mode, context.options)
        count = context.options.num_microbatches
        assert count is not None, "the caller decides into how many microbatches a step is split"
        plan = replace(plan, objective=context.options.objective, num_microbatches=count)
        reserve: Counter[str] = Counter()
        ends = time.monotonic() + context.options.placement_seconds
        for _ in range(_ROUNDS):
            statement = _statement(plan, context, reserve)
            context.progress(
                f"place {len(statement.units)} operators of {len(context.graph.nodes)} nodes on "
                f"{len(statement.devices)} devices"
            )
            placed = _solved(plan, statement, context, ends)
            excess = _excess(placed)
            if not excess:
                return placed
            reserve.update(excess)
        raise _does_not_fit(placed)


def place_by_hand(plan: Plan, context: Context, placement: Placement, note: str) -> Plan:
    """The plan that runs operators where `placement` says, with a certificate that proves nothing.

    Args:
        plan: with an objective and a number of microbatches.
        placement: device of every operator of `state_workload`.
        note: what is said to have made the placement.

    Raises:
        InfeasibleError: it does not fit into memory.
    """
    statement = _statement(plan, context, {})
    loads = device_loads(statement.workload, placement)
    value = max(load.total for load in loads)
    result = PlacementResult(tuple(placement), value, 0.0, 0.0, note)
    placed = _placed(plan, statement, result, contiguous=context.options.contiguous)
    if _excess(placed):
        raise _does_not_fit(placed)
    return placed


def priced_again(plan: Plan, context: Context) -> Plan:
    """The placement of `plan` for throughput, by the times that `context` has now.

    Its certificate proves nothing.

    Raises:
        InfeasibleError: the order that these times lead to does not fit into memory.
    """
    statement = _statement(plan, context, {})
    homes = {node: stage.device for stage in plan.stages for node in stage.nodes}
    number = {device: index for index, device in enumerate(statement.devices)}
    placement = tuple(number[homes[nodes[0]]] for nodes in statement.units)
    return place_by_hand(plan, context, placement, "the placement found before")


def stream(plan: Plan, graph: Graph) -> Schedule:
    """A schedule for the stages of `plan`, of which several may stand on one device."""
    fraction = plan.batch_size / plan.num_microbatches / batch_rows(graph)
    used = {plan.cluster.devices[stage.device].type for stage in plan.stages}
    seconds = {
        entry.name: tuple(c.forward_seconds for c in price(graph, entry, batch_fraction=fraction))
        for entry in plan.cluster.types
        if entry.name in used
    }
    times = _stage_seconds(plan, seconds, plan.stages)
    return _stream(plan, graph, plan.stages, stage_edges(graph, plan.stages), times, ()).schedule


def preferred(plans: Sequence[Plan]) -> Plan:
    """Of placed plans one with the fewest pieces whose step takes little longer than the fastest
    is expected to, and of those the fastest."""
    least = min(map(_step_seconds, plans))
    near = [plan for plan in plans if _step_seconds(plan) <= _WORTH_PIECES * least]
    return min(near, key=lambda plan: (len(plan.stages), _step_seconds(plan)))


def _statement(plan: Plan, context: Context, reserve: Mapping[str, int]) -> PlacementStatement:
    options = context.options
    return state_workload(
        context.graph,
        plan.cluster,
        rows=plan.batch_size // plan.num_microbatches,
        granularity=options.granularity,
        pins=options.device_pins,
        measured=options.measured,
        overlaps=plan.objective is Objective.THROUGHPUT,
        reserve=reserve,
    )


def _solved(plan: Plan, statement: PlacementStatement, context: Context, ends: float) -> Plan:
    """The placed plan. One piece a device is preferred where more would be little faster: what is
    predicted of many pieces is less certain."""
    contiguous = context.options.contiguous
    is_free = not contiguous and plan.objective is Objective.THROUGHPUT
    left = max(ends - time.monotonic(), _LEAST_SECONDS)
    share = 1.0 - _CONTIGUOUS_SHARE if is_free else 1.0
    result = _solve(plan, statement, context, share * left, contiguous=contiguous)
    placed = _placed(plan, statement, result, contiguous=contiguous)
    if not is_free or len(placed.stages) <= 1:
        return placed
    try:
        whole = _solve(plan, statement, context, _CONTIGUOUS_SHARE * left, contiguous=True)
    except InfeasibleError:
        return placed
    best = replace(whole, lower_bound=min(result.lower_bound, whole.value))
    simple = _placed(plan, statement, best, contiguous=False)
    return placed if _excess(simple) else preferred((placed, simple))


def _step_seconds(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_seconds


def _solve(
    plan: Plan,
    statement: PlacementStatement,
    context: Context,
    seconds: float,
    *,
    contiguous: bool,
) -> PlacementResult:
    solver = place_throughput if plan.objective is Objective.THROUGHPUT else place_latency

    def tell(value: float, bound: float) -> None:
        context.progress(f"value {value:.6g} s, bound {bound:.6g} s")

    result = solver(
        statement.workload,
        contiguous=contiguous,
        time_limit=seconds,
        gap=context.options.tolerance,
        progress=tell,
    )
    version = importlib.metadata.version("ortools")
    return replace(result, method=f"{result.method}; OR-Tools {version}")


def _placed(
    plan: Plan, statement: PlacementStatement, result: PlacementResult, *, contiguous: bool
) -> Plan:
    graph = statement.graph
    homes = statement.homes(result.placement)
    if plan.objective is Objective.LATENCY and isinstance(result, LatencyResult):
        groups = result.pieces or _one_piece_each(result.placement)
        nodes = [[node for unit in group for node in statement.units[unit]] for group in groups]
        fused = fused_pieces(graph, homes, nodes)
        stages = ordered_pieces(graph, homes, statement.replicated, fused)
    else:
        stages = make_pieces(graph, homes, statement.replicated)
    edges = stage_edges(graph, stages)
    seconds = _stage_seconds(plan, statement.seconds, stages)
    overheads = piece_overheads(graph, plan.cluster, stages, edges, statement.measured)
    times = tuple(map(sum, zip(seconds, overheads, strict=True)))
    run = _stream(plan, graph, stages, edges, times, _unsteady(plan, statement, stages))
    plan = replace(
        plan,
        stages=stages,
        schedule=run.schedule,
        certificate=certificate_of(statement, result, contiguous=contiguous),
    )
    loads = _loads(plan, statement, result.placement, seconds, overheads)
    return replace(plan, prediction=_prediction(plan, statement, loads, edges, run, seconds))


def _one_piece_each(placement: Placement) -> tuple[tuple[int, ...], ...]:
    groups: dict[int, list[int]] = defaultdict(list)
    for unit, device in enumerate(placement):
        groups[device].append(unit)
    return tuple(tuple(groups[device]) for device in sorted(groups))


def _stage_seconds(
    plan: Plan, seconds: NodeSeconds, stages: tuple[Stage, ...]
) -> tuple[float, ...]:
    kinds = [device.type for device in plan.cluster.devices]
    return tuple(
        sum(seconds[kinds[stage.device]][node] for node in stage.nodes) for stage in stages
    )


def _stream(
    plan: Plan,
    graph: Graph,
    stages: tuple[Stage, ...],
    edges: tuple[StageEdge, ...],
    seconds: tuple[float, ...],
    unsteady: tuple[float, ...],
) -> StreamRun:
    """The schedule, with values on their way for as long as the link between the devices takes."""
    delays = {}
    for edge in edges:
        source, target = stages[edge.source].device, stages[edge.target].device
        size = sum(graph.values[value].type.num_bytes for value in edge.values)
        delays[edge.source, edge.target] = transfer_seconds(plan.cluster, source, target, size)
    return stream_schedule(
        devices=[stage.device for stage in stages],
        seconds=seconds,
        edges=delays,
        num_microbatches=plan.num_microbatches,
        unsteady=unsteady,
    )


def _unsteady(
    plan: Plan, statement: PlacementStatement, stages: tuple[Stage, ...]
) -> tuple[float, ...]:
    """Of every piece, variance of its time over its mean; none if that was not measured."""
    if statement.measured is None:
        return ()
    found = statement.measured.unsteady
    return tuple(found.get(plan.cluster.type_of(stage.device).name, 0.0) for stage in stages)


def _prediction(
    plan: Plan,
    statement: PlacementStatement,
    loads: tuple[DeviceLoad, ...],
    edges: tuple[StageEdge, ...],
    run: StreamRun,
    seconds: tuple[float, ...],
) -> Prediction:
    graph, cluster = statement.graph, statement.cluster
    used = sorted({stage.device for stage in plan.stages})
    busy = sum(seconds) * plan.num_microbatches
    bubble = 1.0 - busy / (len(used) * run.seconds) if run.seconds else 0.0
    assert plan.schedule is not None
    return Prediction(
        step_seconds=run.seconds,
        bubble_fraction=min(max(bubble, 0.0), 1.0),
        stage_forward_seconds=seconds,
        stage_backward_seconds=(0.0,) * len(seconds),
        memory=placed_memory(
            graph,
            plan.stages,
            edges,
            plan.schedule,
            backends=[cluster.type_of(device.index).backend for device in cluster.devices],
            fraction=plan.batch_size / plan.num_microbatches / batch_rows(graph),
            optimizer=plan.optimizer,
        ),
        loads=loads,
    )


def _loads(
    plan: Plan,
    statement: PlacementStatement,
    placement: Placement,
    seconds: tuple[float, ...],
    overheads: tuple[float, ...],
) -> tuple[DeviceLoad, ...]:
    """Loads of devices: nodes that several of them compute count for each; messages as measured, or
    as in the objective."""
    compute: dict[int, float] = defaultdict(float)
    beside: dict[int, float] = defaultdict(float)
    for stage in plan.stages:
        compute[stage.device] += seconds[stage.index]
        beside[stage.device] += overheads[stage.index]
    if statement.measured is None:
        moved = device_loads(statement.workload, placement)
        for device, load in zip(statement.devices, moved, strict=True):
            beside[device] += load.communication
    return tuple(
        DeviceLoad(device, compute[device], beside[device]) for device in sorted(statement.devices)
    )


def _excess(plan: Plan) -> Counter[str]:
    """Bytes by which devices of each type need more memory than they have."""
    found: Counter[str] = Counter()
    for need in _memory(plan):
        kind = plan.cluster.type_of(need.device)
        over = need.total_bytes - kind.memory_bytes
        if over > 0:
            found[kind.name] = max(found[kind.name], over)
    return found


def _memory(plan: Plan) -> tuple[MemoryPrediction, ...]:
    return plan.prediction.memory if plan.prediction is not None else ()


def _does_not_fit(plan: Plan) -> InfeasibleError:
    worst = max(
        _memory(plan),
        key=lambda need: need.total_bytes - plan.cluster.type_of(need.device).memory_bytes,
    )
    kind = plan.cluster.type_of(worst.device)
    return InfeasibleError(
        f"memory of device {worst.device} ({kind.name}): {worst.total_bytes} bytes needed, "
        f"{kind.memory_bytes} available: {worst.parameters_bytes} of parameters, "
        f"{worst.activations_bytes + worst.transients_bytes} of activations, "
        f"{worst.communication_bytes} of inputs, outputs and messages",
        where="placement of operators",
        ways_out=(
            "more microbatches (num_microbatches), each with fewer rows",
            "devices with more memory, or more devices",
            "a smaller batch",
        ),
    )
