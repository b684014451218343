from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutset.compiler.ir.cluster import (
    COLLECTIVES,
    HANDLED,
    PHASES,
    Cluster,
    Device,
    DeviceType,
    Host,
    Link,
    LinkRule,
    OpCost,
    RateCurve,
)
from cutset.compiler.ir.errors import ClusterError, UsageError
from cutset.cost_models.cluster_file import parse_cluster, read_cluster, write_cluster
from cutset.cost_models.cluster_text import render_cluster
from cutset.cost_models.presets import parse_devices, preset, preset_names

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


def test_costs_of_an_element_type_go_before_those_of_any() -> None:
    figures = "{ kernels = 3, rates = [['1 KB', '2 GB/s']] }".replace("'", '"')
    text = MEASURED.replace("gelu = {", f"gelu = {{ bf16 = {{ forward = {figures} }}, ")
    cluster = parse_cluster(text)
    (kind,) = cluster.types
    half = OpCost("gelu", "forward", 3.0, ((1e3, 2e9),), "bf16")
    for dtype in (torch.bfloat16, torch.float16):  # f16 has none of its own
        assert kind.op_cost("gelu", "elementwise", "forward", dtype) == half
    for other in (torch.float32, torch.float64, None):
        found = kind.op_cost("gelu", "elementwise", "forward", other)
        assert found is not None and found.kernels == 2.0
    for format in ("toml", "json"):
        assert parse_cluster(render_cluster(cluster, format=format), format=format) == cluster
    for old, new, cause in (
        ("bf16 = { forward", "bf17 = { forward", "unknown key 'bf17'"),
        ("bf16 = { forward", "bf16 = { onward", "unknown key 'onward'"),
        ("bf16 = { forward = {", "bf16 = 3, f16 = { forward = {", "op_costs.gelu.bf16 = 3 is not"),
    ):
        with pytest.raises(ClusterError, match=cause) as caught:
            parse_cluster(text.replace(old, new), name="lab.toml")
        assert caught.value.where == "lab.toml:12" and "an element type" in str(caught.value)


@pytest.mark.parametrize("suffix", ["toml", "json"])
@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_a_file(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"cluster.{suffix}"
    write_cluster(preset(name), path)
    assert read_cluster(path) == preset(name)


_names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1)
_positive = st.floats(min_value=1e-12, max_value=1e18)


_points = st.dictionaries(_positive, _positive, min_size=1, max_size=3).map(
    lambda table: tuple(sorted(table.items()))
)
_op_costs = st.lists(
    st.builds(
        OpCost,
        _names,
        st.sampled_from(PHASES),
        _positive,
        st.just(()) | _points,
        st.sampled_from(["", "bf16", "f64"]),
    ),
    max_size=2,
    unique_by=lambda cost: cost.name,
).map(tuple)


@st.composite
def _curves(draw: st.DrawFn) -> tuple[RateCurve, ...]:
    wanted = [("matmul", "f32"), ("matmul", "bf16"), ("attention", "f32"), ("memory", "")]
    return tuple(RateCurve(*key, draw(_points)) for key in wanted if draw(st.booleans()))


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
            None,
            None,
            draw(st.just(0.0) | _positive),
            0.0,
            draw(_curves()),
            draw(_op_costs),
        )
        for name in names
    )
    if host is None:
        given = {name: draw(st.none() | st.integers(1, 256)) for name in ("threads", "cores")}
        message = draw(st.just(0.0) | _positive)
        types = (*types[1:], replace(types[0], backend="cpu", message_seconds=message, **given))
    devices = tuple(
        Device(index, draw(st.sampled_from(names)), draw(st.sampled_from(["n0", "n1", "ñ 2"])))
        for index in range(draw(st.integers(1, 6)))
    )
    rule = LinkRule(Link(draw(_positive), draw(_positive)), "*", "*", None)
    inner = LinkRule(
        Link(0.0, draw(_positive)),
        same_node=draw(st.booleans()),
        collectives=tuple((name, link) for name in COLLECTIVES if draw(st.booleans())),
        streams=draw(st.none() | _positive),
        compute_share=draw(st.just(0.0) | st.floats(0.01, 0.99)),
        progress_share=draw(st.just(1.0) | st.floats(0.01, 0.99)),
        skew_seconds=draw(st.just(0.0) | _positive),
        handling=tuple((name, link) for name in HANDLED if draw(st.booleans())),
    )
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
        ('overhead = "5 us"', "cores = 4", "has cores, but only CPU workers", 7, "leave"),
        ('overhead = "5 us"', 'message = "9 us"', "has message, but only CPU workers", 7, "leave"),
        ("count = 2", "count = 0", "count = 0", 13, "at least 1"),
        ("count = 2", "count = 100000000000", "too large", 13, "65536 devices in all"),
        ('backend = "cuda"', "backend = 3", "gpu.backend = 3 is not text", 4, "mend 'backend'"),
        ('"75 GiB"', '"0.5 B"', "less than one byte", 5, "GiB"),
        ('node = "box1"\n', 'node = ""\n', "has no name", 17, "name the machine"),
        ('node = "box1"\n', "", "devices.node is missing", 15, "add 'node'"),
        ('latency = "1.5 ms"', 'latency = "-1 ms"', "must not be negative", 27, "calibrate"),
        ('"350 GB/s"', '"1e999 GB/s"', "must be finite", 22, "calibrate"),
        ('overhead = "5 us"', "host = 3", "gpu.host = 3 is not a table", 7, "keys of a host"),
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


