"""Memory that collectives take beside the tensors that they read and make.

It mirrors `runtime/parts.py`, `runtime/torch_messages.py` (gloo, backend `cpu`) and
`runtime/torch_collectives.py` (NCCL, which pads parts to the largest). `part` is the largest part
here.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "bucket_gather_bytes",
    "bucket_scatter_bytes",
    "exchange_bytes",
    "gather_bytes",
    "most_under_way",
    "scatter_bytes",
]


def bucket_gather_bytes(part: float, count: int) -> float:
    """An all-gather of a bucket: the own part laid down flat, and what arrives."""
    return part + count * part


def bucket_scatter_bytes(whole: float, part: float, count: int, backend: str) -> float:
    """A reduce-scatter of a bucket: laid down flat, as it arrives, the sum."""
    arriving = count * part
    if backend == "cpu":
        return whole + arriving + part
    padded = arriving if arriving > whole else 0.0
    return whole + padded + part


def gather_bytes(part: float, whole: float, count: int, dim: int, backend: str) -> float:
    """An all-gather inside a stage, from `part` to `whole` along `dim`: the operand as it is sent;
    unless parts arrive where they belong, what arrives."""
    if backend == "cpu":
        return part if dim == 0 else whole
    arriving = count * part
    return part if dim == 0 and arriving == whole else part + arriving


def scatter_bytes(whole: float, part: float, count: int, backend: str) -> float:
    """A reduce-scatter inside a stage, from `whole` to `part`: as it is sent, as it arrives."""
    arriving = count * part
    return whole + arriving if backend == "cpu" else arriving


def exchange_bytes(sent: float, received: float, backend: str) -> float:
    """An all-to-all inside a stage; on the CPU what was sent is freed before the result is laid
    out."""
    return max(sent, received) if backend == "cpu" else sent + received


def most_under_way(messages: Iterable[tuple[float, float]], limit: float) -> float:
    """Most bytes of buffers of collectives of which `limit` bytes travel at once.

    Args:
        messages: bytes that travel and bytes of buffers, of every tensor.
        limit: of the first; a single tensor may be larger.
    """
    present = [entry for entry in messages if entry[0] > 0]
    room = max([limit, *(size for size, _ in present)])
    total = 0.0
    for size, buffers in sorted(present, key=lambda entry: entry[1] / entry[0], reverse=True):
        share = min(1.0, room / size)
        total += share * buffers
        room -= share * size
    return total
