"""Ids as runs: `0-2,5`."""

from __future__ import annotations

import re

__all__ = ["format_ranges", "parse_ranges"]

_MOST_IDS = 10_000_000


def format_ranges(ids: tuple[int, ...]) -> str:
    """Non-negative ids as runs: (0, 1, 2, 5) as `0-2,5`. The order is kept."""
    runs: list[tuple[int, int]] = []
    for number in ids:
        if runs and runs[-1][1] + 1 == number:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_ranges(text: str) -> tuple[int, ...]:
    """Inverse of `format_ranges`. Raises ValueError on malformed text."""
    ids: list[int] = []
    for run in text.split(",") if text else ():
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", run, re.ASCII)
        if match is None:
            raise ValueError(f"not a range of ids: {run!r} (expected e.g. 4 or 0-17)")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first + len(ids) > _MOST_IDS:
            raise ValueError(f"not a range of ids: {run!r}")
        ids.extend(range(first, last + 1))
    return tuple(ids)
