"""What a partition costs and needs: the one definition that search, bounds and tests share.

    step = sum_s t_s + (m - 1) max(max_s (t_s + h_s), max_s r_s, max_s g_s) + sum_s (r_s + g_s)
           + max_s (o_s + e_s) + sync

with t_s the forward plus backward seconds of one microbatch in stage s, r_s the seconds of
receiving its boundary values, g_s those of returning their gradients (both links run at the same
time as computation and as each other, so they only bound the steady state, but fill and drain
expose them once), h_s what its messages, in and out, hold it up for where they hardly advance
beside computation (threads of CPUs carry them; by the best link, a value that goes to several
stages once), o_s the optimizer's seconds, e_s those of sums of gradients over the ranks of the
stage that its last backward does not hide, and m times those that every backward makes and does not
hide, and sync the reduction of tied gradients. This is the latency of 1F1B and GPipe without
interleaving (Narayanan et al., PipeDream-2BW, 2021; Zheng et al., Alpa, 2022), with communication
added.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ...compiler.ir.cluster import Link
from ...cost_models.overlap import exposed_seconds
from .problem import Assignment, Flow, Shared, StageProblem, Unit

__all__ = [
    "StageFigures",
    "excess_bytes",
    "held_seconds",
    "is_legal",
    "stage_figures",
    "step_seconds",
    "sync_seconds",
    "transfer",
]


@dataclass(frozen=True, slots=True)
class StageFigures:
    """Cost and need of one stage; seconds are of one microbatch but for the optimizer's."""

    compute_seconds: float
    held_seconds: float
    receive_seconds: float
    return_seconds: float
    optimizer_seconds: float
    exposed_seconds: float
    memory_bytes: int
    limit_bytes: int


def stage_figures(problem: StageProblem, assignment: Assignment) -> tuple[StageFigures, ...]:
    """Figures of every stage of `assignment`."""
    members: list[list[Unit | Shared]] = [[] for _ in assignment.classes]
    for index, unit in enumerate(problem.units):
        members[assignment.stages[index]].append(unit)
    for shared in problem.shared:
        for stage in sorted({assignment.stages[user] for user in shared.users}):
            members[stage].append(shared)
    incoming: list[list[tuple[Flow, int]]] = [[] for _ in assignment.classes]
    outgoing: list[list[Flow]] = [[] for _ in assignment.classes]
    for flow in problem.flows:
        origin = assignment.stages[flow.producer]
        targets = {assignment.stages[user] for user in flow.consumers} - {origin}
        for target in sorted(targets):
            incoming[target].append((flow, assignment.classes[origin]))
        if targets:
            outgoing[origin].append(flow)
    return tuple(
        replace(
            _figures(problem, assignment, stage, members[stage], incoming[stage], outgoing[stage]),
            exposed_seconds=_exposed_seconds(problem, assignment, stage),
        )
        for stage in range(len(members))
    )


def _exposed_seconds(problem: StageProblem, assignment: Assignment, stage: int) -> float:
    """Weight gradients are computed from the last unit to the first; those of the first stage after
    nothing, so that all its backward hides sums. What stages share is summed at the end. Some sums
    are made once a step, beside the last backward, others once a microbatch, beside its own."""
    kind = problem.classes[assignment.classes[stage]].type
    computing: list[float] = []
    summing: dict[int, tuple[float, float]] = {}  # once a step, once a microbatch
    for index in reversed(range(len(problem.units))):
        if assignment.stages[index] == stage:
            unit = problem.units[index]
            seconds = unit.backward_seconds if stage == 0 else unit.weight_seconds
            computing.append(seconds[kind] if seconds else 0.0)
            summing[index] = unit.sum_seconds, unit.early_seconds
    last = 0.0
    for shared in problem.shared:
        own = shared.sum_seconds, shared.early_seconds
        homes = {assignment.stages[user] for user in shared.users} if any(own) else set()
        if stage in homes:
            first = min(user for user in shared.users if assignment.stages[user] == stage)
            before, alone = summing[first], homes == {stage}
            summing[first] = before[0] + (own[0] if alone else 0.0), before[1] + own[1]
            last += 0.0 if alone else own[0]
    once = [sums for sums, _ in summing.values()]
    each = [sums for _, sums in summing.values()]
    exposed = exposed_seconds([*zip(computing, once, strict=True), (0.0, last)], problem.overlap)
    again = 0.0
    if any(each):
        again = exposed_seconds(zip(computing, each, strict=True), problem.overlap)
    return exposed + problem.num_microbatches * again


