from __future__ import annotations

import pytest
import torch

from cutset.compiler.ir.cluster import Cluster
from cutset.compiler.ir.errors import ClusterError
from cutset.cost_models import cluster_file
from cutset.cost_models.presets import (
    device_type,
    limit_memory,
    local_cpu_cluster,
    make_cluster,
    parse_devices,
    preset,
    preset_names,
)

GIB = 1 << 30


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_whole(name: str) -> None:
    cluster = preset(name)
    assert cluster.name == name and not cluster.local
    for index, device in enumerate(cluster.devices):
        assert device.index == index
        kind = cluster.type_of(index)
        assert kind.memory_bytes >= GIB and kind.memory_bytes_per_second > 1e9
        assert kind.rate(torch.float32) > 1e9
        for other in range(len(cluster.devices)):
            if other != index:
                assert cluster.link(index, other).bytes_per_second > 1e8


def test_nodes_fill_up_in_order_and_links_differ_inside_and_between() -> None:
    cluster = make_cluster("h100", 12)
    assert [device.node for device in cluster.devices] == ["node0"] * 8 + ["node1"] * 4
    assert cluster.link(0, 7).bytes_per_second > 5 * cluster.link(7, 8).bytes_per_second


def test_a_mixed_node_has_two_generations_and_a_host() -> None:
    cluster = preset("mixed-node")
    kinds = [cluster.type_of(index).name for index in range(9)]
    assert kinds == ["h100"] * 4 + ["a100"] * 4 + ["cpu-host"]
    assert cluster.link(0, 1).bytes_per_second > cluster.link(0, 4).bytes_per_second


@pytest.mark.parametrize("spec", [3, "3", "cpu:3", [torch.device("cpu")] * 3])
def test_local_workers(spec: object) -> None:
    cluster = parse_devices(spec)  # type: ignore[arg-type]
    assert cluster.local and len(cluster.devices) == 3
    assert {cluster.type_of(index).backend for index in range(3)} == {"cpu"}


@pytest.mark.parametrize(
    ("workers", "streams"),
    [(1, 1.0), (2, 1.0), (4, 2.0)],
)
def test_workers_of_one_core_share_it_with_their_messages(workers: int, streams: float) -> None:
    for cluster in (
        local_cpu_cluster(workers),
        make_cluster("cpu-core", 2 * workers, devices_per_node=workers),
    ):
        inside = next(rule for rule in cluster.links if rule.same_node is not False)
        assert inside.streams == streams
        assert 0.0 < inside.compute_share < 1.0 and 0.0 < inside.progress_share < 1.0
        assert cluster.types[0].instruction_seconds > 0.0


def test_threads_that_carry_messages_have_cores_of_their_own_on_hosts() -> None:
    assert {rule.progress_share for rule in preset("cpu-hosts").links} == {1.0}
    assert preset("cpu-hosts").types[0].instruction_seconds > 0.0
    assert preset("h100-node").types[0].instruction_seconds == 0.0


def test_memory_limit_applies_to_every_way_of_naming_devices() -> None:
    for spec in (2, "h100:2", "a100-node", local_cpu_cluster(2)):
        cluster = parse_devices(spec, memory_limit_bytes=1 << 20)
        assert {entry.memory_bytes for entry in cluster.types} == {1 << 20}
    small = limit_memory(local_cpu_cluster(1, memory_limit_bytes=1 << 10), 1 << 20)
    assert small.types[0].memory_bytes == 1 << 10, "a limit never raises what a device has"


def test_types_and_counts() -> None:
    assert len(parse_devices("h100:64").devices) == 64
    assert parse_devices("h200-node:16") == make_cluster("h200", 16)
    cluster = parse_devices("h100-node")
    assert parse_devices(cluster) is cluster


def test_a_file_names_a_cluster(tmp_path: object) -> None:
    path = f"{tmp_path}/mixed.toml"
    cluster_file.write_cluster(preset("mixed-node"), path)
    assert parse_devices(path) == preset("mixed-node")


@pytest.mark.parametrize(
    ("spec", "cause", "way_out"),
    [
        ("h300-node", "unknown cluster preset 'h300-node'", "h100-node"),
        ("h300:8", "unknown device type 'h300'", "h100"),
        ("h100:many", "'many' in devices = 'h100:many' is not a number", "h100:4"),
        ("h100:0", "'0' in devices", "h100:4"),
        (0, "0 devices", "1 to 65536"),
        (-2, "-2 devices", "1 to 65536"),
        ("-2", "-2 devices", "1 to 65536"),
        (10**12, "1000000000000 devices", "1 to 65536"),
        ("cpu:999999999999", "999999999999 devices", "1 to 65536"),
        ("h100:70000", "70000 devices", "1 to 65536"),
        ("cuda:1+cpu:999999999999", "devices is not possible", "1 to 65536"),
        ("9" * 5000, "unknown cluster preset", "h100-node"),
        ("\u00b2", "unknown cluster preset", "h100-node"),
        (True, "devices = True", "a count"),
        (2.5, "devices = 2.5", "a count"),
        ([], "none cannot form", "cpu or cuda"),
        ([torch.device("cpu"), torch.device("meta")], "'meta'", "describe them"),
    ],
)
def test_what_names_no_devices_is_refused(spec: object, cause: str, way_out: str) -> None:
    with pytest.raises(ClusterError) as caught:
        parse_devices(spec)  # type: ignore[arg-type]
    assert cause in caught.value.cause
    assert any(way_out in way for way in caught.value.ways_out), caught.value.ways_out


def test_more_cuda_devices_than_there_are() -> None:
    with pytest.raises(ClusterError, match="this machine has"):
        parse_devices("cuda:4096")


def test_mixed_devices_of_this_machine() -> None:
    assert parse_devices("cpu:1+cpu:2") == parse_devices("cpu:3")
    with pytest.raises(ClusterError, match="names no devices of this machine"):
        parse_devices("cuda:1+h100:2")
    if not torch.cuda.is_available():
        for spec in ("cuda:1+cpu:1", [torch.device("cpu"), torch.device("cuda", 0)]):
            with pytest.raises(ClusterError, match="1 CUDA devices are wanted"):
                parse_devices(spec)  # type: ignore[arg-type]
        return
    cluster = parse_devices("cpu:1+cuda:1+cpu:1")
    assert [cluster.type_of(index).backend for index in range(3)] == ["cpu", "cuda", "cpu"]
    assert cluster.local and cluster.link(0, 1) == cluster.link(0, 2)
    assert parse_devices([torch.device(name) for name in ("cpu", "cuda:0", "cpu")]) == cluster


def test_unlisted_dtypes_run_at_the_rate_of_f32() -> None:
    kind = device_type("tpu-like")
    assert kind.rate(torch.float64) == kind.rate(torch.float32) < kind.rate(torch.bfloat16)


def test_clusters_compare_by_value() -> None:
    assert make_cluster("a100", 4) == make_cluster("a100", 4)
    assert isinstance(make_cluster("a100", 4), Cluster)
