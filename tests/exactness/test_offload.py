"""States that the planner sends to the host, because nothing else fits, train exactly."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

from cutset.compiler.batch import signature_of
from cutset.compiler.explain import explain, explain_json
from cutset.compiler.ir.cluster import Cluster
from cutset.compiler.ir.errors import InfeasibleError, UsageError
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import OptimizerModel, Plan
from cutset.compiler.measure import measure_training
from cutset.compiler.parallel import Parallel, RunOptions
from cutset.compiler.plan_json import plan_from_json, plan_to_json
from cutset.compiler.planned import PlannedModel, build_programs
from cutset.compiler.reference import relative_errors
from cutset.cost_models import parse_devices
from cutset.cost_models.presets import limit_memory
from cutset.cost_models.simulator import simulate
from cutset.passes.context import PlanOptions
from cutset.passes.pipeline import plan_graph
from cutset.runtime.inprocess import InProcessSession
from cutset.runtime.session import Session
from tests.exactness.harness import SEED, STEPS, Subject, adamw64
from tests.models.exact import ROWS, ExactModel

WIDTH = 96
LAYERS = 8
WEIGHT_BYTES = 8 * LAYERS * (WIDTH * WIDTH + WIDTH)
ADAMW = OptimizerModel("adamw", 2.0)
TOLERANCE = 1e-9


def wide() -> ExactModel:
    layers = [module for _ in range(LAYERS) for module in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    loss = nn.MSELoss()
    return ExactModel(
        nn.Sequential(*layers), (torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)), {}, loss
    )


@functools.cache
def subject(clip: float | None = None) -> Subject:
    return Subject(wide, adamw64, clip_grad_norm=clip)


def cluster(devices: int, weights: float) -> Cluster:
    """GPUs that hold `weights` times the weights of a fair share of the layers."""
    limit = int(weights * WEIGHT_BYTES / devices)
    return limit_memory(parse_devices(f"h100:{devices}"), limit)


@functools.cache
def planned(devices: int, weights: float, **options: object) -> Plan:
    chosen = PlanOptions(num_microbatches=2, optimizer=ADAMW, **options)  # type: ignore[arg-type]
    graph = subject().captured.graph
    return plan_graph(graph, cluster(devices, weights), batch_size=ROWS, options=chosen)


# so little that nothing but offloading fits (weights, gradients and states take four), by devices
TIGHT = {1: 2.8, 2: 3.4, 4: 3.4}
CASES: tuple[tuple[int, float, dict[str, object]], ...] = (
    (1, TIGHT[1], {}),
    (2, TIGHT[2], {}),
    (2, TIGHT[2], {"mesh": Mesh.parse("pipeline=2")}),
    (2, 4.0, {"mesh": Mesh.parse("data=2"), "zero": 3}),
    (2, 5.0, {"mesh": Mesh.parse("tensor=2")}),
    (4, 4.5, {"mesh": Mesh.parse("data=2,pipeline=2"), "zero": 2}),
)


@pytest.mark.parametrize("devices", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_states_are_offloaded_only_where_nothing_else_fits(devices: int) -> None:
    assert not planned(devices, 6.0).is_offloaded
    plan = planned(devices, TIGHT[devices])
    assert plan.is_offloaded
    assert plan_from_json(plan_to_json(plan)) == plan
    with pytest.raises(InfeasibleError) as caught:
        planned(devices, TIGHT[devices], offload="none")
    assert any("offload='optimizer'" in way for way in caught.value.ways_out)
    with pytest.raises(InfeasibleError) as caught:
        planned(devices, 0.5)
    assert not any("offload" in way for way in caught.value.ways_out)


def test_the_host_is_priced_and_told() -> None:
    without, plan = planned(2, 6.0, offload="none"), planned(2, 6.0, offload="optimizer")
    assert plan.is_offloaded
    assert without.prediction is not None and plan.prediction is not None
    host = plan.cluster.type_of(0).host
    assert host is not None
    share = max(entry.host_bytes for entry in plan.prediction.memory) / 4
    slower = plan.prediction.step_seconds - without.prediction.step_seconds
    assert slower > 2 * share / host.link.bytes_per_second
    told = explain_json(plan, subject().captured.graph)["offload"]
    assert isinstance(told, dict)
    assert told["num_parameters"] == 2 * LAYERS
    assert told["host_bytes"] == 4 * share
    assert "of host memory" in explain(plan)
    assert explain_json(without)["offload"] is None
    programs = build_programs(subject().captured, plan)
    run = simulate(programs, cluster=plan.cluster, optimizer=ADAMW)
    updates = [s.end_seconds - s.begin_seconds for s in run.timeline if s.kind == "optimizer"]
    assert max(updates) == pytest.approx(told["update_seconds"], rel=1e-6)


def test_the_host_must_have_room() -> None:
    roomy = cluster(1, TIGHT[1])
    kind = roomy.types[0]
    assert kind.host is not None
    small = replace(kind, host=replace(kind.host, memory_bytes=3 * WEIGHT_BYTES))
    graph = subject().captured.graph
    options = PlanOptions(num_microbatches=2, optimizer=ADAMW)
    plan_graph(graph, roomy, batch_size=ROWS, options=options)
    with pytest.raises(InfeasibleError):
        plan_graph(graph, replace(roomy, types=(small,)), batch_size=ROWS, options=options)


def test_a_cpu_has_no_host() -> None:
    graph = subject().captured.graph
    options = PlanOptions(num_microbatches=2, offload="optimizer")
    with pytest.raises(UsageError, match="cpu-core have no host"):
        plan_graph(graph, parse_devices("cpu:2"), batch_size=ROWS, options=options)


def errors(plan: Plan, session: Session, clip: float | None) -> dict[str, float]:
    """Of training under `plan`, on CPUs in place of its devices."""
    entry = subject(clip)
    here = replace(
        plan,
        cluster=parse_devices(f"cpu:{len(plan.cluster.devices)}"),
        prediction=None,
        certificate=None,
    )
    model = PlannedModel(
        model=entry.model,
        captured=entry.captured,
        plan=here,
        programs=build_programs(entry.captured, here, clip),
        call=(entry.args, entry.kwargs),
        loss_fn=entry.loss_fn,
        call_signature=signature_of(entry.micro),
        training=True,
    )
    options = RunOptions(
        loss_fn=entry.loss_fn,
        optimizer=entry.numerics.optimizer,
        seed=SEED,
        keep_gradients=True,
        clip_grad_norm=clip,
    )
    measured = measure_training(
        Parallel(model, options, session),
        entry.args,
        entry.kwargs,
        loss_fn=entry.loss_fn,
        steps=STEPS,
        compare=True,
    )
    return {
        kind: error.value for kind, error in relative_errors(measured.run, entry.reference).items()
    }


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(("devices", "weights", "pinned"), CASES)
def test_planned_offloading_trains_exactly(
    devices: int, weights: float, pinned: dict[str, object], clip: float | None
) -> None:
    plan = planned(devices, weights, **pinned)
    assert plan.is_offloaded
    session = InProcessSession(devices, host=torch.device("cpu"))
    found = errors(plan, session, clip)
    assert max(found.values()) <= TOLERANCE, found
    for rank in session.ranks:
        assert rank._optimizer is not None and not rank._optimizer.state_tensors()