def _figures(
    problem: StageProblem,
    assignment: Assignment,
    stage: int,
    members: list[Unit | Shared],
    incoming: list[tuple[Flow, int]],
    outgoing: list[Flow],
) -> StageFigures:
    """`incoming` are flows with the class of the device that they come from."""
    own = assignment.classes[stage]
    device = problem.classes[own]
    in_flight = problem.in_flight(assignment.num_stages, stage)
    compute = sum(item.forward_seconds[device.type] for item in members)
    compute += sum(item.backward_seconds[device.type] for item in members if isinstance(item, Unit))
    messages = sum(flow.incoming_bytes(in_flight) for flow, _ in incoming)
    messages += sum(flow.outgoing_bytes(in_flight) for flow in outgoing)
    return StageFigures(
        compute_seconds=compute,
        held_seconds=sum(
            held_seconds(problem, flow) for flow in (*(flow for flow, _ in incoming), *outgoing)
        ),
        receive_seconds=sum(
            transfer(problem.links[origin][own], flow.forward_bytes) for flow, origin in incoming
        ),
        return_seconds=sum(
            transfer(problem.links[own][origin], flow.gradient_bytes) for flow, origin in incoming
        ),
        optimizer_seconds=sum(
            item.optimizer_seconds[device.type] for item in members if item.optimizer_seconds
        ),
        exposed_seconds=0.0,
        memory_bytes=_memory(members, in_flight) + messages,
        limit_bytes=device.memory_bytes,
    )


def _memory(members: list[Unit | Shared], in_flight: int) -> int:
    """Bytes of a stage without messages: at work, or at the optimizer's step if that is more."""
    at_work = sum(in_flight * item.saved_bytes for item in members)
    at_work += max((item.transient_bytes for item in members), default=0)
    update = max(
        sum(item.update_bytes for item in members),
        max((item.update_peak_bytes for item in members), default=0),
    )
    return sum(item.static_bytes for item in members) + max(at_work, update)


def transfer(link: Link, num_bytes: int) -> float:
    """Seconds of one message; a flow without gradient returns none."""
    return link.seconds(num_bytes) if num_bytes else 0.0


def held_seconds(problem: StageProblem, flow: Flow) -> float:
    """What `flow`, with its gradient, holds a stage up for that it enters or leaves."""
    ways = flow.forward_bytes, flow.gradient_bytes
    return sum(transfer(problem.held, num_bytes) for num_bytes in ways)


def sync_seconds(problem: StageProblem, shared: Shared, copies: int) -> float:
    """Ring all-reduce of a tied gradient over the `copies` stages that hold the parameter."""
    if copies < 2 or not shared.reduced_bytes:
        return 0.0
    return 2.0 * (copies - 1) * problem.sync_link.seconds(shared.reduced_bytes / copies)


def step_seconds(problem: StageProblem, assignment: Assignment) -> float:
    """Predicted seconds of one step, see the module docstring."""
    figures = stage_figures(problem, assignment)
    exposed = sum(item.receive_seconds + item.return_seconds for item in figures)
    bottleneck = max(
        max(item.compute_seconds + item.held_seconds, item.receive_seconds, item.return_seconds)
        for item in figures
    )
    sync = sum(
        sync_seconds(problem, shared, len({assignment.stages[user] for user in shared.users}))
        for shared in problem.shared
    )
    return (
        sum(item.compute_seconds for item in figures)
        + (problem.num_microbatches - 1) * bottleneck
        + exposed
        + max(item.optimizer_seconds + item.exposed_seconds for item in figures)
        + sync
    )


def excess_bytes(problem: StageProblem, assignment: Assignment) -> int:
    """By how much the stage that is shortest of memory exceeds its device; <= 0 if all fit."""
    figures = stage_figures(problem, assignment)
    return max(item.memory_bytes - item.limit_bytes for item in figures)


def is_legal(problem: StageProblem, assignment: Assignment) -> bool:
    """Monotone along every edge, no stage empty, devices not reused, pins held, memory kept."""
    stages = assignment.stages
    used = Counter(assignment.classes)
    return (
        all(stages[source] <= stages[target] for source, target in problem.edges())
        and set(stages) == set(range(assignment.num_stages))
        and all(used[index] <= len(item.devices) for index, item in enumerate(problem.classes))
        and all(stages[unit] == stage for unit, stage in problem.stage_pins)
        and all(assignment.classes[stages[unit]] == cls for unit, cls in problem.class_pins)
        and excess_bytes(problem, assignment) <= 0
    )
