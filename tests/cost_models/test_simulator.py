from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cutset.compiler.codegen.programs import generate_programs
from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import Fingerprint, OptimizerModel, Plan, Stage
from cutset.compiler.ir.program import Program, Send
from cutset.compiler.ir.schedule import Schedule
from cutset.compiler.ir.verify import verify_programs
from cutset.cost_models.simulator import Simulation, simulate
from cutset.cost_models.stages import StageSeconds, optimizer_seconds, stage_seconds
from cutset.cost_models.timeline import render_timeline
from tests.ir.builders import mlp, tied_embedding
from tests.sharding.choices import zero_layouts_of

FREE = OptimizerModel("none", 0.0)
WHOLE = "F0.0 F0.1 B0.0 F0.2 B0.1 F0.3 B0.2 B0.3"
LAST = "F1.0 B1.0 F1.1 B1.1 F1.2 B1.2 F1.3 B1.3"


def cluster(link: Link, count: int = 2, memory_rate: float = 1e30) -> Cluster:
    kind = DeviceType("d", "cpu", 1 << 30, memory_rate, (("f32", 1e30),))
    devices = tuple(Device(index, "d", "node") for index in range(count))
    return Cluster("test", (kind,), devices, (LinkRule(link),))


def programs(
    graph: Graph,
    where: Cluster,
    rows: tuple[str, ...],
    microbatches: int,
    clip: float | None = None,
) -> tuple[Program, ...]:
    count, size = len(rows), len(graph.nodes)
    cuts = [size * index // count for index in range(count + 1)]
    text = f"schedule test stages={count} microbatches={microbatches}\n"
    plan = Plan(
        Fingerprint("m", "", "", 0, 0), where, graph.mode, 4 * microbatches, FREE,
        num_microbatches=microbatches,
        stages=tuple(
            Stage(index, (index,), tuple(range(cuts[index], cuts[index + 1])))
            for index in range(count)
        ),
        schedule=Schedule.parse(text + "\n".join(f"{i}: {row}" for i, row in enumerate(rows))),
    )  # fmt: skip
    return generate_programs(graph, plan, plan_hash="0" * 12, clip_grad_norm=clip)


def run(link: Link, rows: tuple[str, ...] = (WHOLE, LAST)) -> Simulation:
    """Two stages of an MLP, four microbatches; a forward takes 1 s, each half of backward 1 s."""
    where = cluster(link)
    seconds = StageSeconds(1.0, 1.0, 1.0)
    return simulate(
        programs(mlp(), where, rows, 4), cluster=where, optimizer=FREE,
        measured={0: seconds, 1: seconds},
    )  # fmt: skip


def test_1f1b_with_free_links_takes_the_textbook_time() -> None:
    """(m + s - 1) (t_f + t_b) = 5 * 3; each of two ranks computes 12 of the 15 seconds."""
    result = run(Link(0.0, 1e30))
    assert result.step_seconds == pytest.approx(15.0)
    assert result.bubble_fraction == pytest.approx(3 / 15)
    assert result.busy_fraction == pytest.approx((12 / 15, 12 / 15))


def test_splitting_backward_shortens_the_drain() -> None:
    """With input gradients sent before weight gradients, rank 0 gets each gradient a second
    earlier: 15 - 1."""
    split = tuple(re.sub(r"B(\d\.\d)", r"I\1 W\1", row) for row in (WHOLE, LAST))
    assert run(Link(0.0, 1e30), split).step_seconds == pytest.approx(14.0)


def test_latency_is_exposed_where_nothing_hides_it() -> None:
    """Half a second a message. Rank 1: F1.0 1.5-2.5, B1.0 -4.5, F1.1 -5.5, B1.1 -7.5. Rank 0 gets
    the first gradient at 5: B0.0 5-7, F0.2 -8, B0.1 -10, F0.3 -11. Rank 1: F1.2 8.5-9.5, B1.2
    -11.5, F1.3 -12.5, B1.3 -14.5. Rank 0: B0.2 12-14, B0.3 15-17."""
    assert run(Link(0.5, 1e30)).step_seconds == pytest.approx(17.0)


def test_bytes_of_links() -> None:
    """Each microbatch sends f32[4,8] one way and its gradient the other: 4 * 128 bytes."""
    assert run(Link(0.0, 1e30)).link_bytes == (((0, 1), 512), ((1, 0), 512))


def test_a_slow_link_is_the_bottleneck() -> None:
    """128 bytes at 12.8 bytes a second take 10 s: four go one after the other."""
    result = run(Link(0.0, 12.8))
    assert result.step_seconds >= 4 * 10.0 + 10.0


def test_memory_follows_the_microbatches_in_flight() -> None:
    """GPipe holds four microbatches on both ranks, 1F1B two on the first and one on the last."""
    gpipe = tuple(
        " ".join(f"{kind}{stage}.{m}" for kind in "FB" for m in range(4)) for stage in range(2)
    )
    lazy, eager = run(Link(0.0, 1e30)), run(Link(0.0, 1e30), gpipe)
    assert all(
        small < large
        for small, large in zip(lazy.peak_memory_bytes, eager.peak_memory_bytes, strict=True)
    )
    for curve, peak in zip(eager.memory_curves, eager.peak_memory_bytes, strict=True):
        assert max(level for _, level in curve) == peak
        assert curve[-1][1] == curve[0][1], "all that a step takes it gives back"
        assert [seconds for seconds, _ in curve] == sorted(seconds for seconds, _ in curve)


def test_spans_do_not_overlap_on_a_rank() -> None:
    result = run(Link(0.1, 1e4))
    for rank in range(2):
        spans = [span for span in result.timeline if span.rank == rank]
        for first, second in zip(spans, spans[1:], strict=False):
            assert first.end_seconds <= second.begin_seconds + 1e-12


def test_a_tied_gradient_and_a_clipped_norm_are_reduced() -> None:
    """Both ends of the model hold the embedding; both then wait for the other's norm."""
    graph, where = tied_embedding(), cluster(Link(1.0, 1e30))
    result = simulate(
        programs(graph, where, ("F0.0 I0.0 W0.0", "F1.0 I1.0 W1.0"), 1, clip=1.0),
        cluster=where, optimizer=FREE,
    )  # fmt: skip
    # ring all-reduce over two ranks: two hops of a second each, twice; two messages before that
    assert sum(span.kind == "sync" and span.rank == 0 for span in result.timeline) == 4
    assert result.step_seconds == pytest.approx(2 * 2.0 + 2 * 1.0)


def interleaved(level: int) -> tuple[Program, ...]:
    """Two stages on each of two ranks of a data axis."""
    graph, mesh = mlp(), Mesh.parse("data=2")
    layouts = zero_layouts_of(graph, mesh, level)
    text = "schedule test stages=2 microbatches=1\n0: F0.0 F1.0 B1.0 B0.0"
    half = len(graph.nodes) // 2
    plan = Plan(
        Fingerprint("m", "", "", 0, 0), cluster(Link(0.25, 1e30)), graph.mode, 4, FREE,
        num_microbatches=1, mesh=mesh,
        stages=tuple(
            Stage(index, (0, 1), tuple(range(half * index, [half, len(graph.nodes)][index])))
            for index in range(2)
        ),
        schedule=Schedule.parse(text), layouts=layouts.values, node_layouts=layouts.nodes,
        parameter_layouts=layouts.parameters,
    )  # fmt: skip
    return generate_programs(graph, plan, plan_hash="0" * 12)


@pytest.mark.parametrize("level", [0, 1])
def test_gradients_of_one_stage_are_reduced_while_another_computes(level: int) -> None:
    """F0 0-1, F1 -2, B1 -4, B0 -6. An all-reduce over two ranks takes two latencies: that of stage
    1 is hidden behind B0, that of stage 0 is not. With ZeRO 1 the second half of each all-reduce,
    an all-gather, follows the update: B0 -6, the first half for stage 0 -6.25 and the second, for
    both stages in one bucket, -6.5."""
    where = cluster(Link(0.25, 1e30))
    measured = {index: StageSeconds(1.0, 1.0, 1.0) for index in range(2)}
    programs = interleaved(level)
    verify_programs(programs)
    result = simulate(programs, cluster=where, optimizer=FREE, measured=measured)
    assert result.step_seconds == pytest.approx(6.5)
    for curve in result.memory_curves:
        assert curve[-1][1] == curve[0][1], "all that a step takes it gives back"


def test_inference_runs_forward_only() -> None:
    where = cluster(Link(0.0, 1e30))
    rows = ("F0.0 F0.1", "F1.0 F1.1")
    seconds = StageSeconds(1.0, 0.0, 0.0)
    result = simulate(
        programs(mlp(mode=Mode.INFER), where, rows, 2), cluster=where,
        measured={0: seconds, 1: seconds},
    )  # fmt: skip
    assert result.step_seconds == pytest.approx(3.0)
    assert {span.kind for span in result.timeline} == {"F"}


def test_programs_that_cannot_end_are_named() -> None:
    where = cluster(Link(0.0, 1e30))
    first, second = programs(mlp(), where, (WHOLE, LAST), 4)
    broken = replace(
        first, instructions=tuple(i for i in first.instructions if not isinstance(i, Send))
    )
    with pytest.raises(VerificationError, match="rank 1 waits at"):
        simulate((broken, second), cluster=where)


def test_the_optimizer_is_bound_by_memory() -> None:
    """1e6 bytes at 1e9 a second: gradient read and zeroed, parameter and both states read and
    written, 8 passes in all."""
    kind = DeviceType("d", "cuda", 1, 1e9, (("f32", 1.0),))
    adamw = OptimizerModel("adamw", 2.0)
    assert optimizer_seconds(kind, adamw, parameter_bytes=1e6) == pytest.approx(8e-3)
    where = cluster(Link(0.0, 1e30), memory_rate=1e6)
    result = simulate(
        programs(mlp(), where, (WHOLE, LAST), 4), cluster=where, optimizer=adamw,
        measured={index: StageSeconds(0.0, 0.0, 0.0) for index in range(2)},
    )  # fmt: skip
    assert result.timeline[-1].kind == "optimizer"
    assert result.step_seconds == pytest.approx(8 * 2 * (8 * 8 + 8) * 4 / 1e6)


def test_the_first_stage_computes_all_gradients_as_weight_gradients() -> None:
    """Nothing is returned to a stage before it, so B is empty there."""
    where = cluster(Link(0.0, 1e30), memory_rate=1e9)
    first, second = (p.stages[0].graph for p in programs(mlp(), where, (WHOLE, LAST), 4))
    kind = where.types[0]
    assert stage_seconds(first, kind).backward_input == 0.0
    assert stage_seconds(first, kind).backward_weight > 0.0
    assert stage_seconds(second, kind).backward_input > 0.0


def test_timeline_picture() -> None:
    """15 characters for 15 seconds: every character is one second."""
    legend, first, second = render_timeline(run(Link(0.0, 1e30)), width=15).splitlines()
    assert legend.startswith("15 s a step; 0-9 forward")
    assert first == "rank 0 |01..aa2bb3cc.dd|  80 % busy"
    assert second == "rank 1 |.0aa1bb2cc3dd..|  80 % busy"


def test_timeline_of_split_backwards_and_the_optimizer() -> None:
    split = tuple(re.sub(r"B(\d\.\d)", r"I\1 W\1", row) for row in (WHOLE, LAST))
    lanes = render_timeline(run(Link(0.0, 1e30), split), width=14).splitlines()[1:]
    assert lanes == ["rank 0 |01.aA2bB3cC.dD|  86 % busy", "rank 1 |.0aA1bB2cC3dD.|  86 % busy"]
