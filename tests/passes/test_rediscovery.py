"""The planner finds what people worked out by hand: Megatron's columns and rows, data parallelism,
ZeRO, tensor parallelism inside nodes, split vocabularies.

Golden files hold the decisions (mesh, ZeRO, how parameters are held, where ranks meet), no figures.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from cutset.compiler.capture import capture
from cutset.compiler.ir.cluster import Cluster, Link, LinkRule
from cutset.compiler.ir.graph import Graph, Mode, ValueKind
from cutset.compiler.ir.mesh import Mesh, Shard
from cutset.compiler.ir.plan import Plan
from cutset.compiler.sharding.localize import localize
from cutset.compiler.sharding.sharding import Sharding
from cutset.cost_models.presets import limit_memory, parse_devices
from cutset.passes.context import PlanOptions
from cutset.passes.pipeline import plan_graph
from tests.conftest import Golden

MIB = 1 << 20
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


@functools.cache
def llama(
    rows: int,
    tokens: int,
    *,
    hidden: int,
    intermediate: int,
    vocabulary: int,
    layers: int = 2,
    heads: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Graph:
    """A Llama on meta, captured at a microbatch of `rows`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        use_cache=False,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
        ids = torch.zeros(rows, tokens, dtype=torch.long)
    return capture(model, (), {"input_ids": ids, "labels": ids}, mode=Mode.TRAIN).graph


def parameter_bytes(graph: Graph) -> int:
    return sum(value.type.num_bytes for value in graph.values_of(ValueKind.PARAMETER))


def slow_links(devices: int) -> Cluster:
    link = LinkRule(Link(latency_seconds=5e-5, bytes_per_second=1e9))
    return replace(parse_devices(f"h100:{devices}"), links=(link,))


def planned(
    graph: Graph,
    cluster: Cluster,
    batch: int,
    mesh: str | None = None,
    num_microbatches: int | None = None,
) -> Plan:
    options = PlanOptions(
        mesh=None if mesh is None else Mesh.parse(mesh), num_microbatches=num_microbatches
    )
    return plan_graph(graph, cluster, batch_size=batch, options=options)


def held(graph: Graph, plan: Plan) -> dict[str, str]:
    """How each parameter is held, by its path in the model."""
    sharding = Sharding.of(plan, graph)
    values = graph.values_of(ValueKind.PARAMETER)
    return {value.origin or value.name: str(sharding.layout(value)) for value in values}


def meetings(graph: Graph, plan: Plan, module: str) -> Counter[str]:
    """Collectives of the first rank's local graph within `module`; an all-gather whose gradient is
    reduce-scattered, as it is one of terms, has a name of its own, as have those of parameters."""
    sharding = Sharding.of(plan, graph)
    part = localize(graph, sharding, (0,) * len(sharding.mesh.axes)).graph
    found: Counter[str] = Counter()
    for node in part.nodes:
        if node.op.name.startswith("cutset.") and node.module_path.startswith(module):
            of_terms = node.op.packet == "all_gather" and node.args[5] is True
            kind = f"{node.op.packet}{' of terms' if of_terms else ''}"
            if part.values[node.inputs[0]].kind is ValueKind.PARAMETER:
                kind += ", parameter"
            found[kind] += 1
    return found


def decisions(graph: Graph, plan: Plan, module: str) -> str:
    """What a golden file holds."""
    table = held(graph, plan).items()
    lines = [f"mesh {plan.mesh or 'of one device'}, ZeRO-{plan.zero_level}"]
    lines += [f"{name} {layout}" for name, layout in table if name.startswith(module)]
    found = sorted(meetings(graph, plan, module).items())
    lines += [f"{module}: {count} x {packet}" for packet, count in found]
    return "\n".join(lines)


