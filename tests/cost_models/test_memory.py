from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cutset.compiler.api import plan_model
from cutset.compiler.capture import capture
from cutset.compiler.codegen.cut import cut_stages
from cutset.compiler.ir.graph import Graph, Mode, ValueKind
from cutset.compiler.ir.plan import OptimizerModel, Stage
from cutset.cost_models import simulate
from cutset.cost_models.action_memory import action_memory
from cutset.cost_models.liveness import Step, live_bytes
from cutset.cost_models.memory import consuming_stages, library_bytes, stage_memory
from cutset.cost_models.memory_tables import memory_model
from cutset.cost_models.node_memory import memory_profile
from tests.ir.builders import GraphBuilder, mlp, residual, tied_embedding

from .measured import StageRun

ADAMW = OptimizerModel("adamw", 2.0)
SGD = OptimizerModel("sgd", 0.0)


def test_liveness_by_hand() -> None:
    """a (10) is given; step 0 makes b (20) with 5 on the way, step 1 reads a and b and makes c
    (1), step 2 makes d (7), which nobody reads. b dies at step 1, a is kept."""
    steps = [
        Step(0, (), ((2, 20.0),), 5.0),
        Step(1, (1, 2), ((3, 1.0),)),
        Step(2, (3,), ((4, 7.0),)),
    ]
    live = live_bytes(steps, {1: 10.0}, keep={1})
    assert live.at_step == (35.0, 31.0, 18.0)
    assert live.peak_bytes == 35.0
    assert live.end == {1: 10.0}


def two_layers() -> Graph:
    """x [4,8] -> linear 8 -> relu -> linear 8 -> sum: every activation is 128 bytes."""
    build = GraphBuilder("two", Mode.TRAIN)
    hidden = build.input("x", (4, 8))
    for layer in range(2):
        weight = build.parameter(f"{layer}.weight", (8, 8))
        hidden = build.op("aten.linear.default", hidden, weight)
        if layer == 0:
            hidden = build.op("aten.relu.default", hidden)
    build.loss(build.op("aten.sum.default", hidden))
    return build.build()


def test_a_stage_by_hand() -> None:
    """First stage (linear, relu), AdamW, two microbatches in flight of four, on CUDA.

    Parameters, gradients 256, states 512. Saved: relu's result, for itself (the next stage has its
    own copy), 128 a microbatch. W: beside it the arriving gradient and the one before relu, 256;
    the weight gradient is added in place. Optimizer: twice the largest parameter on the way, 512,
    when no activation is left: 512 - 256 more than those. Messages: the arriving gradient posted
    ahead 128, four results under way 512, four microbatches of input 512; CUDA graphs of the two
    microbatches keep an input, a result and its gradient each. The margin is 2.5 % of activations
    256, transients 256 and messages, 1 KiB, and what rounding to 512 bytes adds to the parameter,
    its gradient, its two states (256 each) and what is saved (384 a microbatch).
    """
    memory = stage_memory(
        two_layers(), [0, 1], in_flight=2, optimizer=ADAMW, device=3, num_microbatches=4,
        backend="cuda",
    )  # fmt: skip
    assert memory.device == 3
    assert memory.parameters_bytes == memory.gradients_bytes == 256
    assert memory.optimizer_bytes == 512
    assert memory.activations_bytes == 2 * 128
    messages = 128 + 512 + 512 + 2 * 3 * 128
    margin = 0.025 * (256 + 256 + messages) + 1024 + 4 * 256 + 2 * 384
    assert memory.transients_bytes == math.ceil(512 - 256 + margin)
    assert memory.communication_bytes == messages
    assert memory.bound_bytes == memory.total_bytes + library_bytes("cuda") > memory.total_bytes


def test_ranks_keep_messages_until_there_are_eight() -> None:
    """A rank cannot tell that a message has left: up to eight results of 128 bytes are held."""
    few, many = (
        stage_memory(two_layers(), [0, 1], in_flight=2, optimizer=SGD, num_microbatches=number)
        for number in (4, 100)
    )
    assert few.communication_bytes == 128 + 4 * 128 + 4 * 128
    assert many.communication_bytes == 128 + 8 * 128 + 100 * 128


def test_gradients_of_several_consumers_lie_beside_their_sum() -> None:
    """Two stages read relu's result: two gradients of 128 bytes are received, then summed."""
    model = memory_model(two_layers())
    relu = 3
    assert sum(model.steps([0, 1]).arriving.values()) == 128
    assert sum(model.steps([0, 1], {relu: 2}).arriving.values()) == 2 * 128 + 128


def test_stages_that_read_a_value() -> None:
    """linear (2) and relu (3) are read by the second stage; the input (0) by the first alone."""
    graph = two_layers()
    stages = (Stage(0, (0,), (0,)), Stage(1, (1,), (1,)), Stage(2, (2,), (1, 2, 3)))
    counts = consuming_stages(graph, stages)
    assert counts[2] == 2, "by stages 1 and 2, which both compute relu"
    assert 3 not in counts and counts[0] == 1


