"""What a rank holds when it holds the most, in words."""

from __future__ import annotations

import re

from ..cost_models.memory_curve import MemoryPeak
from .words import bytes_text

__all__ = ["peak_text"]

_WORK = {
    "F": "the forward",
    "B": "the backward",
    "I": "the input gradients",
    "W": "the weight gradients",
}
_ACTION = re.compile(r"([FBIW]) (\d+)\.(\d+)")


def peak_text(peak: MemoryPeak, bound_bytes: int | None = None) -> str:
    """`rank 1: 812.0 MiB during I 1.3 (the input gradients of microbatch 3 in stage 1): ...`.

    Args:
        bound_bytes: what the plan promises not to exceed.
    """
    parts = [
        ("parameters", peak.parameters_bytes),
        ("gradients", peak.gradients_bytes),
        ("states", peak.optimizer_bytes),
        ("saved", peak.saved_bytes),
        ("transients", peak.transients_bytes),
        ("messages", peak.messages_bytes),
    ]
    if bound_bytes is not None:
        parts.append(("margin to the bound", bound_bytes - peak.total_bytes))
    told = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts if size)
    return f"rank {peak.rank}: {bytes_text(peak.total_bytes)} during {_moment(peak.moment)}: {told}"


def _moment(name: str) -> str:
    found = _ACTION.match(name)
    if found is None:
        return name
    kind, stage, microbatch = found.groups()
    return f"{name} ({_WORK[kind]} of microbatch {microbatch} in stage {stage})"
