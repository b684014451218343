"""A plan as annotated ONNX: the whole model's graph with the place of every node.

From a graph and a plan made for it, to a `ModelProto` of IR version 11, whose multi-device fields
(`configuration`, node `device_configurations` with `pipeline_stage` and `sharding_spec`) say which
stage and devices run each node. What those fields cannot hold (partial sums, modules, source
lines, schedule, certificate, exact floats) is in `metadata_props` under `cutset.` keys, which
viewers show. One ONNX node stands for one ATen node, in the domain `cutset.<namespace>`.

The file is a view: it names weights without their contents unless `tensors` is given, and nothing
is ever read back from it. A node recomputed in several stages appears once, in the first of them,
replicated over the devices of all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from ..files import set_aside, write_whole
from ..ir.errors import PlanFormatError
from ..ir.graph import Attribute, Graph, Node, Operand, Value, ValueKind
from ..ir.ops import resolve
from ..ir.plan import Plan
from ..ir.text import print_node
from ..ir.text.scan import print_literal
from .sharding import sharding_spec, stage_devices
from .validate import validate_onnx

__all__ = ["CONFIGURATION", "build_onnx", "to_onnx"]

CONFIGURATION = "cutset"
_IR_VERSION = 11  # the first with multi-device fields
_OPSET = 23  # the opset of that IR version; no node uses it
_EXTERNAL_DATA_BYTES = 1 << 30  # a protobuf message ends at 2 GiB

_ELEMENT_TYPES: dict[torch.dtype, int] = {
    torch.float64: TensorProto.DOUBLE,
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
    torch.complex64: TensorProto.COMPLEX64,
    torch.complex128: TensorProto.COMPLEX128,
}


def to_onnx(
    plan: Plan,
    graph: Graph,
    path: str | Path,
    *,
    plan_hash: str = "",
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write `build_onnx(...)` to `path`, whole or not at all, after validating it.

    Contents above 1 GiB go to a file beside it, `<path>.data`.

    Raises:
        PlanFormatError: the plan has no stages or is not of this graph.
        UsageError: a file cannot be written.
    """
    model = build_onnx(plan, graph, plan_hash=plan_hash, tensors=tensors)
    onnx.checker.check_model(model)
    validate_onnx(model)
    target = Path(path)
    weight_bytes = sum(len(item.raw_data) for item in model.graph.initializer)
    if weight_bytes <= _EXTERNAL_DATA_BYTES:
        write_whole(target, model.SerializeToString(), "ONNX")
        return
    with set_aside(target, "ONNX") as folder:
        onnx.save_model(
            model,
            str(folder / target.name),
            save_as_external_data=True,
            location=f"{target.name}.data",
        )