def test_the_last_stage_by_hand() -> None:
    """Second stage (linear, sum): it saves the received value, 128. Its forward has that and the
    result (128) and the loss (4). B: the loss's gradient 4 (sum expands it), the returned one 128.
    """
    memory = action_memory(memory_model(two_layers()), [2, 3])
    assert memory.saved_bytes == 128
    assert memory.forward_bytes == 128 + 128 + 4
    assert memory.backward_input_bytes == 4 + 128
    assert memory.left_bytes == 128 + 4


def test_inference_holds_no_gradients_and_keeps_no_activations() -> None:
    graph = mlp(mode=Mode.INFER)
    memory = stage_memory(
        graph, range(len(graph.nodes)), in_flight=1, optimizer=ADAMW, num_microbatches=2
    )
    assert memory.gradients_bytes == memory.optimizer_bytes == memory.activations_bytes == 0
    margin = 0.025 * (2 * 128 + memory.communication_bytes) + 1024
    assert memory.transients_bytes == math.ceil(2 * 128 + margin), "operand and result of a layer"
    assert memory.communication_bytes == 2 * 128 + 2 * 2 * 128, "inputs; outputs, then joined"


def test_a_frozen_parameter_has_no_gradient() -> None:
    build = GraphBuilder("frozen", Mode.TRAIN)
    x, frozen = build.input("x", (4, 8)), build.parameter("f", (8, 8), requires_grad=False)
    weight = build.parameter("w", (8, 8))
    hidden = build.op("aten.linear.default", x, frozen)
    build.loss(build.op("aten.sum.default", build.op("aten.linear.default", hidden, weight)))
    memory = stage_memory(build.build(), range(3), in_flight=1, optimizer=SGD)
    assert memory.parameters_bytes == 512 and memory.gradients_bytes == 256


def test_views_share_a_storage() -> None:
    """relu's result is saved once, though two views of it are saved as well."""
    build = GraphBuilder("views", Mode.TRAIN)
    x = build.boundary("x", (4, 8))
    hidden = build.op("aten.relu.default", x)
    first, second = build.ops("aten.split.Tensor", hidden, 4, 1)
    build.loss(build.op("aten.sum.default", build.op("aten.mul.Tensor", first, second)))
    assert action_memory(memory_model(build.build()), None).saved_bytes == 128


def test_activations_grow_with_the_batch_and_parameters_do_not() -> None:
    graph = residual()
    nodes = range(len(graph.nodes))
    whole = stage_memory(graph, nodes, in_flight=3, optimizer=SGD)
    double = stage_memory(graph, nodes, in_flight=3, optimizer=SGD, batch_fraction=2.0)
    assert double.activations_bytes == 2 * whole.activations_bytes
    assert double.parameters_bytes == whole.parameters_bytes


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    graph=st.sampled_from([mlp(6), residual(5), tied_embedding(batch=4)]),
    cut=st.integers(1, 16),
    in_flight=st.integers(1, 4),
)
def test_the_additive_bound_holds_for_every_cut(graph: Graph, cut: int, in_flight: int) -> None:
    """What a planner adds up by node is no less than what liveness finds for the stage."""
    cut = min(cut, len(graph.nodes) - 1)
    profile = memory_profile(graph)
    for nodes in (range(cut), range(cut, len(graph.nodes))):
        chosen = [profile[node] for node in nodes]
        memory = action_memory(memory_model(graph), nodes)
        read = {value for node in nodes for value in graph.nodes[node].inputs}
        made = {value for node in nodes for value in graph.nodes[node].outputs}
        received = sum(
            graph.values[value].type.num_bytes
            for value in read - made
            if graph.values[value].kind is ValueKind.RESULT
        )
        others = {v for n in graph.nodes if n.id not in nodes for v in n.inputs}
        sent = sum(graph.values[value].type.num_bytes for value in made & others)
        bound = (
            in_flight * (sum(node.saved_bytes for node in chosen) + received)
            + sum(node.deferred_bytes for node in chosen)
            + max(node.transient_bytes for node in chosen)
            + received
            + 2 * sent
        )
        assert bound >= (in_flight - 1) * memory.saved_bytes + memory.peak_bytes


# -- captured models against measured memory ---------------------------------------------------


class UNet(nn.Module):
    """Two levels, a long skip, batch norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down, self.middle = self.block(3, width), self.block(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join, self.out = self.block(2 * width, width), nn.Conv2d(width, 2, 1)

    @staticmethod
    def block(inner: int, outer: int) -> nn.Module:
        conv = nn.Conv2d(inner, outer, 3, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(outer), nn.ReLU(inplace=True))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skip = self.down(image)
        deep = self.up(self.middle(nn.functional.max_pool2d(skip, 2)))
        result: torch.Tensor = self.out(self.join(torch.cat([deep, skip], 1)))
        return result


class EncoderDecoder(nn.Module):
    """`nn.Transformer` with dropout and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(64, 4, 1, 1, 128, batch_first=True)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        result: torch.Tensor = self.body(source, target, tgt_mask=mask, tgt_is_causal=True)
        return result


