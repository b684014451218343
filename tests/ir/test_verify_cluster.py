"""Clusters, meshes and layouts: right ones pass, each broken one is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cutset.compiler.ir.cluster import Cluster, Device, Link, LinkRule, OpCost, RateCurve
from cutset.compiler.ir.corrections import Correction, Corrections, Signature
from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.mesh import Layout, Mesh
from cutset.compiler.ir.types import TensorType
from cutset.compiler.ir.verify import verify_cluster, verify_layout, verify_mesh
from tests.ir.pipelines import cluster

FACTOR = Correction(
    Signature("aten.mm.default", "(%0, %1)", ("f32[8,4]", "f32[4,2]"), ("f32[8,2]",)),
    2.0,
    None,
    None,
)
INSIDE = LinkRule(Link(1e-6, 1e10), same_node=True)
ACROSS = LinkRule(Link(1e-5, 1e9), same_node=False)


def two_nodes(*links: LinkRule) -> Cluster:
    devices = tuple(Device(index, "cpu", f"node{index % 2}") for index in range(4))
    return replace(cluster(4), devices=devices, links=links)


def kind(**changes: object) -> Cluster:
    right = cluster(2)
    return replace(right, types=(replace(right.types[0], **changes),))


def corrected(*entries: Correction) -> Cluster:
    return kind(corrections=Corrections(entries))


def named(op: str) -> Correction:
    return replace(FACTOR, signature=replace(FACTOR.signature, op=op))


def linked(**changes: object) -> Cluster:
    return replace(cluster(2), links=(replace(LinkRule(Link(0.0, 1e9)), **changes),))


def test_right_clusters_pass() -> None:
    verify_cluster(cluster(1))
    verify_cluster(replace(cluster(1), links=()))
    verify_cluster(two_nodes(INSIDE, ACROSS))
    verify_cluster(two_nodes(LinkRule(Link(0.0, 1e9))))
    verify_cluster(corrected(FACTOR, named("aten.mv.default")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(cluster(2), devices=()), "has no devices"),
        (lambda: replace(cluster(2), types=cluster(2).types * 2), "two device types are called"),
        (lambda: replace(cluster(2), devices=cluster(2).devices[1:]), "its index is 1, not 0"),
        (lambda: replace(cluster(2), types=()), "unknown type 'cpu'"),
        (lambda: kind(name="gpu"), "unknown type 'cpu'"),
        (lambda: kind(backend="abacus"), "backend 'abacus' is not one of cpu, cuda, tpu, npu"),
        (lambda: kind(memory_bytes=0), "memory_bytes is 0, not positive"),
        (lambda: kind(memory_bytes_per_second=float("nan")), "is nan, not positive"),
        (lambda: kind(overhead_seconds=-1.0), "overhead_seconds is -1.0"),
        (lambda: kind(flops_per_second=()), "it has no rate"),
        (lambda: kind(flops_per_second=(("f33", 1.0),)), "'f33' is not a dtype"),
        (lambda: kind(flops_per_second=(("f32", float("inf")),)), "is inf, not positive"),
        (lambda: corrected(), "there are none"),
        (lambda: corrected(FACTOR, replace(FACTOR, forward=3.0)), "two are of aten.mm.default"),
        (lambda: corrected(FACTOR, replace(FACTOR, forward=1.0)), "they are not in order"),
        (lambda: corrected(replace(FACTOR, forward=-1.0)), "not a factor: '-1'"),
        (lambda: corrected(replace(FACTOR, forward=None)), "aten.mm.default has no factor"),
        (lambda: corrected(named("mm")), "'mm' is not an operator name"),
        (lambda: kind(instruction_seconds=-1.0), "instruction_seconds is -1.0"),
        (lambda: kind(curves=(RateCurve("tensor", "f32", ((1.0, 1.0),)),)), "no such kind"),
        (lambda: kind(curves=(RateCurve("memory", "f32", ((1.0, 1.0),)),)), "not its dtype"),
        (lambda: kind(curves=(RateCurve("memory", "", ()),)), "has no points"),
        (lambda: kind(curves=(RateCurve("memory", "", ((1.0, 0.0),)),)), "rate of curve memory"),
        (lambda: kind(curves=(RateCurve("memory", "", ((2.0, 1.0), (2.0, 1.0))),)), "not ascend"),
        (lambda: kind(curves=(RateCurve("memory", "", ((2.0, 1.0),)),) * 2), "two curves"),
        (lambda: kind(op_costs=(OpCost("gelu", "forward", -1.0),)), "kernels of forward of gelu"),
        (lambda: kind(op_costs=(OpCost("gelu", "onward", 1.0),)), "no such phase"),
        (lambda: kind(op_costs=(OpCost("gelu", "forward", 1.0),) * 2), "two costs are of"),
        (lambda: kind(op_costs=(OpCost("gelu", "forward", 1.0, (), "f7"),)), "'f7' is not a dtype"),
        (lambda: linked(streams=0.0), "streams is 0.0"),
        (lambda: linked(compute_share=1.0), "compute_share is 1.0"),
        (lambda: linked(compute_share=2.0, progress_share=0.5), "at 0.5 of a transfer's speed"),
        (lambda: linked(progress_share=0.0), "progress_share is 0.0"),
        (lambda: linked(progress_share=1.5), "progress_share is 1.5"),
        (lambda: linked(skew_seconds=-1e-3), "skew_seconds"),
        (lambda: linked(handling=(("all_gather", Link(-1.0, 1e9)),)), "latency_seconds"),
        (lambda: linked(handling=(("all_reduce", Link(0.0, 1e9)),)), "is not one of all_gather"),
        (lambda: linked(collectives=(("gather", Link(0.0, 1.0)),)), "'gather' is not one of"),
        (lambda: linked(collectives=(("all_reduce", Link(0.0, 0.0)),)), "bytes_per_second is 0.0"),
        (lambda: replace(cluster(2), links=(LinkRule(Link(-1.0, 1.0)),)), "latency_seconds is -1"),
        (lambda: replace(cluster(2), links=(LinkRule(Link(0.0, 0.0)),)), "bytes_per_second is 0.0"),
        (lambda: two_nodes(INSIDE), "no link between device 0 (node node0) and 1"),
        (lambda: two_nodes(ACROSS), "no link between device 0 (node node0) and 2"),
        (lambda: two_nodes(), "no link between"),
    ],
)
def test_broken_clusters_are_caught(make: Callable[[], Cluster], message: str) -> None:
    with pytest.raises(VerificationError) as caught:
        verify_cluster(make())
    assert message in caught.value.cause


def test_meshes() -> None:
    verify_mesh(Mesh(()))
    verify_mesh(Mesh.parse("data=2,pipeline=4"))
    with pytest.raises(VerificationError, match="two axes are called 'data'"):
        verify_mesh(Mesh.parse("data=2,data=4"))


@pytest.mark.parametrize(
    "text", ["data", "data=", "data=0", "data=-2", "data=\u00b2", "data=" + "9" * 5000]
)
def test_what_is_no_mesh_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a mesh axis"):
        Mesh.parse(text)


def test_layouts() -> None:
    mesh = Mesh.parse("data=2,tensor=4")
    type = TensorType((6, 3), torch.float32)
    for text in ("[S(0),S(1)]", "[R,P(sum)]", "[S(0),S(0)]"):
        verify_layout(Layout.parse(text), type, mesh)
    with pytest.raises(VerificationError, match="has 1 placements, mesh .* has 2 axes"):
        verify_layout(Layout.parse("[R]"), type, mesh)
    with pytest.raises(VerificationError, match=r"axis tensor shards dim 2, which f32\[6,3\]"):
        verify_layout(Layout.parse("[R,S(2)]"), type, mesh)
