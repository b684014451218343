from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cutset.compiler.ir.errors import CaptureError
from cutset.runtime.random_bits import bits, chance
from cutset.runtime.rng import (
    ReplayRandomness,
    make_key,
    normal,
    num_draws,
    random_op,
    uniform,
)

KEY = make_key(0, 0, 0)
CPU = torch.device("cpu")
COUNT = 1 << 16
EXPECTED = [-1225569641, -1332091556, 691197819, -1655654938]


def test_key_depends_on_each_of_its_parts() -> None:
    words = [(s, t, m) for s in (0, 1, 2**40) for t in (0, 1, 7) for m in (0, 1, 7)]
    keys = {int(make_key(*word)) for word in words}
    assert len(keys) == len(words)
    assert all(0 <= key < 2**62 for key in keys)


@given(st.integers(), st.integers(0, 2**40), st.integers(0, 2**20))
def test_key_is_a_function_of_its_parts(seed: int, step: int, microbatch: int) -> None:
    assert torch.equal(make_key(seed, step, microbatch), make_key(seed, step, microbatch))


def test_numbers_are_these_and_stay_these() -> None:
    found = bits(make_key(1, 2, 3), 4, (4,), CPU).tolist()
    assert found == EXPECTED, "changing the stream changes what every seed trains"


@pytest.mark.parametrize("other", ["draw", "lane", "step", "index"])
def test_related_streams_differ_in_half_of_all_bits(other: str) -> None:
    first = bits(KEY, 3, (COUNT,), CPU)
    second = {
        "draw": lambda: bits(KEY, 4, (COUNT,), CPU),
        "lane": lambda: bits(KEY, 3, (COUNT,), CPU, lane=1),
        "step": lambda: bits(make_key(0, 1, 0), 3, (COUNT,), CPU),
        "index": lambda: first.roll(1),
    }[other]()
    flips = first ^ second
    share = torch.stack([((flips >> bit) & 1).double().mean() for bit in range(32)])
    assert (share - 0.5).abs().max() < 6 * 0.5 / math.sqrt(COUNT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_uniform_numbers_fill_the_unit_interval(dtype: torch.dtype) -> None:
    numbers = uniform(KEY, 0, (COUNT,), dtype=dtype)
    assert numbers.dtype == dtype and numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers.float(), 64, 0, 1)
    chi_square = ((counts - COUNT / 64) ** 2 / (COUNT / 64)).sum()
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)


def test_rows_are_uncorrelated() -> None:
    rows = uniform(KEY, 5, (256, 256))
    correlation = torch.corrcoef(rows) - torch.eye(256)
    assert correlation.abs().max() < 6 / math.sqrt(256)
    assert (correlation.std() * math.sqrt(256) - 1).abs() < 0.05


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    numbers = normal(KEY, 1, (COUNT,), dtype=torch.float64)
    moments = [float((numbers**power).mean()) for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.08)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_chance_has_its_probability(probability: float) -> None:
    share = float(chance(KEY, 2, (COUNT,), CPU, probability).double().mean())
    assert share == pytest.approx(probability, abs=0.01 if 0 < probability < 1 else 0)


def test_dropout_scales_what_it_keeps_and_its_gradient() -> None:
    x = torch.randn(64, 64, dtype=torch.float64, requires_grad=True)
    y, mask = random_op("aten.native_dropout.default")(KEY, 0, x, 0.25, True)
    assert torch.allclose(y, x * mask / 0.75)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, mask.double() / 0.75)
    assert 0.7 < float(mask.double().mean()) < 0.8


def test_draws_of_a_tensor_do_not_depend_on_its_strides() -> None:
    x = torch.ones(8, 4)
    dropout = random_op("aten.dropout.default")
    assert torch.equal(dropout(KEY, 0, x, 0.5, True), dropout(KEY, 0, x.t().clone().t(), 0.5, True))


CALLS: dict[str, tuple[Callable[[], tuple[object, ...]], tuple[float, float] | None]] = {
    "aten.rand.default": (lambda: ([COUNT],), (0.5, 1 / 12)),
    "aten.randn_like.default": (lambda: (torch.empty(COUNT),), (0.0, 1.0)),
    "aten.bernoulli.p": (lambda: (torch.empty(COUNT), 0.3), (0.3, 0.21)),
    "aten.bernoulli.default": (lambda: (torch.full((COUNT,), 0.3),), (0.3, 0.21)),
    "aten.exponential.default": (lambda: (torch.empty(COUNT), 2.0), (0.5, 0.25)),
    "aten.uniform.default": (lambda: (torch.empty(COUNT), 2.0, 4.0), (3.0, 1 / 3)),
    "aten.normal_functional.default": (lambda: (torch.empty(COUNT), 1.0, 2.0), (1.0, 4.0)),
    "aten.normal.Tensor_float": (lambda: (torch.ones(COUNT), 2.0), (1.0, 4.0)),
    "aten.randint.low": (lambda: (2, 12, [COUNT]), (6.5, 99 / 12)),
}


@pytest.mark.parametrize("name", CALLS)
def test_samples_have_mean_and_variance_of_their_distribution(name: str) -> None:
    args, moments = CALLS[name]
    sample = random_op(name)(KEY, 0, *args()).double()
    assert moments is not None and sample.shape == (COUNT,)
    assert float(sample.mean()) == pytest.approx(moments[0], abs=5 * math.sqrt(moments[1] / COUNT))
    assert float(sample.var()) == pytest.approx(moments[1], rel=0.05)


