"""Refuses decisions of the user that contradict each other, before anything is searched."""

from __future__ import annotations

from dataclasses import replace

from ..compiler.ir.cluster import Cluster
from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Mode
from ..compiler.ir.mesh import Mesh, Replicate, format_stage_meshes
from ..compiler.ir.plan import DATA, PIPELINE, TENSOR
from .context import RECOMPUTES, SCHEDULES, PlanOptions
from .offload import OFFLOADS, have_hosts

__all__ = ["check_pinned", "mesh_is_open", "updates_elementwise"]

_AXES = (DATA, PIPELINE, TENSOR)
_ELEMENTWISE = frozenset(
    "adamw adam sgd rmsprop adagrad nadam radam adamax adadelta asgd rprop".split()
)


def updates_elementwise(optimizer: str) -> bool:
    """Whether a part of a parameter can be updated without seeing the rest of it."""
    return optimizer in _ELEMENTWISE


def mesh_is_open(cluster: Cluster, options: PlanOptions) -> bool:
    """Whether there is a mesh to choose: several devices, and nothing that fixes stages."""
    if options.mesh is not None:
        return True
    fixed = options.num_stages is not None or options.pins or options.device_pins
    return len(cluster.devices) > 1 and not fixed


def check_pinned(cluster: Cluster, mode: Mode, options: PlanOptions) -> None:
    """Raises UsageError where `options` contradict each other, the cluster or the optimizer."""
    _check_names(mode, options)
    if options.mesh is not None:
        _check_mesh(cluster, mode, options, options.mesh)
    if options.stage_meshes:
        _check_stage_meshes(cluster, mode, options)
        _check_offload(cluster, mode, options)
        return
    _check_layout_pins(cluster, options)
    if options.zero:
        _check_zero(cluster, mode, options, options.zero)
    _check_offload(cluster, mode, options)


def _check_names(mode: Mode, options: PlanOptions) -> None:
    known = SCHEDULES if mode is Mode.TRAIN else (*SCHEDULES, "forward")
    if options.schedule not in (None, *known):
        cause = f"no schedule of mode {mode.value!r} is called {options.schedule!r}"
        raise _refused("schedule", cause, f"one of: {', '.join(known)}")
    if options.recompute not in RECOMPUTES:
        cause = f"there is no way to recompute called {options.recompute!r}"
        raise _refused("recompute", cause, f"one of: {', '.join(RECOMPUTES)}")


def _check_stage_meshes(cluster: Cluster, mode: Mode, options: PlanOptions) -> None:
    meshes = options.stage_meshes
    told = f"mesh {format_stage_meshes(meshes)}"
    if options.num_stages not in (None, len(meshes)):
        raise _refused(
            "mesh",
            f"num_stages = {options.num_stages} contradicts {told}, which has {len(meshes)} stages",
            "leave num_stages out",
        )
    size = sum(mesh.size for mesh in meshes)
    if size > len(cluster.devices):
        raise _refused(
            "mesh",
            f"{told} needs {size} devices, the cluster has {len(cluster.devices)}",
            "shrink an axis",
            "plan for more devices",
        )
    for mesh in meshes:
        if mesh.axis(PIPELINE).size > 1:
            raise _refused(
                "mesh",
                f"{told} has a {PIPELINE} axis inside a stage",
                "give each stage its mesh, without a pipeline: e.g. data=2/tensor=2",
            )
        _check_mesh(cluster, mode, replace(options, num_stages=None), mesh)
    for what, given in (
        ("modules are pinned to stages or devices", options.pins or options.device_pins),
        ("parameters are pinned to layouts", options.layout_pins),
        ("optimizer states are to be offloaded", options.offload == "optimizer"),
    ):
        if given:
            raise _refused(
                "mesh",
                f"{told} gives stages meshes of their own, and {what}; both at once is not planned",
                "leave one of them out",
                "give all stages the same mesh, e.g. pipeline=2,tensor=2",
            )
    if options.zero:
        _check_zero_of_stages(mode, options, told)


def _check_zero_of_stages(mode: Mode, options: PlanOptions, told: str) -> None:
    if mode is not Mode.TRAIN or all(mesh.axis(DATA).size == 1 for mesh in options.stage_meshes):
        raise _refused(
            "zero",
            f"ZeRO-{options.zero} splits what training holds over a {DATA} axis; {told} has none, "
            "or this plan is for inference",
            f"add {DATA}=2 or more to a stage",
            "leave zero out",
        )
    if not updates_elementwise(options.optimizer.name):
        raise _whole_updates("zero", f"ZeRO-{options.zero}", options.optimizer.name)


