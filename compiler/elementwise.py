"""Whether an optimizer updates every element from that element's own gradients and states.

Only then is the update of a part of a parameter that part of the update. No class says so of
itself, so it is tried: a matrix and its rows, and its columns, must go the same way. (Adafactor
factors second moments, Muon makes a matrix orthogonal, LAMB scales by norms: all go another way.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .ir.errors import UsageError
from .ir.graph import ValueKind
from .ir.program import Program

__all__ = ["check_elementwise", "first_part"]

_SHAPE = (64, 72)  # more elements than a block of the optimizers that quantize states in blocks
_STEPS = 3
_ROUNDING = 1e-12


def first_part(programs: tuple[Program, ...]) -> str | None:
    """A trained parameter that a rank holds or updates only in part, if there is one."""
    for program in programs:
        trained = {
            value.origin
            for stage in program.stages
            for value in stage.graph.values_of(ValueKind.PARAMETER)
            if value.requires_grad
        }
        for shard in (*program.shards, *program.updates):
            if shard.name in trained:
                return shard.name
    return None


def check_elementwise(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Refuse an optimizer that cannot update parameter `name` in parts.

    Raises:
        UsageError: it is not elementwise, or fails on a matrix.
    """
    kind = type(optimizer)
    for group in optimizer.param_groups:
        options = {
            key: _plain(key, value)
            for key, value in group.items()
            if key not in ("params", "param_names")
        }
        try:
            difference = _difference(kind, options)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise _refusal(kind, name, f"it fails on a matrix: {error}") from error
        if not difference <= _ROUNDING:
            reason = "how it updates one element depends on others of the same parameter"
            raise _refusal(kind, name, reason)


def _plain(key: str, value: Any) -> Any:
    """A hyperparameter as it is on any device: which kernel computes does not matter here."""
    if key in ("capturable", "fused"):
        return False
    return float(value) if isinstance(value, Tensor) else value


def _refusal(kind: type, name: str, reason: str) -> UsageError:
    return UsageError(
        f"{kind.__name__} cannot train {name!r} over ranks that hold or update parts of it: "
        f"{reason}",
        where=f"optimizer {kind.__name__}",
        ways_out=(
            "use an optimizer that works element by element, such as AdamW or SGD",
            "keep parameters whole: pass mesh='pipeline=N', or mesh='data=N' and zero=0",
        ),
    )


def _difference(kind: Any, options: Mapping[str, Any]) -> float:
    """How far apart a matrix and its parts are after a few steps, relative to the way they went."""
    source = torch.Generator().manual_seed(0)
    start = torch.randn(_SHAPE, generator=source, dtype=torch.float64)
    # rows and columns of other sizes, as what works with norms sees norms then
    scales = torch.linspace(0.1, 2.0, start.numel(), dtype=torch.float64).view(_SHAPE)
    gradients = [
        torch.randn(_SHAPE, generator=source, dtype=torch.float64) * scales for _ in range(_STEPS)
    ]
    whole = _trained(kind, options, start, gradients)
    way = float((whole - start).abs().max()) or 1.0
    worst = 0.0
    for dim in (0, 1):
        starts = start.chunk(2, dim)
        pieces = [[gradient.chunk(2, dim)[i] for gradient in gradients] for i in range(2)]
        parts = [_trained(kind, options, *piece) for piece in zip(starts, pieces, strict=True)]
        worst = max(worst, float((torch.cat(parts, dim) - whole).abs().max()) / way)
    return worst


def _trained(
    kind: Any, options: Mapping[str, Any], start: Tensor, gradients: list[Tensor]
) -> Tensor:
    parameter = torch.nn.Parameter(start.clone(memory_format=torch.contiguous_format))
    optimizer = kind([{"params": [parameter], **options}])
    for gradient in gradients:
        parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
        optimizer.step()
    return parameter.detach()
