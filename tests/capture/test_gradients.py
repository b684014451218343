"""What would change gradients in silence is handled exactly or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cutset.compiler.capture import Captured, capture
from cutset.compiler.capture.export import export_model, mode_of
from cutset.compiler.capture.signature import InputSignature
from cutset.compiler.ir.errors import CaptureError
from cutset.compiler.ir.graph import Mode
from tests.capture.compare import worst_error
from tests.models import nets
from tests.models.example import Example, mean_square


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("scale", torch.ones(6))

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x)).tanh())


def _train(model: nn.Module, *, check: bool = True) -> Captured:
    model.double()
    width = 6 if isinstance(model, _Net) else 16
    args = (torch.randn(3, width, dtype=torch.float64),)
    return capture(model, args, mode=Mode.TRAIN, loss_fn=mean_square, check=check)


def test_straight_through_written_with_detach_is_exact() -> None:
    class Rewritten(_Net):
        def middle(self, x: Tensor) -> Tensor:
            return x + (x.sign() - x).detach()

    _train(Rewritten())


def test_tensor_hook_is_refused_with_its_line() -> None:
    with pytest.raises(CaptureError, match="gradient hook") as refusal:
        _train(nets.GradientHook())
    assert "nets.py:" in refusal.value.where


def test_module_hook_is_refused_with_its_path() -> None:
    model = _Net()
    model.second.register_full_backward_hook(lambda module, inputs, outputs: None)
    with pytest.raises(CaptureError, match="backward hook") as refusal:
        _train(model)
    assert "module second (Linear)" in refusal.value.where


def test_parameter_hook_is_refused_with_its_name() -> None:
    model = _Net()
    model.first.weight.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(CaptureError, match="backward hook") as refusal:
        _train(model)
    assert "parameter first.weight" in refusal.value.where


def test_hooks_do_not_matter_for_inference() -> None:
    model = _Net()
    model.second.register_full_backward_hook(lambda module, inputs, outputs: None)
    capture(model, (torch.randn(3, 6),), mode=Mode.INFER)


def test_reentrant_checkpoint_is_refused_with_the_way_out() -> None:
    class Reentrant(_Net):
        def middle(self, x: Tensor) -> Tensor:
            return checkpoint(self.second, x, use_reentrant=True)

    with pytest.raises(CaptureError, match="reentrant") as refusal:
        _train(Reentrant())
    assert "use_reentrant=False" in refusal.value.ways_out[0]


def test_gradient_taken_inside_the_forward_pass_is_refused() -> None:
    class Penalty(_Net):
        def middle(self, x: Tensor) -> Tensor:
            (slope,) = torch.autograd.grad(x.square().sum(), x, create_graph=True)
            return x + slope

    with pytest.raises(CaptureError, match="gradient inside the forward pass"):
        _train(Penalty())


def test_change_in_place_without_gradients_is_refused() -> None:
    class Clamped(_Net):
        def middle(self, x: Tensor) -> Tensor:
            x = x * 1.0
            with torch.no_grad():
                x[:, 1:].clamp_(-0.1, 0.1)
            return x

    with pytest.raises(CaptureError, match="in place .* under torch.no_grad"):
        _train(Clamped(), check=False)


def test_write_through_data_is_refused() -> None:
    class Scaled(_Net):
        def middle(self, x: Tensor) -> Tensor:
            x = x * 1.0
            x.data.mul_(2.0)
            return x

    with pytest.raises(CaptureError, match=r"in place .*mul_"):
        _train(Scaled(), check=False)


def test_changed_parameter_is_refused_by_name() -> None:
    class Renormed(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 6, max_norm=0.5)

        def middle(self, x: Tensor) -> Tensor:
            return x + self.table(torch.arange(3))

    with pytest.raises(CaptureError, match=r"changes its parameter table\.weight in place"):
        _train(Renormed())


def test_data_is_read_as_a_detached_value() -> None:
    class Quantized(_Net):
        def middle(self, x: Tensor) -> Tensor:
            return x + (x.round() - x).data * self.second.weight.data.norm()

    _train(Quantized())


def test_spectral_norm_is_exact() -> None:
    """It writes to fresh values and to buffers under no_grad."""

    class Normed(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))

    captured = _train(Normed())
    assert {output.target[-2:] for output in captured.graph.outputs[1:]} == {"_u", "_v"}


def test_buffer_updated_without_gradients_is_exact() -> None:
    class Averaged(_Net):
        def middle(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.scale.mul_(0.9).add_(x.abs().mean(0), alpha=0.1)
            return x / self.scale

    captured = _train(Averaged())
    assert [output.target for output in captured.graph.outputs[1:]] == ["scale"]


@pytest.mark.parametrize("functional", [True, False], ids=["short way", "decomposed"])
def test_regions_without_gradients_are_detached_on_both_ways(functional: bool) -> None:
    class Regions(nets.NoGradRegion):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if functional else y.add_(1.0)

    torch.manual_seed(0)
    model = Regions().double()
    example = Example(model, (torch.randn(3, 16, dtype=torch.float64),), {}, mean_square)
    captured = _train(model, check=False)
    assert worst_error(captured, example).value < 1e-12


def test_self_check_finds_what_detection_misses() -> None:
    class Hidden(_Net):
        def middle(self, x: Tensor) -> Tensor:
            if x.grad_fn is not None:
                x.grad_fn.register_prehook(lambda gradients: (gradients[0] * 3,))
            return x

    with pytest.raises(CaptureError, match=r"other gradients than the model.* first\."):
        _train(Hidden())


def test_self_check_leaves_no_trace() -> None:
    class Noisy(_Net):
        def middle(self, x: Tensor) -> Tensor:
            self.scale += 1.0
            return nn.functional.dropout(x, 0.5) * self.scale

    model = Noisy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    args = (torch.zeros(3, 6),)
    capture(model, args, mode=Mode.TRAIN, loss_fn=mean_square)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_frozen_parameters_have_no_gradient() -> None:
    model = _Net()
    model.first.requires_grad_(False)
    captured = _train(model)
    flags = {value.origin: value.requires_grad for value in captured.graph.values if value.origin}
    assert flags["second.weight"] and not flags["first.weight"]
    linear = captured.graph.nodes[0]
    assert not captured.graph.values[linear.outputs[0]].requires_grad


def test_loss_without_gradient_is_refused() -> None:
    model = _Net().requires_grad_(False)
    with pytest.raises(CaptureError, match="does not depend on any parameter"):
        _train(model)


def test_switching_modes_is_undone_after_an_error() -> None:
    model = _Net().train()
    with pytest.raises(ZeroDivisionError), mode_of(model, Mode.INFER):
        assert not model.first.training and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert model.first.training and torch.is_grad_enabled()


def test_short_way_equals_decomposition() -> None:
    """The same operators in the same order as `run_decompositions({})` gives."""
    torch.manual_seed(0)
    model, args = nets.Seq2Seq(), (torch.randn(2, 6, 32), torch.randn(2, 5, 32))
    inputs, tensors = InputSignature.of(args, {}, 0)
    ours = export_model(model, inputs, tensors, mode=Mode.TRAIN, loss_fn=mean_square).graph
    ours.eliminate_dead_code()
    program = torch.export.export(model, args, strict=False).run_decompositions({})

    def calls(graph: torch.fx.Graph) -> list[str]:
        found = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        ignored = ("_assert", "getitem", "alias", "detach")
        return [name for name in found if not any(word in name for word in ignored)]

    theirs = calls(program.graph)
    assert calls(ours)[: len(theirs)] == theirs and len(theirs) > 100
