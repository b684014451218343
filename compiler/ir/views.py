"""Graphs, plans and programs as `networkx` graphs, for analysis, pictures and tests.

`graph_view` has the nodes of a `Graph`, `stage_view` the stages of a plan, and `event_view` the
instructions of programs with everything that an instruction waits for. A cycle of the event view
is a deadlock (the verifier finds deadlocks by execution, see `verify/waits.py`; tests hold the two
against each other).
"""

from __future__ import annotations

import networkx as nx

from .graph import Graph, producers
from .plan import Plan
from .program import Program
from .text import print_instruction
from .verify.waits import program_waits

__all__ = ["event_view", "graph_view", "stage_view"]


def graph_view(graph: Graph) -> nx.DiGraph:
    """One vertex per node id (`name`, `op`, `module_path`), one edge per pair of nodes that
    exchanges values (`values`, `num_bytes`), in node order."""
    view = nx.DiGraph(name=graph.name)
    for node in graph.nodes:
        view.add_node(node.id, name=node.name, op=node.op.name, module_path=node.module_path)
    made_by = producers(graph)
    for node in graph.nodes:
        for value in dict.fromkeys(node.inputs):
            if value in made_by:
                _add_edge(view, graph, (made_by[value], node.id), value)
    return view


def stage_view(plan: Plan, graph: Graph) -> nx.DiGraph:
    """One vertex per stage (`device`, `num_nodes`), one edge per pair of stages that exchanges
    values (`values`: names, `num_bytes` per microbatch)."""
    view = nx.DiGraph(name=graph.name)
    for stage in plan.stages:
        view.add_node(stage.index, device=stage.device, num_nodes=len(stage.nodes))
    homes: dict[int, list[int]] = {}
    for stage in plan.stages:
        for node in stage.nodes:
            homes.setdefault(node, []).append(stage.index)
    made_by = producers(graph)
    for stage in plan.stages:
        own = set(stage.nodes)
        read = {value for node in stage.nodes for value in graph.nodes[node].inputs}
        for value in sorted(read):
            if value in made_by and made_by[value] not in own:
                _add_edge(view, graph, (homes[made_by[value]][0], stage.index), value)
    return view


def _add_edge(view: nx.DiGraph, graph: Graph, edge: tuple[int, int], value: int) -> None:
    known = view.get_edge_data(*edge, default={"values": (), "num_bytes": 0})
    view.add_edge(
        *edge,
        values=(*known["values"], graph.values[value].name),
        num_bytes=known["num_bytes"] + graph.values[value].type.num_bytes,
    )


def event_view(programs: tuple[Program, ...]) -> nx.DiGraph:
    """One vertex per instruction, `(rank, position)` with `text`, standing for its completion,
    and an edge from each completion that it needs, under sends that block until received."""
    view = nx.DiGraph()
    waits = program_waits(programs)
    for rank, program in enumerate(programs):
        for position, instruction in enumerate(program.instructions):
            view.add_node((rank, position), text=print_instruction(instruction))
            if position:
                view.add_edge((rank, position - 1), (rank, position))
            for wait in waits[rank][position]:
                if wait.count:
                    view.add_edge((wait.rank, wait.count - 1), (rank, position))
    return view