MEASURED = """\
# bandwidth = "9 GB/s"  latency: comments name no lines
[types.worker]
backend = "cpu"
memory = "4 GiB"
memory_bandwidth = "8 GB/s"
overhead = "3 us"
instruction = "40 us"
rates = { f32 = "60 GFLOP/s" }
matmul_rates = { f32 = [["1 MFLOP", "20 GFLOP/s"], ["1 GFLOP", "60 GFLOP/s"]] }
attention_rates = { f32 = [["2 MFLOP", "9 GFLOP/s"]] }
memory_bandwidths = [["64 KiB", "20 GB/s"], ["64 MiB", "8 GB/s"]]
op_costs = { gelu = { forward = { kernels = 2, rates = [["1 KB", "5 GB/s"]] } } }

[[devices]]
type = "worker"
node = "here"
count = 2

[[links]]
same_node = true
latency = "100 us"
bandwidth = "2 GB/s"
streams = 1.5
compute_share = 1.25
progress_share = 0.5
skew = "200 us"
all_reduce = { latency = "90 us", bandwidth = "3 GB/s" }
handling = { all_gather = { latency = "450 us", bandwidth = "1 GB/s" } }

[[links]]
latency = "100 us"
bandwidth = "2 GB/s"
"""


def test_what_calibration_writes() -> None:
    cluster = parse_cluster(MEASURED)
    (kind,) = cluster.types
    assert kind.instruction_seconds == pytest.approx(4e-5)
    assert kind.rate(torch.float32, 1e6) == 20e9 and kind.rate(torch.float32) == 60e9
    assert kind.rate(torch.float32, 10**7.5) == pytest.approx((20e9 * 60e9) ** 0.5)
    assert kind.rate(torch.float32, 1e12, "attention") == 9e9
    assert kind.rate(torch.float64, 1.0) == 60e9
    assert kind.memory_rate(1.0) == 20e9 and kind.memory_rate(1 << 26) == 8e9
    gelu = OpCost("gelu", "forward", 2.0, ((1e3, 5e9),))
    assert kind.op_cost("gelu", "elementwise", "forward") == gelu
    assert kind.op_cost("gelu", "elementwise", "backward_input") is None
    assert kind.op_cost("relu", "elementwise", "forward") is None
    assert kind.op_cost("gelu", "elementwise", "forward", torch.bfloat16) == gelu
    assert kind.op_rate(gelu, 1e6) == 5e9 and kind.op_rate(OpCost("x", "forward", 1.0), 1.0) == 20e9
    rule = cluster.rule(0, 1)
    assert (rule.streams, rule.compute_share) == (1.5, 1.25)
    assert (rule.progress_share, rule.skew_seconds) == (0.5, pytest.approx(2e-4))
    assert rule.handling == (("all_gather", Link(pytest.approx(45e-5), 1e9)),)
    own = cluster.link(0, 1, "all_reduce")
    assert (own.latency_seconds, own.bytes_per_second) == (pytest.approx(90e-6), 3e9)
    assert cluster.link(0, 1, "all_gather") == cluster.link(0, 1) == rule.link


