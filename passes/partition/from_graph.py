"""State the stage problem of a captured graph: prices and sizes of units, devices in classes.

Costs come from `cost_models`; memory is its additive bound, of which this module decides only what
is counted once a unit (`Unit`) and what once a stage (`Shared`): parameters, constants and user
inputs that several units read, and replicated nodes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...compiler.ir.cluster import Cluster, DeviceType, Link
from ...compiler.ir.graph import Mode, OutputKind, Value, ValueKind, users
from ...cost_models.analysis import batch_rows, batch_values
from ...cost_models.node_memory import memory_profile
from ...cost_models.ops import NodeCost, price_once
from ...cost_models.overlap import Overlap
from ...cost_models.recompute import with_reruns
from ...cost_models.stages import optimizer_seconds
from .devices import class_links, device_classes, slowest_link, used_types
from .pins import class_pins, stage_pins
from .problem import Flow, Shared, StageProblem, Unit
from .statement import Statement, unit_name

__all__ = ["state_problem"]

_KEPT = (ValueKind.PARAMETER, ValueKind.BUFFER, ValueKind.CONSTANT)


@dataclass(frozen=True, slots=True)
class _Figures:
    """Prices and sizes of one graph at one microbatch size, by node or value id."""

    types: tuple[DeviceType, ...]
    costs: tuple[tuple[NodeCost, ...], ...]
    saved: tuple[int, ...]
    transient: tuple[int, ...]
    deferred: tuple[int, ...]
    value_bytes: tuple[int, ...]


def state_problem(statement: Statement, num_microbatches: int) -> StageProblem:
    """The stage problem when the batch is split into `num_microbatches`."""
    figures = _figures(statement, num_microbatches)
    classes = device_classes(statement)
    links = class_links(statement.cluster, classes)
    whole = statement.network.cluster if statement.network else statement.cluster
    units = [
        _unit(statement, figures, index, num_microbatches) for index in range(len(statement.units))
    ]
    shared = []
    for item in _held_by_several(statement, figures, num_microbatches):
        if len(item.users) == 1:
            units[item.users[0]] = _absorb(units[item.users[0]], item)
        else:
            shared.append(item)
    node_unit = {node: index for index, unit in enumerate(statement.units) for node in unit}
    return StageProblem(
        units=tuple(units),
        flows=_flows(statement, figures, node_unit),
        shared=tuple(shared),
        classes=classes,
        links=links,
        sync_link=slowest_link(statement.cluster),
        num_microbatches=num_microbatches,
        schedule=statement.schedule,
        stage_pins=stage_pins(statement),
        class_pins=class_pins(statement, classes),
        overlap=Overlap.of(whole),
        held=_held(statement.cluster, links),
    )


def _held(cluster: Cluster, links: Iterable[Iterable[Link]]) -> Link:
    """The share of messages for which either end is held up, over the best of `links`."""
    share, every = Overlap.of(cluster).held, [link for row in links for link in row]
    if not share:
        return Link(0.0, math.inf)
    return Link(
        share * min(link.latency_seconds for link in every),
        max(link.bytes_per_second for link in every) / share,
    )


def _figures(statement: Statement, num_microbatches: int) -> _Figures:
    graph = statement.graph
    fraction = statement.batch_size / num_microbatches / batch_rows(graph)
    types = used_types(statement.cluster)
    profiles = [
        memory_profile(
            graph, batch_fraction=fraction, backend=backend, recomputed=statement.recomputed
        )
        for backend in sorted({entry.backend for entry in types})
    ]
    batched = batch_values(graph)
    rerun = statement.rerun
    return _Figures(
        types=types,
        costs=tuple(
            with_reruns(
                price_once(
                    graph, entry, batch_fraction=fraction, network=statement.network, ahead=True
                ),
                rerun,
            )
            for entry in types
        ),
        saved=tuple(max(node.saved_bytes for node in row) for row in zip(*profiles, strict=True)),
        transient=tuple(
            max(node.transient_bytes for node in row) for row in zip(*profiles, strict=True)
        ),
        deferred=tuple(
            max(node.deferred_bytes for node in row) for row in zip(*profiles, strict=True)
        ),
        value_bytes=tuple(
            math.ceil(value.type.num_bytes * (fraction if value.id in batched else 1.0))
            for value in graph.values
        ),
    )


def _unit(statement: Statement, figures: _Figures, index: int, num_microbatches: int) -> Unit:
    graph, nodes = statement.graph, statement.units[index]
    trains = graph.mode is Mode.TRAIN
    returned = {output.value for output in graph.outputs_of(OutputKind.USER)}
    kept = (
        0
        if trains
        else 2
        * num_microbatches
        * sum(
            figures.value_bytes[value]
            for node in nodes
            for value in graph.nodes[node].outputs
            if value in returned
        )
    )
    return Unit(
        name=unit_name(graph, nodes),
        forward_seconds=tuple(
            _sum_or_never(statement, figures, position, nodes, "forward_seconds")
            for position in range(len(figures.types))
        ),
        backward_seconds=tuple(
            sum(costs[node].backward_seconds for node in nodes) if trains else 0.0
            for costs in figures.costs
        ),
        weight_seconds=tuple(
            sum(costs[node].backward_weight_seconds for node in nodes) if trains else 0.0
            for costs in figures.costs
        ),
        static_bytes=kept + sum(figures.deferred[node] for node in nodes),
        saved_bytes=sum(figures.saved[node] for node in nodes) if trains else 0,
        transient_bytes=max(figures.transient[node] for node in nodes),
        optimizer_seconds=(0.0,) * len(figures.types),
    )


def _sum_or_never(
    statement: Statement, figures: _Figures, position: int, nodes: Iterable[int], name: str
) -> float:
    """Seconds of `nodes` on one device type, infinite if it cannot run one of them."""
    missing = figures.types[position].unsupported_ops
    if any(statement.graph.nodes[node].op.name in missing for node in nodes):
        return math.inf
    return float(sum(getattr(figures.costs[position][node], name) for node in nodes))


def _held_by_several(
    statement: Statement, figures: _Figures, num_microbatches: int
) -> list[Shared]:
    """What each stage holds once: tensors that are not computed, and replicated nodes."""
    graph = statement.graph
    readers: dict[int, set[int]] = defaultdict(set)
    replica_users: dict[int, set[int]] = defaultdict(set)
    for index, nodes in enumerate(statement.units):
        for node in (*nodes, *statement.replicas[index]):
            for value in graph.nodes[node].inputs:
                readers[value].add(index)
        for node in statement.replicas[index]:
            replica_users[node].add(index)
    held = [
        _tensor(statement, figures, graph.values[value], tuple(sorted(units)), num_microbatches)
        for value, units in sorted(readers.items())
        if graph.values[value].kind in (*_KEPT, ValueKind.INPUT)
    ]
    together: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for node, units in sorted(replica_users.items()):
        together[tuple(sorted(units))].append(node)
    trains = graph.mode is Mode.TRAIN
    for group, members in together.items():
        held.append(
            Shared(
                name=graph.nodes[members[0]].name,
                users=group,
                forward_seconds=tuple(
                    _sum_or_never(statement, figures, position, members, "forward_seconds")
                    for position in range(len(figures.types))
                ),
                saved_bytes=sum(figures.saved[node] for node in members) if trains else 0,
                transient_bytes=max(figures.transient[node] for node in members),
                optimizer_seconds=(0.0,) * len(figures.types),
            )
        )
    return _merge_alike(held)


def _tensor(
    statement: Statement,
    figures: _Figures,
    value: Value,
    units: tuple[int, ...],
    num_microbatches: int,
) -> Shared:
    """A parameter with its gradient and states, a buffer, a constant or an input of all steps."""
    trained = value.kind is ValueKind.PARAMETER and value.requires_grad
    trained = trained and statement.graph.mode is Mode.TRAIN
    own = value.type.num_bytes
    optimizer = statement.optimizer
    static, updated, away = own, own if trained else 0, 0
    summed = early = handling = once = 0.0
    if value.kind is ValueKind.INPUT:
        copies = num_microbatches if value.batch_dim is not None else 1
        static = figures.value_bytes[value.id] * copies
    elif trained and value.id in statement.parameters:
        part = statement.parameters[value.id]
        static = own + part.gradient_bytes + part.state_bytes
        updated = part.updated_bytes
        away = updated if part.is_offloaded else 0
        summed = part.sum_seconds
        early = part.microbatch_seconds
        handling = part.handling_seconds
        once = part.step_seconds
    elif trained:
        static = 2 * own + math.ceil(own * optimizer.state_bytes_per_parameter_byte)
    backends = {entry.backend for entry in figures.types}
    foreach = trained and backends != {"cpu"} and optimizer.state_bytes_per_parameter_byte > 0
    return Shared(
        name=value.origin,
        users=units,
        forward_seconds=(handling,) * len(figures.types),
        static_bytes=static,
        update_bytes=updated - away if foreach else 0,
        update_peak_bytes=4 * updated,
        optimizer_seconds=tuple(
            once
            + optimizer_seconds(
                entry,
                optimizer,
                parameter_bytes=updated - away,
                num_parameters=1 if entry.backend == "cpu" else 0,  # others launch all as one
                offloaded_bytes=away,
            )
            for entry in figures.types
        ),
        reduced_bytes=own if trained and len(units) > 1 else 0,
        sum_seconds=summed,
        early_seconds=early,
    )


def _merge_alike(held: list[Shared]) -> list[Shared]:
    """Join what has the same users; only tied parameters stay single, as each is reduced."""
    groups: dict[tuple[int, ...], Shared] = {}
    single = []
    for item in held:
        if item.reduced_bytes:
            single.append(item)
        elif item.users in groups:
            groups[item.users] = _join(groups[item.users], item)
        else:
            groups[item.users] = item
    return [*single, *groups.values()]


def _join(first: Shared, second: Shared) -> Shared:
    return replace(
        first,
        forward_seconds=_add(first.forward_seconds, second.forward_seconds),
        static_bytes=first.static_bytes + second.static_bytes,
        saved_bytes=first.saved_bytes + second.saved_bytes,
        transient_bytes=max(first.transient_bytes, second.transient_bytes),
        update_bytes=first.update_bytes + second.update_bytes,
        update_peak_bytes=max(first.update_peak_bytes, second.update_peak_bytes),
        optimizer_seconds=_add(first.optimizer_seconds, second.optimizer_seconds),
        sum_seconds=first.sum_seconds + second.sum_seconds,
        early_seconds=first.early_seconds + second.early_seconds,
    )


def _absorb(unit: Unit, item: Shared) -> Unit:
    """`unit` with what only it uses."""
    return replace(
        unit,
        forward_seconds=_add(unit.forward_seconds, item.forward_seconds),
        static_bytes=unit.static_bytes + item.static_bytes,
        saved_bytes=unit.saved_bytes + item.saved_bytes,
        transient_bytes=max(unit.transient_bytes, item.transient_bytes),
        update_bytes=unit.update_bytes + item.update_bytes,
        update_peak_bytes=max(unit.update_peak_bytes, item.update_peak_bytes),
        optimizer_seconds=_add(unit.optimizer_seconds, item.optimizer_seconds),
        sum_seconds=unit.sum_seconds + item.sum_seconds,
        early_seconds=unit.early_seconds + item.early_seconds,
    )


def _add(first: tuple[float, ...], second: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(first, second, strict=True))


def _flows(statement: Statement, figures: _Figures, node_unit: dict[int, int]) -> tuple[Flow, ...]:
    graph = statement.graph
    read_by = users(graph)
    trains = graph.mode is Mode.TRAIN
    flows = []
    for unit, nodes in enumerate(statement.units):
        for node in nodes:
            for value in graph.nodes[node].outputs:
                readers = {node_unit[user] for user in read_by[value] if user in node_unit}
                consumers = tuple(sorted(readers - {unit}))
                if consumers:
                    size = max(figures.value_bytes[value], 1)
                    carries = trains and graph.values[value].requires_grad
                    flows.append(Flow(unit, consumers, size, size if carries else 0))
    return tuple(flows)
