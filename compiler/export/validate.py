"""Rules of ONNX's multi-device annotations, none of which `onnx.checker` looks at.

From a `ModelProto` of any producer to nothing, or to a `PlanFormatError` that names the node. The
rules are those of the IR specification (version 11): configurations are named and list their
devices; a node refers to a configuration that exists; devices of a sharding spec exist, or are
groups that it defines; shards divide existing dims and there is one device or group a shard. To
them we add that a pipeline is one: stages are numbered without holes, and no value flows back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx

from ..ir.errors import PlanFormatError

__all__ = ["validate_onnx"]

_FIRST_IR_VERSION = 11
_NUM_STAGES = "cutset.num_stages"


def validate_onnx(model: onnx.ModelProto) -> None:
    """Check every multi-device field of `model`.

    Raises:
        PlanFormatError: the first rule that is broken, at the node or configuration that breaks it.
    """
    if model.ir_version < _FIRST_IR_VERSION:
        raise _error(
            f"IR version {model.ir_version} has no multi-device fields (they begin with "
            f"{_FIRST_IR_VERSION})",
            where="ir_version",
        )
    devices = _configurations(model)
    ranks = _tensor_ranks(model.graph)
    for node in model.graph.node:
        _check_node(node, devices=devices, ranks=ranks)
    for name in devices:
        _check_pipeline(model, name)


def _configurations(model: onnx.ModelProto) -> dict[str, int]:
    """Configuration name -> its number of devices."""
    devices: dict[str, int] = {}
    if not model.configuration:
        raise _error("the model has no device configuration", where="configuration")
    for position, entry in enumerate(model.configuration):
        where = f"configuration[{position}] {entry.name!r}"
        if not entry.name or entry.name in devices:
            raise _error("a configuration needs a name of its own", where=where)
        if entry.num_devices < 1:
            raise _error(f"num_devices is {entry.num_devices}", where=where)
        if entry.device and len(entry.device) != entry.num_devices:
            raise _error(
                f"{len(entry.device)} device names for {entry.num_devices} devices", where=where
            )
        if len(set(entry.device)) != len(entry.device):
            raise _error("two devices have the same name", where=where)
        devices[entry.name] = entry.num_devices
    return devices


def _tensor_ranks(graph: onnx.GraphProto) -> dict[str, int]:
    """Tensor name -> number of dims, where the graph says."""
    infos = (*graph.input, *graph.output, *graph.value_info)
    ranks = {
        info.name: len(info.type.tensor_type.shape.dim)
        for info in infos
        if info.type.tensor_type.HasField("shape")
    }
    ranks.update((item.name, len(item.dims)) for item in graph.initializer)
    return ranks


def _check_node(node: onnx.NodeProto, *, devices: dict[str, int], ranks: dict[str, int]) -> None:
    seen: set[str] = set()
    for entry in node.device_configurations:
        where = f"node {node.name!r}"
        if entry.configuration_id not in devices:
            known = ", ".join(sorted(devices))
            raise _error(
                f"unknown configuration {entry.configuration_id!r} (known: {known})", where=where
            )
        if entry.configuration_id in seen:
            raise _error(f"configuration {entry.configuration_id!r} twice", where=where)
        seen.add(entry.configuration_id)
        if entry.HasField("pipeline_stage") and entry.pipeline_stage < 0:
            raise _error(f"pipeline_stage is {entry.pipeline_stage}", where=where)
        for spec in entry.sharding_spec:
            if spec.tensor_name not in (*node.input, *node.output):
                raise _error(
                    f"sharding of {spec.tensor_name!r}, neither input nor output", where=where
                )
            _check_spec(
                spec,
                num_devices=devices[entry.configuration_id],
                rank=ranks.get(spec.tensor_name),
                where=f"{where}, tensor {spec.tensor_name!r}",
            )


def _check_spec(
    spec: onnx.ShardingSpecProto, *, num_devices: int, rank: int | None, where: str
) -> None:
    holders = list(_holders(spec, where))
    for device in holders:
        if not 0 <= device < num_devices:
            raise _error(f"device {device} is not one of 0..{num_devices - 1}", where=where)
    if len(set(holders)) != len(holders):
        raise _error("one device holds two shards", where=where)
    dims: set[int] = set()
    num_shards = 1
    for entry in spec.sharded_dim:
        axis = entry.axis + rank if rank is not None and entry.axis < 0 else entry.axis
        if rank is not None and not 0 <= axis < rank:
            raise _error(f"axis {entry.axis} of a tensor with {rank} dims", where=where)
        if axis in dims:
            raise _error(f"axis {entry.axis} is sharded twice", where=where)
        dims.add(axis)
        counts = [item.num_shards for item in entry.simple_sharding]
        if not counts or min(counts) < 1:
            raise _error(f"axis {entry.axis} has shard counts {counts}", where=where)
        num_shards *= math.prod(counts)
    if num_shards != len(spec.device):
        raise _error(f"{num_shards} shards on {len(spec.device)} devices or groups", where=where)


def _holders(spec: onnx.ShardingSpecProto, where: str) -> Iterator[int]:
    """Devices of a spec, groups expanded."""
    groups = {entry.key: tuple(entry.value) for entry in spec.index_to_device_group_map}
    unused = set(groups) - set(spec.device)
    if unused:
        raise _error(f"device group {min(unused)} holds no shard", where=where)
    for device in spec.device:
        group = groups.get(device, (device,))
        if not group:
            raise _error(f"device group {device} is empty", where=where)
        yield from group


def _check_pipeline(model: onnx.ModelProto, configuration: str) -> None:
    """Stages have no holes, and every edge goes to the same stage or a later one."""
    stage_of: dict[str, int] = {}
    used: set[int] = set()
    staged = [node for node in model.graph.node if _stage(node, configuration) is not None]
    if staged and len(staged) != len(model.graph.node):
        missing = next(n for n in model.graph.node if _stage(n, configuration) is None)
        raise _error("a node without a pipeline stage among nodes with one", where=missing.name)
    for node in staged:
        stage = _stage(node, configuration)
        assert stage is not None
        for name in node.input:
            if stage_of.get(name, 0) > stage:
                raise _error(
                    f"pipeline stage {stage} reads {name!r} of the later stage {stage_of[name]}",
                    where=f"node {node.name!r}",
                )
        stage_of.update((name, stage) for name in node.output)
        used.add(stage)
    declared = {entry.key: entry.value for entry in model.metadata_props}.get(_NUM_STAGES)
    num_stages = int(declared) if declared is not None and declared.isdigit() else None
    _check_stage_numbers(used, num_stages, where=f"configuration {configuration!r}")


def _check_stage_numbers(used: set[int], num_stages: int | None, *, where: str) -> None:
    if used and num_stages is not None and max(used) >= num_stages:
        raise _error(f"pipeline stage {max(used)} of {num_stages} stages", where=where)
    holes = set(range(max(used, default=-1) + 1)) - used
    if holes:
        raise _error(f"no node has pipeline stage {min(holes)}", where=where)


def _stage(node: onnx.NodeProto, configuration: str) -> int | None:
    for entry in node.device_configurations:
        if entry.configuration_id == configuration and entry.HasField("pipeline_stage"):
            return int(entry.pipeline_stage)
    return None


def _error(cause: str, *, where: str) -> PlanFormatError:
    return PlanFormatError(
        cause, where=where, ways_out=("export the plan again; annotations are never edited",)
    )
