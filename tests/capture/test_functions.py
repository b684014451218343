"""A model's own autograd functions keep their backward, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from cutset.compiler.capture import Captured, capture
from cutset.compiler.ir.errors import CaptureError
from cutset.compiler.ir.graph import Mode
from tests.capture.compare import worst_error
from tests.models import nets
from tests.models.example import Example, mean_square


class Reverse(Function):
    """Identity forward; the gradient times -scale backward (domain adaptation)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -ctx.scale * gradient, None


class Product(Function):
    """x w, with a gradient of w that is not that of the product; two outputs, new style."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x @ w, x.cumsum(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return first @ w.t() + 2 * second, x.tanh().t() @ first


class Constant(Function):
    """One output without a gradient beside one with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        rounded = x.round()
        ctx.mark_non_differentiable(rounded)
        return x * 2, rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        return gradient * 5 if ctx.needs_input_grad[0] else gradient


class Clip(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-1.0, 1.0)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x)).tanh())


class Reversed(_Net):
    def middle(self, x: Tensor) -> Tensor:
        return Reverse.apply(x, 0.3) + x.sin()


class Multiplied(_Net):
    def middle(self, x: Tensor) -> Tensor:
        first, second = Product.apply(x, self.second.weight)
        return first * second


class Rounded(_Net):
    def middle(self, x: Tensor) -> Tensor:
        double, rounded = Constant.apply(x)
        return double + x * rounded


class Unneeded(_Net):
    """The function runs where nothing needs a gradient."""

    def middle(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = Reverse.apply(x, 0.5)
        return x * y + Reverse.apply(torch.ones(6, dtype=x.dtype), 2.0)


class Clipped(_Net):
    def middle(self, x: Tensor) -> Tensor:
        return Clip.apply(x)


class Aliased(_Net):
    reverse = Reverse.apply

    def middle(self, x: Tensor) -> Tensor:
        return Aliased.reverse(x, 0.5)


def _train(model: nn.Module, width: int = 6) -> tuple[Captured, Example]:
    torch.manual_seed(0)
    args = (torch.randn(3, width, dtype=torch.float64),)
    example = Example(model.double(), args, {}, mean_square)
    captured = capture(model, args, mode=Mode.TRAIN, loss_fn=mean_square, check=False)
    return captured, example


@pytest.mark.parametrize("kind", [Reversed, Multiplied, Rounded, Unneeded])
def test_own_backward_is_kept(kind: type[nn.Module]) -> None:
    torch.manual_seed(1)
    error = worst_error(*_train(kind()))
    assert error.value < 1e-13, error


def test_straight_through_estimator_is_exact() -> None:
    assert worst_error(*_train(nets.StraightThrough(), 16)).value < 1e-13


def test_classes_are_as_they_were() -> None:
    class Own(Reverse):
        @classmethod
        def apply(cls, *args: Any) -> Any:
            return super().apply(*args)

    class Model(_Net):
        def middle(self, x: Tensor) -> Tensor:
            return Own.apply(x, 0.1)

    before = Own.__dict__["apply"]
    _train(Model())
    assert Own.__dict__["apply"] is before
    _train(Reversed())
    assert "apply" not in Reverse.__dict__
    with pytest.raises(CaptureError):
        _train(Clipped())
    assert "apply" not in Clip.__dict__


def test_backward_that_is_not_linear_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"\(Clip\) is not linear") as refusal:
        _train(Clipped())
    assert refusal.value.where.endswith("test_functions.Clip")


def test_function_called_under_another_name_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"autograd\.Function Reverse") as refusal:
        _train(Aliased())
    assert any("Class.apply" in way for way in refusal.value.ways_out)


def test_functions_do_not_matter_for_inference() -> None:
    captured = capture(Clipped(), (torch.randn(3, 6),), mode=Mode.INFER)
    assert captured.graph.outputs