def gpt2() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=32)
    config.use_cache = False
    ids = torch.randint(0, 256, (4, 32))
    return GPT2LMHeadModel(config), (), {"input_ids": ids, "labels": ids}


def unet() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    return UNet(), (torch.randn(4, 3, 32, 32), torch.randint(0, 2, (4, 32, 32))), {}


def encoder_decoder() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    source, target = torch.randn(4, 32, 64), torch.randn(4, 24, 64)
    return EncoderDecoder(), (source, target, torch.randn(4, 24, 64)), {}


Model = Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]]


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (gpt2, None),
        (unet, nn.functional.cross_entropy),
        (encoder_decoder, nn.functional.mse_loss),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_prediction_bounds_what_a_stage_allocates(
    make: Model, loss: Callable[..., torch.Tensor] | None, dtype: torch.dtype
) -> None:
    """Two stages of a captured model, run as a rank runs them: never more, rarely much less."""
    torch.manual_seed(0)
    model, args, kwargs = make()
    model = model.to(dtype).train()
    args = tuple(item.to(dtype) if item.is_floating_point() else item for item in args)
    loss_fn = None if loss is None else lambda output, target: loss(output, target)
    captured = capture(model, args, kwargs, mode=Mode.TRAIN, loss_fn=loss_fn, check=False)
    graph, half = captured.graph, len(captured.graph.nodes) // 2
    stages = (
        Stage(0, (0,), tuple(range(half))),
        Stage(1, (1,), tuple(range(half, len(graph.nodes)))),
    )
    tensors = {**captured.tensors, **captured.inputs.bind(args, kwargs)}
    prepared = memory_model(graph)
    for stage, program in zip(stages, cut_stages(graph, stages), strict=True):
        run = StageRun(program, tensors)
        tensors |= run.outputs()
        measured, predicted = run.measure(), action_memory(prepared, stage.nodes)
        assert predicted.saved_bytes >= 0.999 * measured.saved
        assert predicted.saved_bytes <= 1.03 * measured.saved
        bound = predicted.saved_bytes + predicted.backward_input_bytes
        for upper, actual in (
            (predicted.forward_bytes, measured.forward),
            (bound, measured.backward_input),
            (predicted.left_bytes + predicted.backward_weight_bytes, measured.backward_weight),
        ):
            assert upper >= 0.995 * actual, f"stage {stage.index}: {upper} of {actual}"
        assert predicted.peak_bytes <= 1.2 * measured.peak


def test_prediction_bounds_weight_gradients_in_parts() -> None:
    """One stage whose backward completes bucket after bucket: each part is bounded by itself."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(96, 96), nn.GELU(), nn.LayerNorm(96)) for _ in range(6))
    )
    args = (torch.randn(64, 96), torch.randn(64, 96))
    captured = capture(
        model, args, {}, mode=Mode.TRAIN, loss_fn=nn.functional.mse_loss, check=False
    )
    graph = captured.graph
    (program,) = cut_stages(graph, (Stage(0, (0,), tuple(range(len(graph.nodes)))),))
    names = [f"{block}.{item}" for block in reversed(range(6)) for item in ("2.bias", "0.weight")]
    parts = tuple((names[2 * i], names[2 * i + 1]) for i in range(6))
    ids = {value.origin: value.id for value in graph.values_of(ValueKind.PARAMETER)}
    run = StageRun(
        replace(program, parts=parts),
        {**captured.tensors, **captured.inputs.bind(args, {})},
    )
    measured = run.measure()
    predicted = action_memory(
        memory_model(graph), None, parts=[[ids[name] for name in part] for part in parts]
    )
    assert len(measured.weight_parts) == len(predicted.part_bytes) == 6
    for upper, actual in zip(predicted.part_bytes, measured.weight_parts, strict=True):
        assert 0.995 * actual <= upper <= 1.2 * actual
    assert predicted.part_bytes[0] > 1.5 * predicted.part_bytes[-1]
    whole = action_memory(memory_model(graph), None)
    assert whole.backward_bytes == predicted.backward_bytes


@pytest.mark.parametrize("zero", [0, 1])
def test_buckets_count_beside_the_parts_that_compute(zero: int) -> None:
    """The planner's bound of a data-parallel rank holds for the simulated course of its memory, and
    counts no buckets where activations are most."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(8)))
    for rows in (512, 4096):
        batch = (torch.randn(rows, 256), torch.randn(rows, 256))
        planned = plan_model(
            model,
            "cpu:2",
            example_inputs=batch,
            loss_fn=nn.functional.mse_loss,
            mesh="data=2",
            zero=zero,
            num_microbatches=1,
            check=False,
        )
        assert planned.programs[0].stages[0].parts
        plan = planned.plan
        assert plan.prediction is not None
        simulated = simulate(planned.programs, cluster=plan.cluster, optimizer=plan.optimizer)
        for entry, peak in zip(plan.prediction.memory, simulated.peak_memory_bytes, strict=True):
            assert peak <= entry.total_bytes <= 1.2 * peak
