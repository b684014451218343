"""What the search for a mesh looks through: meshes, numbers of microbatches, ways to save bytes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator

from ..compiler.ir.cluster import Cluster
from ..compiler.ir.counts import divisors
from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Mode, ValueKind
from ..compiler.ir.mesh import Mesh, MeshAxis
from ..compiler.ir.plan import DATA, PIPELINE, TENSOR, Plan
from .candidates import Way
from .columns import stage_devices
from .context import Context
from .layout_pins import can_hold, held_placements
from .microbatches import candidates, pinned_count
from .pinned import updates_elementwise

__all__ = [
    "is_uneven",
    "mesh_sizes",
    "meshes",
    "microbatch_counts",
    "more_microbatches",
    "search_space",
    "ways_to_save",
]

_FEW_DEVICES = 16  # of which any number may form a mesh
_SHARES = (1.0, 1.1)  # of the memory: additive bounds exceed the need by about a tenth


def meshes(num_devices: int, rows: int) -> Iterator[Mesh]:
    """Every data x pipeline x tensor of `num_devices`, in both orders where they differ; the data
    axis divides `rows`."""
    for data in divisors(math.gcd(num_devices, rows)):
        for tensor in divisors(num_devices // data):
            stages = num_devices // data // tensor
            axes = {DATA: data, PIPELINE: stages, TENSOR: tensor}
            orders = [(PIPELINE, DATA, TENSOR)]
            if data > 1 and stages > 1:
                orders.append((DATA, PIPELINE, TENSOR))
            for order in orders:
                yield Mesh(tuple(MeshAxis(name, axes[name]) for name in order if axes[name] > 1))


def search_space(
    plan: Plan,
    context: Context,
    rows: int,
    counts_of: Callable[[Plan, Context, int], list[int]],
) -> list[tuple[Mesh, int]]:
    """Meshes with numbers of microbatches, which `counts_of` says by number of stages.

    Args:
        rows: of the batch that was captured.

    Raises:
        UsageError: what is pinned leaves nothing.
    """
    options = context.options
    pinned = options.mesh
    table = []
    for mesh in _searched(plan.cluster, rows) if pinned is None else (pinned,):
        data, stages = mesh.axis(DATA).size, mesh.axis(PIPELINE).size
        if (options.zero and data == 1) or not _suits_pins(context, mesh):
            continue
        counts = [
            count
            for count in counts_of(plan, context, stages)
            if plan.batch_size // count % data == 0
        ]
        table += [(mesh, count) for count in counts]
    if not table and counts_of is microbatch_counts:
        if options.layout_pins:  # says which pin is impossible, and what would be legal
            whole = Mesh((MeshAxis(TENSOR, len(plan.cluster.devices)),))
            held_placements(context.graph, options.layout_pins, whole)
        raise _none_suits(plan, context)
    return table


def _none_suits(plan: Plan, context: Context) -> UsageError:
    options = context.options
    backends = sorted({entry.backend for entry in plan.cluster.types})
    if options.mesh is None and options.zero and len(backends) > 1:
        return UsageError(
            f"ZeRO-{options.zero} works over a {DATA} axis, and none is searched over devices of "
            f"several backends ({', '.join(backends)})",
            where="zero",
            ways_out=(f"pin the mesh too, e.g. mesh='{DATA}=2'", "leave zero out"),
        )
    return UsageError(
        f"no number of microbatches of a batch of {plan.batch_size} rows suits the mesh",
        where="mesh",
        ways_out=("let the data axis divide the rows of a microbatch",),
    )


def _searched(cluster: Cluster, rows: int) -> Iterator[Mesh]:
    """Meshes of all devices and, where some may be better left out, of the first of them, with
    devices of one backend in each stage. A pipeline of single devices takes those that it wants of
    all."""
    for size in mesh_sizes(cluster):
        for mesh in meshes(size, rows):
            is_single = all(axis.name == PIPELINE for axis in mesh.axes)
            if size == len(cluster.devices) if is_single else _has_one_backend_each(cluster, mesh):
                yield mesh


def _has_one_backend_each(cluster: Cluster, mesh: Mesh) -> bool:
    """Whether the devices of each stage are of one backend."""
    groups = stage_devices(mesh)
    return all(len({cluster.type_of(device).backend for device in own}) == 1 for own in groups)


def mesh_sizes(cluster: Cluster) -> tuple[int, ...]:
    """How many of the devices, which are taken in order, may form a mesh; all of them first.

    Where devices are uneven, any number of a few; of many those that end a node or a type, or are
    the largest power of two."""
    count = len(cluster.devices)
    if not is_uneven(cluster):
        return (count,)
    if count <= _FEW_DEVICES:
        return tuple(range(count, 1, -1))
    pairs = itertools.pairwise(cluster.devices)
    ends = {b.index for a, b in pairs if (a.type, a.node) != (b.type, b.node)}
    ends |= {count, 1 << (count.bit_length() - 1)}
    return tuple(sorted(ends - {1}, reverse=True))


def is_uneven(cluster: Cluster) -> bool:
    """Whether devices are of several types, or nodes of several sizes, or the number of devices is
    no power of two."""
    count = len(cluster.devices)
    sizes = Counter(device.node for device in cluster.devices).values()
    kinds = {device.type for device in cluster.devices}
    return len(kinds) > 1 or len(set(sizes)) > 1 or count & (count - 1) > 0


def _suits_pins(context: Context, mesh: Mesh) -> bool:
    """Whether pinned layouts are possible on `mesh`; of a pinned mesh they must be."""
    pins = context.options.layout_pins
    if context.options.mesh is not None:
        held_placements(context.graph, pins, mesh)
        return True
    return can_hold(context.graph, pins, mesh)


def ways_to_save(plan: Plan, context: Context, mesh: Mesh, *, offload: bool) -> tuple[Way, ...]:
    """Ways to save memory on `mesh`, least first, all of them with states on the device or, if they
    `offload`, away from it."""
    options = context.options
    auto = options.recompute == "auto"
    kinds = ("none", "selective", "full") if auto else (options.recompute,)
    if plan.mode is Mode.INFER:
        kinds = ("none",)
    if all(axis.name == PIPELINE for axis in mesh.axes):
        return tuple(Way(0, saving=0.0, recompute=kind, offload=offload) for kind in kinds)
    levels: tuple[int, ...] = (0,)
    if options.zero is not None:
        levels = (options.zero,)
    elif plan.mode is Mode.INFER:
        levels = (0,)
    elif mesh.axis(DATA).size > 1 and updates_elementwise(plan.optimizer.name):
        levels = (0, 1, 2, 3)
    return tuple(
        Way(level, saving, kind, offload)
        for kind in kinds
        for saving in (0.0, *_SHARES)
        for level in levels
    )


def microbatch_counts(plan: Plan, context: Context, stages: int) -> list[int]:
    """The typical numbers for so many stages."""
    pinned = pinned_count(plan, context)
    if pinned is not None:
        return [pinned]
    inputs = context.graph.values_of(ValueKind.INPUT)
    if not any(value.batch_dim is not None for value in inputs):
        return [1]
    return list(candidates(plan.batch_size, stages))


def more_microbatches(plan: Plan, context: Context, stages: int) -> list[int]:
    """More than the typical numbers, if the number is open."""
    typical = microbatch_counts(plan, context, stages)
    if context.options.num_microbatches is not None or typical == [1]:
        return []
    return [number for number in divisors(plan.batch_size) if number > typical[-1]]
