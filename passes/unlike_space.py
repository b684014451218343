"""Which meshes stages may have of their own where devices are uneven: few, and where they may pay.

Devices of one type on one node are a run, and have one stage or two. Of a run of a few devices any
number may form the first of two stages, of a larger one half of them or the largest power of two.
Inside a stage there is every data x tensor. Runs follow each other in the order of the cluster, and
the last may be left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from ..compiler.ir.cluster import Cluster
from ..compiler.ir.counts import divisors
from ..compiler.ir.mesh import Mesh, MeshAxis
from ..compiler.ir.plan import DATA, TENSOR

__all__ = ["unlike_meshes"]

_FEW_DEVICES = 8  # in a run, any number of which may form a stage
_MOST_RUNS = 4


def unlike_meshes(cluster: Cluster, rows: int) -> Iterator[tuple[Mesh, ...]]:
    """In-stage meshes, first stage to last, that are not all alike; the data axis divides `rows`.

    None where there are too many runs of devices.
    """
    runs = _runs(cluster)
    if len(runs) > _MOST_RUNS:
        return
    for count in range(len(runs), 0, -1):
        for parts in itertools.product(*map(_parts, runs[:count])):
            sizes = tuple(itertools.chain.from_iterable(parts))
            if len(sizes) > 1:
                for meshes in itertools.product(*(_inside(size, rows) for size in sizes)):
                    if len(set(meshes)) > 1:
                        yield meshes


def _runs(cluster: Cluster) -> tuple[int, ...]:
    """How many devices of one type on one node follow each other; of one type where that would be
    too many runs."""
    by_node = itertools.groupby(cluster.devices, key=lambda device: (device.type, device.node))
    found = tuple(len(tuple(group)) for _, group in by_node)
    if len(found) <= _MOST_RUNS:
        return found
    by_type = itertools.groupby(cluster.devices, key=lambda device: device.type)
    return tuple(len(tuple(group)) for _, group in by_type)


def _parts(size: int) -> Iterator[tuple[int, ...]]:
    """One stage of `size` devices, or two."""
    yield (size,)
    power = 1 << ((size - 1).bit_length() - 1) if size > 1 else 0
    few = (
        range(1, size)
        if size <= _FEW_DEVICES
        else {power, size // 2, size - power, size - size // 2}
    )
    for first in sorted(few):
        yield (first, size - first)


def _inside(size: int, rows: int) -> tuple[Mesh, ...]:
    """Every data x tensor of `size` devices."""
    found = []
    for data in divisors(math.gcd(size, rows)):
        axes = MeshAxis(DATA, data), MeshAxis(TENSOR, size // data)
        found.append(Mesh(tuple(axis for axis in axes if axis.size > 1)))
    return tuple(found)
