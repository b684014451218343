"""Rules of clusters, meshes and layouts."""

from __future__ import annotations

import math
from itertools import pairwise

from ..cluster import (
    COLLECTIVES,
    CURVES,
    HANDLED,
    PHASES,
    Cluster,
    DeviceType,
    LinkRule,
    RateCurve,
)
from ..corrections import Correction, Corrections
from ..errors import CaptureError, ClusterError, VerificationError
from ..memo import once_per_object
from ..mesh import Layout, Mesh, Shard
from ..ops import op_named
from ..types import DTYPES_BY_NAME, TensorType
from .report import check, first_repeated

__all__ = ["verify_cluster", "verify_layout", "verify_mesh"]

BACKENDS = ("cpu", "cuda", "tpu", "npu")


def verify_cluster(cluster: Cluster) -> None:
    """Device types with positive figures, devices numbered 0, 1, ... of known types, and a link
    between every two devices.

    Raises:
        VerificationError: the first rule that is broken.
    """
    here = f"cluster {cluster.name!r}"
    check(bool(cluster.devices), "the cluster has no devices", here)
    repeated = first_repeated(entry.name for entry in cluster.types)
    check(repeated is None, f"two device types are called {repeated!r}", here)
    for entry in cluster.types:
        _verify_device_type(entry, f"device type {entry.name!r} of {here}")
    known = {entry.name for entry in cluster.types}
    for position, device in enumerate(cluster.devices):
        place = f"device {position} of {here}"
        check(device.index == position, f"its index is {device.index}, not {position}", place)
        check(device.type in known, f"it is of unknown type {device.type!r}", place)
    for rule in cluster.links:
        _verify_rule(rule, f"link {rule} of {here}")
    _verify_links(cluster)


def _positive(name: str, figure: float, here: str) -> None:
    check(math.isfinite(figure) and figure > 0, f"{name} is {figure}, not positive", here)


def _not_negative(name: str, figure: float, here: str) -> None:
    check(math.isfinite(figure) and figure >= 0, f"{name} is {figure}, negative or no number", here)


def _verify_rule(rule: LinkRule, here: str) -> None:
    for link in (rule.link, *(own for _, own in (*rule.collectives, *rule.handling))):
        _positive("bytes_per_second", link.bytes_per_second, here)
        _not_negative("latency_seconds", link.latency_seconds, here)
    for links, known in ((rule.collectives, COLLECTIVES), (rule.handling, HANDLED)):
        names = [name for name, _ in links]
        for name in names:
            check(name in known, f"{name!r} is not one of {', '.join(known)}", here)
        check(first_repeated(names) is None, f"{first_repeated(names)} is there twice", here)
    if rule.streams is not None:
        _positive("streams", rule.streams, here)
    share = rule.compute_share
    kept = rule.progress_share
    check(0 < kept <= 1, f"progress_share is {kept}, not a share above 0 and of at most 1", here)
    taken = (
        f"compute_share is {share}, at {kept:g} of a transfer's speed not a share from 0 up to 1"
    )
    check(0 <= share * kept < 1, taken, here)
    _not_negative("skew_seconds", rule.skew_seconds, here)


def _verify_device_type(entry: DeviceType, here: str) -> None:
    check(
        entry.backend in BACKENDS,
        f"backend {entry.backend!r} is not one of {', '.join(BACKENDS)}",
        here,
    )
    _positive("memory_bytes", entry.memory_bytes, here)
    _positive("memory_bytes_per_second", entry.memory_bytes_per_second, here)
    _not_negative("overhead_seconds", entry.overhead_seconds, here)
    check(bool(entry.flops_per_second), "it has no rate", here)
    for dtype, rate in entry.flops_per_second:
        check(dtype in DTYPES_BY_NAME, f"{dtype!r} is not a dtype", here)
        _positive(f"flops_per_second of {dtype}", rate, here)
    if entry.threads is not None:
        check(entry.threads >= 1, f"it has {entry.threads} threads", here)
        check(entry.backend == "cpu", f"threads are of CPU workers, it is {entry.backend}", here)
    if entry.cores is not None:
        check(entry.cores >= 1, f"it has {entry.cores} cores", here)
        check(entry.backend == "cpu", f"cores are of CPU workers, it is {entry.backend}", here)
    _not_negative("instruction_seconds", entry.instruction_seconds, here)
    _not_negative("message_seconds", entry.message_seconds, here)
    if entry.message_seconds:
        check(entry.backend == "cpu", f"messages are CPU workers', it is {entry.backend}", here)
    for curve in entry.curves:
        _verify_curve(curve, here)
    twice = first_repeated((curve.kind, curve.dtype) for curve in entry.curves)
    check(twice is None, f"two curves are of {twice}", here)
    for cost in entry.op_costs:
        title = f"{cost.phase} of {cost.name} {cost.dtype}".rstrip()
        known = not cost.dtype or cost.dtype in DTYPES_BY_NAME
        check(known, f"{title}: {cost.dtype!r} is not a dtype", here)
        check(cost.phase in PHASES, f"{title}: no such phase, one of {', '.join(PHASES)}", here)
        _not_negative(f"kernels of {title}", cost.kernels, here)
        _verify_points(title, cost.points, here)
    double = first_repeated((cost.name, cost.phase, cost.dtype) for cost in entry.op_costs)
    check(double is None, f"two costs are of {double}", here)
    if entry.corrections is not None:
        problem = _problem_of(entry.corrections)
        check(not problem, problem, f"corrections of {here}")
    if entry.host is not None:
        place = f"host of {here}"
        _positive("memory_bytes", entry.host.memory_bytes, place)
        _positive("memory_bytes_per_second", entry.host.memory_bytes_per_second, place)
        _positive("bytes_per_second", entry.host.link.bytes_per_second, place)
        _not_negative("latency_seconds", entry.host.link.latency_seconds, place)


