"""Decisions of the user that contradict each other are refused, with the ways out."""

from __future__ import annotations

import pytest

from cutset.compiler.ir.cluster import Cluster
from cutset.compiler.ir.errors import UsageError
from cutset.compiler.ir.graph import Mode
from cutset.compiler.ir.mesh import Mesh, Shard
from cutset.compiler.ir.plan import OptimizerModel
from cutset.cost_models.presets import local_cpu_cluster, preset
from cutset.passes.context import LayoutPin, PlanOptions
from cutset.passes.mesh_space import meshes
from cutset.passes.pinned import check_pinned

LBFGS = OptimizerModel("lbfgs", 2.0)


def _options(mesh: str | None = None, **options: object) -> PlanOptions:
    parsed = None if mesh is None else Mesh.parse(mesh)
    return PlanOptions(mesh=parsed, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "cause", "way_out"),
    [
        (_options("data=2,expert=2"), "unknown mesh axis 'expert'", "data, pipeline, tensor"),
        (_options("data=2,data=2"), "has axis 'data' twice", "each axis once"),
        (_options("data=2,tensor=4"), "needs 8 devices, the cluster has 4", "shrink"),
        (_options("pipeline=2", num_stages=3), "num_stages = 3 contradicts", "pipeline=3"),
        (_options("data=4", num_stages=2), r"which has 1 stage\n", "pipeline=2"),
        (_options("data=2", device_pins=(("0", 1),)), "cannot be pinned to devices", "to stages"),
        (_options("tensor=2", optimizer=LBFGS), "tensor axis .* 'lbfgs' is not known", "AdamW"),
        (_options("tensor=4", zero=1), "mesh tensor=4 has none", "add data=2"),
        (_options("data=4", zero=1, optimizer=LBFGS), "ZeRO-1 updates parts", "AdamW"),
        (_options(zero=2, num_stages=2), "num_stages = 2 leaves one device", "pin the mesh"),
        (_options(schedule="foo"), "no schedule of mode 'train' is called 'foo'", "1f1b, gpipe"),
        (_options(schedule="forward"), "no schedule of mode 'train'", "1f1b, gpipe"),
        (_options(recompute="some"), "no way to recompute called 'some'", "selective"),
        (_options(zero=2, pins=(("0", 1),)), "pinning stages leaves one device", "pin the mesh"),
    ],
)
def test_contradictions_are_refused(options: PlanOptions, cause: str, way_out: str) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        check_pinned(local_cpu_cluster(4), Mode.TRAIN, options)
    assert any(way_out in way for way in caught.value.ways_out)


@pytest.mark.parametrize(
    ("cluster", "mode", "cause"),
    [
        (local_cpu_cluster(4), Mode.INFER, "is for inference"),
        (local_cpu_cluster(1), Mode.TRAIN, "there is one"),
    ],
)
def test_zero_needs_what_it_splits(cluster: Cluster, mode: Mode, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        check_pinned(cluster, mode, _options(zero=1))


def test_zero_and_split_parameters_may_be_asked_for_on_devices_of_several_types() -> None:
    check_pinned(preset("mixed-node"), Mode.TRAIN, _options(zero=1))
    pin = LayoutPin("0", "tensor", Shard(0))
    check_pinned(preset("mixed-node"), Mode.TRAIN, _options(layout_pins=(pin,)))


@pytest.mark.parametrize("mesh", [str(mesh) for mesh in meshes(4, rows=8)])
def test_every_mesh_of_the_search_may_be_pinned(mesh: str) -> None:
    check_pinned(local_cpu_cluster(4), Mode.TRAIN, _options(mesh))
    check_pinned(local_cpu_cluster(4), Mode.TRAIN, _options(mesh, zero=0))
    if "data" in mesh:
        check_pinned(local_cpu_cluster(4), Mode.TRAIN, _options(mesh, zero=3))
