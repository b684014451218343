"""Random streams that follow from (seed, step, microbatch, op), never from rank, plan or device.

`make_key` folds seed, step and microbatch into a key, `random_op` gives the counter-based
replacement of an ATen operator that draws random numbers (see `runtime/random_ops.py`), and
`ReplayRandomness` makes an ordinary eager model draw the very same numbers, which is how the
unpartitioned model becomes a reference for a partitioned run.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .random_bits import normal, uniform
from .random_ops import RandomOp, draws_inside, num_draws, random_op, replacement

__all__ = [
    "ReplayRandomness",
    "draws_inside",
    "make_key",
    "normal",
    "num_draws",
    "random_op",
    "uniform",
]

_WORD = (1 << 64) - 1


def make_key(seed: int, step: int, microbatch: int) -> Tensor:
    """Key of one microbatch's random streams: a 0-dim int64 CPU tensor in [0, 2**62).

    Step and microbatch are folded in one after the other by a 64-bit finaliser, so that keys of
    neighbouring steps and seeds have nothing in common.
    """
    state = 0x9E6C63D0876A3F35
    for word in (seed, step, microbatch):
        state = _scramble(state ^ (word & _WORD))
    return torch.tensor(state >> 2, dtype=torch.int64)


def _scramble(word: int) -> int:
    for shift, factor in ((32, 0xD6E8FEB86659FD93), (29, 0xA0761D6478BD642F)):
        word = ((word ^ (word >> shift)) * factor) & _WORD
    return word ^ (word >> 32)


class ReplayRandomness(TorchDispatchMode):
    """Under this mode an eager model draws the numbers of the captured graph.

    Random ops are numbered in the order in which the forward pass issues them, as capture numbers
    them. Activation checkpointing restores the state of torch's default generator before it
    recomputes; every draw therefore advances that generator by one real draw, and the generator's
    state identifies the ordinal: a state seen before is a recomputation and gets the same numbers.
    Run forward *and* backward under the mode, one microbatch per mode. The generator's state is
    put back on exit.

    Args:
        key: of the microbatch, from `make_key`.
    """

    def __init__(self, key: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._key = key
        self._ordinals: dict[bytes, int] = {}
        self._replacements: dict[object, RandomOp | None] = {}

    def __enter__(self) -> ReplayRandomness:
        self._state = torch.get_rng_state()
        # The fused attention kernels of CUDA draw by themselves, out of reach of a dispatch mode.
        self._attention = sdpa_kernel(SDPBackend.MATH) if torch.cuda.is_available() else None
        if self._attention is not None:
            self._attention.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if self._attention is not None:
            self._attention.__exit__(kind, error, trace)
        torch.set_rng_state(self._state)

    def __torch_dispatch__(
        self,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        try:
            function = self._replacements[func]
        except KeyError:
            function = self._replacements[func] = replacement(func)
        if function is None or not num_draws(func.overloadpacket.__name__, args, kwargs):
            return func(*args, **kwargs)
        return function(self._key, self._ordinal(), *args, **kwargs)

    def _ordinal(self) -> int:
        state = torch.get_rng_state().numpy().tobytes()
        ordinal = self._ordinals.setdefault(state, len(self._ordinals))
        torch.rand(())
        return ordinal