@once_per_object
def _problem_of(corrections: Corrections) -> str:
    """What is wrong with `corrections`; empty: nothing."""
    lines = list(map(str, corrections.entries))
    if not lines:
        return "there are none"
    if lines != sorted(lines):
        return "they are not in order"
    twice = first_repeated(entry.signature for entry in corrections.entries)
    if twice is not None:
        return f"two are of {twice.op} with the same types"
    for entry in corrections.entries:
        try:
            op_named(entry.signature.op)
            Correction.parse(str(entry))
        except (CaptureError, ValueError) as error:
            return str(error)
        if all(getattr(entry, phase) is None for phase in PHASES):
            return f"one of {entry.signature.op} has no factor"
    return ""


def _verify_curve(curve: RateCurve, here: str) -> None:
    title = f"curve {curve.kind} {curve.dtype}".rstrip()
    check(curve.kind in CURVES, f"{title}: no such kind, one of {', '.join(CURVES)}", here)
    of_memory = curve.kind == "memory"
    known = not curve.dtype if of_memory else curve.dtype in DTYPES_BY_NAME
    check(known, f"{title}: {curve.dtype!r} is not its dtype", here)
    check(bool(curve.points), f"{title} has no points", here)
    _verify_points(title, curve.points, here)


def _verify_points(title: str, points: tuple[tuple[float, float], ...], here: str) -> None:
    for size, rate in points:
        _positive(f"size of {title}", size, here)
        _positive(f"rate of {title}", rate, here)
    rising = all(low < high for (low, _), (high, _) in pairwise(points))
    check(rising, f"{title}: its sizes do not ascend", here)


def _verify_links(cluster: Cluster) -> None:
    """One pair of devices stands for all pairs on the same two nodes."""
    seen: set[tuple[str, str]] = set()
    first: dict[str, int] = {}
    for device in cluster.devices:
        for node, other in first.items():
            pair = (node, device.node)
            if pair in seen:
                continue
            seen.add(pair)
            for source, target in ((other, device.index), (device.index, other)):
                try:
                    cluster.link(source, target)
                except ClusterError as error:
                    raise VerificationError(
                        error.cause, where=error.where, ways_out=error.ways_out
                    ) from error
        first.setdefault(device.node, device.index)


def verify_mesh(mesh: Mesh) -> None:
    """Axes have distinct names and at least one device each. Raises VerificationError."""
    here = f"mesh {mesh}"
    repeated = first_repeated(axis.name for axis in mesh.axes)
    check(repeated is None, f"two axes are called {repeated!r}", here)
    for axis in mesh.axes:
        check(bool(axis.name), "an axis has no name", here)
        check(axis.size >= 1, f"axis {axis.name} has size {axis.size}", here)


def verify_layout(layout: Layout, type: TensorType, mesh: Mesh, *, where: str = "") -> None:
    """One placement per mesh axis, sharding dims that exist. Raises VerificationError.

    Sharded dims need not divide evenly, and one dim may be sharded over several axes.
    """
    here = where or f"layout {layout}"
    check(
        len(layout.placements) == len(mesh.axes),
        f"layout {layout} has {len(layout.placements)} placements, mesh {mesh} has "
        f"{len(mesh.axes)} axes",
        here,
    )
    for placement, axis in zip(layout.placements, mesh.axes, strict=True):
        if isinstance(placement, Shard):
            check(
                0 <= placement.dim < len(type.shape),
                f"axis {axis.name} shards dim {placement.dim}, which {type} does not have",
                here,
            )
