"""Pieces of a placed graph: complete, in an order that can be run, and few."""

from __future__ import annotations

import random

import pytest

from cutset.compiler.ir.graph import Graph, Mode, ValueKind
from cutset.compiler.ir.plan import Stage
from cutset.compiler.ir.stage_edges import stage_edges
from cutset.cost_models.presets import local_cpu_cluster
from cutset.passes.placement.from_graph import state_workload
from cutset.passes.placement.memory import placed_memory
from cutset.passes.placement.pieces import fused_pieces, make_pieces, ordered_pieces
from cutset.passes.placement.stream import stream_schedule
from tests.ir.builders import mlp, residual

NONE: frozenset[int] = frozenset()


def homes_of(graph: Graph, seed: int, devices: int) -> dict[int, int]:
    draw = random.Random(seed)
    return {node.id: draw.randrange(devices) for node in graph.nodes}


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("late", [False, True])
def test_pieces_are_complete_and_in_a_topological_order(seed: int, late: bool) -> None:
    graph = residual(4)
    homes = homes_of(graph, seed, 3)
    pieces = make_pieces(graph, homes, NONE, late=late)
    assert sorted(node for piece in pieces for node in piece.nodes) == sorted(homes)
    for piece in pieces:
        assert {homes[node] for node in piece.nodes} == {piece.device}
    for edge in stage_edges(graph, pieces):
        assert edge.source < edge.target
    alternating = sum(a.device != b.device for a, b in zip(pieces, pieces[1:], strict=False))
    assert alternating > 0


@pytest.mark.parametrize("seed", range(10))
def test_waiting_leaves_no_more_pieces(seed: int) -> None:
    graph = residual(4)
    homes = homes_of(graph, seed, 3)
    counts = [len(make_pieces(graph, homes, NONE, late=late)) for late in (True, False)]
    assert counts[0] <= counts[1]


def test_devices_that_do_not_wait_in_turn_have_one_piece_each() -> None:
    graph = mlp(6, mode=Mode.INFER)
    count = len(graph.nodes)
    homes = {node.id: 3 * node.id // count for node in graph.nodes}
    pieces = make_pieces(graph, homes, NONE)
    assert [piece.device for piece in pieces] == [0, 1, 2]


def test_a_chain_that_goes_to_and_fro_is_cut_at_every_change() -> None:
    graph = mlp(4, mode=Mode.INFER)
    homes = {node.id: node.id % 2 for node in graph.nodes}
    pieces = make_pieces(graph, homes, NONE)
    assert [piece.nodes for piece in pieces] == [(node.id,) for node in graph.nodes]


def test_given_pieces_keep_the_order_of_their_device() -> None:
    graph = mlp(4, mode=Mode.INFER)
    last = len(graph.nodes)
    homes = {node: 0 if node in (0, last - 1) else 1 for node in range(last)}
    pieces = ordered_pieces(graph, homes, NONE, [[last - 1], list(range(1, last - 1)), [0]][::-1])
    assert [piece.device for piece in pieces] == [0, 1, 0]


def makespan(graph: Graph, stages: tuple[Stage, ...]) -> float:
    run = stream_schedule(
        devices=[stage.device for stage in stages],
        seconds=[float(len(stage.nodes)) for stage in stages],
        edges={(edge.source, edge.target): 0.5 for edge in stage_edges(graph, stages)},
        num_microbatches=1,
    )
    return run.seconds


@pytest.mark.parametrize("seed", range(30))
def test_fused_pieces_are_fewer_and_take_no_longer(seed: int) -> None:
    graph = residual(5)
    homes = homes_of(graph, seed, 2)
    single = [[node.id] for node in graph.nodes]
    fused = fused_pieces(graph, homes, single)
    assert sorted(node for nodes in fused for node in nodes) == sorted(homes)
    before, after = (ordered_pieces(graph, homes, NONE, given) for given in (single, fused))
    assert len(after) < len(before)
    assert makespan(graph, after) <= makespan(graph, before)


def test_memory_counts_parameters_once_and_values_under_way() -> None:
    graph = mlp(4, width=64, batch=32, mode=Mode.INFER)
    cluster = local_cpu_cluster(2)
    statement = state_workload(graph, cluster, rows=32)
    homes = statement.homes([index % 2 for index in range(len(statement.units))])
    stages = make_pieces(graph, homes, statement.replicated)
    edges = stage_edges(graph, stages)
    needs = {}
    for count in (1, 8):
        schedule = stream_schedule(
            devices=[stage.device for stage in stages],
            seconds=[1.0] * len(stages),
            edges={(edge.source, edge.target): 0.1 for edge in edges},
            num_microbatches=count,
        ).schedule
        needs[count] = placed_memory(
            graph,
            stages,
            edges,
            schedule,
            backends=["cpu", "cpu"],
            fraction=1.0,
            optimizer=None,  # type: ignore[arg-type]
        )
    held = [
        sum(
            value.type.num_bytes
            for value in graph.values_of(ValueKind.PARAMETER)
            if any(
                value.id in graph.nodes[node].inputs
                for stage in stages
                if stage.device == device
                for node in stage.nodes
            )
        )
        for device in range(2)
    ]
    assert [need.parameters_bytes for need in needs[1]] == held
    for few, many in zip(needs[1], needs[8], strict=True):
        assert many.activations_bytes >= few.activations_bytes > 0
