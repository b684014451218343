"""How calls bind to graph inputs, where losses are found, how results unflatten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutset.compiler.capture import Captured, capture
from cutset.compiler.capture.signature import InputSignature, find_loss, num_targets
from cutset.compiler.ir.errors import CaptureError, UsageError
from cutset.compiler.ir.graph import Mode, OutputKind
from cutset.compiler.ir.types import TensorType


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: Any = 1.0, extra: Any = None, flag: bool = True) -> Any:
        y = self.layer(x) * (scale if flag else 1.0)
        if extra is not None:
            y = y + extra["a"][0]
        return {"y": y, "pair": (y.sum(), None), "name": "net", "x": x}


def _infer(*args: Any, **kwargs: Any) -> Captured:
    return capture(_Net(), args, kwargs, mode=Mode.INFER)


def test_inputs_are_named_by_their_place_in_the_call() -> None:
    captured = _infer(torch.ones(3, 4), extra={"a": [torch.ones(4)]}, scale=torch.ones(3, 1))
    values = [captured.graph.values[number] for number in captured.graph.inputs]
    assert [(value.origin, value.batch_dim) for value in values] == [
        ("args[0]", 0),
        ("kwargs.extra['a'][0]", None),
        ("kwargs.scale", 0),
    ]


def test_a_call_binds_by_name_in_any_order() -> None:
    captured = _infer(torch.ones(3, 4), scale=torch.ones(3, 1), flag=True)
    x, scale = torch.zeros(5, 4), torch.zeros(5, 1)
    bound = captured.inputs.bind((x,), {"flag": True, "scale": scale})
    assert bound["args[0]"] is x and bound["kwargs.scale"] is scale


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.ones(3, 4),), {}, "missing: .'flag'"),
        ((torch.ones(3, 4),), {"flag": True, "other": 1}, "unexpected: .'other'"),
        ((torch.ones(3, 4),), {"flag": False}, "False stands where"),
        ((7.0,), {"flag": True}, r"args\[0\] is float"),
        ((), {"flag": True}, "structure"),
    ],
)
def test_a_call_that_differs_is_refused(args: Any, kwargs: Any, message: str) -> None:
    captured = _infer(torch.ones(3, 4), flag=True)
    with pytest.raises(UsageError, match=message):
        captured.inputs.bind(args, kwargs)


def test_results_come_back_in_the_model_s_structure() -> None:
    captured = _infer(torch.ones(3, 4))
    targets = [output.target for output in captured.graph.outputs]
    assert targets == ["0", "1", "2"]
    assert [output.batch_dim for output in captured.graph.outputs] == [0, None, 0]
    tensors = {target: torch.full((1,), float(target)) for target in targets}
    result = captured.outputs.unflatten(tensors)
    assert result["name"] == "net" and result["pair"][1] is None
    assert (result["y"], result["pair"][0], result["x"]) == (0.0, 1.0, 2.0)


def test_objects_in_results_are_dropped_with_a_warning() -> None:
    class Opaque:
        pass

    class Model(_Net):
        def forward(self, x: Tensor) -> Any:
            return self.layer(x), Opaque()

    captured = capture(Model(), (torch.ones(2, 4),), mode=Mode.INFER)
    assert captured.warnings == ("result[1] (Opaque) cannot be returned and is None instead",)
    assert captured.outputs.unflatten({"0": torch.ones(1)})[1] is None


def test_targets_are_the_last_arguments() -> None:
    class Model(_Net):
        def forward(self, x: Tensor) -> Any:
            return self.layer(x)

    args = (torch.ones(3, 4), torch.tensor([0, 1, 2]))
    captured = capture(Model(), args, mode=Mode.TRAIN, loss_fn=nn.CrossEntropyLoss())
    values = [captured.graph.values[number] for number in captured.graph.inputs]
    assert [value.origin for value in values] == ["args[0]", "targets[0]"]
    (loss,) = captured.graph.outputs
    assert loss.kind is OutputKind.LOSS
    assert set(captured.inputs.bind(args, {})) == {"args[0]", "targets[0]"}
    kept = capture(Model(), args, mode=Mode.TRAIN, loss_fn=nn.CrossEntropyLoss(), keep_outputs=True)
    assert [output.kind for output in kept.graph.outputs] == [OutputKind.LOSS, OutputKind.USER]


def test_number_of_targets_follows_from_the_loss_function() -> None:
    assert num_targets(None) == 0
    assert num_targets(lambda output: output) == 0
    assert num_targets(F.mse_loss) == 1
    assert num_targets(nn.CrossEntropyLoss()) == 1
    assert num_targets(lambda output, a, b, c=1: output) == 2


def test_loss_function_with_parameters_is_refused() -> None:
    with pytest.raises(UsageError, match="parameters of its own"):
        num_targets(nn.Linear(2, 2))


def test_too_few_targets_are_refused() -> None:
    with pytest.raises(UsageError, match="takes 1 targets, but there are 0"):
        InputSignature.of((), {"x": torch.ones(2)}, 1)


@dataclass
class _Result:
    loss: Tensor


def test_loss_is_found_where_models_put_it() -> None:
    loss = torch.ones(())
    for result in (loss, _Result(loss), {"loss": loss}, (loss, torch.ones(3)), [loss]):
        assert find_loss(result) is loss


@pytest.mark.parametrize("result", [torch.ones(2), (torch.ones(2),), {"x": 1}, torch.tensor(1)])
def test_result_without_loss_is_refused(result: object) -> None:
    with pytest.raises(CaptureError, match="no loss to train on"):
        find_loss(result)


def test_call_without_example_inputs_is_refused() -> None:
    with pytest.raises(UsageError, match="no example inputs"):
        capture(_Net(), mode=Mode.INFER)


def test_batch_is_dim_0_of_the_first_tensor_with_a_dim() -> None:
    call = (torch.tensor(1.0), torch.ones(6, 2), torch.ones(6), torch.ones(2, 6))
    signature, tensors = InputSignature.of(call, {}, 0)
    assert signature.rows == 6 and len(tensors) == 4
    assert [leaf.batch_dim for leaf in signature.tensor_leaves] == [None, 0, 0, None]
    assert signature.tensor_leaves[1].type == TensorType((6, 2), torch.float32)
