"""Carries the stages of a plan over to another capture of the same model.

Another batch size or sequence length gives the same nodes, which keep their stages. Another mode
(inference, without loss or dropout) gives other nodes: those that read parameters or buffers go
where these are held, the rest follow the corresponding node of the planned graph (same module,
operator and occurrence) as far as values still flow to later stages only. Nodes that neither
reads nor is computed from anything placed go as late as their users allow.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Graph, Node, ValueKind, producers, users
from ..compiler.ir.plan import NodeLayout, ParameterLayout, Plan, Stage, StageMesh, ValueLayout
from ..compiler.sharding.sharding import legal_node_layouts, legal_value_layouts
from .replicate import complete_stages, replicated_nodes

__all__ = ["Layouts", "carried_over", "held_stages", "transfer", "transfer_layouts"]

_HELD = (ValueKind.PARAMETER, ValueKind.BUFFER)


def carried_over(plan: Plan, old: Graph, new: Graph) -> Plan:
    """`plan`, which was made for `old`, with its stages and layouts for `new`.

    Raises:
        UsageError: as `transfer`.
    """
    stages = transfer(plan, old, new)
    if plan.is_mixed:
        return replace(plan, stages=tuple(_own_carried(plan, stage, old, new) for stage in stages))
    layouts = transfer_layouts(plan, old, new)
    return replace(
        plan,
        stages=stages,
        layouts=layouts.values,
        parameter_layouts=layouts.parameters,
        node_layouts=layouts.nodes,
    )


def _own_carried(plan: Plan, stage: Stage, old: Graph, new: Graph) -> Stage:
    """A stage of `new` with the layouts that it has over its own mesh in `old`."""
    assert stage.own is not None
    layouts = transfer_layouts(plan.of_stage(stage), old, new)
    inside = frozenset(stage.nodes)
    kept = (replace(group, nodes=_within(group.nodes, inside)) for group in layouts.nodes)
    groups = tuple(group for group in kept if group.nodes)
    own = StageMesh(stage.own.mesh, layouts.values, layouts.parameters, groups)
    return replace(stage, own=own)


def _within(nodes: tuple[int, ...], inside: frozenset[int]) -> tuple[int, ...]:
    return tuple(node for node in nodes if node in inside)


def transfer(
    plan: Plan,
    old_graph: Graph | None,
    new_graph: Graph,
    parameter_stages: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Stage, ...]:
    """Stages of `new_graph` under `plan`, which was made for `old_graph`.

    Stages that the new graph has no nodes for (one that only computes the loss) are left out and
    the others renumbered; every stage keeps its devices, and its mesh if it has its own.

    Args:
        old_graph: the planned graph, or None if it is not at hand.
        parameter_stages: name -> stages that hold the parameter or buffer; by default those that
            read it in `old_graph`.

    Raises:
        UsageError: the new graph needs a parameter where the plan does not hold it.
    """
    if old_graph is not None and _same_nodes(old_graph, new_graph):
        return plan.stages
    held = parameter_stages
    if held is None:
        assert old_graph is not None, "either the planned graph or its parameters' stages"
        held = held_stages(plan, old_graph)
    hints = _hints(plan, old_graph, new_graph) if old_graph is not None else {}
    placed = _place(new_graph, held, hints, len(plan.stages))
    if isinstance(placed, _Conflict):
        placed = _place(new_graph, held, {}, len(plan.stages))
    if isinstance(placed, _Conflict):
        raise UsageError(
            f"the plan holds {placed.name} in stages {placed.held}, but this call of the model "
            f"reads it after stage {placed.earliest}",
            where=placed.node.module_path or placed.node.name,
            ways_out=("plan for this mode of the model by itself",),
        )
    return _stages(plan, new_graph, placed)


@dataclass(frozen=True, slots=True)
class Layouts:
    """The layouts of a plan: of values, parameters and nodes (see `Plan`)."""

    values: tuple[ValueLayout, ...]
    parameters: tuple[ParameterLayout, ...]
    nodes: tuple[NodeLayout, ...]


def transfer_layouts(plan: Plan, old: Graph, new: Graph) -> Layouts:
    """Layouts of `new` under `plan`, which was made for `old`.

    Parameters and buffers are held as planned. A node runs like the one it corresponds to (same
    module, operator and occurrence) if that is legal at its sizes, else replicated.
    """
    if not (plan.node_layouts or plan.parameter_layouts or plan.layouts):
        return Layouts((), (), ())
    names = {(value.kind, value.origin): value.name for value in new.values if value.origin}
    renamed = {
        value.name: names[value.kind, value.origin]
        for value in old.values
        if (value.kind, value.origin) in names
    }
    position = {key: node for node, key in enumerate(_keys(new))}
    twins = {node: position[key] for node, key in enumerate(_keys(old)) if key in position}
    nodes = tuple(
        replace(group, nodes=tuple(sorted(twins[node] for node in group.nodes if node in twins)))
        for group in plan.node_layouts
    )
    return Layouts(
        legal_value_layouts(
            new,
            plan.stage_mesh,
            tuple(
                ValueLayout(renamed[entry.value], entry.layout)
                for entry in plan.layouts
                if entry.value in renamed
            ),
        ),
        tuple(
            replace(entry, value=renamed[entry.value])
            for entry in plan.parameter_layouts
            if entry.value in renamed
        ),
        legal_node_layouts(new, plan.stage_mesh, nodes),
    )


def held_stages(plan: Plan, graph: Graph) -> dict[str, tuple[int, ...]]:
    """Name (aliases too) of each parameter and buffer -> stages of `plan` that read it."""
    table: dict[str, set[int]] = defaultdict(set)
    for stage in plan.stages:
        for node in stage.nodes:
            for index in graph.nodes[node].inputs:
                value = graph.values[index]
                if value.kind in _HELD:
                    for name in (value.origin, *value.aliases):
                        table[name].add(stage.index)
    return {name: tuple(sorted(stages)) for name, stages in table.items()}


def _same_nodes(old: Graph, new: Graph) -> bool:
    """Whether the graphs differ in nothing but sizes."""
    return len(old.nodes) == len(new.nodes) and all(
        a.op == b.op
        and a.inputs == b.inputs
        and a.outputs == b.outputs
        and a.module_path == b.module_path
        for a, b in zip(old.nodes, new.nodes, strict=True)
    )


def _keys(graph: Graph) -> list[tuple[str, str, int]]:
    """Module, operator and occurrence of every node."""
    seen: Counter[tuple[str, str]] = Counter()
    keys = []
    for node in graph.nodes:
        place = node.module_path, node.op.name
        keys.append((*place, seen[place]))
        seen[place] += 1
    return keys


def _hints(plan: Plan, old: Graph, new: Graph) -> dict[int, int]:
    """New node -> stage of the old node that it corresponds to, where that is in one stage."""
    homes: dict[int, list[int]] = defaultdict(list)
    for stage in plan.stages:
        for node in stage.nodes:
            homes[node].append(stage.index)
    stage_of = {key: homes[node] for node, key in enumerate(_keys(old))}
    return {
        node: stage_of[key][0]
        for node, key in enumerate(_keys(new))
        if len(stage_of.get(key, ())) == 1
    }


@dataclass(frozen=True, slots=True)
class _Conflict:
    """A node that reads what no stage from `earliest` on holds."""

    node: Node
    name: str
    held: tuple[int, ...]
    earliest: int


def _place(
    graph: Graph,
    held: Mapping[str, tuple[int, ...]],
    hints: Mapping[int, int],
    num_stages: int,
) -> dict[int, int] | _Conflict:
    """Stage of every node that is not replicated, or the first node that has none."""
    replicated = replicated_nodes(graph)
    made_by = producers(graph)
    stage_of: dict[int, int] = {}
    for node in graph.nodes:
        if node.id in replicated:
            continue
        sources = [stage_of[made_by[v]] for v in node.inputs if made_by.get(v) in stage_of]
        earliest = max(sources, default=0)
        owners = [
            (graph.values[v].origin, held[graph.values[v].origin])
            for v in node.inputs
            if graph.values[v].kind in _HELD and graph.values[v].origin in held
        ]
        legal = [s for s in range(earliest, num_stages) if all(s in o for _, o in owners)]
        if not legal:
            name, stages = owners[0]
            return _Conflict(node, name, stages, earliest)
        if owners or sources or node.id in hints:
            wanted = hints.get(node.id, earliest)
            later = [stage for stage in legal if stage >= wanted]
            stage_of[node.id] = later[0] if later else legal[-1]
    _place_late(graph, stage_of, replicated, num_stages)
    return stage_of


def _place_late(
    graph: Graph, stage_of: dict[int, int], replicated: frozenset[int], num_stages: int
) -> None:
    """Give each node that is free of constraints the stage of its first user."""
    read_by = users(graph)
    for node in reversed(graph.nodes):
        if node.id not in stage_of and node.id not in replicated:
            later = [
                stage_of[user]
                for value in node.outputs
                for user in read_by[value]
                if user in stage_of
            ]
            stage_of[node.id] = min(later, default=num_stages - 1)


def _stages(plan: Plan, graph: Graph, stage_of: dict[int, int]) -> tuple[Stage, ...]:
    groups: list[set[int]] = [set() for _ in plan.stages]
    for node, stage in stage_of.items():
        groups[stage].add(node)
    pairs = zip(plan.stages, groups, strict=True)
    kept = [(stage, group) for stage, group in pairs if group]
    complete_stages(graph, [group for _, group in kept])
    return tuple(
        replace(stage, index=index, nodes=tuple(sorted(group)))
        for index, (stage, group) in enumerate(kept)
    )
