"""Rules of operators that draw random numbers: a rank draws those of its part of the whole tensor.

The emitted operator gets `window=(shape of the whole result, where the part begins)`, so numbers
follow from the seed and never from the layout. A whole result is drawn alike by all ranks, whose
terms of a sum are thus dropped together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...ir.mesh import Partial, Placement, Replicate, Shard
from ..labels import call_with
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView
from .common import broadcast, for_all, is_sharded, linear, over, strategy

__all__ = ["RANDOM"]


def _window(lowering: Lowering) -> dict[str, object]:
    """The argument that makes a random operator draw the local part of its first result; nothing
    if the result is whole or the operator draws nothing."""
    if lowering.node.random_draw is None or not is_sharded(lowering):
        return {}
    return {"window": (lowering.view.output().shape, lowering.output_offset())}


def _lower_drawn(lowering: Lowering) -> Sequence[Ref]:
    return call_with(lowering, _window(lowering))


def _dropout(view: OpView, parts: int) -> Iterator[OpStrategy]:
    yield from broadcast(view, parts)
    mask: tuple[Placement, ...] = (Replicate(),) * (len(view.outputs) - 1)
    yield from linear(view, [0], (Partial(), *mask))


def _like(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Of the operand nothing but type and shape is read, or its elements one by one."""
    yield from broadcast(view, parts)
    if view.packet.endswith("_like"):
        yield from strategy(view, [(0, Partial())], Replicate())


def _sized(view: OpView, parts: int) -> Iterator[OpStrategy]:
    for dim in over(view.output(), parts):
        yield from strategy(view, [], Shard(dim))


def _lower_sized(lowering: Lowering) -> Sequence[Ref]:
    return call_with(lowering, {"size": lowering.output_type().shape, **_window(lowering)})


def _normal(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Of means and deviations that are tensors, or of a size."""
    yield from broadcast(view, parts) if view.inputs else _sized(view, parts)


def _lower_normal(lowering: Lowering) -> Sequence[Ref]:
    return _lower_drawn(lowering) if lowering.inputs else _lower_sized(lowering)


RANDOM: Table = {
    **for_all("dropout native_dropout feature_dropout", Rule(_dropout, _lower_drawn)),
    **for_all(
        "alpha_dropout feature_alpha_dropout rand_like randn_like randint_like bernoulli uniform "
        "exponential normal_functional random rrelu rrelu_with_noise_functional",
        Rule(_like, _lower_drawn),
    ),
    **for_all("rand randn randint", Rule(_sized, _lower_sized)),
    "normal": Rule(_normal, _lower_normal),
}
