"""Models and calls that a partitioned run can get wrong in silence."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cutset.compiler.ir.errors import CaptureError

from .partitioned import WIDTH, Plain, assert_same, batch, chain, partition, train_both

BATCHES = [batch(seed=seed) for seed in range(2)]


def decaying(parameters: Any) -> torch.optim.Optimizer:
    """Changes every parameter whose gradient is not None, even if it is zero."""
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


class Two(nn.Module):
    """Two linears, pinned to a stage each by `PINS`; subclasses put something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)


PINS = {"first": 0, "second": 1}


def made(kind: type[nn.Module]) -> nn.Module:
    """The same weights on every call."""
    torch.manual_seed(0)
    return kind().double().train()


class OneBadGradient(Two):
    """The gradient of `bad` is NaN, all others are finite."""

    def __init__(self) -> None:
        super().__init__()
        self.bad = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + torch.sqrt(self.bad * 0.0)


def test_a_norm_of_nan_spoils_all_gradients_as_in_torch() -> None:
    parallel = partition(made(OneBadGradient), clip_grad_norm=1.0, constraints=PINS)
    plain = Plain(made(OneBadGradient), clip=1.0)
    parallel.train_step(*batch())
    plain.step(*batch())
    for name, tensor in plain.model.state_dict().items():
        assert tensor.isnan().all(), name
        assert parallel.state_dict()[name].isnan().all(), name


class Spectral(Two):
    """A complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.fft.rfft(self.first(x)) * self.filter
        return self.second(torch.fft.irfft(h, n=WIDTH))


def test_complex_gradients_count_in_the_norm() -> None:
    parallel = partition(made(Spectral), clip_grad_norm=0.01, constraints=PINS)
    train_both(parallel, Plain(made(Spectral), clip=0.01), BATCHES, 1e-10)


def test_a_finished_step_keeps_nothing_alive() -> None:
    parallel = partition(chain())
    x, y = (tensor.clone() for tensor in batch())
    parallel.train_step(x, y)
    parallel(x)
    alive = weakref.ref(x.untyped_storage()), weakref.ref(x), weakref.ref(y)
    del x, y
    assert [item() for item in alive] == [None, None, None]


class Teacher(nn.Module):
    """A branch under no_grad, deep enough to be cut; its parameters require gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.student = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = torch.tanh(self.teacher[0](x))
            target = self.teacher[1](torch.sin(target))
        return self.student(x) - target


def test_what_is_cut_off_from_the_loss_has_no_gradient_rather_than_zero() -> None:
    pins = {"teacher.0": 0, "teacher.1": 1, "student": 1}
    parallel = partition(made(Teacher), optimizer=decaying, constraints=pins)
    trained = {v.origin for v in parallel.planned.captured.graph.values if v.requires_grad}
    assert "student.weight" in trained and "teacher.0.weight" not in trained
    train_both(parallel, Plain(made(Teacher), decaying), BATCHES)


class Remembering(Two):
    """A buffer that is written, never read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.last.copy_(h.detach().mean(0))
        return self.second(h)


def test_a_buffer_that_is_only_written() -> None:
    parallel = partition(made(Remembering), constraints=PINS)
    train_both(parallel, Plain(made(Remembering)), BATCHES)
    assert parallel.state_dict()["last"].any()


class Delayed(Two):
    """A buffer becomes the input, which stage 0 reads; stage 1 reads the old content."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        old = self.last.clone()
        self.last.copy_(x)
        return self.second(torch.tanh(self.first(x))) * (1.0 + old)


def test_a_buffer_that_becomes_an_input_is_a_copy_of_it() -> None:
    parallel = partition(made(Delayed), constraints=PINS)
    x, y = (tensor.clone() for tensor in batch())
    train_both(parallel, Plain(made(Delayed)), [(x, y)])
    before = parallel.state_dict()["last"].clone()
    x.zero_()
    assert torch.equal(parallel.state_dict()["last"], before)


