"""Cut a captured graph into stage graphs, following a plan's stages.

From `Graph` and stage node sets to one `StageProgram` a stage. A value read in a stage that does
not compute it becomes a BOUNDARY value there and a BOUNDARY output of the stage that does. When
several stages compute a value (replicated nodes), each reads its own copy. A stage that returns the
new content of a buffer holds that buffer, whether it reads the old content or not.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ..ir.errors import VerificationError
from ..ir.graph import Graph, Mode, Node, Output, OutputKind, Value, ValueKind, producers
from ..ir.plan import Stage
from ..ir.program import StageProgram

__all__ = ["cut_stages"]


def cut_stages(
    graph: Graph, stages: tuple[Stage, ...], recomputed: Collection[int] = ()
) -> tuple[StageProgram, ...]:
    """One `StageProgram` per stage, in stage order.

    A training graph loses its USER outputs (a step returns the loss only).

    Args:
        recomputed: nodes that backward computes again.

    Raises:
        VerificationError: a stage reads a value that no stage up to it computes.
    """
    computed_by = _computing_stages(graph, stages)
    outputs = _assign_outputs(graph, stages, computed_by)
    reads = [_external_reads(graph, stage, outputs[stage.index]) for stage in stages]
    boundary = _boundary_edges(graph, stages, computed_by, reads)
    programs = (
        _stage_program(graph, stage, reads[stage.index], outputs[stage.index], boundary)
        for stage in stages
    )
    return tuple(
        replace(program, recomputed=_positions(stage, recomputed))
        for stage, program in zip(stages, programs, strict=True)
    )


def _positions(stage: Stage, nodes: Collection[int]) -> tuple[int, ...]:
    """Where those of `nodes` that are in the stage come in its graph."""
    return tuple(i for i, node in enumerate(sorted(stage.nodes)) if node in nodes)


def _computing_stages(graph: Graph, stages: tuple[Stage, ...]) -> dict[int, tuple[int, ...]]:
    """Value id -> stages that compute it, for RESULT values."""
    table: dict[int, list[int]] = {}
    for stage in stages:
        for node in stage.nodes:
            for value in graph.nodes[node].outputs:
                table.setdefault(value, []).append(stage.index)
    return {value: tuple(found) for value, found in table.items()}


def _assign_outputs(
    graph: Graph, stages: tuple[Stage, ...], computed_by: dict[int, tuple[int, ...]]
) -> list[list[Output]]:
    """Outputs of the whole graph by the stage that returns them."""
    table: list[list[Output]] = [[] for _ in stages]
    readers = _stages_reading(graph, stages)
    buffers = _buffers(graph)
    for output in graph.outputs:
        if output.kind is OutputKind.USER and graph.mode is Mode.TRAIN:
            continue
        candidates = computed_by.get(output.value)
        if candidates is None and output.kind is OutputKind.BUFFER:
            candidates = readers.get(buffers[output.target])
        candidates = candidates or readers.get(output.value) or (0,)
        home = candidates[-1] if output.kind is OutputKind.LOSS else candidates[0]
        table[home].append(output)
    return table


def _buffers(graph: Graph) -> dict[str, int]:
    """Value ids of buffers by each of their names."""
    return {
        name: value.id
        for value in graph.values_of(ValueKind.BUFFER)
        for name in (value.origin, *value.aliases)
    }


def _stages_reading(graph: Graph, stages: tuple[Stage, ...]) -> dict[int, tuple[int, ...]]:
    table: dict[int, list[int]] = {}
    for stage in stages:
        read = {value for node in stage.nodes for value in graph.nodes[node].inputs}
        for value in read:
            table.setdefault(value, []).append(stage.index)
    return {value: tuple(found) for value, found in table.items()}


def _external_reads(graph: Graph, stage: Stage, outputs: list[Output]) -> tuple[int, ...]:
    """Value ids that the stage uses and does not compute, ascending."""
    nodes = [graph.nodes[node] for node in stage.nodes]
    own = {value for node in nodes for value in node.outputs}
    used = {value for node in nodes for value in node.inputs}
    used.update(output.value for output in outputs)
    changed = [output.target for output in outputs if output.kind is OutputKind.BUFFER]
    buffers = _buffers(graph) if changed else {}
    used.update(buffers[name] for name in changed)
    return tuple(sorted(used - own))


def _boundary_edges(
    graph: Graph,
    stages: tuple[Stage, ...],
    computed_by: dict[int, tuple[int, ...]],
    reads: list[tuple[int, ...]],
) -> dict[int, tuple[int, tuple[int, ...]]]:
    """Value id -> (producing stage, consuming stages) for every value that crosses stages."""
    edges: dict[int, tuple[int, tuple[int, ...]]] = {}
    producer_node = producers(graph)
    for stage in stages:
        for value in reads[stage.index]:
            if graph.values[value].kind is not ValueKind.RESULT:
                continue
            sources = [source for source in computed_by.get(value, ()) if source < stage.index]
            if not sources:
                node = graph.nodes[producer_node[value]]
                raise VerificationError(
                    f"stage {stage.index} reads %{graph.values[value].name}, which no earlier "
                    f"stage computes (it is computed in {list(computed_by.get(value, ()))})",
                    where=f"node {node.name} of {node.module_path} ({node.source})",
                )
            source = edges[value][0] if value in edges else sources[0]
            consumers = edges[value][1] if value in edges else ()
            edges[value] = (source, (*consumers, stage.index))
    return edges


def _stage_program(
    graph: Graph,
    stage: Stage,
    reads: tuple[int, ...],
    outputs: list[Output],
    boundary: dict[int, tuple[int, tuple[int, ...]]],
) -> StageProgram:
    sent = [
        Output(OutputKind.BOUNDARY, value, target=graph.values[value].name)
        for value, (source, _) in sorted(boundary.items())
        if source == stage.index
    ]
    received = {value for value in reads if value in boundary}
    nodes = [graph.nodes[node] for node in sorted(stage.nodes)]
    return StageProgram(
        index=stage.index,
        graph=_subgraph(graph, stage.index, nodes, reads, received, [*outputs, *sent]),
        consumers=tuple(
            (graph.values[output.value].name, boundary[output.value][1]) for output in sent
        ),
        producers=tuple(
            (graph.values[value].name, boundary[value][0]) for value in sorted(received)
        ),
    )


def _subgraph(
    graph: Graph,
    index: int,
    nodes: list[Node],
    reads: tuple[int, ...],
    received: set[int],
    outputs: list[Output],
) -> Graph:
    """The graph of one stage, with dense ids; names are those of the whole graph."""
    kept = [*reads, *(value for node in nodes for value in node.outputs)]
    new_id = {value: position for position, value in enumerate(kept)}
    values = tuple(
        _renumbered(graph.values[value], new_id[value], value in received) for value in kept
    )
    return Graph(
        name=f"{graph.name}.stage{index}",
        mode=graph.mode,
        values=values,
        nodes=tuple(
            replace(
                node,
                id=position,
                inputs=tuple(new_id[value] for value in node.inputs),
                outputs=tuple(new_id[value] for value in node.outputs),
            )
            for position, node in enumerate(nodes)
        ),
        inputs=tuple(value.id for value in values if value.kind is ValueKind.INPUT),
        outputs=tuple(replace(output, value=new_id[output.value]) for output in outputs),
    )


def _renumbered(value: Value, new_id: int, received: bool) -> Value:
    if received:
        return replace(value, id=new_id, kind=ValueKind.BOUNDARY, origin="")
    return replace(value, id=new_id)
