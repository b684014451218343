"""What a person is told about a plan is what the plan says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cutset.compiler.explain import boundaries, explain, explain_json
from cutset.compiler.explain_profile import profile_text
from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import Alternative, ProfiledBlock, ProfileReport, Stage
from cutset.compiler.ir.schedule import Action, Schedule
from cutset.compiler.module_names import block_of, modules_of_stages
from cutset.compiler.timeline import ideal_seconds, ideal_simulation
from tests.compiler.plans import plan_of
from tests.conftest import Golden
from tests.ir.builders import mlp, residual, tied_embedding


def test_text_with_and_without_the_graph(golden: Golden) -> None:
    graph = mlp(num_layers=2)
    plan = plan_of(graph, (0, 1), (2, 3, 4))
    golden("explain/mlp.txt", explain(plan, graph))
    golden("explain/mlp_plan_alone.txt", explain(plan))


def test_many_stages_are_listed_one_a_line() -> None:
    graph = mlp(num_layers=12)
    stages = tuple(Stage(index, (index % 2,), (2 * index, 2 * index + 1)) for index in range(12))
    plan = replace(plan_of(graph, (0,), (1,)), stages=stages, schedule=None, prediction=None)
    lines = explain(plan, graph).splitlines()
    assert lines[3] == "stages"
    assert lines[4].split() == ["0", "device", "0", "layers.0"]
    assert len(lines) < 25


def test_json_holds_the_figures_and_is_json() -> None:
    graph = mlp(num_layers=2)
    plan = plan_of(graph, (0, 1), (2, 3, 4))
    found = json.loads(json.dumps(explain_json(plan, graph)))
    assert [stage["modules"] for stage in found["stages"]] == [["layers.0"], ["layers.1"]]
    assert found["stages"][0]["num_parameters"] == 8 * 8 + 8
    assert found["stages"][0]["memory"]["total_bytes"] == 30 << 20
    assert found["boundaries"] == [
        {"source": 0, "target": 1, "values": ["relu"], "num_bytes": 4 * 8 * 4}
    ]
    assert found["certificate"]["gap"] == plan.certificate.gap  # type: ignore[union-attr]
    assert explain_json(plan)["boundaries"] is None


def test_a_skip_goes_straight_to_the_stage_that_reads_it() -> None:
    graph = residual(num_blocks=3)  # nodes 3b, 3b+1, 3b+2 are block b; the last two end the graph
    plan = plan_of(graph, (0, 1, 2), (3, 4, 5), tuple(range(6, len(graph.nodes))))
    pairs = {(item.source, item.target): item.values for item in boundaries(plan, graph)}
    first = graph.values[graph.nodes[2].outputs[0]].name
    assert first in pairs[0, 1]
    assert pairs[0, 2] == (first,)


def test_recomputed_nodes_cross_no_boundary() -> None:
    graph = tied_embedding()
    plan = plan_of(graph, (0, 1, 2), tuple(range(1, len(graph.nodes))))
    assert [item.values for item in boundaries(plan, graph)] == [("embedding",)]


def test_binding_names_the_slowest_stage_and_a_full_device() -> None:
    graph = mlp(num_layers=2)
    plan = plan_of(graph, (0, 1), (2, 3, 4))
    small = tuple(replace(kind, memory_bytes=31 << 20) for kind in plan.cluster.types)
    text = explain(replace(plan, cluster=replace(plan.cluster, types=small)), graph)
    assert "the slowest stage is 1: 6 ms a microbatch, 1.33 times the mean" in text
    assert "memory is close to its limit: the fullest device is 0 with 30.0 MiB of 31.0" in text


def test_module_names_are_cut_at_the_block_and_joined() -> None:
    assert block_of("model.layers.3.mlp.up") == "model.layers.3"
    assert block_of("lm_head") == "lm_head"
    graph = mlp(num_layers=4)
    stages = (Stage(0, (0,), (0, 1, 2, 3, 4)), Stage(1, (1,), (5, 6, 7, 8)))
    assert modules_of_stages(graph, stages) == (
        ("layers.0-1", "layers.2 (part)"),
        ("layers.2 (part)", "layers.3"),
    )


def test_an_outer_module_is_not_named_beside_its_inner_ones() -> None:
    graph = mlp(num_layers=2)
    nodes = tuple(
        replace(node, module_path="layers" if node.id == 1 else node.module_path)
        for node in graph.nodes
    )
    (names,) = modules_of_stages(replace(graph, nodes=nodes), (Stage(0, (0,), (0, 1, 2, 3)),))
    assert names == ("layers.0-1",)


ONE_F_ONE_B = Schedule.parse("""
schedule 1f1b stages=2 microbatches=4
0: F0.0 F0.1 B0.0 F0.2 B0.1 F0.3 B0.2 B0.3
1: F1.0 B1.0 F1.1 B1.1 F1.2 B1.2 F1.3 B1.3
""")


def test_ideal_time_of_1f1b_is_the_textbook_formula() -> None:
    assert ideal_seconds(ONE_F_ONE_B, (1.0, 1.0), (2.0, 2.0)) == (4 + 2 - 1) * 3.0
    # unequal stages: fill and drain of the fast one, and the slow one busy all the time
    assert ideal_seconds(ONE_F_ONE_B, (1.0, 2.0), (2.0, 4.0)) == 1.0 + 4 * 6.0 + 2.0


def test_halves_of_a_backward_take_the_whole_together() -> None:
    split = Schedule.parse("schedule zb stages=1 microbatches=1\n0: F0.0 I0.0 W0.0")
    spans = ideal_simulation(split, (1.0,), (3.0,)).timeline
    assert [(span.begin_seconds, span.end_seconds) for span in spans] == [
        (0.0, 1.0), (1.0, 2.5), (2.5, 4.0),
    ]  # fmt: skip


def test_idle_time_of_the_ideal_is_the_bubble() -> None:
    simulation = ideal_simulation(ONE_F_ONE_B, (1.0, 1.0), (2.0, 2.0))
    assert simulation.busy_fraction == (12 / 15, 12 / 15)
    assert simulation.bubble_fraction == pytest.approx(1 / 5)  # (stages - 1) / (m + stages - 1)


def test_of_a_long_schedule_the_beginning_is_drawn() -> None:
    graph = mlp(num_layers=2)
    actions = " ".join(f"F0.{m} B0.{m}" for m in range(100))
    schedule = Schedule.parse(f"schedule long stages=1 microbatches=100\n0: {actions}")
    text = explain(replace(plan_of(graph, (0, 1), (2, 3, 4)), schedule=schedule))
    assert "schedule long: 300 ms by stage times alone; the first 56 ms:" in text
    assert "|0aa1bb2cc3dd" in text


def test_a_schedule_that_waits_for_itself_is_named() -> None:
    stuck = replace(ONE_F_ONE_B, ranks=((Action.parse("B0.0"),), ONE_F_ONE_B.ranks[1]))
    with pytest.raises(VerificationError, match=r"B0\.0 waits for an action"):
        ideal_seconds(stuck, (1.0, 1.0), (2.0, 2.0))


def test_what_measuring_changed(golden: Golden) -> None:
    report = ProfileReport(
        kind="blocks",
        rounds=2,
        num_measured=3,
        num_known=1,
        seconds=4.25,
        ended="all that counts of the plan and of what comes close to it is measured",
        changed=("mesh", "layouts"),
        first=Alternative(Mesh.parse("tensor=2"), 1, 0, 0.02, True),
        first_seconds=0.05,
        blocks=(
            ProfiledBlock("head", "cpu", 4, 1, (0.001, 0.0, 0.002), (0.002, 0.0, 0.001)),
            ProfiledBlock(
                "model.decoder.layers.0.attention", "cpu", 30, 6, (0.01, 0.01, 0.01), (0.02,) * 3
            ),
            ProfiledBlock("", "cpu", 1, 2, (0.0, 0.0, 0.0), (1e-5, 0.0, 0.0)),
        ),
    )
    plan = replace(plan_of(mlp(num_layers=2), (0, 1), (2, 3, 4)), profile=report)
    golden("explain/profile.txt", profile_text(plan))