class Strided(Two):
    """Reads memory by strides of its own, which a value loses on its way between stages."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cos(torch.sin(torch.tanh(self.first(x)).t()))
        return self.second(h.as_strided((x.shape[0], WIDTH), (1, x.shape[0])))


class StridedRows(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.cos(torch.sin(torch.tanh(self.first(x)).t().contiguous().t()))
        windows = h.t().as_strided((WIDTH, x.shape[0]), (x.shape[0], 1))
        return self.second(windows.as_strided((x.shape[0], WIDTH), (WIDTH, 1)))


@pytest.mark.parametrize("kind", [Strided, StridedRows])
def test_as_strided_sees_the_strides_of_the_model(kind: type[nn.Module]) -> None:
    for cut in ({"first": 0, "second": 1}, {"first": 0, "second": 0}):
        parallel = partition(made(kind), constraints=cut)
        train_both(parallel, Plain(made(kind)), BATCHES)


def test_as_strided_beyond_its_input_is_refused() -> None:
    class Beyond(Two):
        def forward(self, x: Tensor) -> Tensor:
            h = self.second(torch.tanh(self.first(x)))
            return h[:, :2].as_strided((1, WIDTH), (WIDTH, 1))

    with pytest.raises(CaptureError, match="beyond its input"):
        partition(made(Beyond))


class SometimesTied(nn.Module):
    """The first weight is used again at the end, on another rank, but not in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor, tied: bool = True) -> Tensor:
        h = self.layers[1](torch.tanh(self.layers[0](x)))
        return h @ self.layers[0].weight if tied else h


def test_a_copy_that_one_kind_of_call_does_not_train_is_sent_again() -> None:
    pins = {"layers.0": 0, "layers.1": 1}
    parallel = partition(made(SometimesTied), constraints=pins, optimizer=decaying)
    plain = Plain(made(SometimesTied), decaying)
    for tied in (True, False, True, False, False, True):
        loss, expected = (
            float(run(*batch(), tied=tied)) for run in (parallel.train_step, plain.step)
        )
        assert abs(loss - expected) < 1e-12
        plain.model.eval()
        for other in (tied, not tied):
            x = batch(seed=1)[0]
            torch.testing.assert_close(parallel(x, tied=other), plain.model(x, tied=other))
        plain.model.train()
    assert_same(parallel.state_dict(), plain.model.state_dict())


def test_inference_first() -> None:
    parallel, plain = partition(chain()), Plain(chain())
    x = batch()[0]
    torch.testing.assert_close(parallel(x), plain.model(x))
    train_both(parallel, plain, BATCHES)
    torch.testing.assert_close(parallel(x), plain.model(x))


def test_loading_part_of_a_state_leaves_the_rest_as_it_is() -> None:
    parallel = partition(chain())
    parallel.train_step(*batch())
    expected = {name: tensor.clone() for name, tensor in parallel.state_dict().items()}
    part = {"layers.0.weight": torch.ones(WIDTH, WIDTH, dtype=torch.float64)}
    parallel.load_state_dict(part, strict=False)
    assert_same(parallel.state_dict(), expected | part)


class Averaging(Two):
    """A buffer that is not part of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.mean.mul_(0.5).add_(h.detach().mean(0))
        return self.second(h) + self.mean


def test_loading_a_state_leaves_other_buffers_as_they_are() -> None:
    parallel, plain = partition(made(Averaging)), Plain(made(Averaging))
    train_both(parallel, plain, BATCHES)
    parallel.load_state_dict(plain.model.state_dict())
    train_both(parallel, plain, BATCHES)


def test_modules_that_change_their_mode_are_captured_again() -> None:
    class Normed(Two):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.norm(self.first(x)))

    model = made(Normed)
    parallel, plain = partition(model), Plain(made(Normed))
    train_both(parallel, plain, BATCHES, 1e-10)
    for changed in (model, plain.model):
        changed.norm.eval()
        changed.first.weight.requires_grad_(False)
    train_both(parallel, plain, BATCHES, 1e-10)


class Replacing(Two):
    """Assigns new tensors to buffers, without changing the old ones."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        self.count = self.count + 1
        return self.second(h - self.mean) / self.count


def test_buffers_that_are_replaced() -> None:
    parallel = partition(made(Replacing), check=True, constraints=PINS)
    train_both(parallel, Plain(made(Replacing)), BATCHES)
    assert parallel.state_dict()["count"] == 4


def test_a_buffer_that_is_replaced_by_another_shape_is_refused() -> None:
    class Growing(Two):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, x])
            return self.second(self.first(x))

    with pytest.raises(CaptureError, match="buffer seen of shape .1, 6. .* is replaced"):
        partition(made(Growing))