def build_onnx(
    plan: Plan,
    graph: Graph,
    *,
    plan_hash: str = "",
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> onnx.ModelProto:
    """The annotated model.

    Args:
        plan: a plan with stages for `graph`.
        graph: the captured model.
        plan_hash: stored in the metadata.
        tensors: contents of parameters, buffers and constants by name; without them these are
            graph inputs of known type.

    Raises:
        PlanFormatError: the plan has no stages or is not of this graph.
    """
    stages = _stages_of_nodes(plan, graph)
    contents = dict(tensors or {})
    held = [value for value in graph.values if value.kind is not ValueKind.RESULT]
    body = helper.make_graph(
        nodes=[_node(plan, graph, node, stages[node.id]) for node in graph.nodes],
        name=graph.name or "model",
        inputs=[_value_info(value) for value in held if value.origin not in contents],
        outputs=[_value_info(graph.values[item]) for item in _output_ids(graph)],
        initializer=[
            _initializer(value, contents[value.origin])
            for value in held
            if value.origin in contents
        ],
        value_info=[_value_info(value) for value in graph.values_of(ValueKind.RESULT)],
    )
    domains = sorted({_domain(node) for node in graph.nodes})
    model = helper.make_model(
        body,
        ir_version=_IR_VERSION,
        producer_name="cutset",
        opset_imports=[
            helper.make_opsetid("", _OPSET),
            *(helper.make_opsetid(domain, 1) for domain in domains),
        ],
    )
    devices = plan.cluster.devices
    model.configuration.append(
        onnx.DeviceConfigurationProto(
            name=CONFIGURATION,
            num_devices=len(devices),
            device=[f"{item.node}/{item.type}:{item.index}" for item in devices],
        )
    )
    helper.set_model_props(model, _model_metadata(plan, graph, plan_hash))
    return model


def _stages_of_nodes(plan: Plan, graph: Graph) -> list[tuple[int, ...]]:
    """Stages that compute each node, ascending. Raises PlanFormatError if there are none."""
    table: list[list[int]] = [[] for _ in graph.nodes]
    for stage in plan.stages:
        for node in stage.nodes:
            if node >= len(table):
                raise _other_graph(f"stage {stage.index} holds node {node}, past the graph's last")
            table[node].append(stage.index)
    for lost, stages in zip(graph.nodes, table, strict=True):
        if not stages:
            raise _other_graph(f"node {lost.name!r} ({lost.op}) is in no stage")
    return [tuple(sorted(stages)) for stages in table]


def _other_graph(cause: str) -> PlanFormatError:
    return PlanFormatError(
        cause,
        where="stages of the plan",
        ways_out=("export the plan with the model it was made for", "plan this model again"),
    )


def _node(plan: Plan, graph: Graph, node: Node, stages: tuple[int, ...]) -> onnx.NodeProto:
    overload = node.op.name.rsplit(".", 1)[1]
    proto = helper.make_node(
        node.op.packet,
        inputs=[graph.values[value].name for value in node.inputs],
        outputs=[graph.values[value].name for value in node.outputs],
        name=node.name,
        domain=_domain(node),
        overload=overload if overload != "default" else None,
        doc_string=node.module_path or None,
    )
    proto.attribute.extend(
        attribute
        for name, item in _named_arguments(node)
        if (attribute := _attribute(name, item)) is not None
    )
    proto.device_configurations.append(_device_configuration(plan, graph, node, stages))
    _set_metadata(proto.metadata_props, _node_metadata(plan, graph, node, stages))
    return proto


def _device_configuration(
    plan: Plan, graph: Graph, node: Node, stages: tuple[int, ...]
) -> onnx.NodeDeviceConfigurationProto:
    layouts = {entry.value: entry.layout for entry in plan.layouts}
    devices = tuple(stage_devices(plan, stage) for stage in stages)
    return onnx.NodeDeviceConfigurationProto(
        configuration_id=CONFIGURATION,
        pipeline_stage=stages[0],
        sharding_spec=[
            sharding_spec(
                value.name,
                num_dims=len(value.type.shape),
                layout=layouts.get(value.name),
                mesh=plan.mesh,
                stage_devices=devices,
            )
            for value in (graph.values[item] for item in node.outputs)
        ],
    )


def _domain(node: Node) -> str:
    return f"cutset.{node.op.name.split('.')[0]}"


def _named_arguments(node: Node) -> list[tuple[str, Attribute]]:
    """(name, value) of every argument of the call, positional ones by the operator's schema."""
    names = [argument.name for argument in resolve(node.op)._schema.arguments]
    return [*zip(names, node.args, strict=False), *node.kwargs]


def _attribute(name: str, item: Attribute) -> onnx.AttributeProto | None:
    """ONNX attribute for one argument; None for a tensor, which is an input, and for None.

    ONNX floats have 32 bits: the exact call is in the node's metadata.
    """
    if item is None or isinstance(item, Operand) or item == ():
        return None
    if isinstance(item, (bool, int)):
        return helper.make_attribute(name, int(item))
    if isinstance(item, (float, str)):
        return helper.make_attribute(name, item)
    if isinstance(item, tuple):
        for kind in (int, float, str):
            numbers = [kind(part) for part in item if isinstance(part, kind)]
            if len(numbers) == len(item):
                return helper.make_attribute(name, numbers)
    if isinstance(item, tuple) and all(isinstance(part, Operand) for part in item):
        return None
    return helper.make_attribute(name, print_literal(item, lambda operand: f"%{operand.index}"))


def _value_info(value: Value) -> onnx.ValueInfoProto:
    info = helper.make_tensor_value_info(
        value.name, _ELEMENT_TYPES[value.type.dtype], list(value.type.shape)
    )
    if value.kind is not ValueKind.RESULT:
        entries = {"cutset.kind": value.kind.value, "cutset.origin": value.origin}
        if value.aliases:
            entries["cutset.tied_to"] = ", ".join(value.aliases)
        if value.batch_dim is not None:
            entries["cutset.batch_dim"] = str(value.batch_dim)
        _set_metadata(info.metadata_props, entries)
    return info


def _initializer(value: Value, tensor: torch.Tensor) -> onnx.TensorProto:
    contents = tensor.detach().cpu().contiguous().reshape(-1)
    return onnx.TensorProto(
        name=value.name,
        data_type=_ELEMENT_TYPES[tensor.dtype],
        dims=list(tensor.shape),
        raw_data=contents.view(torch.uint8).numpy().tobytes() if contents.numel() else b"",
    )


def _output_ids(graph: Graph) -> tuple[int, ...]:
    return tuple(dict.fromkeys(output.value for output in graph.outputs))


def _node_metadata(plan: Plan, graph: Graph, node: Node, stages: tuple[int, ...]) -> dict[str, str]:
    entries = {
        "cutset.stage": ",".join(map(str, stages)),
        "cutset.device": ",".join(
            str(device) for stage in stages for device in stage_devices(plan, stage)
        ),
        "cutset.module": node.module_path,
        "cutset.source": node.source,
        "cutset.call": print_node(graph, node),
    }
    names = {graph.values[value].name for value in node.outputs}
    entries.update(
        (f"cutset.layout.{entry.value}", str(entry.layout))
        for entry in plan.layouts
        if entry.value in names
    )
    return {key: text for key, text in entries.items() if text}


def _model_metadata(plan: Plan, graph: Graph, plan_hash: str) -> dict[str, str]:
    outputs = [
        f"{item.kind.value} {item.target}".strip() + f" = {graph.values[item.value].name}"
        for item in graph.outputs
    ]
    entries = {
        "cutset.plan_hash": plan_hash,
        "cutset.graph_hash": plan.fingerprint.graph_hash,
        "cutset.mode": plan.mode.value,
        "cutset.num_stages": str(len(plan.stages)),
        "cutset.num_microbatches": str(plan.num_microbatches),
        "cutset.batch_size": str(plan.batch_size),
        "cutset.mesh": str(plan.mesh),
        "cutset.outputs": "\n".join(outputs),
        "cutset.warnings": "\n".join(plan.warnings),
    }
    if plan.schedule is not None:
        entries["cutset.schedule"] = str(plan.schedule)
    if plan.certificate is not None:
        entries["cutset.certificate"] = json.dumps(asdict(plan.certificate))
    if plan.prediction is not None:
        entries["cutset.prediction"] = json.dumps(asdict(plan.prediction))
    return {key: text for key, text in entries.items() if text}


def _set_metadata(target: object, entries: Mapping[str, str]) -> None:
    for key, text in entries.items():
        entry = target.add()  # type: ignore[attr-defined]
        entry.key, entry.value = key, text