def test_permutation_is_one() -> None:
    order = random_op("aten.randperm.default")(KEY, 0, 1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(order, torch.arange(1000))


@pytest.mark.parametrize("replacement", [True, False])
def test_multinomial_samples_by_weight(replacement: bool) -> None:
    weights = torch.tensor([1.0, 2.0, 0.0, 5.0]).repeat(4096, 1)
    found = random_op("aten.multinomial.default")(KEY, 0, weights, 1, replacement)
    shares = torch.bincount(found.flatten(), minlength=4) / 4096
    assert shares.tolist() == pytest.approx([0.125, 0.25, 0.0, 0.625], abs=0.03)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_with_dropout_averages_to_attention(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 6, 8, dtype=torch.float64) for heads in (4, 2, 2))
    call = random_op("aten.scaled_dot_product_attention.default")
    draws = [call(KEY, draw, q, k, v, None, 0.1, causal, enable_gqa=True) for draw in range(400)]
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert (torch.stack(draws).mean(0) - exact).abs().max() < 0.1


def test_op_without_replacement_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"aten\.poisson\.default .* no counter-based"):
        random_op("aten.poisson.default")


def test_deterministic_calls_use_up_no_draw() -> None:
    x = torch.ones(2)
    assert num_draws("dropout", (x, 0.1, False), {}) == 0
    assert num_draws("dropout", (x, 0.0, True), {}) == 0
    assert num_draws("native_dropout", (x, 0.1, True), {}) == 1
    assert num_draws("scaled_dot_product_attention", (x, x, x), {"is_causal": True}) == 0
    assert num_draws("lstm", (x, [x], [x], True, 3, 0.5, True, False, False), {}) == 2


def test_streams_trace_to_functional_graphs() -> None:
    def step(key: Tensor, x: Tensor) -> Tensor:
        return random_op("aten.native_dropout.default")(key, 7, x, 0.3, True)[0]

    x = torch.randn(5, 3)
    traced = make_fx(step)(KEY, x)
    other = make_key(9, 9, 9)
    assert torch.equal(traced(other, x), step(other, x))
    assert not torch.equal(traced(other, x), traced(KEY, x))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert not any(target._schema.is_mutable for target in calls)


class _Net(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            run = self._layer
            x = checkpoint(run, layer, x, use_reentrant=False) if self.recompute else run(layer, x)
        return x + torch.randn_like(x)

    def _layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        return F.dropout(layer(x), 0.4).sin()


def _gradients(net: nn.Module, x: Tensor, key: Tensor) -> list[Tensor]:
    with ReplayRandomness(key):
        return list(torch.autograd.grad(net(x).square().sum(), list(net.parameters())))


def test_recomputation_replays_its_draws() -> None:
    torch.manual_seed(0)
    plain, recomputing = _Net(False), _Net(True)
    recomputing.load_state_dict(plain.state_dict())
    x = torch.randn(4, 8)
    for ours, theirs in zip(
        _gradients(plain, x, KEY), _gradients(recomputing, x, KEY), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_replay_is_repeatable_and_leaves_the_generator_alone() -> None:
    net, x = _Net(False), torch.randn(4, 8)
    state = torch.get_rng_state()
    first = _gradients(net, x, KEY)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again, other = _gradients(net, x, KEY), _gradients(net, x, make_key(0, 1, 0))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_replayed_ops_are_the_replacements() -> None:
    x = torch.randn(4, 6)
    with ReplayRandomness(KEY):
        dropped = F.dropout(x, 0.5)
        filled = torch.empty(3).uniform_(2.0, 3.0)
        slopes = F.rrelu(x, 0.1, 0.3, training=True)
    assert torch.equal(dropped, random_op("aten.dropout.default")(KEY, 0, x, 0.5, True))
    expected = random_op("aten.uniform.default")(KEY, 1, torch.empty(3), 2.0, 3.0)
    assert torch.equal(filled, expected)
    assert torch.equal(slopes, random_op("aten.rrelu.default")(KEY, 2, x, 0.1, 0.3, True))


def test_recurrent_layers_draw_as_torch_does() -> None:
    torch.manual_seed(0)
    net = nn.LSTM(4, 6, 3, batch_first=True, dropout=0.5, bidirectional=True).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    with ReplayRandomness(KEY):
        expected, (hidden, cell) = net(x)
    zeros = torch.zeros(6, 2, 6, dtype=torch.float64)
    call = random_op("aten.lstm.input")
    found = call(KEY, 0, x, [zeros, zeros], net._flat_weights, True, 3, 0.5, True, True, True)
    for ours, theirs in zip(found, (expected, hidden, cell), strict=True):
        assert (ours - theirs).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_replay_equals_replacements_bit_for_bit_in_every_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8).to(dtype) for _ in range(3))
    with ReplayRandomness(KEY):
        dropped = F.dropout(q, 0.1)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)
    assert torch.equal(dropped, random_op("aten.native_dropout.default")(KEY, 0, q, 0.1, True)[0])
    attention = random_op("aten.scaled_dot_product_attention.default")
    ours = attention(KEY, 1, q, k, v, None, 0.1, True)
    assert ours.dtype == dtype
    assert (ours - attended).abs().max() <= 2 * torch.finfo(dtype).eps
