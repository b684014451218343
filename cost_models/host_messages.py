"""What messages take of the thread that computes, where that is the CPU itself.

Gloo sends from the thread that asks for it: the message is copied into a socket, at the bandwidth
of the link, before anything else goes on. Its all-reduces run in threads of their own. All other
collectives are messages of each rank to each other (`runtime/torch_messages.py`), and a rank copies
its own part and adds up what it receives; small ones
take its thread no longer than it takes to ask for them. What a program starts travels in buckets
(`runtime/parts.py`): tensors are laid down before and copied out after. CUDA devices do all of this
beside the kernels.

With n bytes of the whole tensor and p ranks, bytes moved in memory and through sockets:

                    lay down   own part   sockets         add up                  copy out
    all_reduce      2 n                                                           2 n
    reduce_scatter  2 n        2 n / p    n (p - 1) / p   2 n / p + 3 n (p - 1) / p   2 n / p
    all_gather      2 n / p    2 n / p    n (p - 1) / p                           2 n (p - 1) / p
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..compiler.ir.cluster import Cluster

if TYPE_CHECKING:
    from .exchanges import Exchange

__all__ = ["HostSeconds", "ahead_seconds", "asking_seconds", "bucket_seconds", "send_seconds"]


@dataclass(frozen=True, slots=True)
class HostSeconds:
    """Seconds of the thread that computes for one collective: before it is under way, while it
    is, at its end (which is part of its time), and after that."""

    before: float = 0.0
    sending: float = 0.0
    finishing: float = 0.0
    after: float = 0.0

    @property
    def total(self) -> float:
        return self.before + self.sending + self.finishing + self.after


def send_seconds(cluster: Cluster, source: int, target: int, num_bytes: float) -> float:
    """Of sending one message, beside its instruction."""
    kind = cluster.type_of(source)
    if kind.backend != "cpu":
        return 0.0
    return kind.message_seconds + num_bytes / cluster.link(source, target).bytes_per_second


def ahead_seconds(cluster: Cluster, rank: int, entry: Exchange) -> tuple[float, float]:
    """Of collectives inside a stage that travel beside its computation: how much longer that takes,
    and of that asking for them, and copying messages into sockets, which is all that is known where
    it was not measured."""
    kind = cluster.type_of(rank)
    if kind.backend != "cpu":
        return 0.0, 0.0
    if entry.collective == "all_reduce":
        asking = kind.message_seconds * entry.count
        return asking, asking
    sent = sum(
        size / cluster.link(*edge).bytes_per_second for edge, size in entry.edges if edge[0] == rank
    )
    own = asking_seconds(cluster, rank, entry) + sent
    whole = entry.handling_seconds or own
    return whole, min(own, whole)


def asking_seconds(cluster: Cluster, rank: int, entry: Exchange) -> float:
    """Of asking for the messages of the collectives of `entry`, one to and one from each other
    rank; of all-reduces, for each. Their latency is more, as threads wait for processors; no
    computation waits for that.
    """
    kind = cluster.type_of(rank)
    if entry.collective == "all_reduce":
        return kind.message_seconds * entry.count
    messages = 2 * (len(set(entry.ranks)) - 1) * entry.count
    each = kind.message_seconds or kind.instruction_seconds
    return min(messages * each, entry.latency_seconds)


def bucket_seconds(
    cluster: Cluster,
    rank: int,
    collective: str,
    ranks: Sequence[int],
    num_bytes: float,
    *,
    num_tensors: int = 2,
    asking: float = 0.0,
) -> HostSeconds:
    """Of a collective that a program starts over `ranks`, `rank` among them.

    Args:
        num_bytes: in all of its `num_tensors`.
        asking: seconds of asking for its messages.
    """
    count = len(set(ranks))
    device = cluster.type_of(rank)
    if device.backend != "cpu" or count < 2:
        return HostSeconds()

    def moving(moved: float) -> float:
        return moved / device.memory_rate(moved)

    share = num_bytes / count
    others = num_bytes - share
    if collective == "all_reduce":
        in_place = num_tensors == 1
        copied = 0.0 if in_place else moving(2 * num_bytes)
        return HostSeconds(before=copied, sending=asking, after=copied)
    neighbour = next(other for other in ranks if other != rank)
    sent = others / cluster.link(rank, neighbour).bytes_per_second
    if collective == "reduce_scatter":
        return HostSeconds(
            before=moving(2 * num_bytes),
            sending=asking + moving(2 * share) + sent,
            finishing=moving(2 * share + 3 * others),
            after=moving(2 * share),
        )
    return HostSeconds(
        before=moving(2 * share),
        sending=asking + moving(2 * share) + sent,
        after=moving(2 * others),
    )
