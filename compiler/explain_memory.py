"""What ranks hold when they hold the most, in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict

from ..cost_models.memory_curve import MemoryPeak
from .ir.plan import Plan
from .ir.program import Program
from .simulated import simulated
from .words import bytes_text

__all__ = ["peak_text", "peaks_json", "peaks_text"]

_MOST_RANKS = 8

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


def peaks_text(plan: Plan, programs: Sequence[Program]) -> str:
    """The peak of each rank, the fullest first; empty if it is not known."""
    peaks = sorted(_peaks(plan, programs), key=lambda peak: -peak.total_bytes)
    if not peaks:
        return ""
    memory = plan.prediction.memory if plan.prediction is not None else ()
    bounds = {entry.device: entry.total_bytes for entry in memory}
    lines = [f"  {peak_text(peak, bounds.get(peak.rank))}" for peak in peaks[:_MOST_RANKS]]
    if len(peaks) > _MOST_RANKS:
        lines.append(f"  ... and {len(peaks) - _MOST_RANKS} more ranks")
    return "\n".join(["memory at its fullest", *lines])


def peaks_json(plan: Plan, programs: Sequence[Program]) -> list[dict[str, object]] | None:
    """The same as plain data, in order of ranks; None if it is not known."""
    peaks = _peaks(plan, programs)
    return [{**asdict(peak), "total_bytes": peak.total_bytes} for peak in peaks] or None


def _peaks(plan: Plan, programs: Sequence[Program]) -> tuple[MemoryPeak, ...]:
    found = simulated(plan, programs)
    return found.peaks if found is not None else ()


def _moment(name: str) -> str:
    found = _ACTION.match(name)
    if found is None:
        return name
    kind, stage, microbatch = found.groups()
    return f"{name} ({_WORK[kind]} of microbatch {microbatch} in stage {stage})"
