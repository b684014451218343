"""What is recomputed is not saved, is computed once more in backward, late, and bit-equal."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, fx

from cutset.compiler.codegen.python import stage_source
from cutset.compiler.ir.graph import Graph, Mode, OutputKind
from cutset.runtime import rng
from cutset.runtime.kernels import Source, StageKernels, trace_training
from cutset.runtime.recompute import recompute
from tests.ir.builders import GraphBuilder

CPU = torch.device("cpu")
KEY = torch.tensor(7)


def kernels_of(graph: Graph, recomputed: Collection[int]) -> StageKernels:
    namespace: dict = {"torch": torch, "aten": torch.ops.aten, "rng": rng, "recompute": recompute}
    exec(stage_source(0, graph, recomputed), namespace)
    return trace_training(namespace["stage_0"], graph, CPU)


def chain(num_blocks: int = 3) -> tuple[Graph, list[list[int]]]:
    """Residual blocks of two linears and a gelu behind a boundary; nodes by block."""
    build = GraphBuilder("chain", Mode.TRAIN)
    hidden = build.boundary("h", (4, 8), torch.float64)
    blocks = []
    for block in range(num_blocks):
        first = build.parameter(f"first{block}", (16, 8), torch.float64)
        second = build.parameter(f"second{block}", (8, 16), torch.float64)
        wide = build.op("aten.linear.default", hidden, first)
        narrow = build.op("aten.linear.default", build.op("aten.gelu.default", wide), second)
        hidden = build.op("aten.add.Tensor", hidden, narrow)
        blocks.append([4 * block, 4 * block + 1, 4 * block + 2])  # not the sum, which is kept
    build.output(hidden, OutputKind.BOUNDARY, target=hidden.name)
    return build.build(), blocks


def run(kernels: StageKernels, seed: int = 0) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Results of F and B, and what B and W add to the gradient of each parameter."""
    torch.manual_seed(seed)
    values = kernels.signature.arguments
    tensors = [torch.randn(value.type.shape, dtype=value.type.dtype) for value in values]
    results = list(kernels.forward([KEY, *tensors]))
    outputs, saved = results[: kernels.num_outputs], results[kernels.num_outputs :]
    sources: dict = {(Source.ARGUMENT, i + 1): tensor for i, tensor in enumerate(tensors)}
    sources[Source.ARGUMENT, 0] = KEY
    sources |= {(Source.SAVED, i): tensor for i, tensor in enumerate(saved)}
    for index, position in enumerate(kernels.signature.tangents):
        sources[Source.TANGENT, index] = torch.ones_like(outputs[position])
    (weight,) = kernels.backward_weights
    sums = {
        i: torch.zeros_like(tensors[i]) for i in (*kernels.accumulated_early, *weight.accumulated)
    }
    early = [sums[i] for i in kernels.accumulated_early]
    back = list(kernels.backward_input([*(sources[s] for s in kernels.input_sources), *early]))
    count = len(kernels.signature.differentiable) - len(kernels.zero_inputs)
    sources |= {(Source.PASSED, i): tensor for i, tensor in enumerate(back[count:])}
    late = [sums[i] for i in weight.accumulated]
    weight.kernel([*(sources[s] for s in weight.sources), *late])
    return [*outputs, *back[:count]], sums


def check_equal(graph: Graph, recomputed: Collection[int]) -> StageKernels:
    kept, again = kernels_of(graph, ()), kernels_of(graph, recomputed)
    (results, sums), (others, other_sums) = run(kept), run(again)
    assert all(map(torch.equal, results, others))
    assert sums.keys() == other_sums.keys()
    assert all(torch.equal(sums[i], other_sums[i]) for i in sums)
    return again


def saved_bytes(kernels: StageKernels) -> int:
    nodes = list(kernels.modules["forward"].graph.nodes)[-1].args[0][kernels.num_outputs :]
    return sum(node.meta["val"].untyped_storage().nbytes() for node in nodes)


def calls(module: fx.GraphModule) -> list[str]:
    targets = (node.target for node in module.graph.nodes)
    return [t._schema.name.split(":")[-1] for t in targets if isinstance(t, torch._ops.OpOverload)]


def test_only_what_enters_blocks_is_saved() -> None:
    """Of three blocks, gelu's operand and result (2 x 512 bytes) and the sum (256) are kept; with
    recomputation the two sums that enter blocks, as the first block's input is an argument."""
    graph, blocks = chain()
    assert saved_bytes(kernels_of(graph, ())) == 3 * 2 * 512 + 2 * 256
    again = check_equal(graph, sum(blocks, []))
    assert saved_bytes(again) == 2 * 256


def test_each_block_is_recomputed_when_backward_comes_to_it() -> None:
    """gelu runs once more a block, right before the gradients of that block and not earlier."""
    graph, blocks = chain()
    ops = calls(check_equal(graph, sum(blocks, [])).modules["input"])
    order = [op for op in ops if op in ("gelu", "gelu_backward")]
    assert sorted(order[:2]) == ["gelu", "gelu_backward"]
    assert order.count("gelu") == order.count("gelu_backward") == 3
    for block in range(3):
        assert set(order[2 * block : 2 * block + 2]) == {"gelu", "gelu_backward"}


