"""Trace files of measured and of simulated steps, event by event."""

from __future__ import annotations

from typing import Any

__all__ = ["what_ranks_did"]


def what_ranks_did(events: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """What a trace says each rank did with which lane, however long it took; events of one thread
    do not overlap."""
    spans = [one for one in events if one["ph"] == "X"]
    for one in spans:
        for other in spans:
            if one is not other and (one["pid"], one["tid"]) == (other["pid"], other["tid"]):
                ends = one["ts"] + one["dur"] - 1e-3, other["ts"] + other["dur"] - 1e-3
                assert one["ts"] >= ends[1] or other["ts"] >= ends[0], (one, other)
    return sorted((one["pid"], one["cat"], one["name"]) for one in spans)
