"""How a partitioned model may be called: losses, containers of inputs and outputs, other sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput  # imported in a trace, it is no tree

from cutset.compiler.ir.errors import CaptureError, UsageError

from .partitioned import WIDTH, Chain, Plain, assert_same, batch, chain, partition, train_both

X, Y = batch()


class Wrapped(nn.Module):
    """A chain, and what a subclass makes of its result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.chain = Chain()
        self.double()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


# -- losses ------------------------------------------------------------------------------------


def _one(output: Tensor) -> Tensor:
    return output.square().mean()


def _three(output: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return F.mse_loss(output, first) + F.l1_loss(output, second)


def _with_option(output: Tensor, target: Tensor, scale: float = 2.0) -> Tensor:
    return scale * F.mse_loss(output, target)


@pytest.mark.parametrize(
    ("loss_fn", "inputs"),
    [
        (_one, (X,)),
        (_three, (X, Y, X + Y)),
        (_with_option, (X, Y)),
        (nn.SmoothL1Loss(), (X, Y)),
        (lambda output, target: (output - target).abs().mean(), (X, Y)),
    ],
    ids=["output only", "two targets", "an option", "a module", "a lambda"],
)
def test_loss_functions(loss_fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    parallel = partition(chain(), *inputs, loss_fn=loss_fn)
    train_both(parallel, Plain(chain(), loss_fn=loss_fn), [inputs] * 2)


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss, out: loss,
        lambda loss, out: (loss, out),
        lambda loss, out: {"logits": out, "loss": loss},
        lambda loss, out: CausalLMOutput(loss=loss, logits=out),
    ],
    ids=["the loss", "a tuple", "a dict", "a ModelOutput"],
)
def test_models_that_return_their_loss(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    class Model(Wrapped):
        def forward(self, x: Tensor, target: Tensor) -> Any:
            out = self.chain(x)
            return wrap(F.mse_loss(out, target), out)

    parallel = partition(Model(), X, Y, loss_fn=None)
    train_both(parallel, Plain(Model(), loss_fn=None), [(X, Y)] * 2)
    plain = Model()
    plain.load_state_dict(parallel.state_dict())
    with torch.no_grad():
        expected = plain.eval()(X, Y)
    found = parallel(X, Y)
    assert type(found) is type(expected)
    if isinstance(found, tuple | dict):
        pairs = zip(
            *(list(o.values()) if isinstance(o, dict) else o for o in (found, expected)),
            strict=True,
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_model_without_loss_is_refused_with_ways_out() -> None:
    with pytest.raises(CaptureError, match="no loss to train on") as caught:
        partition(chain(), X, loss_fn=None)
    assert any("loss_fn" in way for way in caught.value.ways_out)


# -- containers of inputs and outputs ----------------------------------------------------------


class Nested(Wrapped):
    """Reads a dict of lists and a flag; returns a nest of tensors and constants."""

    def forward(
        self, parts: dict[str, Any], *, shift: Tensor, negate: bool, power: float = 1.0
    ) -> Any:
        first, (second, third) = parts["first"], parts["rest"]
        out = self.chain(first + second * third)
        out = -out if negate else out
        return {"out": (out + shift, [out.sum(-1), None]), "power": power, "mean": out.mean()}


def _nested_call(rows: int = 4) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, y = batch(rows)
    return ({"first": x, "rest": [y, x + y]},), {
        "shift": torch.ones(WIDTH).double(),
        "negate": True,
    }


def _nested_loss(result: Any) -> Tensor:
    return result["out"][0].square().mean() + result["out"][1][0].mean()


def test_nested_inputs_and_keywords_train_exactly() -> None:
    args, named = _nested_call()
    parallel = partition(Nested(), *args, example_kwargs=named, loss_fn=_nested_loss)
    plain = Plain(Nested(), loss_fn=_nested_loss)
    for _ in range(2):
        loss = float(parallel.train_step(*args, **named))
        assert loss == pytest.approx(plain.step(*args, **named), rel=1e-12)
    assert_same(parallel.state_dict(), plain.model.state_dict())


def test_nested_outputs_come_back_in_their_structure() -> None:
    args, named = _nested_call()
    model = Nested().eval()
    parallel = partition(model, *args, example_kwargs=named, loss_fn=None, mode="infer")
    with torch.no_grad():
        expected = model(*args, **named)
    found = parallel(*args, **named)
    torch.testing.assert_close(found["out"][0], expected["out"][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["out"][1][0], expected["out"][1][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["mean"], expected["mean"], rtol=1e-12, atol=1e-12)
    assert found["out"][1][1] is None
    assert found["power"] == 1.0
    assert isinstance(found["out"], tuple)


def test_another_constant_is_another_graph() -> None:
    args, named = _nested_call()
    model = Nested().eval()
    parallel = partition(model, *args, example_kwargs=named, loss_fn=None, mode="infer")
    for negate in (True, False):
        call = named | {"negate": negate}
        with torch.no_grad():
            expected = model(*args, **call)["out"][0]
        found = parallel(*args, **call)["out"][0]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_keywords_may_come_in_any_order_but_not_be_missing() -> None:
    args, named = _nested_call()
    parallel = partition(Nested().eval(), *args, example_kwargs=named, loss_fn=None, mode="infer")
    expected = parallel(*args, **named)["mean"]
    assert torch.equal(parallel(*args, **dict(reversed(named.items())))["mean"], expected)
    with pytest.raises((UsageError, CaptureError), match="shift"):
        parallel(*args, negate=True)


def test_an_object_among_the_inputs_is_refused_by_its_type() -> None:
    with pytest.raises(UsageError, match="Generator"):
        partition(chain(), X, torch.Generator(), loss_fn=None)


# -- constants made inside the model -----------------------------------------------------------


class Positions(Wrapped):
    """Constants that depend on the length: they differ between calls of other lengths."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        table = torch.tensor([float(length - i) for i in range(length)], dtype=x.dtype)
        return self.chain(x * table[None, :, None]) + torch.tensor([length], dtype=x.dtype)


def test_constants_of_another_length_are_not_mixed_up() -> None:
    source = torch.Generator().manual_seed(5)
    long, short = (
        torch.randn(4, length, WIDTH, generator=source, dtype=torch.float64) for length in (5, 3)
    )
    parallel = partition(Positions(), long, loss_fn=_one)
    plain = Plain(Positions(), loss_fn=_one)
    train_both(parallel, plain, [(long,), (short,), (long,)])


# -- other sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "microbatch"), [(2, 2), (3, 1), (1, 1), (8, 2)])
def test_a_batch_of_another_size_is_captured_once_and_exact(rows: int, microbatch: int) -> None:
    parallel, plain = partition(chain(0.2)), Plain(chain(0.2))
    train_both(parallel, plain, [batch()])
    plain.rows = microbatch
    train_both(parallel, plain, [batch(rows), batch(rows, seed=2)])
    plain.rows = 2
    train_both(parallel, plain, [batch()])
    assert len(parallel._variants) == 2


class Normed(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.chain(x))


def test_a_last_batch_whose_microbatches_get_too_small_is_refused_with_the_size() -> None:
    parallel = partition(Normed())
    with pytest.raises(CaptureError, match="3 rows, run as 3 microbatches of 1 where") as caught:
        parallel.train_step(*batch(3))
    assert caught.value.ways_out[0] == "pass batches of a multiple of 2 rows"
    parallel.train_step(*batch(2))


def test_strides_of_the_inputs_do_not_matter() -> None:
    class Flat(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            return self.chain(x.view(-1, WIDTH))

    parallel, plain = partition(Flat(), X, Y), Plain(Flat())
    train_both(parallel, plain, [(X, Y)])
    strided = X.T.contiguous().T, Y
    loss = float(parallel.train_step(*strided))
    assert loss == pytest.approx(plain.step(X, Y), rel=1e-12)
    assert len(parallel._variants) == 1


# -- parameters that do not train --------------------------------------------------------------


class Partly(Wrapped):
    """A frozen layer and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2).double()
        for parameter in self.chain.layers[0].parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x)


def test_frozen_and_unused_parameters_stay_as_they_are() -> None:
    model = Partly()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parallel = partition(model, keep_gradients=True)
    reference = Partly()
    reference.load_state_dict(before)
    plain = Plain(reference)
    train_both(parallel, plain, [(X, Y)] * 2)
    still = {"chain.layers.0.weight", "chain.layers.0.bias", "unused.weight", "unused.bias"}
    assert set(parallel.gradients()) == set(before) - still
    state = parallel.state_dict()
    for name in before:
        assert torch.equal(state[name], before[name]) == (name in still), name


# -- precision ---------------------------------------------------------------------------------


def test_bfloat16_stays_close_to_the_unpartitioned_bfloat16_model() -> None:
    model = chain(dtype=torch.bfloat16)
    inputs = tuple(tensor.bfloat16() for tensor in batch())
    make = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    parallel = partition(model, *inputs, optimizer=make)
    plain = Plain(model, make)
    for _ in range(2):
        loss, expected = float(parallel.train_step(*inputs)), plain.step(*inputs)
        assert loss == pytest.approx(expected, rel=2e-2)
    assert_same(parallel.state_dict(), plain.model.state_dict(), 2e-2)
    found = parallel(inputs[0])
    assert found.dtype is torch.bfloat16


@pytest.mark.slow
def test_compiled_stages_train_like_eager_ones() -> None:
    parallel = partition(chain(0.2), compile=True)
    train_both(parallel, Plain(chain(0.2)), [(X, Y)] * 2, 1e-10)


def test_a_batch_without_rows_is_refused() -> None:
    parallel = partition(chain())
    for call in (lambda: parallel.train_step(X[:0], Y[:0]), lambda: parallel(X[:0])):
        with pytest.raises(UsageError, match=r"the batch has no rows: .* \(0, 6\)"):
            call()
    with pytest.raises(UsageError, match="the batch has no rows"):
        partition(chain(), X[:0], Y[:0])
    train_both(parallel, Plain(chain()), [(X, Y)])