@pytest.mark.parametrize(
    ("old", "new", "cause", "line", "way_out"),
    [
        ('"40 us"', '"40 GB"', "instruction = '40 GB' is not a quantity", 7, "us"),
        ('["1 MFLOP", "20 ', '["1 MFLOP", "0 ', "'0 GFLOP/s' must be positive", 9, "calibrate"),
        ('["1 GFLOP", "60', '["1 KFLOP", "60', "f32 = '1 KFLOP' is not a quantity", 9, "MFLOP"),
        ('["1 GFLOP", "60', '["1 FLOP", "60', "do not ascend: '1 FLOP' follows", 9, "order"),
        ('{ f32 = [["2 MFLOP", "9 GFLOP/s"]] }', '{ f99 = [["2 MFLOP", "9 GFLOP/s"]] }',
         "unknown dtype 'f99' among the attention_rates", 10, "f32"),
        ('[["2 MFLOP", "9 GFLOP/s"]]', '"9 GFLOP/s"', "is not a list of pairs", 10, "1 MFLOP"),
        ('["64 MiB", "8 GB/s"]', '["64 MiB"]', "memory_bandwidths is not a list of", 11, "64"),
        ('["64 MiB", "8 GB/s"]', '["64 MiB", "8 GB"]', "'8 GB' is not a quantity", 11, "GB/s"),
        ("kernels = 2", 'kernels = "2"', "kernels = '2' is not a number", 12, "without a unit"),
        ("kernels = 2", "kernels = -1", "kernels = -1 is not a number", 12, "at least 0"),
        ("kernels = 2, ", "", "worker.op_costs.gelu.forward.kernels is missing", 12, "number"),
        ("kernels = 2,", "kernel = 2,", "unknown key 'kernel'", 12, "keys of a phase"),
        ("{ forward =", "{ forwards =", "unknown key 'forwards'", 12, "backward_input"),
        ('"5 GB/s"]]', '"5 GB"]]', "'5 GB' is not a quantity", 12, "GB/s"),
        ("streams = 1.5", "streams = 0", "streams = 0 is not a number above 0", 23, "above 0"),
        ("compute_share = 1.25", "compute_share = 2", "of at least 0 and below 2", 24, "below 2"),
        ("progress_share = 0.5", "", "compute_share = 1.25 is not a number", 24, "below 1"),
        ("progress_share = 0.5", "progress_share = 0", "is not a number above 0", 25, "above 0"),
        ("progress_share = 0.5", "progress_share = 1.5", "more than the whole", 25, "at most 1"),
        ('"200 us"', '"200 GB"', "'200 GB' is not a quantity", 26, "us"),
        ("all_reduce =", "all_reduction =", "unknown key 'all_reduction'", 27, "all_reduce"),
        ('"3 GB/s"', '"0 GB/s"', "bandwidth = '0 GB/s' must be positive", 27, "calibrate"),
        ('latency = "90 us", ', "", "links.all_reduce.latency is missing", 27, "add it"),
        ('\n\n[[links]]\nlatency = "100 us"\nbandwidth = "2 GB/s"',
         '\n\n[[links]]\nlatency = "100 us"\nbandwidth = "2 GiB"', "'2 GiB' is not a", 32, "GiB/s"),
        ("{ all_gather =", "{ all_to_all =", "unknown key 'all_to_all'", 28, "reduce_scatter"),
        ('"450 us"', '"450 B"', "'450 B' is not a quantity", 28, "us"),
    ],
)  # fmt: skip
def test_mistakes_in_what_was_measured(
    old: str, new: str, cause: str, line: int, way_out: str
) -> None:
    assert old in MEASURED
    with pytest.raises(ClusterError) as caught:
        parse_cluster(MEASURED.replace(old, new), name="here.toml")
    assert cause in caught.value.cause
    assert caught.value.where == f"here.toml:{line}"
    assert any(way_out in way for way in caught.value.ways_out), caught.value.ways_out


@pytest.mark.parametrize("key", ["threads", "cores"])
@pytest.mark.parametrize("number", ["0", "-2", "1.5", '"4"', "true"])
def test_threads_and_cores_are_whole_numbers(key: str, number: str) -> None:
    text = GOOD.replace('backend = "cuda"', f'backend = "cpu"\n{key} = {number}')
    with pytest.raises(ClusterError, match=f"is not a number of {key}") as caught:
        parse_cluster(text, name="lab.toml")
    assert caught.value.where == "lab.toml:5"
    cluster = parse_cluster(text.replace(f"{key} = {number}", f"{key} = 3"))
    assert getattr(cluster.types[0], key) == 3