def test_weight_gradients_of_what_is_recomputed_join_the_input_gradients() -> None:
    graph, blocks = chain(2)
    again = check_equal(graph, blocks[1])
    origins = [again.signature.arguments[i].origin for i in again.accumulated_early]
    assert origins == ["second1"], "gelu's result needs its operand, which B recomputes"
    assert "gelu" not in calls(again.modules["weight"])
    assert check_equal(graph, ()).accumulated_early == ()


def test_gradients_of_one_node_stay_together() -> None:
    """A bias gradient in W would hold the gradient that the weight gradient in B reads as well."""
    build = GraphBuilder("bias", Mode.TRAIN)
    h = build.boundary("h", (4, 8), torch.float64)
    first = build.parameter("first", (8, 8), torch.float64)
    second = build.parameter("second", (8, 8), torch.float64)
    bias = build.parameter("b", (8,), torch.float64)
    wide = build.op("aten.tanh.default", build.op("aten.linear.default", h, first))
    out = build.op("aten.tanh.default", build.op("aten.linear.default", wide, second, bias))
    build.output(out, OutputKind.BOUNDARY, target=out.name)
    again = check_equal(build.build(), [0, 1])
    assert [again.signature.arguments[i].origin for i in again.accumulated_early] == ["second", "b"]


def test_what_only_weight_gradients_read_is_recomputed_there() -> None:
    graph, _ = chain(1)
    again = check_equal(graph, [1])
    assert again.accumulated_early == ()
    assert "gelu" in calls(again.modules["weight"]) and "gelu" not in calls(again.modules["input"])


def test_a_view_of_a_recomputed_result_is_not_saved() -> None:
    """Linear makes views of its weight: kept, they would keep a recomputed weight."""
    build = GraphBuilder("cast", Mode.TRAIN)
    h = build.boundary("h", (4, 8), torch.float64)
    weight = build.parameter("w", (8, 8), torch.float64)
    made = build.op("aten.mul.Tensor", weight, 2.0)
    out = build.op("aten.linear.default", h, made)
    build.output(out, OutputKind.BOUNDARY, target=out.name)
    graph = build.build()
    assert saved_bytes(kernels_of(graph, ())) == 512
    assert saved_bytes(check_equal(graph, [0])) == 0


def test_dropout_draws_the_same_mask_again() -> None:
    build = GraphBuilder("dropout", Mode.TRAIN)
    h = build.boundary("h", (32, 8), torch.float64)
    out = build.op("aten.dropout.default", h, 0.5, True, random_draw=3)
    build.output(out, OutputKind.BOUNDARY, target=out.name)
    graph = build.build()
    again = check_equal(graph, [0])
    assert saved_bytes(again) == 0 < saved_bytes(kernels_of(graph, ()))
    (_, gradient), _ = run(again)
    assert {0.0, 2.0} == set(gradient.unique().tolist())


def test_running_statistics_are_updated_once() -> None:
    build = GraphBuilder("norm", Mode.TRAIN)
    h = build.boundary("h", (4, 3, 5, 5), torch.float64)
    w, b = (build.parameter(name, (3,), torch.float64) for name in "wb")
    mean, var = (build.buffer(name, (3,), torch.float64) for name in ("mean", "var"))
    op = "aten._native_batch_norm_legit_functional.default"
    out = build.ops(op, h, w, b, mean, var, True, 0.1, 1e-5)
    build.output(build.op("aten.relu.default", out[0]), OutputKind.BOUNDARY, target="y")
    build.output(out[3], OutputKind.BUFFER, target="mean", batch_dim=None)
    again = check_equal(build.build(), [0, 1])
    assert any("batch_norm" in op and "backward" not in op for op in calls(again.modules["input"]))


def in_place(key: Tensor, device: torch.device, h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    with recompute():
        x = torch.nn.functional.linear(h, w)
        x.add_(1.0)
        y = torch.tanh(x)
    return (y * 2.0,)


def test_marks_survive_functionalisation() -> None:
    build = GraphBuilder("inplace", Mode.TRAIN)
    h = build.boundary("h", (4, 8), torch.float64)
    w = build.parameter("w", (8, 8), torch.float64)
    out = build.op("aten.linear.default", h, w)
    build.output(out, OutputKind.BOUNDARY, target=out.name)
    again = trace_training(in_place, build.build(), CPU)
    assert saved_bytes(again) == 0
    assert "tanh" in calls(again.modules["input"])


def test_a_stage_function_runs_without_being_traced() -> None:
    (result,) = in_place(KEY, CPU, torch.ones(4, 8), torch.ones(8, 8))
    assert torch.equal(result, torch.full((4, 8), 2.0 * torch.tanh(torch.tensor(9.0)).item()))
