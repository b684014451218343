"""Where time goes in a simulated step: hosts, shared wires, ranks that meet inside a stage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cutset.compiler.api import plan_model
from cutset.compiler.ir.cluster import Cluster, DeviceType, Link, LinkRule
from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.messages import MAX_SENDS_UNDER_WAY
from cutset.compiler.ir.program import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Recv,
    Send,
)
from cutset.compiler.ir.trace import Lane
from cutset.compiler.planned import PlannedModel
from cutset.cost_models import Simulation, StageSeconds, preset, preset_names, simulate
from cutset.cost_models.simulation import covered_seconds
from cutset.cost_models.stage_prices import StagePrices
from tests.cost_models.test_simulator import FREE, LAST, WHOLE, cluster, programs
from tests.ir.builders import mlp

SECONDS = StageSeconds(1.0, 1.0, 1.0)
SPLIT: dict[str, int | str] = {"0.weight": "tensor=S(0)", "2.weight": "tensor=S(1)"}


def changed(where: Cluster, **fields: object) -> Cluster:
    kind: DeviceType = replace(where.types[0], **fields)  # type: ignore[arg-type]
    return replace(where, types=(kind,))


def run(where: Cluster, seconds: StageSeconds = SECONDS) -> Simulation:
    """Two stages of an MLP, 1F1B of four microbatches."""
    made = programs(mlp(), where, (WHOLE, LAST), 4)
    return simulate(made, cluster=where, optimizer=FREE, measured={0: seconds, 1: seconds})


def test_a_cpu_stops_for_every_instruction_and_a_queue_hides_its_host() -> None:
    plain = cluster(Link(0.0, 1e30))
    free = run(plain).step_seconds
    slow = changed(plain, instruction_seconds=0.01)
    count = len(programs(mlp(), slow, (WHOLE, LAST), 4)[0].instructions)
    serial = run(slow)
    assert free + 10 * 0.01 < serial.step_seconds <= free + 2 * count * 0.01
    assert serial.ranks[0].host_seconds > 0.0
    queued = run(changed(slow, backend="cuda"))
    assert queued.step_seconds == pytest.approx(free, rel=0.02)
    bound = run(changed(slow, backend="cuda"), StageSeconds(1e-6, 1e-6, 1e-6))
    assert bound.step_seconds >= count * 0.01, "the host is the bottleneck"


def test_the_time_of_a_rank_adds_up() -> None:
    result = run(changed(cluster(Link(0.25, 1e4)), instruction_seconds=0.01))
    for entry in result.ranks:
        parts = entry.busy_seconds + entry.exposed_seconds + entry.host_seconds
        assert parts + entry.idle_seconds == pytest.approx(result.step_seconds)
        assert entry.hidden_seconds >= 0.0
        assert entry.busy_seconds == pytest.approx(
            result.busy_fraction[entry.rank] * result.step_seconds
        )
    assert result.ranks[1].exposed_seconds > 0.0 and result.ranks[0].hidden_seconds > 0.0


def test_an_action_waits_for_what_goes_on_beside_it() -> None:
    """Sums and gathers of ZeRO-3 take four times as long as the action that should hide them."""
    made = planned("data=4", zero=3)
    where = made.plan.cluster
    slow = replace(where, links=tuple(replace(rule, streams=0.25) for rule in where.links))
    plain, result = (simulate(made.programs, cluster=one) for one in (where, slow))
    assert any(entry.hidden_seconds > 0.0 for entry in plain.ranks)
    assert result.step_seconds > plain.step_seconds
    assert max(event.end_seconds for event in result.events) <= result.step_seconds
    for entry in result.ranks:
        parts = entry.busy_seconds + entry.exposed_seconds + entry.host_seconds
        assert parts + entry.idle_seconds == pytest.approx(result.step_seconds)


def test_collectives_take_no_longer_than_the_measured_action_that_holds_them() -> None:
    made = planned("data=4", zero=3)
    short = {0: StageSeconds(1e-7, 0.0, 1e-7)}
    quick = simulate(made.programs, cluster=made.plan.cluster, measured=short)
    spans = [span for span in quick.timeline if span.kind in "FIW"]
    assert spans and all(s.end_seconds - s.begin_seconds <= 1.001e-7 for s in spans)


def test_transfers_slow_down_the_computation_beside_them() -> None:
    """Every byte takes half a worker at both ends; a message lasts a second."""
    link = Link(0.0, 128.0)
    alone, shared = (
        run(replace(cluster(link), links=(LinkRule(link, compute_share=share),)))
        for share in (0.0, 0.5)
    )
    assert shared.step_seconds > alone.step_seconds
    assert sum(shared.busy_fraction) * shared.step_seconds > 24.0


def test_ranks_wait_for_the_last_where_they_meet() -> None:
    """Once for every collective inside the stage, and no longer than they compute in between."""
    made = planned("tensor=2", "h100:2", SPLIT)
    where = made.plan.cluster

    def seconds(late: float) -> float:
        links = tuple(replace(rule, skew_seconds=late) for rule in where.links)
        return simulate(made.programs, cluster=replace(where, links=links)).step_seconds

    alone, little, more = seconds(0.0), seconds(1e-9), seconds(2e-9)
    assert little > alone and more - alone == pytest.approx(2 * (little - alone), rel=1e-3)
    assert (little - alone) / 1e-9 == pytest.approx(_meetings(made), rel=1e-3)
    assert alone < seconds(1.0) < 2.5 * alone


def _meetings(made: PlannedModel) -> float:
    """How often the first rank meets the others of its stages."""
    prices = StagePrices(made.programs, made.plan.cluster, {})
    return sum(
        entry.count
        for action in made.programs[0].instructions
        if isinstance(action, Forward | Backward | BackwardInput | BackwardWeight)
        for cost in prices.of(0, action)
        for entry in cost.exposed
    )


@pytest.mark.parametrize("link", [Link(0.0, 1e-320), Link(1e308, 1e9)], ids=["slow", "late"])
def test_a_step_without_end_is_refused(link: Link) -> None:
    with pytest.raises(VerificationError, match="no finite time on cluster .*rank 1 waits at"):
        run(cluster(link))


def test_a_sender_waits_for_its_oldest_message() -> None:
    """Ten forwards of a second each send 128 bytes, which take 100 s: eight leave rank 0 at once,
    the others when there is room."""
    where = changed(cluster(Link(0.0, 1.28)), backend="cuda")
    count = MAX_SENDS_UNDER_WAY + 2
    rows = tuple(" ".join(f"F{stage}.{m}" for m in range(count)) for stage in range(2))
    rows = tuple(
        f"{row} " + " ".join(f"B{stage}.{m}" for m in range(count))
        for stage, row in enumerate(rows)
    )
    made = programs(mlp(), where, rows, count)
    result = simulate(made, cluster=where, optimizer=FREE, measured={0: SECONDS, 1: SECONDS})
    sends = [i for i in made[0].instructions if isinstance(i, Send)]
    assert len(sends) == count and any(isinstance(i, Recv) for i in made[1].instructions)
    begins = sorted(s.begin_seconds for s in result.timeline if s.rank == 0 and s.kind == "F")
    assert begins[MAX_SENDS_UNDER_WAY] == pytest.approx(MAX_SENDS_UNDER_WAY)
    # the ninth message waits for the first, the tenth forward for the ninth message
    assert begins[MAX_SENDS_UNDER_WAY + 1] >= 100.0


def planned(
    mesh: str,
    devices: str | Cluster = "h100:4",
    constraints: dict[str, int | str] | None = None,
    zero: int | None = None,
) -> PlannedModel:
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    batch = (torch.randn(64, 512), torch.randn(64, 512))
    return plan_model(
        model, devices, example_inputs=batch, loss_fn=F.mse_loss, mesh=mesh,
        num_microbatches=2, check=False, constraints=constraints, zero=zero,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tensor() -> PlannedModel:
    """Weights over two ranks, rows over two."""
    return planned("tensor=2,data=2", constraints=SPLIT)


def test_collectives_inside_stages_are_communication(tensor: PlannedModel) -> None:
    found = simulate(tensor.programs, cluster=tensor.plan.cluster)
    names = {event.name for event in found.events if event.lane is Lane.COMMUNICATION}
    inside = [event for event in found.events if " in F " in event.name]
    assert any(name.startswith("all_reduce over 0,1 in F 0.0") for name in names), names
    for entry in found.ranks:
        spans = sum(
            span.end_seconds - span.begin_seconds
            for span in found.timeline
            if span.rank == entry.rank and span.kind in "FIW"
        )
        exposed = covered_seconds(
            sorted(
                (event.begin_seconds, event.end_seconds)
                for event in inside
                if event.rank == entry.rank
            )
        )
        assert exposed > 0.0
        computing = entry.busy_seconds - entry.optimizer_seconds
        assert computing <= spans - exposed + 1e-12


def test_ranks_of_a_stage_wait_for_each_other() -> None:
    """Rank 0 computes at a hundredth of the pace of rank 1, and the other ends with it."""
    made = planned("tensor=2", "h100:2", SPLIT)
    where = made.plan.cluster
    slow = replace(where.types[0], name="slow", flops_per_second=(("f32", 5e9),))
    devices = (replace(where.devices[0], type="slow"), *where.devices[1:])
    mixed = replace(where, types=(*where.types, slow), devices=devices)
    found = simulate(made.programs, cluster=mixed)
    first, second = (
        max(s.end_seconds for s in found.timeline if s.rank == rank and s.kind == "F")
        for rank in range(2)
    )
    assert first == pytest.approx(second, rel=0.01)
    assert found.ranks[1].idle_seconds > 0.5 * found.step_seconds > found.ranks[0].idle_seconds


def test_the_peak_is_the_top_of_the_curve_and_below_the_bound(tensor: PlannedModel) -> None:
    found = simulate(tensor.programs, cluster=tensor.plan.cluster, optimizer=tensor.plan.optimizer)
    assert tensor.plan.prediction is not None
    bounds = {entry.device: entry for entry in tensor.plan.prediction.memory}
    for peak, curve in zip(found.peaks, found.memory_curves, strict=True):
        assert peak.total_bytes == max(level for _, level in curve)
        assert peak.total_bytes <= bounds[peak.rank].total_bytes <= bounds[peak.rank].bound_bytes
        assert any(seconds == peak.seconds for seconds, _ in curve)
        assert peak.moment in {event.name for event in found.events}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_plans_and_simulates(name: str) -> None:
    """Two stages on its first two devices."""
    where = preset(name)
    pair = replace(where, devices=where.devices[:2])
    made = planned("pipeline=2", pair)
    found = simulate(made.programs, cluster=pair)
    assert made.plan.prediction is not None
    assert 0.0 < found.step_seconds == pytest.approx(made.plan.prediction.step_seconds, rel=0.5)
    assert found.link_bytes and 0.0 < found.bubble_fraction < 1.0