def test_mistakes_in_json_are_named_too() -> None:
    text = render_cluster(parse_cluster(MEASURED), format="json")
    with pytest.raises(ClusterError) as caught:
        parse_cluster(text.replace('"60 GFLOP/s"', '"6 GB"', 1), name="a.json", format="json")
    assert caught.value.where.startswith("a.json:")
    lines = text.splitlines()
    assert '"60 GFLOP/s"' in lines[int(caught.value.where.split(":")[1]) - 1]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="cannot read the cluster file"):
        read_cluster(tmp_path / "none.toml")


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text(render_cluster(preset("h100-node"), format="json")[:200])
    with pytest.raises(ClusterError, match="not JSON"):
        read_cluster(path)


@pytest.mark.parametrize(
    ("text", "format", "cause", "where"),
    [
        (GOOD.replace("[[devices]]", "[devices", 1), "toml", "not TOML", "lab:10"),
        ("name = ", "toml", "not TOML", "lab:1"),
        ("a = " + "[" * 100_000, "toml", "nested too deeply", "lab"),
        ('{"types": {\n"a"', "json", "not JSON", "lab:2"),
        ("[" * 100_000, "json", "nested too deeply", "lab"),
        ('{"name": "a", "name": "b"}', "json", "'name' is given twice", "lab"),
        ('{"types": NaN}', "json", "NaN is not", "lab"),
        ("[]", "json", "not a table of keys", "lab"),
        ("name = 5", "toml", "name = 5 is not text", "lab:1"),
        ('name = "a"\ntypes = []', "toml", "types = [] is not a table", "lab:2"),
    ],
)
def test_what_does_not_parse_is_refused_with_its_line(
    text: str, format: str, cause: str, where: str
) -> None:
    with pytest.raises(ClusterError) as caught:
        parse_cluster(text, name="lab", format=format)
    assert cause in caught.value.cause
    assert caught.value.where == where and caught.value.ways_out


@pytest.mark.parametrize(
    ("raw", "cause", "line"),
    [
        (b"name = 1\n\xff\xfe", "no text in UTF-8", ":2"),
        (GOOD.encode("utf-16"), "no text in UTF-8", ":1"),
        (b"\0" * 100, "not TOML", ":1"),
        (b"", "types is missing", ""),
    ],
)
def test_files_that_are_no_text_are_refused(
    raw: bytes, cause: str, line: str, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.toml"
    path.write_bytes(raw)
    with pytest.raises(ClusterError, match=cause) as caught:
        read_cluster(path)
    assert caught.value.where == f"{path}{line}" and caught.value.ways_out


def test_paths_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for path, cause in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none.toml", "No such file"),
        (tmp_path / "a\0.toml", "null byte"),
        (tmp_path / ("x" * 300 + ".toml"), "too long"),
    ):
        with pytest.raises(ClusterError, match=cause) as caught:
            parse_devices(str(path))
        assert caught.value.where == str(path) and caught.value.ways_out


def test_a_byte_order_mark_and_other_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "CLUSTER.TOML"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert parse_devices(str(path)) == parse_cluster(GOOD)


def test_devices_without_pairs_need_no_links() -> None:
    alone = GOOD[: GOOD.index("[[links]]")].replace("count = 2", "count = 1")
    first = alone[: alone.rindex("[[devices]]")]
    assert parse_cluster(first).links == ()
    with pytest.raises(ClusterError, match="no link between device 0") as caught:
        parse_cluster(alone)
    assert "add a [[links]] rule" in caught.value.ways_out[0]


def test_a_file_that_cannot_be_written_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text("old")

    def is_full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", is_full)
    with pytest.raises(UsageError, match="No space left"):
        write_cluster(preset("h100-node"), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[types]", "devices = []", "[[devices]]\ncount = 1"])
def test_a_file_with_parts_missing(text: str) -> None:
    with pytest.raises(ClusterError):
        parse_cluster(text)


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"\.toml or \.json"):
        write_cluster(preset("cpu-node"), tmp_path / "cluster.yaml")
