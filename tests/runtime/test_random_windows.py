"""A part of a tensor draws the numbers that it has in the whole, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from cutset.runtime.random_bits import Window, bits, normal, uniform
from cutset.runtime.rng import make_key, random_op

KEY = make_key(5, 4, 3)
CPU = torch.device("cpu")
SHAPE = (5, 4, 6)
Call = Callable[[Tensor, Window | None], object]


def _windows(shape: tuple[int, ...]) -> Iterator[tuple[tuple[slice, ...], Window]]:
    """Uneven blocks that tile `shape`: its dims 0 and 1 cut in two."""
    cuts = [((0, size // 3), (size // 3, size)) for size in shape[:2]]
    for first, second in product(*cuts):
        ranges = [first, second, *((0, size) for size in shape[2:])]
        yield (
            tuple(slice(*item) for item in ranges),
            (shape, tuple(begin for begin, _ in ranges)),
        )


@st.composite
def _blocks(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    shape = draw(st.lists(st.integers(1, 6), max_size=4))
    offset = [draw(st.integers(0, size - 1)) for size in shape]
    part = [draw(st.integers(0, size - begin)) for size, begin in zip(shape, offset, strict=True)]
    return tuple(shape), tuple(offset), tuple(part)


@given(_blocks(), st.integers(0, 1))
def test_bits_of_any_block_are_those_of_the_whole(
    block: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], lane: int
) -> None:
    shape, offset, part = block
    whole = bits(KEY, 3, shape, CPU, lane)
    where = tuple(slice(b, b + n) for b, n in zip(offset, part, strict=True))
    assert torch.equal(bits(KEY, 3, part, CPU, lane, (shape, offset)), whole[where])


def test_indices_beyond_31_bits_tell_elements_apart() -> None:
    rows, columns = 2**12, 2**21
    block = bits(KEY, 0, (3, 5), CPU, window=((rows, columns), (2**11 - 1, columns - 5)))
    for row in range(3):
        begin = (2**11 - 1 + row) * columns + columns - 5
        line = bits(KEY, 0, (5,), CPU, window=((rows * columns,), (begin,)))
        assert torch.equal(block[row], line)
    low = bits(KEY, 0, (5,), CPU, window=((rows * columns,), (7,)))
    high = bits(KEY, 0, (5,), CPU, window=((rows * columns,), (7 + 2**31,)))
    assert not (low == high).any()


@pytest.mark.parametrize("sample", [uniform, normal])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_of_a_window(sample: Callable[..., Tensor], dtype: torch.dtype) -> None:
    whole = sample(KEY, 1, SHAPE, dtype=dtype)
    for where, window in _windows(SHAPE):
        part = sample(KEY, 1, whole[where].shape, dtype=dtype, window=window)
        assert torch.equal(part, whole[where])


def _of(name: str, *args: object) -> Call:
    return lambda x, window: random_op(name)(KEY, 2, x, *args, window=window)


def _sized(name: str, *bounds: object) -> Call:
    return lambda x, window: random_op(name)(KEY, 2, *bounds, list(x.shape), window=window)


CALLS: dict[str, Call] = {
    "dropout": _of("aten.dropout.default", 0.3, True),
    "native_dropout": _of("aten.native_dropout.default", 0.3, True),
    "feature_dropout": _of("aten.feature_dropout.default", 0.3, True),
    "alpha_dropout": _of("aten.alpha_dropout.default", 0.3, True),
    "feature_alpha_dropout": _of("aten.feature_alpha_dropout.default", 0.3, True),
    "rrelu": _of("aten.rrelu.default", 0.1, 0.4, True),
    "bernoulli": _of("aten.bernoulli.default"),
    "bernoulli.p": _of("aten.bernoulli.p", 0.3),
    "uniform": _of("aten.uniform.default", 1.0, 2.0),
    "exponential": _of("aten.exponential.default", 2.0),
    "normal_functional": _of("aten.normal_functional.default", 1.0, 2.0),
    "normal": _of("aten.normal.Tensor_float", 2.0),
    "random": _of("aten.random.from", 3, 90),
    "rand_like": _of("aten.rand_like.default"),
    "randn_like": _of("aten.randn_like.default"),
    "randint_like": _of("aten.randint_like.default", 90),
    "rand": _sized("aten.rand.default"),
    "randn": _sized("aten.randn.default"),
    "randint": _sized("aten.randint.low", 3, 90),
    "normal.size": _sized("aten.normal.float_float", 1.0, 2.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_on_a_part_draw_its_share(name: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(SHAPE) - (0.5 if name == "rrelu" else 0.0)
    whole = CALLS[name](x, None)
    for where, window in _windows(SHAPE):
        part = CALLS[name](x[where], window)
        pairs = zip(part, whole, strict=True) if isinstance(part, tuple) else [(part, whole)]
        assert all(torch.equal(ours, theirs[where]) for ours, theirs in pairs)


def test_attention_on_some_rows_and_heads_draws_their_mask() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 4, 3, 8, dtype=torch.float64) for _ in range(3))
    attend = random_op("aten.scaled_dot_product_attention.default")
    whole = attend(KEY, 2, q, k, v, None, 0.4, True)
    for where, _ in _windows(SHAPE[:2]):
        window = (5, 4, 3, 3), (where[0].start, where[1].start, 0, 0)
        part = attend(KEY, 2, q[where], k[where], v[where], None, 0.4, True, window=window)
        assert torch.equal(part, whole[where])


def test_recurrent_layers_on_some_rows_draw_their_mask() -> None:
    torch.manual_seed(0)
    net = torch.nn.LSTM(4, 6, 3, batch_first=True, dropout=0.5).double()
    x, state = torch.randn(5, 7, 4).double(), torch.randn(3, 5, 6).double()

    def run(rows: slice, window: Window | None) -> Tensor:
        part = state[:, rows].contiguous()
        args = [part, part], net._flat_weights, True, 3, 0.5, True, False, True
        result: Tensor = random_op("aten.lstm.input")(KEY, 0, x[rows], *args, window=window)[0]
        return result

    whole = run(slice(0, 5), None)
    part = run(slice(2, 5), ((7, 5, 6), (0, 2, 0)))
    assert (part - whole[2:]).abs().max() < 1e-14


def test_windows_trace() -> None:
    def step(key: Tensor, x: Tensor) -> Tensor:
        dropout = random_op("aten.native_dropout.default")
        result: Tensor = dropout(key, 7, x, 0.3, True, window=[[9, 4], [6, 1]])[0]
        return result

    x = torch.randn(3, 2)
    traced = make_fx(step)(make_key(0, 0, 0), x)
    assert torch.equal(traced(KEY, x), step(KEY, x))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert not any(target._schema.is_mutable for target in calls)
