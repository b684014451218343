"""Seconds of a step's sums of gradients that no computation hides.

The weight gradients of a stage's last microbatch are computed in parts, and the sums of what a part
completes travel while the next ones compute (`compiler/codegen/tail.py`): what is still under way
when they are all done is exposed. A bucket waits until it is full, and it is one of eight
(`compiler/ir/buckets.py`), so that an eighth of the sums is taken to be exposed at least.

Where threads of CPUs carry messages, transfers keep a share p of their speed beside computation
(`progress_share`), and take a share c of it from computation at full speed (`compute_share`). What
computes for C seconds alone takes C / (1 - c p) beside transfers, which get p times that done: all
that C hides of them is p (1 - c) / (1 - c p) C. Where they are over before the computation is,
computing has taken c of their time longer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..compiler.ir.cluster import Cluster, LinkRule
from ..compiler.ir.memo import once_per_object

__all__ = ["LEAST_EXPOSED", "Overlap", "exposed_seconds"]

LEAST_EXPOSED = 1 / 8


@dataclass(frozen=True, slots=True)
class Overlap:
    """How well transfers and computation go beside each other.

    Args:
        hidden: seconds of transfers that a second of computation hides.
        taken: seconds that a second of transfers adds to the computation that hides it.
    """

    hidden: float = 1.0
    taken: float = 0.0

    @property
    def exposed(self) -> float:
        """The share of sums of gradients that takes time in any case."""
        return max(LEAST_EXPOSED, self.taken)

    @property
    def held(self) -> float:
        """The share of a transfer for which a device at its ends that has no rest is held up."""
        return max(1.0 - self.hidden, self.taken)

    @staticmethod
    def of(cluster: Cluster) -> Overlap:
        """Between devices of `cluster`; over several links, as over the best of them."""
        return _overlap(cluster)


@once_per_object
def _overlap(cluster: Cluster) -> Overlap:
    rules = _rules(cluster)
    if not rules:
        return Overlap()
    return Overlap(max(map(_hidden, rules)), min(min(rule.compute_share, 1.0) for rule in rules))


def _hidden(rule: LinkRule) -> float:
    kept, share = rule.progress_share, rule.compute_share
    return max(0.0, kept * (1.0 - share) / (1.0 - share * kept)) if kept < 1.0 else 1.0


def _rules(cluster: Cluster) -> set[LinkRule]:
    """Those of links between two devices: they depend on the nodes alone."""
    on_node: dict[str, list[int]] = {}
    for device in cluster.devices:
        on_node.setdefault(device.node, []).append(device.index)
    firsts = [devices[0] for devices in on_node.values()]
    inside = {cluster.rule(*devices[:2]) for devices in on_node.values() if len(devices) > 1}
    return inside | {cluster.rule(a, b) for a in firsts for b in firsts if a < b}


def exposed_seconds(parts: Iterable[tuple[float, float]], overlap: Overlap = Overlap()) -> float:
    """Seconds of sums after the last of `parts`, in the order in which they are computed.

    Args:
        parts: seconds of computing weight gradients, and of summing those over ranks.

    >>> exposed_seconds([(1.0, 2.0), (1.0, 2.0)])
    3.0
    >>> exposed_seconds([(1.0, 2.0), (1.0, 2.0)], Overlap(hidden=0.25))
    3.75
    """
    computed = arrived = total = 0.0  # seconds of transfers
    for seconds, summing in parts:
        computed += overlap.hidden * seconds
        total += summing
        if summing:
            arrived = max(arrived, computed) + summing
    return max(arrived - computed, overlap.exposed * total)
