from __future__ import annotations

from cutset.cost_models.presets import local_cpu_cluster
from cutset.passes.microbatches import candidates
from cutset.passes.pipeline import PlanOptions, plan_graph
from tests.ir.builders import mlp


def test_candidates_divide_the_batch_and_lie_around_four_a_stage() -> None:
    assert list(candidates(12, 2)) == [1, 2, 3, 4, 6, 12]
    found = list(candidates(4096, 8))
    assert all(4096 % number == 0 for number in found)
    assert {8, 16, 32, 64} <= set(found)
    assert list(candidates(7, 4)) == [1, 7]


def test_work_is_split_where_it_outweighs_messages() -> None:
    options = PlanOptions(num_stages=4)
    large = plan_graph(
        mlp(8, width=512, batch=32), local_cpu_cluster(4), batch_size=1024, options=options
    )
    small = plan_graph(
        mlp(8, width=8, batch=32), local_cpu_cluster(4), batch_size=32, options=options
    )
    assert large.num_microbatches >= 8
    assert small.num_microbatches <= 2


def test_the_choice_is_the_best_of_the_pinned_ones() -> None:
    graph, cluster = mlp(8, width=256, batch=32), local_cpu_cluster(3)
    free = plan_graph(graph, cluster, batch_size=128)
    assert free.certificate is not None
    for number in candidates(128, 3):
        options = PlanOptions(num_microbatches=number)
        pinned = plan_graph(graph, cluster, batch_size=128, options=options).certificate
        assert pinned is not None
        assert free.certificate.objective <= pinned.objective * 1.005
