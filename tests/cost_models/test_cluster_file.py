from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Host, Link, LinkRule
from cutset.compiler.ir.errors import ClusterError
from cutset.cost_models.cluster_file import parse_cluster, read_cluster, write_cluster
from cutset.cost_models.cluster_text import render_cluster
from cutset.cost_models.presets import preset, preset_names

GOOD = """\
name = "lab"

[types.gpu]
backend = "cuda"
memory = "75 GiB"
memory_bandwidth = "2.8 TB/s"
overhead = "5 us"
rates = { bf16 = "650 TFLOP/s", f32 = "50 TFLOP/s" }

[[devices]]
type = "gpu"
node = "box0"
count = 2

[[devices]]
type = "gpu"
node = "box1"

[[links]]
same_node = true
latency = "8 us"
bandwidth = "350 GB/s"

[[links]]
a = "box0"
b = "box1"
latency = "1.5 ms"
bandwidth = "10 GiB/s"
"""


def test_units() -> None:
    cluster = parse_cluster(GOOD)
    kind = cluster.types[0]
    assert kind.memory_bytes == 75 * 1024**3
    assert kind.memory_bytes_per_second == pytest.approx(2.8e12)
    assert kind.overhead_seconds == pytest.approx(5e-6)
    assert kind.flops_per_second == (("bf16", 650e12), ("f32", 50e12))
    assert [device.node for device in cluster.devices] == ["box0", "box0", "box1"]
    assert cluster.link(0, 1) == Link(8e-6, 350e9)
    assert cluster.link(2, 0) == Link(1.5e-3, 10 * 1024.0**3)


@pytest.mark.parametrize("suffix", ["toml", "json"])
@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_a_file(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"cluster.{suffix}"
    write_cluster(preset(name), path)
    assert read_cluster(path) == preset(name)


_names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1)
_positive = st.floats(min_value=1e-12, max_value=1e18)


@st.composite
def _clusters(draw: st.DrawFn) -> Cluster:
    names = draw(st.lists(_names, min_size=1, max_size=3, unique=True))
    link = Link(draw(_positive), draw(_positive))
    host = draw(st.none() | st.just(Host(link, draw(st.integers(1, 1 << 50)), draw(_positive))))
    types = tuple(
        DeviceType(
            name,
            draw(st.sampled_from(["cuda", "tpu", "npu"] if host else ["cuda"])),
            draw(st.integers(1, 1 << 50)),
            draw(_positive),
            tuple((dtype, draw(_positive)) for dtype in draw(st.sets(_dtypes, min_size=1))),
            draw(st.just(0.0) | _positive),
            tuple(draw(st.lists(_names, max_size=2))),
            host,
        )
        for name in names
    )
    if host is None:
        threads = draw(st.none() | st.integers(1, 256))
        types = (*types[1:], replace(types[0], backend="cpu", threads=threads))
    devices = tuple(
        Device(index, draw(st.sampled_from(names)), draw(st.sampled_from(["n0", "n1", "ñ 2"])))
        for index in range(draw(st.integers(1, 6)))
    )
    rule = LinkRule(Link(draw(_positive), draw(_positive)), "*", "*", None)
    inner = LinkRule(Link(0.0, draw(_positive)), same_node=draw(st.booleans()))
    return Cluster(draw(_names), types, devices, (inner, rule), draw(st.booleans()))


_dtypes = st.sampled_from(["f32", "bf16", "f64", "f16"])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(_clusters(), st.sampled_from(["toml", "json"]))
def test_parsing_undoes_printing(cluster: Cluster, suffix: str) -> None:
    assert parse_cluster(render_cluster(cluster, format=suffix), format=suffix) == cluster


@pytest.mark.parametrize(
    ("old", "new", "cause", "line", "way_out"),
    [
        ('type = "gpu"\nnode = "box1"', 'type = "gnu"\nnode = "box1"', "unknown device type 'gnu'",
         16, "types of this file: gpu"),
        ('"2.8 TB/s"', '"0 TB/s"', "memory_bandwidth = '0 TB/s' must be positive", 6, "measure"),
        ('"2.8 TB/s"', '"-1 TB/s"', "must be positive", 6, "measure"),
        ('"2.8 TB/s"', '"2.8 TB"', "memory_bandwidth = '2.8 TB' is not a quantity", 6, "TB/s"),
        ('"2.8 TB/s"', "2.8e12", "is not a quantity", 6, "one of the units"),
        ('"350 GB/s"', '"1.2.3 GB/s"', "'1.2.3' is not a number", 22, "GB/s"),
        ('overhead = "5 us"', 'overhed = "5 us"', "unknown key 'overhed'", 7, "keys of a type"),
        ('backend = "cuda"', 'backend = "cude"', "unknown backend 'cude'", 4, "cuda"),
        ('f32 = "50 TFLOP/s"', 'fp32 = "50 TFLOP/s"', "unknown dtype 'fp32'", 8, "f32"),
        ('overhead = "5 us"', 'host = { bandwidth = "4 GB/s" }', "gpu.host.latency is missing",
         None, "add it"),
        ('overhead = "5 us"', 'host = { pages = 4 }', "unknown key 'pages'", 7, "keys of a host"),
        ('overhead = "5 us"', "threads = 4", "has threads, but only CPU workers", 7, "leave"),
        ("count = 2", "count = 0", "count = 0", 13, "at least 1"),
        ('a = "box0"', 'a = "box9"', "link end a = 'box9' is not a node", 25, "box0, box1"),
        ('latency = "1.5 ms"', 'latency = "1.5 mW"', "is not a quantity", 27, "ms"),
        ("same_node = true", 'same_node = "yes"', "same_node = 'yes'", 20, "leave the key out"),
        ('a = "box0"\nb = "box1"', "same_node = true", "no link between device 0", 19, "[[links]]"),
        ('memory = "75 GiB"', "", "gpu.memory is missing", None, "add it"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_line_and_remedy(
    old: str, new: str, cause: str, line: int | None, way_out: str
) -> None:
    assert old in GOOD
    with pytest.raises(ClusterError) as caught:
        parse_cluster(GOOD.replace(old, new), name="lab.toml")
    assert cause in caught.value.cause
    if line is not None:
        assert caught.value.where == f"lab.toml:{line}"
    assert any(way_out in way for way in caught.value.ways_out), caught.value.ways_out


@pytest.mark.parametrize("threads", ["0", "-2", "1.5", '"4"', "true"])
def test_threads_are_a_whole_number(threads: str) -> None:
    text = GOOD.replace('backend = "cuda"', f'backend = "cpu"\nthreads = {threads}')
    with pytest.raises(ClusterError, match="is not a number of threads") as caught:
        parse_cluster(text, name="lab.toml")
    assert caught.value.where == "lab.toml:5"
    cluster = parse_cluster(text.replace(f"threads = {threads}", "threads = 3"))
    assert cluster.types[0].threads == 3


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="cannot read cluster file"):
        read_cluster(tmp_path / "none.toml")


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text(render_cluster(preset("h100-node"), format="json")[:200])
    with pytest.raises(ClusterError, match="not JSON"):
        read_cluster(path)


@pytest.mark.parametrize("text", ["", "[types]", "devices = []", "[[devices]]\ncount = 1"])
def test_a_file_with_parts_missing(text: str) -> None:
    with pytest.raises(ClusterError):
        parse_cluster(text)


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"\.toml or \.json"):
        write_cluster(preset("cpu-node"), tmp_path / "cluster.yaml")
