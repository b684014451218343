"""Memory of stages that recompute, predicted and measured, and their seconds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cutset.compiler.capture import capture
from cutset.compiler.codegen.cut import cut_stages
from cutset.compiler.ir.graph import Graph, Mode, OutputKind
from cutset.compiler.ir.plan import Stage
from cutset.cost_models.action_memory import action_memory
from cutset.cost_models.memory_tables import memory_model, rerun_nodes
from cutset.cost_models.node_memory import memory_profile
from cutset.cost_models.ops import price
from cutset.cost_models.presets import local_cpu_cluster
from cutset.cost_models.stages import stage_seconds
from cutset.passes.recompute import choose_recompute
from tests.ir.builders import GraphBuilder

from .measured import StageRun
from .test_memory import Model, encoder_decoder, gpt2, unet


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (gpt2, None),
        (unet, nn.functional.cross_entropy),
        (encoder_decoder, nn.functional.mse_loss),
    ],
)
@pytest.mark.parametrize("how", ["full", "selective"])
def test_prediction_bounds_what_a_stage_allocates(
    make: Model, loss: Callable[..., torch.Tensor] | None, how: str
) -> None:
    torch.manual_seed(0)
    model, args, kwargs = make()
    loss_fn = None if loss is None else lambda output, target: loss(output, target)
    captured = capture(model.train(), args, kwargs, mode=Mode.TRAIN, loss_fn=loss_fn, check=False)
    graph, half = captured.graph, len(captured.graph.nodes) // 2
    stages = (
        Stage(0, (0,), tuple(range(half))),
        Stage(1, (1,), tuple(range(half, len(graph.nodes)))),
    )
    recomputed = choose_recompute(graph, how)
    tensors = {**captured.tensors, **captured.inputs.bind(args, kwargs)}
    prepared = memory_model(graph)
    for stage, program in zip(stages, cut_stages(graph, stages, recomputed), strict=True):
        run = StageRun(program, tensors)
        tensors |= run.outputs()
        measured, predicted = run.measure(), action_memory(prepared, stage.nodes, recomputed)
        assert 0.999 * measured.saved <= predicted.saved_bytes <= 1.03 * measured.saved
        for upper, actual in (
            (predicted.forward_bytes, measured.forward),
            (predicted.saved_bytes + predicted.backward_input_bytes, measured.backward_input),
            (predicted.left_bytes + predicted.backward_weight_bytes, measured.backward_weight),
        ):
            assert upper >= 0.995 * actual, f"stage {stage.index}: {upper} of {actual}"
        assert predicted.peak_bytes <= 1.35 * measured.peak


def stage() -> Graph:
    """Behind a boundary: linear (0), gelu (1), linear (2), neg (3), sum with the boundary (4)."""
    build = GraphBuilder("stage", Mode.TRAIN)
    hidden = build.boundary("h", (4, 8))
    first, second = build.parameter("first", (16, 8)), build.parameter("second", (8, 16))
    wide = build.op("aten.gelu.default", build.op("aten.linear.default", hidden, first))
    narrow = build.op("aten.neg.default", build.op("aten.linear.default", wide, second))
    out = build.op("aten.add.Tensor", hidden, narrow)
    build.output(out, OutputKind.BOUNDARY, target=out.name)
    return build.build()


def test_only_what_backward_reads_runs_again() -> None:
    """The results of the second linear and of neg are read by no backward."""
    assert rerun_nodes(stage(), (0, 1, 2, 3)) == {0, 1}
    assert rerun_nodes(stage(), ()) == frozenset()


def test_seconds_by_hand() -> None:
    """B runs linear and gelu again, and the second linear's weight gradient beside them; W has the
    first one's. If gelu alone runs again it does so in W, which alone reads its result."""
    graph, kind = stage(), local_cpu_cluster(1).types[0]
    costs = price(graph, kind)
    plain = stage_seconds(graph, kind)
    full = stage_seconds(graph, kind, recomputed=(0, 1, 2, 3))
    again = costs[0].forward_seconds + costs[1].forward_seconds
    moved = costs[2].backward_weight_seconds
    assert full.forward == plain.forward
    assert full.backward_input == pytest.approx(plain.backward_input + again + moved)
    assert full.backward_weight == pytest.approx(plain.backward_weight - moved)
    late = stage_seconds(graph, kind, recomputed=(1,))
    assert late.backward_input == pytest.approx(plain.backward_input)
    assert late.backward_weight == pytest.approx(plain.backward_weight + costs[1].forward_seconds)


def test_additive_figures_by_hand() -> None:
    """Linear and gelu save 256 bytes each; recomputed they save nothing, and no gradient waits for
    the second weight gradient, which joins B."""
    plain = memory_profile(stage())
    full = memory_profile(stage(), recomputed=(0, 1, 2, 3))
    assert [node.saved_bytes for node in plain] == [256, 256, 0, 0, 0]
    assert [node.saved_bytes for node in full] == [0, 0, 0, 0, 0]
    assert plain[2].deferred_bytes == 128 and full[2].deferred_bytes == 0
