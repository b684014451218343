"""What a person is told of a sharded plan: devices, layouts in words, where ranks meet, why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from cutset.compiler.capture import capture
from cutset.compiler.explain import explain, explain_json
from cutset.compiler.explain_blocks import BlockSummary, summarize_blocks
from cutset.compiler.explain_mesh import alternatives_text, constraint, mesh_text
from cutset.compiler.explain_runner_up import runner_up_text
from cutset.compiler.ir.cluster import Link, LinkRule
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import Alternative, Plan
from cutset.cost_models.presets import limit_memory, parse_devices
from cutset.passes.context import PlanOptions
from cutset.passes.pipeline import plan_graph
from tests.conftest import Golden

LAYERS = 4


@pytest.fixture(scope="module")
def graph() -> Graph:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=4096,
        use_cache=False,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        ids = torch.zeros(4, 64, dtype=torch.long)
    return capture(model, (), {"input_ids": ids, "labels": ids}, mode=Mode.TRAIN).graph


@pytest.fixture(scope="module")
def plan(graph: Graph) -> Plan:
    options = PlanOptions(mesh=Mesh.parse("data=2,pipeline=2,tensor=2"), zero=1)
    return plan_graph(graph, parse_devices("h100:8"), batch_size=16, options=options)


@pytest.fixture(scope="module")
def blocks(graph: Graph, plan: Plan) -> dict[str, BlockSummary]:
    return {block.label: block for block in summarize_blocks(plan, graph)}


def test_the_picture_shows_stages_and_columns(plan: Plan, golden: Golden) -> None:
    golden("explain/mesh.txt", mesh_text(plan))


def test_equal_layers_are_told_of_once(blocks: dict[str, BlockSummary]) -> None:
    layers = [label for label in blocks if "layers" in label]
    assert sum(blocks[label].count for label in layers) == LAYERS
    assert len(layers) < LAYERS
    assert {"model.embed_tokens", "lm_head"} <= set(blocks)


def test_layouts_are_named_as_columns_and_rows(blocks: dict[str, BlockSummary]) -> None:
    layer = next(block for label, block in blocks.items() if "layers" in label)
    words = {name: words for words, names in layer.parameters for name in names}
    for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert words[name] == "column [R,S(0)], ZeRO-1", name
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert words[name] == "row [R,S(1)], ZeRO-1", name


def test_traffic_and_memory_are_counted(blocks: dict[str, BlockSummary]) -> None:
    layer = next(block for label, block in blocks.items() if "layers" in label)
    assert layer.forward.count >= 2 and layer.backward.count >= 2
    assert layer.forward.num_bytes > 0 and layer.forward.seconds > 0
    assert layer.step.count == 9  # every parameter's gradient is summed over the data axis
    assert 0 < layer.memory_share < 1
    assert layer.forward.seconds + layer.backward.seconds < layer.seconds
    assert layer.replicated_seconds is not None and layer.replicated_seconds > layer.seconds


def test_the_next_best_layouts_of_a_block_are_priced(
    plan: Plan, blocks: dict[str, BlockSummary]
) -> None:
    assert plan.prediction is not None
    entry = next(block for label, block in blocks.items() if "layers" in label).runner_up
    assert entry is not None
    assert entry.step_seconds > 0 and entry.constraint == "time"
    first = entry.changes[0]
    assert first.is_parameter and first.name.startswith("model.layers.")
    assert first.chosen != first.instead
    text = runner_up_text(entry, plan.prediction.step_seconds)
    assert f"{first.name} {first.instead} instead of {first.chosen}" in text
    assert text.endswith("binds: time")


def test_memory_keeps_faster_layouts_of_a_block_away(graph: Graph) -> None:
    """With room for it, blocks are laid out otherwise."""
    mesh = Mesh.parse("tensor=8")
    options = PlanOptions(mesh=mesh, num_microbatches=4, recompute="none")
    slow = replace(parse_devices("h100:8"), links=(LinkRule(Link(1e-4, 1e9)),))
    free = plan_graph(graph, slow, batch_size=16, options=options)
    assert free.prediction is not None
    limit = max(entry.total_bytes for entry in free.prediction.memory) // 2
    tight = plan_graph(graph, limit_memory(slow, limit), batch_size=16, options=options)
    assert tight.prediction is not None
    entries = [block.runner_up for block in summarize_blocks(tight, graph)]
    faster = [entry for entry in entries if entry is not None and entry.step_seconds < 0]
    assert any(entry.constraint == "memory of stage 0" for entry in faster)
    assert all(entry.device_bytes > 0 for entry in faster)
    assert "binds: memory of stage 0" in " ".join(explain(tight, graph).split())


def test_text_and_json_say_the_same(graph: Graph, plan: Plan) -> None:
    found = json.loads(json.dumps(explain_json(plan, graph)))
    assert found["zero"] == 1
    assert found["devices"]["columns"][1] == {"place": {"data": 0, "tensor": 1}, "devices": [1, 3]}
    assert {block["label"] for block in found["blocks"]} >= {"lm_head"}
    text = explain(plan, graph)
    assert "ZeRO-1 (states in parts over data)" in text
    assert "instead    replicated over tensor" in text
    head = next(block for block in found["blocks"] if block["label"] == "lm_head")
    assert head["runner_up"]["constraint"] == "time"
    assert head["runner_up"]["changes"][0]["name"] == "lm_head.weight"
    assert text.count("runner-up  ") == sum(bool(block["runner_up"]) for block in found["blocks"])
    assert "lm_head" in explain(plan, graph) and "instead" not in explain(plan)


def test_the_constraint_is_named(plan: Plan) -> None:
    assert constraint(plan).startswith("none, it is time")
    small = replace(plan.cluster.types[0], memory_bytes=1000 << 20)
    tight = replace(plan, cluster=replace(plan.cluster, types=(small,)))
    assert constraint(tight).startswith("memory of device")
    faster = Alternative(Mesh.parse("data=8"), 1, 0, 1e-9, fits=False)
    assert "mesh data=8 with 1 microbatch would take" in constraint(
        replace(plan, alternatives=(faster,))
    )


def test_the_runner_up_is_named(plan: Plan) -> None:
    assert plan.prediction is not None
    seconds = plan.prediction.step_seconds
    others = (
        Alternative(Mesh.parse("data=8"), 2, 3, 1.5 * seconds, fits=True),
        Alternative(Mesh.parse("tensor=8"), 1, 0, 0.5 * seconds, fits=False),
    )
    first, second = alternatives_text(replace(plan, alternatives=others)).splitlines()
    assert first.startswith("runner-up       mesh data=8 with 2 microbatches, ZeRO-3")
    assert first.endswith("(+50.0%)")
    assert second.endswith("(-50.0%), does not fit")