def _check_mesh(cluster: Cluster, mode: Mode, options: PlanOptions, mesh: Mesh) -> None:
    names = [axis.name for axis in mesh.axes]
    for name in names:
        if name not in _AXES:
            known = ", ".join(_AXES)
            raise _refused("mesh", f"unknown mesh axis {name!r}", f"axes are {known}")
        if names.count(name) > 1:
            raise _refused("mesh", f"mesh {mesh} has axis {name!r} twice", "give each axis once")
    if mesh.size > len(cluster.devices):
        raise _refused(
            "mesh",
            f"mesh {mesh} needs {mesh.size} devices, the cluster has {len(cluster.devices)}",
            "shrink an axis",
            "plan for more devices",
        )
    stages = mesh.axis(PIPELINE).size
    if options.num_stages not in (None, stages):
        raise _refused(
            "mesh",
            f"num_stages = {options.num_stages} contradicts mesh {mesh}, "
            f"which has {stages} stage{'' if stages == 1 else 's'}",
            f"leave num_stages out, or pass {PIPELINE}={options.num_stages} in the mesh",
        )
    if options.device_pins:
        raise _refused(
            "mesh",
            "a mesh places stages on devices itself, so modules cannot be pinned to devices",
            "pin modules to stages instead",
        )
    trains = mode is Mode.TRAIN
    if trains and mesh.axis(TENSOR).size > 1 and not updates_elementwise(options.optimizer.name):
        raise _whole_updates("mesh", f"the {TENSOR} axis of mesh {mesh}", options.optimizer.name)


def _check_layout_pins(cluster: Cluster, options: PlanOptions) -> None:
    for pin in options.layout_pins:
        where = f"constraints: {pin}"
        if pin.axis != TENSOR:
            raise _refused(
                where,
                f"parameters are pinned over the {TENSOR} axis, not over {pin.axis!r}",
                f"write '{TENSOR}={pin.placement}'",
                f"use zero= for parts over the {DATA} axis",
            )
        if isinstance(pin.placement, Replicate):
            continue
        if options.mesh is not None and options.mesh.axis(TENSOR).size == 1:
            raise _refused(
                where,
                f"the pin splits parameters over a {TENSOR} axis, mesh {options.mesh} has none",
                f"add {TENSOR}=2 or more to the mesh",
                "drop the pin",
            )
        if not mesh_is_open(cluster, options):
            raise _refused(
                where,
                f"the pin splits parameters over a {TENSOR} axis, but no mesh is searched: stages "
                "are fixed, or there is one device",
                f"pin the mesh too, e.g. mesh='{PIPELINE}=2,{TENSOR}=2'",
            )


def _check_zero(cluster: Cluster, mode: Mode, options: PlanOptions, level: int) -> None:
    if mode is not Mode.TRAIN:
        raise _refused(
            "zero",
            f"ZeRO-{level} splits what training holds; this plan is for inference",
            "leave zero out",
        )
    if not updates_elementwise(options.optimizer.name):
        raise _whole_updates("zero", f"ZeRO-{level}", options.optimizer.name)
    if options.mesh is not None and options.mesh.axis(DATA).size == 1:
        raise _refused(
            "zero",
            f"ZeRO-{level} works over a {DATA} axis, mesh {options.mesh} has none",
            f"add {DATA}=2 or more to the mesh",
            "leave zero out",
        )
    if options.mesh is None and (options.num_stages is not None or options.pins):
        fixed = f"num_stages = {options.num_stages}" if options.num_stages else "pinning stages"
        raise _refused(
            "zero",
            f"ZeRO-{level} works over a {DATA} axis, but {fixed} leaves one device a stage",
            f"pin the mesh too, e.g. mesh='{DATA}=2,{PIPELINE}=2'",
            "leave zero out",
        )
    if options.mesh is None and len(cluster.devices) == 1:
        raise _refused("zero", f"ZeRO-{level} needs several devices, there is one", "leave it out")


def _check_offload(cluster: Cluster, mode: Mode, options: PlanOptions) -> None:
    if options.offload not in OFFLOADS:
        known = ", ".join(OFFLOADS)
        raise _refused("offload", f"offload = {options.offload!r} is unknown", f"one of: {known}")
    if options.offload != "optimizer":
        return
    if mode is not Mode.TRAIN:
        raise _refused("offload", "inference keeps no optimizer states", "leave offload out")
    if not have_hosts(cluster):
        used = {device.type for device in cluster.devices}
        alone = [e.name for e in cluster.types if e.name in used and e.host is None]
        raise _refused(
            "offload",
            f"devices of type {', '.join(alone)} have no host to keep optimizer states for them",
            "leave offload out",
            "describe the host of accelerators in the cluster file: host = { ... }",
        )


def _whole_updates(where: str, what: str, optimizer: str) -> UsageError:
    return _refused(
        where,
        f"{what} updates parts of parameters, but {optimizer!r} is not known to update each "
        "element by itself",
        "use an elementwise optimizer such as AdamW or SGD",
        f"use {PIPELINE} and {DATA} axes without ZeRO",
    )


def _refused(where: str, cause: str, *ways_out: str) -> UsageError:
    return UsageError(cause, where=where, ways_out=ways_out)
