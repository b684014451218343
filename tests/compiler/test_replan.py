"""Plan, measure, plan again, with times that a test makes up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cutset.compiler.api import plan_model
from cutset.compiler.block_times import BlockTimes, Measurer, ProfileOptions, Row, cost_alone
from cutset.compiler.explain import explain, explain_json
from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.compiler.ir.errors import UsageError
from cutset.compiler.ir.graph import Mode
from cutset.compiler.ir.plan import Objective, Plan, ProfileReport
from cutset.compiler.plan_json import plan_from_json, plan_to_json
from cutset.compiler.planned import build_programs
from cutset.compiler.planning import Planning
from cutset.compiler.profile_database import ProfileDatabase
from cutset.compiler.profile_parts import Part
from cutset.compiler.replan import search_measured
from cutset.cost_models import simulate
from cutset.cost_models.collectives import Network
from cutset.cost_models.ops import price
from cutset.cost_models.stages import in_weights
from cutset.passes.context import PlanOptions
from cutset.runtime.launcher import cache_directory
from tests.exactness.placed import cpu_type, cpu_workers

WORKER = cpu_type("worker")
Slower = Callable[[Part], float]


def workers(kind: DeviceType = WORKER, local: bool = True) -> Cluster:
    devices = tuple(Device(index, kind.name, "host") for index in range(2))
    return Cluster("workers", (kind,), devices, (LinkRule(Link(1e-5, 2e9)),), local=local)


class MadeUp:
    """Measures what the rates predict, times `slower`; each measurement takes `seconds`."""

    def __init__(self, slower: Slower, seconds: float = 1.0) -> None:
        self.slower = slower
        self.seconds = seconds
        self.now = 0.0
        self.parts: list[Part] = []
        self.closed = 0

    def turn(self, say: Callable[[str], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def measure(self, part: Part) -> list[Row]:
        self.now += self.seconds
        self.parts.append(part)
        graph = part.stage.graph
        network = Network(workers(), tuple((name, (0, 1)) for name, _ in part.stage.axes))
        costs = [
            cost_alone(node, cost)
            for node, cost in zip(graph.nodes, price(graph, WORKER, network=network), strict=True)
        ]
        forward = sum(cost.forward_seconds for cost in costs)
        backward = sum(cost.backward_seconds for cost in costs)
        weights = sum(in_weights(graph, costs))
        factor = self.slower(part)
        return [(factor * forward, factor * (backward - weights), factor * weights)] * 2

    def close(self) -> None:
        self.closed += 1


def net() -> nn.Module:
    torch.manual_seed(0)
    layer = lambda: nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))  # noqa: E731
    return nn.Sequential(*(layer() for _ in range(4)))


def planning(cluster: Cluster | None = None) -> Planning:
    call = (torch.randn(32, 128), torch.randn(32, 128)), {}
    loss = nn.functional.mse_loss
    return Planning(net(), call, cluster or workers(), Mode.TRAIN, loss, False, lambda line: None)


def searched(
    measurer: MadeUp, directory: Path, options: PlanOptions | None = None, seconds: float = 60.0
) -> Plan:
    search = planning()
    times = BlockTimes(
        search.cluster,
        ProfileOptions("blocks", seconds),
        ProfileDatabase(directory),
        measurer,
        search.say,
        clock=lambda: measurer.now,
    )
    return search_measured(search, options or PlanOptions(), times)[1]


def report_of(plan: Plan) -> ProfileReport:
    assert plan.profile is not None
    return plan.profile


def is_split(part: Part) -> bool:
    """Whether it is what tensor parallelism makes of a layer."""
    kinds = {node.op.packet for node in part.stage.graph.nodes}
    return bool(kinds & {"all_reduce", "sum_gradient"})


def test_times_as_predicted_change_nothing(tmp_path: Path) -> None:
    before = planning().search_once(PlanOptions())[1]
    plan = searched(MadeUp(lambda part: 1.0), tmp_path)
    report = report_of(plan)
    assert (plan.mesh, plan.stages) == (before.mesh, before.stages)
    assert report.changed == () and report.rounds == 1
    assert report.first.mesh == before.mesh
    assert plan.prediction is not None and before.prediction is not None
    step = before.prediction.step_seconds
    assert plan.prediction.step_seconds == pytest.approx(step, rel=0.02)


def test_a_layout_that_turns_out_slow_is_left(tmp_path: Path) -> None:
    before = planning().search_once(PlanOptions())[1]
    chosen = str(before.mesh)

    def slower(part: Part) -> float:
        return 5.0 if ("tensor" in chosen) is is_split(part) else 1.0

    plan = searched(MadeUp(slower), tmp_path)
    report = report_of(plan)
    assert str(plan.mesh) != chosen
    assert "mesh" in report.changed
    assert str(report.first.mesh) == chosen
    assert plan.prediction is not None
    assert plan.prediction.step_seconds < report.first_seconds
    assert report.first_seconds > 1.1 * report.first.step_seconds


def test_what_was_measured_is_what_is_predicted(tmp_path: Path) -> None:
    plan = searched(MadeUp(lambda part: 3.0), tmp_path)
    for block in report_of(plan).blocks:
        measured, predicted = sum(block.measured), sum(block.predicted)
        if predicted:
            assert measured == pytest.approx(3.0 * predicted, rel=0.05)
    assert plan.prediction is not None and report_of(plan).first.step_seconds > 0
    corrections = plan.cluster.types[0].corrections
    assert corrections is not None
    factors = [entry.forward for entry in corrections.entries if entry.forward is not None]
    assert factors and all(factor == pytest.approx(3.0, rel=0.01) for factor in factors)


def test_the_plan_in_the_end_has_no_part_that_was_not_measured(tmp_path: Path) -> None:
    turns = iter(range(1000))
    plan = searched(MadeUp(lambda part: 1.0 + next(turns) % 3), tmp_path)
    report = report_of(plan)
    assert report.num_measured > 0 and 1 <= report.rounds <= 4
    assert "is measured" in report.ended
    nodes = sum(block.num_nodes * block.count for block in report.blocks)
    assert nodes > 0


def test_with_the_same_database_the_same_plan_is_found_without_measuring(tmp_path: Path) -> None:
    first = searched(MadeUp(lambda part: 5.0 if is_split(part) else 1.0), tmp_path)
    never = MadeUp(lambda part: 1 / 0)
    plans = [searched(never, tmp_path) for _ in range(2)]
    assert never.parts == []
    assert report_of(plans[0]).num_measured == 0
    assert report_of(plans[0]).num_known == report_of(first).num_measured
    for plan in plans:
        assert plan.cluster == first.cluster
        assert replace(plan, certificate=None, profile=None) == replace(
            first, certificate=None, profile=None
        )


def test_the_budget_ends_measuring_and_what_is_known_counts(tmp_path: Path) -> None:
    measurer = MadeUp(lambda part: 2.0, seconds=10.0)
    plan = searched(measurer, tmp_path, seconds=5.0)
    assert len(measurer.parts) == 1
    report = report_of(plan)
    assert report.seconds == 10.0
    assert "was over before" in report.ended
    assert plan.cluster.types[0].corrections is not None


def test_workers_on_one_core_take_twice_the_time_of_their_threads(tmp_path: Path) -> None:
    """What is measured is by the clock of a thread; what is predicted, while both compute."""
    (kind,) = workers().types
    few = replace(workers(), types=(replace(kind, threads=1, cores=1),))
    search = planning(few)
    times = BlockTimes(
        search.cluster,
        ProfileOptions("blocks"),
        ProfileDatabase(tmp_path),
        MadeUp(lambda part: 0.5),
        search.say,
    )
    report = report_of(search_measured(search, PlanOptions(), times)[1])
    kept = [sum(record.seconds) for record in ProfileDatabase(tmp_path).records()]
    for block in report.blocks:
        assert block.measured == pytest.approx(block.predicted, rel=1e-6)
        assert pytest.approx(sum(block.measured) / 2) in kept


def test_what_memory_does_not_suffice_for_keeps_its_price_and_is_warned_of(tmp_path: Path) -> None:
    class NoRoomForActivations(MadeUp):
        def measure(self, part: Part) -> list[Row]:
            rows = super().measure(part)
            is_large = part.stage.graph.nodes[0].op.packet == "gelu"
            return [rows[0], "out of memory: tried to allocate 3.00 GiB"] if is_large else rows

    said: list[str] = []
    search = planning()
    search.say = said.append
    times = BlockTimes(
        search.cluster,
        ProfileOptions("ops"),
        ProfileDatabase(tmp_path),
        NoRoomForActivations(lambda part: 3.0),
        search.say,
    )
    plan = search_measured(search, PlanOptions(), times)[1]
    report = report_of(plan)
    assert report.ended.endswith("is measured, but for what could not be")
    assert report.num_measured == len(ProfileDatabase(tmp_path).records()) > 0
    told = [line for line in plan.warnings if "could not be measured" in line]
    assert told and set(told) <= set(said) and len(told) == len(set(told))
    assert "operator aten.gelu.default 0.1 could not be measured on worker" in told[0]
    assert "its time is a predicted one: out of memory: tried to allocate 3.00 GiB" in told[0]
    assert told[0] in explain(plan)
    assert all(block.path != "0.1" for block in report.blocks)


def test_all_that_cannot_be_measured_leaves_the_plan_by_rates(tmp_path: Path) -> None:
    class NoRoom(MadeUp):
        def measure(self, part: Part) -> list[Row]:
            super().measure(part)
            return ["out of memory"] * 2

    before = planning().search_once(PlanOptions())[1]
    measurer = NoRoom(lambda part: 3.0)
    plan = searched(measurer, tmp_path)
    assert (plan.mesh, plan.stages) == (before.mesh, before.stages)
    assert plan.prediction == before.prediction
    assert report_of(plan).num_measured == 0 and report_of(plan).rounds == 0
    digests = [part.digest for part in measurer.parts]
    assert len(digests) == len(set(digests))  # nothing is tried a second time
    assert ProfileDatabase(tmp_path).records() == ()


def test_what_another_planner_measured_meanwhile_is_not_measured_again(tmp_path: Path) -> None:
    class WaitsForAnother(MadeUp):
        def turn(self, say: Callable[[str], None]) -> AbstractContextManager[None]:
            say("waits")
            searched(MadeUp(lambda part: 3.0), tmp_path)
            return nullcontext()

    measurer = WaitsForAnother(lambda part: 1 / 0)
    plan = searched(measurer, tmp_path)
    assert measurer.parts == [] and report_of(plan).num_measured == 0
    assert report_of(plan).num_known > 0


def test_the_file_of_the_plan_simulates_as_the_plan_does(tmp_path: Path) -> None:
    search = planning()
    measurer: Measurer = MadeUp(lambda part: 4.0)
    times = BlockTimes(
        search.cluster, ProfileOptions("blocks"), ProfileDatabase(tmp_path), measurer, search.say
    )
    captured, plan = search_measured(search, PlanOptions(), times)
    read = plan_from_json(plan_to_json(plan))
    assert read == plan
    seconds = [
        simulate(
            build_programs(captured, item), cluster=item.cluster, optimizer=item.optimizer
        ).step_seconds
        for item in (plan, read)
    ]
    rates = replace(
        plan.cluster, types=tuple(replace(t, corrections=None) for t in plan.cluster.types)
    )
    plain = simulate(build_programs(captured, plan), cluster=rates, optimizer=plan.optimizer)
    assert seconds[0] == seconds[1] > 2 * plain.step_seconds


def test_explain_says_what_changed(tmp_path: Path) -> None:
    plan = searched(MadeUp(lambda part: 5.0 if is_split(part) else 1.0), tmp_path)
    text = explain(plan)
    report = report_of(plan)
    assert "known before; planned again" in text
    assert f"  before: {report.first.mesh} with" in text
    assert report.ended in text
    assert "1.00 times" in text or "5.00 times" in text
    data = explain_json(plan)["profile"]
    assert isinstance(data, dict) and data["first"]["mesh"] == str(report.first.mesh)


def test_operators_that_are_placed_have_the_times_of_their_blocks(tmp_path: Path) -> None:
    fast, slow = cpu_type("fast"), cpu_type("slow")
    search = planning(cpu_workers(fast, slow))
    search.mode, search.loss_fn = Mode.INFER, None
    search.call = (torch.randn(32, 128),), {}

    class OneIsSlow(MadeUp):
        def measure(self, part: Part) -> list[Row]:
            first, _ = super().measure(part)
            assert not isinstance(first, str)
            return [first, (9 * first[0], 0.0, 0.0)]

    times = BlockTimes(
        search.cluster,
        ProfileOptions("blocks"),
        ProfileDatabase(tmp_path),
        OneIsSlow(lambda part: 1.0),
        search.say,
    )
    options = PlanOptions(objective=Objective.THROUGHPUT, placement_seconds=2.0)
    plan = search_measured(search, options, times)[1]
    nodes = dict.fromkeys((0, 1), 0)
    for stage in plan.stages:
        nodes[stage.device] += len(stage.nodes)
    first = report_of(plan).first
    assert report_of(plan).first_seconds == pytest.approx(plan.prediction.step_seconds)
    assert first.step_seconds < report_of(plan).first_seconds
    assert nodes[0] > 2 * nodes[1]


def test_ranks_of_a_job_do_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(UsageError, match="the ranks of this job would find different plans"):
        plan_model(net(), 2, example_inputs=(torch.randn(8, 128),), mode="infer", profile="blocks")


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTSET_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "common"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("CUTSET_CACHE")
    assert cache_directory() == tmp_path / "common" / "cutset"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # which the standard says to ignore
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "cutset"


def test_workers_end_when_planning_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTSET_CACHE", str(tmp_path))
    made: list[MadeUp] = []

    def measurer(cluster: Cluster, options: ProfileOptions) -> MadeUp:
        made.append(MadeUp(lambda part: 1.0))
        return made[-1]

    search = planning()
    search.profile, search.measurer = ProfileOptions("ops"), measurer
    plan = search.search(PlanOptions())[1]
    assert made[0].closed == 1
    assert report_of(plan).kind == "ops"
    assert all(len(part.nodes) == 1 for part in made[0].parts)
    assert len({part.digest for part in made[0].parts}) == len(made[0].parts)
