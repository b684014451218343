"""Table of ATen's random operators and their counter-based replacements.

`random_op("aten.native_dropout.default")(key, draw, *args, **kwargs)` computes what the operator
computes, differentiably where the operator is, with numbers hashed from (key, draw) instead of
drawn from a generator. Results are functional; in-place operators exist for the replay of eager
models only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiler.ir.errors import CaptureError
from . import random_layers as layers
from . import random_samples as samples

__all__ = ["RandomOp", "draws_inside", "num_draws", "random_op", "replacement"]

RandomOp = Callable[..., Any]

_PACKETS: dict[str, RandomOp] = {
    "alpha_dropout": layers.draw_alpha_dropout,
    "bernoulli": samples.draw_bernoulli,
    "dropout": layers.draw_dropout,
    "exponential": samples.draw_exponential,
    "feature_alpha_dropout": layers.draw_feature_alpha_dropout,
    "feature_dropout": layers.draw_feature_dropout,
    "gru": functools.partial(layers.draw_recurrent, torch.gru),
    "lstm": functools.partial(layers.draw_recurrent, torch.lstm),
    "multinomial": samples.draw_multinomial,
    "native_dropout": layers.draw_native_dropout,
    "normal": samples.draw_normal,
    "normal_functional": samples.draw_normal_like,
    "rand": samples.draw_rand,
    "rand_like": samples.draw_rand_like,
    "randint": samples.draw_randint,
    "randint_like": samples.draw_randint_like,
    "randn": samples.draw_randn,
    "randn_like": samples.draw_randn_like,
    "random": samples.draw_random,
    "randperm": samples.draw_randperm,
    "rnn_relu": functools.partial(layers.draw_recurrent, torch.rnn_relu),
    "rnn_tanh": functools.partial(layers.draw_recurrent, torch.rnn_tanh),
    "rrelu": layers.draw_rrelu,
    "rrelu_with_noise_functional": layers.draw_rrelu_with_noise,
    "scaled_dot_product_attention": layers.draw_attention,
    "uniform": samples.draw_uniform,
}
_DROPOUTS = frozenset(name for name in _PACKETS if name.endswith("dropout"))
_RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())


def random_op(name: str) -> RandomOp:
    """The replacement of `namespace.packet.overload`, called as `f(key, draw, *args, **kwargs)`.

    Raises:
        CaptureError: the operator draws random numbers in a way that has no replacement.
    """
    function = _PACKETS.get(name.split(".")[1])
    if function is None:
        raise CaptureError(
            f"{name} draws random numbers and has no counter-based replacement",
            ways_out=(
                f"write the model with one of: {', '.join(sorted(_PACKETS))}",
                "draw the numbers outside the model and pass them as an input",
            ),
        )
    return function


def draws_inside(packet: str) -> bool:
    """Whether the operator may draw, even if torch does not mark it (recurrent nets)."""
    return packet in _PACKETS


def num_draws(packet: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Ordinals that a call of `packet` uses up; 0: it is deterministic with these arguments."""
    if packet in _DROPOUTS:
        probability, train = args[1], args[2] if len(args) > 2 else kwargs.get("train", True)
        return int(train is not False and 0.0 < probability < 1.0)
    if packet == "scaled_dot_product_attention":
        probability = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
        return int(probability > 0.0)
    if packet in _RECURRENT:
        # (input, hidden, params, has_biases, num_layers, dropout, train, ...), or for packed
        # sequences (data, batch_sizes, hidden, params, has_biases, ...).
        tail = args[3:] if isinstance(args[3], bool) else args[4:]
        _, num_layers, dropout, train = tail[:4]
        return num_layers - 1 if train and dropout > 0.0 else 0
    if packet == "_cudnn_rnn":
        dropout, train = args[11:13]
        return int(train and dropout > 0.0)
    if packet.startswith("rrelu"):
        position = 3 if packet == "rrelu" else 4
        train = args[position] if len(args) > position else kwargs.get("training", False)
        return int(bool(train))
    return 1


def replacement(operator: torch._ops.OpOverload) -> RandomOp | None:
    """For the replay of eager models: replacement of a low-level operator, in-place ones included.

    None: the operator draws nothing. Raises CaptureError for one without a replacement.
    """
    packet = operator.overloadpacket.__name__
    if torch.Tag.nondeterministic_seeded not in operator.tags and packet not in _PACKETS:
        return None
    if packet == "rrelu_with_noise":
        return _rrelu_into_noise
    if packet.startswith("_scaled_dot_product") or packet in _RECURRENT:
        return None  # fused kernels: reached only where they draw nothing
    if packet == "_cudnn_rnn":
        return _refuse_cudnn
    if not packet.endswith("_"):
        return random_op(f"aten.{packet}.default")
    base = "normal_functional" if packet == "normal_" else packet[:-1]
    function = random_op(f"aten.{base}.default")
    # A dispatch mode does not see arguments that equal their defaults.
    defaults = (0.5,) if operator is torch.ops.aten.bernoulli_.float else ()

    def in_place(key: Tensor, draw: int, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor.copy_(function(key, draw, tensor, *(args or defaults), **kwargs))

    return in_place


def _refuse_cudnn(key: Tensor, draw: int, *args: Any) -> Tensor:
    raise CaptureError(
        "cuDNN's recurrent layers draw their dropout by themselves, out of reach of a replay",
        ways_out=("run the reference under torch.backends.cudnn.flags(enabled=False)",),
    )


def _rrelu_into_noise(
    key: Tensor, draw: int, tensor: Tensor, noise: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    result, slopes = layers.draw_rrelu_with_noise(key, draw, tensor, noise, *args, **kwargs)
    noise.copy_(slopes)
    return result
