"""Layouts in ONNX's terms.

From a layout over a mesh, and the devices of the stages that compute a value, to a
`ShardingSpecProto`: per tensor dim a number of shards, and per shard the device or the group of
devices that hold it, shards in row-major order of the sharded dims. Partial sums have no
counterpart there: they are shown as replicated, and the exact layout is in the node's metadata.
"""

from __future__ import annotations

import itertools
import math

import onnx

from ..ir.mesh import Layout, Mesh, MeshAxis, Shard
from ..ir.plan import Plan

__all__ = ["sharding_spec", "stage_devices"]

_PIPELINE = "pipeline"


def stage_devices(plan: Plan, stage: int) -> tuple[int, ...]:
    """Devices of one stage, in the order of the mesh axes other than `pipeline`.

    A mesh with further axes numbers ranks row-major; one without leaves the stage its one device.
    """
    axes = plan.mesh.axes
    if all(axis.name == _PIPELINE or axis.size == 1 for axis in axes):
        return (plan.stages[stage].device,)
    coordinates = itertools.product(*(range(axis.size) for axis in axes))
    return tuple(
        rank
        for rank, coordinate in enumerate(coordinates)
        if all(
            axis.name != _PIPELINE or position == stage
            for axis, position in zip(axes, coordinate, strict=True)
        )
    )


def sharding_spec(
    name: str,
    *,
    num_dims: int,
    layout: Layout | None,
    mesh: Mesh,
    stage_devices: tuple[tuple[int, ...], ...],
) -> onnx.ShardingSpecProto:
    """Where the shards of tensor `name` are.

    Args:
        name: the tensor.
        num_dims: its number of dims.
        layout: one placement per axis of `mesh`; None means replicated.
        mesh: the plan's mesh.
        stage_devices: devices of each stage that computes it, as `stage_devices` orders them.
    """
    sharded = _sharded_axes(layout, mesh)
    shards: dict[tuple[int, ...], list[int]] = {}
    for devices in stage_devices:
        for device, position in zip(devices, _positions(mesh, len(devices)), strict=True):
            index = tuple(_flat_index(axes, position) for _, axes in sorted(sharded.items()))
            shards.setdefault(index, []).append(device)
    groups = [tuple(dict.fromkeys(shards[index])) for index in sorted(shards)]
    spec = onnx.ShardingSpecProto(tensor_name=name)
    for number, group in enumerate(groups, start=1):
        spec.device.append(group[0] if len(group) == 1 else -number)
        if len(group) > 1:
            spec.index_to_device_group_map.add(key=-number, value=group)
    for dim, axes in sorted(sharded.items()):
        assert dim < num_dims, f"{name} has no dim {dim} to shard"
        entry = spec.sharded_dim.add(axis=dim)
        entry.simple_sharding.add(num_shards=math.prod(axis.size for axis in axes))
    return spec


def _sharded_axes(layout: Layout | None, mesh: Mesh) -> dict[int, list[MeshAxis]]:
    """Tensor dim -> mesh axes of size above one over which it is split, in mesh order."""
    table: dict[int, list[MeshAxis]] = {}
    if layout is not None:
        for placement, axis in zip(layout.placements, mesh.axes, strict=True):
            if isinstance(placement, Shard) and axis.size > 1 and axis.name != _PIPELINE:
                table.setdefault(placement.dim, []).append(axis)
    return table


def _positions(mesh: Mesh, num_devices: int) -> list[dict[str, int]]:
    """Coordinate of each device of one stage, by axis name."""
    if num_devices == 1:
        return [{}]
    axes = [axis for axis in mesh.axes if axis.name != _PIPELINE]
    names = [axis.name for axis in axes]
    ranges = (range(axis.size) for axis in axes)
    return [dict(zip(names, item, strict=True)) for item in itertools.product(*ranges)]


def _flat_index(axes: list[MeshAxis], position: dict[str, int]) -> int:
    """Row-major index of `position` over `axes`."""
    index = 0
    for axis in axes:
        index = index * axis.size + position.get(axis.name, 0)
    return index