def test_blocks_without_room_become_columns_then_rows(golden: Golden) -> None:
    """Shoeybi et al., Megatron-LM (2019): two sums a layer forward and two backward, or their form
    as reduce-scatter and all-gather (Korthikanti et al., 2022)."""
    graph = llama(
        8, 128, hidden=1024, intermediate=4096, vocabulary=4096, heads=16, dtype=torch.bfloat16
    )
    limit = 100 * MIB
    assert limit < 2 * parameter_bytes(graph), "with its gradients it does not fit whole"
    plan = planned(graph, limit_memory(parse_devices("h100:8"), limit), 8, "tensor=8")
    layouts = held(graph, plan)
    for layer in ("model.layers.0.", "model.layers.1."):
        found = {name.split(".")[-2]: layouts[name] for name in layouts if layer in name}
        assert all(found[name] == "[S(0)]" for name in COLUMNS), found
        assert all(found[name] == "[S(1)]" for name in ROWS), found
    inside = meetings(graph, plan, "model.layers.1")
    assert inside["all_reduce"] + inside["reduce_scatter"] == 2, inside
    assert inside["sum_gradient"] + inside["all_gather of terms"] == 2, inside
    golden("plans/megatron.txt", decisions(graph, plan, "model.layers.1"))


def test_slow_links_and_room_give_data_parallelism(golden: Golden) -> None:
    graph, cluster = small_llama(), slow_links(4)
    plan = planned(graph, cluster, 1024)
    assert str(plan.mesh) == "data=4" and plan.zero_level <= 1
    assert all(layout == "[R]" for layout in held(graph, plan).values())
    rows = {entry.value: entry.layout.placements for entry in plan.layouts}
    assert rows["input_ids"] == rows["labels"] == (Shard(0),)
    assert not meetings(graph, plan, "model.layers"), "ranks meet for the loss and once a step"
    golden("plans/data_parallel.txt", decisions(graph, plan, "model.layers.0"))


def test_the_same_model_without_room_is_sharded_by_zero(golden: Golden) -> None:
    """Rajbhandari et al., ZeRO (2020): states, then gradients, then parameters in parts. The number
    of microbatches is that which is chosen if it is open, which takes ten times as long."""
    graph = small_llama()
    whole = 4 * parameter_bytes(graph)  # parameters, gradients, two states
    plan = planned(graph, limit_memory(slow_links(4), whole - 2 * MIB), 1024, num_microbatches=256)
    assert plan.mesh.axis("data").size > 1 and plan.zero_level >= 1
    states = {entry.value: str(entry.state) for entry in plan.parameter_layouts}
    assert sum("S(" in layout for layout in states.values()) == len(held(graph, plan))
    assert plan.prediction is not None
    assert max(entry.total_bytes for entry in plan.prediction.memory) < whole
    golden("plans/zero.txt", decisions(graph, plan, "model.layers.0"))


def small_llama() -> Graph:
    return llama(4, 256, hidden=512, intermediate=2048, vocabulary=2048)


def test_vocabularies_are_split(golden: Golden) -> None:
    graph = llama(8, 128, hidden=512, intermediate=1024, vocabulary=65536, dtype=torch.bfloat16)
    plan = planned(graph, parse_devices("h100:8"), 8, "tensor=8")
    layouts = held(graph, plan)
    assert layouts["lm_head.weight"] == "[S(0)]"
    assert layouts["model.embed_tokens.weight"] in ("[S(0)]", "[S(1)]")
    golden("plans/vocabulary.txt", decisions(graph, plan, ""))


@pytest.mark.slow
def test_large_models_keep_tensor_parallelism_inside_nodes() -> None:
    """Narayanan et al. (2021): tensors inside nodes of eight, pipeline and data across. The layers
    are those of a 70B model; of 80 there are 4, on 16 devices with memory in proportion."""
    graph = llama(
        8,
        2048,
        hidden=8192,
        intermediate=28672,
        vocabulary=128256,
        layers=4,
        heads=64,
        dtype=torch.bfloat16,
    )
    cluster = limit_memory(parse_devices("h100:16"), 15 * 1024 * MIB)
    plan = planned(graph, cluster, 64)
    sizes = {axis.name: axis.size for axis in plan.mesh.axes}
    assert 1 < sizes["tensor"] <= 8
    assert sizes.get("pipeline", 1) * sizes.get("data", 1) >= 2
    inner = sizes["tensor"]
    for stage in plan.stages:  # the tensor axis is the last of the mesh
        for start in range(0, len(stage.devices), inner):
            group = stage.devices[start : start + inner]
            assert len({plan.cluster.devices[device].node for device in group}) == 1
    layouts = held(graph, plan)
    tensor = [axis.name for axis in plan.stage_mesh.axes].index("tensor")
    for name, layout in layouts.items():
        placements = layout[1:-1].split(",")
        if name.split(".")[-2] in COLUMNS[:3]:
            assert placements[tensor] == "S(0)", (name, layout)
