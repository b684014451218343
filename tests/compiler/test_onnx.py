"""Annotated ONNX says where every node is, and its validator notices when that is nonsense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from cutset.compiler.export import build_onnx, to_onnx, validate_onnx
from cutset.compiler.export.sharding import sharding_spec, stage_devices
from cutset.compiler.ir.errors import PlanFormatError
from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.mesh import Layout, Mesh
from cutset.compiler.ir.plan import Plan
from tests.compiler.plans import plan_of
from tests.ir.builders import mlp, tied_embedding


def _mlp_plan() -> tuple[Plan, Graph]:
    graph = mlp(num_layers=2)
    return plan_of(graph, (0, 1), (2, 3, 4)), graph


def _model() -> onnx.ModelProto:
    return build_onnx(*_mlp_plan())


def _metadata(entries: object) -> dict[str, str]:
    return {entry.key: entry.value for entry in entries}  # type: ignore[attr-defined]


def test_file_round_trip_passes_both_checkers(tmp_path: Path) -> None:
    plan, graph = _mlp_plan()
    to_onnx(plan, graph, tmp_path / "plan.onnx", plan_hash="cafe")
    model = onnx.load(tmp_path / "plan.onnx")
    onnx.checker.check_model(model)
    validate_onnx(model)
    assert model.ir_version == 11
    assert _metadata(model.metadata_props)["cutset.plan_hash"] == "cafe"
    assert _metadata(model.metadata_props)["cutset.schedule"] == str(plan.schedule)


def test_every_node_has_its_stage_device_and_module() -> None:
    model = _model()
    assert [node.op_type for node in model.graph.node] == [
        "linear", "relu", "linear", "relu", "mse_loss",
    ]  # fmt: skip
    stages = [node.device_configurations[0].pipeline_stage for node in model.graph.node]
    assert stages == [0, 0, 1, 1, 1]
    last = model.graph.node[2]
    assert last.domain == "cutset.aten"
    assert list(last.device_configurations[0].sharding_spec[0].device) == [1]
    notes = _metadata(last.metadata_props)
    assert notes["cutset.module"] == "layers.1"
    assert notes["cutset.source"] == "model.py:7"
    assert "aten.linear.default(%relu, %layers_1_weight, %layers_1_bias)" in notes["cutset.call"]


def test_weights_are_named_inputs_unless_their_contents_are_given() -> None:
    plan, graph = _mlp_plan()
    assert {item.name for item in build_onnx(plan, graph).graph.input} == {
        "x", "y", "layers_0_weight", "layers_0_bias", "layers_1_weight", "layers_1_bias",
    }  # fmt: skip
    weight = torch.randn(8, 8).T  # not contiguous
    model = build_onnx(plan, graph, tensors={"layers.0.weight": weight})
    onnx.checker.check_model(model)
    (initializer,) = model.graph.initializer
    assert "layers_0_weight" not in {item.name for item in model.graph.input}
    stored = torch.from_numpy(onnx.numpy_helper.to_array(initializer).copy())
    assert torch.equal(stored, weight)


def test_scalar_arguments_become_attributes_by_schema_name() -> None:
    graph = tied_embedding()
    model = build_onnx(plan_of(graph, (0, 1, 2), tuple(range(1, len(graph.nodes)))), graph)
    nodes = {node.name: node for node in model.graph.node}
    assert onnx.helper.get_node_attr_value(nodes["unsqueeze"], "dim") == 1
    assert list(onnx.helper.get_node_attr_value(nodes["view"], "size")) == [10, 8]
    assert onnx.helper.get_node_attr_value(nodes["mask"], "dtype") == b"b1"


def test_a_node_recomputed_in_two_stages_is_replicated_over_their_devices() -> None:
    graph = tied_embedding()
    model = build_onnx(plan_of(graph, (0, 1, 2), tuple(range(1, len(graph.nodes)))), graph)
    validate_onnx(model)
    mask = next(node for node in model.graph.node if node.name == "mask")
    (spec,) = mask.device_configurations[0].sharding_spec
    assert mask.device_configurations[0].pipeline_stage == 0
    assert [list(group.value) for group in spec.index_to_device_group_map] == [[0, 1]]
    assert _metadata(mask.metadata_props)["cutset.stage"] == "0,1"


def test_a_plan_of_another_graph_is_refused() -> None:
    plan, _ = _mlp_plan()
    with pytest.raises(PlanFormatError, match="in no stage"):
        build_onnx(plan, mlp(num_layers=3))
    with pytest.raises(PlanFormatError, match="past the graph's last"):
        build_onnx(plan, mlp(num_layers=1))


def test_sharding_over_two_axes_lists_shards_in_row_major_order() -> None:
    mesh = Mesh.parse("data=2,pipeline=2,tensor=2")
    plan = replace(_mlp_plan()[0], mesh=mesh)
    devices = stage_devices(plan, 1)
    assert devices == (2, 3, 6, 7)

    def spec(layout: str) -> onnx.ShardingSpecProto:
        return sharding_spec(
            "h", num_dims=2, layout=Layout.parse(layout), mesh=mesh, stage_devices=(devices,)
        )

    both = spec("[S(1),R,S(0)]")  # dim 0 over tensor, dim 1 over data
    assert list(both.device) == [2, 6, 3, 7]
    assert [(dim.axis, dim.simple_sharding[0].num_shards) for dim in both.sharded_dim] == [
        (0, 2), (1, 2),
    ]  # fmt: skip
    one = spec("[R,R,S(0)]")
    assert list(one.device) == [-1, -2]
    assert [list(entry.value) for entry in one.index_to_device_group_map] == [[2, 6], [3, 7]]
    same = spec("[S(0),R,S(0)]")
    assert list(same.device) == [2, 3, 6, 7]
    assert same.sharded_dim[0].simple_sharding[0].num_shards == 4


def _annotation(model: onnx.ModelProto, node: int) -> onnx.NodeDeviceConfigurationProto:
    return model.graph.node[node].device_configurations[0]


def _shard(model: onnx.ModelProto, axis: int, num_shards: int) -> None:
    spec = _annotation(model, 0).sharding_spec[0]
    spec.sharded_dim.add(axis=axis).simple_sharding.add(num_shards=num_shards)


def _no_stage(model: onnx.ModelProto) -> None:
    _annotation(model, 3).ClearField("pipeline_stage")


def _hole(model: onnx.ModelProto) -> None:
    for node in (0, 1):
        _annotation(model, node).pipeline_stage = 1


BREAKS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "old IR": (lambda m: setattr(m, "ir_version", 10), "no multi-device fields"),
    "no configuration": (lambda m: m.ClearField("configuration"), "no device configuration"),
    "no devices": (lambda m: setattr(m.configuration[0], "num_devices", 0), "num_devices is 0"),
    "device names": (lambda m: m.configuration[0].device.append("x"), "3 device names for 2"),
    "same names": (
        lambda m: m.configuration[0].device.__setitem__(0, m.configuration[0].device[1]),
        "same name",
    ),
    "unknown configuration": (
        lambda m: setattr(_annotation(m, 0), "configuration_id", "other"),
        "unknown configuration 'other'",
    ),
    "two annotations": (
        lambda m: m.graph.node[0].device_configurations.append(_annotation(m, 0)),
        "twice",
    ),
    "negative stage": (lambda m: setattr(_annotation(m, 0), "pipeline_stage", -1), "is -1"),
    "stage past the last": (
        lambda m: setattr(_annotation(m, 4), "pipeline_stage", 2),
        "stage 2 of 2 stages",
    ),
    "backward edge": (
        lambda m: setattr(_annotation(m, 4), "pipeline_stage", 0),
        "reads 'relu_1' of the later stage 1",
    ),
    "a hole": (_hole, "no node has pipeline stage 0"),
    "no stage": (_no_stage, "without a pipeline stage"),
    "foreign tensor": (
        lambda m: setattr(_annotation(m, 0).sharding_spec[0], "tensor_name", "y"),
        "neither input nor output",
    ),
    "unknown device": (
        lambda m: _annotation(m, 0).sharding_spec[0].device.__setitem__(0, 2),
        "device 2 is not one of 0..1",
    ),
    "device twice": (
        lambda m: _annotation(m, 0).sharding_spec[0].device.append(0),
        "one device holds two shards",
    ),
    "empty group": (
        lambda m: _annotation(m, 0).sharding_spec[0].index_to_device_group_map.add(key=0),
        "group 0 is empty",
    ),
    "unused group": (
        lambda m: _annotation(m, 0).sharding_spec[0].index_to_device_group_map.add(key=-5),
        "group -5 holds no shard",
    ),
    "axis": (lambda m: _shard(m, 2, 1), "axis 2 of a tensor with 2 dims"),
    "shard count": (lambda m: _shard(m, -1, 2), "2 shards on 1 devices"),
    "no shards": (lambda m: _shard(m, 0, 0), r"shard counts \[0\]"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_validator_names_what_is_broken(name: str) -> None:
    change, message = BREAKS[name]
    model = _model()
    validate_onnx(model)
    change(model)
    with pytest.raises(PlanFormatError, match=message):
        validate_onnx(model)
