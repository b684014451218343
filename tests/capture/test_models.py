"""Captured graphs of models that nobody here wrote: exact, well-formed, honest about gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cutset.compiler.capture import capture
from cutset.compiler.capture.interpret import run_graph
from cutset.compiler.ir.graph import Mode, OutputKind, Value
from cutset.compiler.ir.text import parse_graph, print_graph
from cutset.compiler.ir.types import TensorType
from cutset.compiler.ir.verify.graph import verify_graph
from tests.capture.compare import KEY, worst_error
from tests.models.zoo import PLAIN, ZOO, with_dtype

TRAINED = [
    *PLAIN,
    "bert",
    "clip",
    "gpt2",
    "llama",
    "mamba",
    "mixtral",
    "t5",
    "vit",
    "whisper",
]
INFERRED = ["gpt2", "residual_net", "t5", "recurrent"]


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_the_model_s(name: str) -> None:
    torch.manual_seed(0)
    example = with_dtype(ZOO[name](), torch.float64)
    captured = capture(
        example.model,
        example.args,
        example.kwargs,
        mode=Mode.TRAIN,
        loss_fn=example.loss_fn,
        check=False,
    )
    assert not captured.warnings
    verify_graph(captured.graph)
    assert parse_graph(print_graph(captured.graph)) == captured.graph
    error = worst_error(captured, example)
    assert error.value < 1e-11, error
    given = {**captured.tensors, **captured.inputs.bind(example.args, example.kwargs)}
    run_graph(captured.graph, given, key=KEY, observe=_check_value)


def _check_value(value: Value, tensor: Tensor) -> None:
    assert TensorType.of(tensor) == value.type, value
    # what only goes into `detach` has no gradient, though autograd records it
    assert tensor.requires_grad or not value.requires_grad, value


@pytest.mark.parametrize("name", INFERRED)
def test_inference_is_bit_equal_and_leaves_the_model_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    example = with_dtype(ZOO[name](), torch.float64)
    model = example.model.train()
    captured = capture(model, example.args, example.kwargs, mode=Mode.INFER)
    assert all(module.training for module in model.modules())
    assert captured.num_draws == 0
    assert not any(value.requires_grad for value in captured.graph.values)
    given = {**captured.tensors, **captured.inputs.bind(example.args, example.kwargs)}
    with torch.no_grad():
        results = run_graph(captured.graph, given, key=KEY)
        expected = model.eval()(*example.args, **example.kwargs)
    outputs = captured.graph.outputs
    user = {
        output.target: result
        for output, result in zip(outputs, results, strict=True)
        if output.kind is OutputKind.USER
    }
    found = captured.outputs.unflatten(user)
    assert type(found) is type(expected)
    _assert_same(found, expected)


def _assert_same(found: object, expected: object) -> None:
    left, right = (torch.utils._pytree.tree_leaves(item) for item in (found, expected))
    assert len(left) == len(right) > 0
    for ours, theirs in zip(left, right, strict=True):
        assert torch.equal(ours, theirs)


class _Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1)


def test_views_exist_whatever_the_strides_of_their_operand() -> None:
    """Kernels of this device may lay tensors out otherwise than those that were traced."""
    x = torch.randn(3, 4)
    graph = capture(_Rows(), (x,), mode=Mode.INFER).graph
    assert [node.op.name for node in graph.nodes] == ["aten.view.default"]
    (result,) = run_graph(graph, {"args[0]": x.t().contiguous().t()})
    assert torch.equal(result, x.flatten())
