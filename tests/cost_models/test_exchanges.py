"""What collectives move: counted where the runtime calls them, against what the simulator says."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from cutset.compiler.ir.cluster import Cluster
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.program import StageProgram
from cutset.compiler.parallel import Parallel, RunOptions
from cutset.cost_models import make_cluster, simulate
from cutset.cost_models.collectives import Network
from cutset.cost_models.exchanges import edge_bytes, stage_costs
from cutset.cost_models.links import all_gather_seconds, all_reduce_seconds, reduce_scatter_seconds
from cutset.cost_models.stages import StageSeconds, stage_seconds
from cutset.runtime.communicator import Split
from cutset.runtime.inprocess import InProcessSession
from cutset.runtime.local_communicator import LocalCommunicator
from tests.exactness.harness import Subject, adamw64, in_stage, layouts_over
from tests.models.exact import SHARDED_MODELS
from tests.sharding.choices import Layouts, zero_layouts_of


def test_bytes_of_a_ring_and_of_messages() -> None:
    gpus, workers = make_cluster("h100", 4), make_cluster("cpu-core", 4)
    ranks = (0, 1, 2, 3)
    assert dict(edge_bytes(gpus, "all_reduce", ranks, 16.0)) == {
        (0, 1): 24.0, (1, 2): 24.0, (2, 3): 24.0, (3, 0): 24.0,
    }  # fmt: skip
    assert set(dict(edge_bytes(gpus, "all_gather", ranks, 16.0)).values()) == {12.0}
    for collective in ("all_gather", "reduce_scatter", "all_to_all"):
        messages = dict(edge_bytes(workers, collective, ranks, 16.0))
        assert len(messages) == 12 and set(messages.values()) == {4.0}
    assert edge_bytes(gpus, "all_reduce", (2,), 16.0) == ()


class Counted:
    """Bytes that ranks of one process hand to their communicators, by (source, target)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sent: Counter[tuple[int, int]] = Counter()
        for name in (
            "send",
            "start_all_reduce",
            "start_all_gather",
            "start_reduce_scatter",
            "start_all_to_all",
        ):
            patch.setattr(LocalCommunicator, name, self._counting(name))

    def _counting(self, name: str) -> Callable[..., Any]:
        call, count = getattr(LocalCommunicator, name), getattr(self, f"_{name}")

        @functools.wraps(call)
        def counted(end: LocalCommunicator, tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
            count(end.rank, tensor, *rest)
            return call(end, tensor, *rest, **named)

        return counted

    def _send(self, rank: int, tensor: torch.Tensor, peer: int, tag: int) -> None:
        self.sent[rank, peer] += tensor.nbytes

    def _start_all_reduce(
        self, rank: int, tensor: torch.Tensor, ranks: Sequence[int], reduction: str
    ) -> None:
        order = sorted(ranks)
        following = order[(order.index(rank) + 1) % len(order)]
        self.sent[rank, following] += 2 * (len(order) - 1) * tensor.nbytes // len(order)

    def _start_all_gather(
        self, rank: int, tensor: torch.Tensor, ranks: Sequence[int], split: Split
    ) -> None:
        self.sent.update({(rank, other): tensor.nbytes for other in ranks if other != rank})

    def _start_reduce_scatter(
        self, rank: int, tensor: torch.Tensor, ranks: Sequence[int], split: Split
    ) -> None:
        parts = zip(ranks, split.parts(tensor), strict=True)
        self.sent.update({(rank, other): part.nbytes for other, part in parts if other != rank})

    def _start_all_to_all(self, rank: int, tensor: torch.Tensor, ranks: Sequence[int]) -> None:
        size = tensor.nbytes // len(ranks)
        self.sent.update({(rank, other): size for other in ranks if other != rank})


def _layouts(entry: Subject, mesh: Mesh, level: int) -> Layouts | None:
    if mesh.size == 1:
        return None
    graph = entry.captured.graph
    return zero_layouts_of(graph, mesh, level) if level else layouts_over(graph, mesh, None)


@functools.cache
def subject() -> Subject:
    return Subject(SHARDED_MODELS["gpt2"], adamw64, clip_grad_norm=0.1)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("pipeline=2", 0),
        ("data=2", 0),
        ("data=2", 1),
        ("data=2", 2),
        ("data=2", 3),
        ("tensor=2", 0),
        ("data=2,pipeline=2,tensor=2", 0),
    ],
)
def test_every_byte_of_a_step_is_counted(
    text: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, whole = subject(), Mesh.parse(text)
    mesh, stages = in_stage(whole), whole.axis("pipeline").size
    layouts = _layouts(entry, mesh, level)
    planned = entry.planned(stages, "1f1b", mesh, layouts)
    simulated = simulate(planned.programs, cluster=planned.plan.cluster)
    counted = Counted(monkeypatch)
    options = RunOptions(
        loss_fn=entry.loss_fn, optimizer=entry.numerics.optimizer, clip_grad_norm=entry.clip
    )
    parallel = Parallel(planned, options, InProcessSession(whole.size))
    parallel.train_step(*entry.args, **entry.kwargs)
    counted.sent.clear()  # of setting up
    parallel.train_step(*entry.args, **entry.kwargs)
    assert dict(simulated.link_bytes) == pytest.approx(dict(counted.sent), rel=5e-3)


def _stage(text: str, level: int = 0) -> tuple[StageProgram, Cluster]:
    entry, mesh = subject(), Mesh.parse(text)
    planned = entry.planned(1, "1f1b", mesh, _layouts(entry, mesh, level))
    return planned.programs[0].stages[0], planned.plan.cluster


def test_an_action_is_computation_and_what_it_waits_for() -> None:
    stage, cluster = _stage("tensor=2")
    network, kind = Network(cluster, stage.axes), cluster.type_of(0)
    costs = stage_costs(stage, kind, network, None)
    seconds = stage_seconds(stage.graph, kind, network=network)
    assert costs.forward.seconds == pytest.approx(seconds.forward)
    assert costs.backward_weight.seconds == pytest.approx(seconds.backward_weight)
    assert costs.forward.exposed and not costs.forward.hidden
    (entry,) = costs.forward.exposed
    assert entry.ranks == (0, 1)
    assert 0.0 < costs.forward.compute_seconds < seconds.forward
    measured = stage_costs(stage, kind, network, StageSeconds(9.0, 0.0, 9.0))
    assert measured.forward.seconds == pytest.approx(9.0)
    assert measured.forward.exposed[0].seconds == pytest.approx(entry.seconds)


def test_ranks_of_a_stage_meet_as_often_whatever_they_hide() -> None:
    """On a rank whose computation is so short that it hides next to nothing, too."""
    stage, cluster = _stage("data=2", 3)
    network, kind = Network(cluster, stage.axes), cluster.type_of(0)
    rates = tuple((name, 1e3 * rate) for name, rate in kind.flops_per_second)
    fast = replace(kind, flops_per_second=rates, memory_bytes_per_second=1e15, overhead_seconds=0.0)
    first, alone = (stage_costs(stage, one, network, None) for one in (kind, fast))
    assert alone.hidden != first.hidden
    other = stage_costs(stage, fast, network, None, first)
    for one, two in (
        (first.forward, other.forward),
        (first.backward_weight, other.backward_weight),
    ):
        assert [entry.count for entry in one.exposed] == [entry.count for entry in two.exposed]
        assert [entry.count for entry in one.hidden] == [entry.count for entry in two.hidden]


def test_gathers_of_parameters_hide_behind_computation() -> None:
    stage, cluster = _stage("data=2", 3)
    network, kind = Network(cluster, stage.axes), cluster.type_of(0)
    costs = stage_costs(stage, kind, network, None)
    seconds = stage_seconds(stage.graph, kind, network=network)
    assert costs.forward.seconds == pytest.approx(seconds.forward)
    assert costs.forward.hidden and costs.forward.exposed
    (exposed,), (hidden,) = costs.forward.exposed, costs.forward.hidden
    alone = sum(
        all_gather_seconds(cluster, (0, 1), stage.graph.values[node.outputs[0]].type.num_bytes)
        for node in stage.graph.nodes
        if node.op.packet == "all_gather"
    )
    sums = exposed.seconds + hidden.seconds - alone  # of the loss
    assert 0.0 < sums < 4 * all_reduce_seconds(cluster, (0, 1), 8.0)


def test_gradients_that_backward_sums_take_time_with_weight_gradients() -> None:
    """The one that is complete last has nothing beside it, the others are hidden in part."""
    stage, cluster = _stage("data=2", 2)
    assert any(part.summed for part in stage.kept)
    network, kind = Network(cluster, stage.axes), cluster.type_of(0)
    costs = stage_costs(stage, kind, network, None)
    plain = stage_seconds(stage.graph, kind, network=network).backward_weight
    types = {value.origin: value.type for value in stage.graph.values if value.origin}
    sums = [
        reduce_scatter_seconds(cluster, (0, 1), types[part.name].num_bytes) for part in stage.kept
    ]
    assert plain + min(sums) <= costs.backward_weight.seconds <= plain + 0.99 * sum(sums)
    assert costs.backward_weight.hidden and costs.backward_weight.exposed
    assert costs.backward_weight.compute_seconds <= plain
