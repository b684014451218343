"""A picture of a simulated step for a terminal: one lane a rank, time from left to right."""

from __future__ import annotations

import string

from .simulator import Simulation, Span

__all__ = ["render_timeline"]

_LETTERS = {
    "F": string.digits,
    "B": string.ascii_lowercase,
    "I": string.ascii_lowercase,
    "W": string.ascii_uppercase,
}


def render_timeline(simulation: Simulation, width: int = 80) -> str:
    """Lanes of `width` characters: each shows what the rank does for most of that slice of time.

    Digits are forwards (last digit of the microbatch), small letters backwards or input
    gradients (a is microbatch 0), capitals weight gradients, `*` the optimizer, `=` gradient
    synchronisation, `.` idle.
    """
    ranks = sorted({span.rank for span in simulation.timeline})
    label = max((len(str(rank)) for rank in ranks), default=1)
    lines = [
        f"rank {rank:>{label}} |{_lane(simulation, rank, width)}| "
        f"{100 * _busy(simulation, rank):3.0f} % busy"
        for rank in ranks
    ]
    legend = "0-9 forward, a-z input gradient, A-Z weight gradient, * optimizer, = sync, . idle"
    return "\n".join([f"{_time(simulation.step_seconds)} a step; {legend}", *lines])


def _busy(simulation: Simulation, rank: int) -> float:
    ranks = sorted({span.rank for span in simulation.timeline})
    return simulation.busy_fraction[ranks.index(rank)]


def _lane(simulation: Simulation, rank: int, width: int) -> str:
    spans = [span for span in simulation.timeline if span.rank == rank]
    slice_seconds = simulation.step_seconds / width if simulation.step_seconds else 1.0
    shares: list[dict[str, float]] = [{} for _ in range(width)]
    for span in spans:
        first = int(span.begin_seconds / slice_seconds)
        last = min(int(span.end_seconds / slice_seconds), width - 1)
        for cell in range(first, last + 1):
            begin = max(span.begin_seconds, cell * slice_seconds)
            end = min(span.end_seconds, (cell + 1) * slice_seconds)
            share = shares[cell]
            share[_mark(span)] = share.get(_mark(span), 0.0) + max(end - begin, 0.0)
    return "".join(_majority(share, slice_seconds) for share in shares)


def _majority(share: dict[str, float], slice_seconds: float) -> str:
    idle = slice_seconds - sum(share.values())
    mark = max(share, key=lambda item: share[item], default=".")
    return mark if share and share[mark] >= idle else "."


def _mark(span: Span) -> str:
    letters = _LETTERS.get(span.kind)
    if letters is None:
        return {"optimizer": "*", "sync": "="}[span.kind]
    return letters[span.microbatch % len(letters)]


def _time(seconds: float) -> str:
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"
