"""Where the ranks of a mixed cluster compute, and over what they talk."""

from __future__ import annotations

import pytest
import torch

from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.compiler.ranks import message_backend, place_of

GPU = DeviceType("gpu", "cuda", 1 << 30, 1e12, (("f32", 1e13),))
CPU = DeviceType("cpu", "cpu", 1 << 30, 1e10, (("f32", 1e11),), threads=2)


def cluster(*places: tuple[str, str]) -> Cluster:
    devices = tuple(Device(index, kind, node) for index, (kind, node) in enumerate(places))
    return Cluster("mixed", (GPU, CPU), devices, (LinkRule(Link(1e-5, 1e9)),), local=True)


def test_cuda_devices_are_numbered_within_their_node() -> None:
    mixed = cluster(("cpu", "a"), ("gpu", "a"), ("gpu", "a"), ("cpu", "b"), ("gpu", "b"))
    places = [str(place_of(mixed, rank)) for rank in range(5)]
    assert places == ["cpu", "cuda:0", "cuda:1", "cpu", "cuda:0"]


@pytest.mark.parametrize(
    ("kinds", "backend"),
    [
        (["cpu", "cpu"], "gloo"),
        (["gpu", "cpu"], "gloo"),
        (["gpu", "gpu", "cpu"], "nccl"),
        (["gpu", "gpu"], "nccl"),
        (["gpu"], "nccl"),
    ],
)
def test_nccl_where_two_ranks_can_use_it(kinds: list[str], backend: str) -> None:
    mixed = cluster(*((kind, "a") for kind in kinds))
    assert message_backend(mixed, len(kinds)) == backend
    assert torch.device("cpu") == place_of(cluster(("cpu", "a")), 0)
