"""F, B and W kernels of a stage give the gradients of plain autograd, and split what they must."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cutset.compiler.codegen.python import stage_source
from cutset.compiler.ir.graph import Graph, Mode, OutputKind, Value, ValueKind
from cutset.runtime.kernels import Source, StageKernels, trace_training
from tests.ir.builders import GraphBuilder

CPU = torch.device("cpu")


def compile_stage(graph: Graph):
    namespace: dict = {"torch": torch, "aten": torch.ops.aten}
    exec(stage_source(0, graph), namespace)
    return namespace["stage_0"]


def values_for(graph: Graph) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = []
    for value in graph.values:
        if value.kind is ValueKind.RESULT:
            continue
        if value.type.is_float:
            tensors.append(torch.randn(value.type.shape, dtype=value.type.dtype))
        else:
            tensors.append(torch.randint(0, 4, value.type.shape))
    return tensors


def run_kernels(kernels: StageKernels, tensors: list[Tensor], tangents: list[Tensor]):
    """Outputs, input gradients and accumulated weight gradients, as the executor does it."""
    key = torch.tensor(0)
    arguments = [key, *tensors]
    sources = {(Source.ARGUMENT, i): t for i, t in enumerate(arguments)}
    results = list(kernels.forward(list(arguments)))
    outputs, saved = results[: kernels.num_outputs], results[kernels.num_outputs :]
    sources |= {(Source.SAVED, i): t for i, t in enumerate(saved)}
    sources |= {(Source.TANGENT, i): t for i, t in enumerate(tangents)}
    back = list(kernels.backward_input([sources[s] for s in kernels.input_sources]))
    count = len(kernels.signature.differentiable) - len(kernels.zero_inputs)
    sources |= {(Source.PASSED, i): t for i, t in enumerate(back[count:])}
    buffers: dict[int, Tensor] = {}
    for _ in range(2):
        for part in kernels.backward_weights:
            for index in part.accumulated:
                buffers.setdefault(index, torch.zeros_like(tensors[index]))
            own = [buffers[index] for index in part.accumulated]
            passed = part.kernel([*(sources[s] for s in part.sources), *own])
            sources |= {(Source.PASSED, i): t for i, t in zip(part.passed, passed, strict=True)}
    return outputs, back[:count], buffers


def check(graph: Graph, parts: tuple[tuple[str, ...], ...] = ()) -> StageKernels:
    """Kernels of `graph` against autograd through the stage function."""
    function = compile_stage(graph)
    kernels = trace_training(function, graph, CPU, parts=parts)
    assert len(kernels.backward_weights) == max(len(parts), 1)
    tensors = values_for(graph)
    wants = {*kernels.signature.trained, *kernels.signature.differentiable}
    leaves = [t.clone().requires_grad_(i in wants) for i, t in enumerate(tensors)]
    expected = function(torch.tensor(0), CPU, *leaves)
    tangents = [torch.randn_like(expected[i]) for i in kernels.signature.tangents]
    wanted = [*kernels.signature.differentiable, *kernels.signature.trained]
    gradients = torch.autograd.grad(
        [expected[i] for i in kernels.signature.tangents],
        [leaves[i] for i in wanted],
        tangents,
        allow_unused=True,
    )
    outputs, inputs, weights = run_kernels(kernels, tensors, tangents)
    for got, want in zip(outputs, expected, strict=True):
        assert torch.equal(got, want)
    reference = dict(zip(wanted, gradients, strict=True))
    present = [i for i in kernels.signature.differentiable if reference[i] is not None]
    for index, got in zip(present, inputs, strict=True):
        torch.testing.assert_close(got, reference[index], rtol=1e-12, atol=1e-12)
    for index, got in weights.items():
        torch.testing.assert_close(got, 2 * reference[index], rtol=1e-12, atol=1e-12)
    assert set(weights) == {i for i in kernels.signature.trained if reference[i] is not None}
    return kernels


def stage(name: str) -> tuple[GraphBuilder, Value]:
    build = GraphBuilder(name, Mode.TRAIN)
    return build, build.boundary("h", (2, 6, 8), torch.float64)


def parameter(build: GraphBuilder, name: str, *shape: int) -> Value:
    return build.parameter(name, shape, torch.float64)


def boundary_out(build: GraphBuilder, value: Value) -> Graph:
    build.output(value, OutputKind.BOUNDARY, target=value.name)
    return build.build()


def targets(kernels: StageKernels, part: str) -> list[str]:
    nodes = kernels.modules[part].graph.nodes
    return [str(node.target) for node in nodes if node.op == "call_function"]


def test_linear_and_gelu() -> None:
    build, h = stage("mlp")
    w, b = parameter(build, "w", 16, 8), parameter(build, "b", 16)
    kernels = check(
        boundary_out(build, build.op("aten.gelu.default", build.op("aten.linear.default", h, w, b)))
    )
    assert "aten.addmm_.default" in targets(kernels, "weight")
    assert not any("detach" in t for part in kernels.modules for t in targets(kernels, part))


def test_convolution_gradients_are_computed_apart() -> None:
    build = GraphBuilder("conv", Mode.TRAIN)
    h = build.boundary("h", (2, 3, 8, 8), torch.float64)
    w, b = parameter(build, "w", 4, 3, 3, 3), parameter(build, "b", 4)
    kernels = check(boundary_out(build, build.op("aten.conv2d.default", h, w, b, [1, 1], [1, 1])))
    for part in ("input", "weight"):
        assert targets(kernels, part).count("aten.convolution_backward.default") == 1


def test_layer_norm_embedding_and_two_uses_of_a_value() -> None:
    build = GraphBuilder("front", Mode.TRAIN)
    ids = build.input("ids", (2, 6), torch.int64)
    table, w, b = (parameter(build, "t", 4, 8), parameter(build, "w", 8), parameter(build, "b", 8))
    h = build.op("aten.embedding.default", table, ids)
    n = build.op("aten.layer_norm.default", h, [8], w, b)
    out = build.op("aten.add.Tensor", h, n)
    build.output(out, OutputKind.BOUNDARY, target=out.name)
    build.output(n, OutputKind.BOUNDARY, target=n.name)
    kernels = check(build.build())
    assert kernels.signature.differentiable == ()


def test_batch_norm_updates_buffers_functionally() -> None:
    build = GraphBuilder("norm", Mode.TRAIN)
    h = build.boundary("h", (4, 3, 5, 5), torch.float64)
    w, b = parameter(build, "w", 3), parameter(build, "b", 3)
    mean = build.buffer("mean", (3,), torch.float64)
    var = build.buffer("var", (3,), torch.float64)
    out = build.ops(
        "aten._native_batch_norm_legit_functional.default", h, w, b, mean, var, True, 0.1, 1e-5
    )
    build.output(out[0], OutputKind.BOUNDARY, target=out[0].name)
    build.output(out[3], OutputKind.BUFFER, target="mean", batch_dim=None)
    check(build.build())


def test_gradient_that_does_not_exist_is_reported_as_zero() -> None:
    build, h = stage("cut")
    w = parameter(build, "w", 8, 8)
    frozen = build.op("aten.detach.default", h)
    kernels = check(boundary_out(build, build.op("aten.linear.default", frozen, w)))
    assert kernels.zero_inputs == (0,)


def test_loss_stage() -> None:
    build, h = stage("head")
    w = parameter(build, "w", 8, 8)
    y = build.op("aten.linear.default", h, w)
    build.loss(build.op("aten.mean.default", build.op("aten.tanh.default", y)))
    check(build.build())


def test_kernels_free_their_arguments() -> None:
    build, h = stage("free")
    w = parameter(build, "w", 8, 8)
    graph = boundary_out(
        build, build.op("aten.relu.default", build.op("aten.linear.default", h, w))
    )
    kernels = trace_training(compile_stage(graph), graph, CPU)
    arguments: list[Tensor | None] = [torch.tensor(0), *values_for(graph)]
    kernels.forward(arguments)
    assert arguments == []


@pytest.mark.parametrize("transposes", [0, 1])
def test_addmm_writes_through_transposed_buffers(transposes: int) -> None:
    build, h = stage("t")
    w = parameter(build, "w", 8, 8)
    flat = build.op("aten.reshape.default", h, [12, 8])
    other = build.op("aten.t.default", w) if transposes else w
    kernels = check(boundary_out(build, build.op("aten.mm.default", flat, other)))
    assert "aten.add_.Tensor" not in targets(kernels, "weight")


def test_weight_gradients_in_parts() -> None:
    """A tied weight, a norm and a convolution; cuts where only some of what is needed is done."""
    build, h = stage("parts")
    w, v, tied = (parameter(build, name, 8, 8) for name in ("w", "v", "tied"))
    n, b = parameter(build, "n", 8), parameter(build, "b", 8)
    x = build.op("aten.tanh.default", build.op("aten.linear.default", h, tied))
    x = build.op("aten.layer_norm.default", x, [8], n, b)
    x = build.op("aten.tanh.default", build.op("aten.linear.default", x, w))
    x = build.op("aten.tanh.default", build.op("aten.linear.default", x, v))
    graph = boundary_out(build, build.op("aten.linear.default", x, tied))
    for parts in (
        (("v",), ("w",), ("b", "n"), ("tied",)),
        (("w", "v"), ("n",), ("b",), ("tied",)),  # n and b come out of one operator
        (("tied",), ("v",)),
        (("b",), ("v",), ()),
    ):
        kernels = check(graph, parts)
        names = [value.origin for value in kernels.signature.arguments]
        done: set[str] = set()
        for part, wanted in zip(kernels.backward_weights, parts, strict=True):
            done |= {names[index] for index in part.accumulated}
            assert set(wanted) <= done
    first = check(graph, (("v",), ("tied",))).backward_weights[0]
    found = {kernels.signature.arguments[index].origin for index in first.accumulated}
    assert found == {"v", "n", "b"}  # input gradients go through the norm


def test_parts_free_what_later_ones_do_not_read() -> None:
    build = GraphBuilder("chain", Mode.TRAIN)
    hidden = build.input("x", (4, 8), torch.float64)
    for index in range(3):
        weight = parameter(build, f"w{index}", 8, 8)
        hidden = build.op("aten.tanh.default", build.op("aten.linear.default", hidden, weight))
    build.loss(build.op("aten.mean.default", hidden))
    kernels = check(build.build(), (("w2",), ("w1",), ("w0",)))
    first, second, third = kernels.backward_weights
    assert [len(part.passed) for part in (first, second, third)] == [1, 1, 0]
    assert not {*first.sources} & {*second.sources} & {*third.sources}
    assert all(
        targets(kernels, part.name).count("aten.addmm_.default") == 1
        for part in (first, second, third)
    )


def test_oracle_is_not_trivial() -> None:
    """A wrong kernel is caught: guards the comparison itself."""
    build, h = stage("guard")
    w = parameter(build, "w", 8, 8)
    graph = boundary_out(build, build.op("aten.linear.default", h, w))
    wrong = nn.functional.linear
    kernels = trace_training(lambda key, device, h, w: (wrong(h, w) * 2,), graph, CPU)
    tensors = values_for(graph)
    outputs, _, _ = run_kernels(kernels, tensors, [torch.ones(2, 6, 8, dtype=torch.float64)])
    assert not torch.equal(outputs[0], compile_stage(graph)(0, CPU, *tensors)[0])


def test_recurrent_layers_in_single_precision() -> None:
    build = GraphBuilder("lstm", Mode.TRAIN)
    h = build.boundary("h", (2, 5, 4))
    zero = build.op("aten.zeros.default", [1, 2, 3])
    shapes = ((12, 4), (12, 3), (12,), (12,))
    weights = [build.parameter(f"w{i}", shape) for i, shape in enumerate(shapes)]
    options = (True, 1, 0.0, True, False, True)
    out = build.ops("aten.lstm.input", h, [zero, zero], weights, *options)
    graph = boundary_out(build, out[0])
    kernels = trace_training(compile_stage(graph), graph, CPU)
    tensors = values_for(graph)
    outputs, inputs, sums = run_kernels(kernels, tensors, [torch.ones(2, 5, 3)])
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    (expected,) = compile_stage(graph)(torch.tensor(0), CPU, *leaves)
    expected.sum().backward()
    torch.testing.assert_close(outputs[0], expected.detach())
    torch.testing.assert_close(inputs[0], leaves[0].grad)
    for index, total in sums.items():
        torch.testing.assert_close(total, 2 * leaves[index].grad)
