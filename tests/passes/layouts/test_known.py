"""Layouts whose best form is known from the literature."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from cutset.compiler.capture import capture
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.mesh import Mesh, Replicate, Shard
from cutset.compiler.sharding.localize import localize
from cutset.compiler.sharding.sharding import make_sharding
from cutset.passes.layouts.choose import LayoutChoice, plan_layouts
from cutset.passes.layouts.statement import LayoutOptions

from .test_choose import cluster


@pytest.fixture(scope="module")
def llama() -> dict[str, Graph]:
    """Two layers with wide weights, on few tokens and on many rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
        use_cache=False,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    graphs = {}
    for name, shape in (("tokens", (1, 3)), ("rows", (8, 16))):
        ids = torch.zeros(shape, dtype=torch.long, device="meta")
        call = {"input_ids": ids, "labels": ids.clone()}
        graphs[name] = capture(model, (), call, mode=Mode.TRAIN).graph
    return graphs


def collectives(graph: Graph, choice: LayoutChoice) -> Counter[tuple[str, str]]:
    """(module path, collective) of the first rank's local graph."""
    sharding = make_sharding(
        graph, choice.mesh, choice.node_layouts, choice.layouts, choice.parameter_layouts
    )
    part = localize(graph, sharding, (0,) * len(choice.mesh.axes)).graph
    nodes = (node for node in part.nodes if node.op.name.startswith("cutset."))
    return Counter((node.module_path, node.op.packet) for node in nodes)


def test_blocks_become_columns_then_rows(llama: dict[str, Graph]) -> None:
    """Shoeybi et al., Megatron-LM (2019): two sums forward and two backward a layer."""
    graph, mesh = llama["tokens"], Mesh.parse("tensor=4")
    choice = plan_layouts(graph, mesh, cluster(4, 1e10, latency=1e-5), range(4))
    held = {entry.value: entry.held.placements[0] for entry in choice.parameter_layouts}
    for layer in range(2):
        for name in ("self_attn_q_proj", "self_attn_v_proj", "mlp_gate_proj", "mlp_up_proj"):
            assert held[f"p_model_layers_{layer}_{name}_weight"] == Shard(0), name
        for name in ("self_attn_o_proj", "mlp_down_proj"):
            assert held[f"p_model_layers_{layer}_{name}_weight"] == Shard(1), name
    inside = Counter[str]()
    for (path, packet), count in collectives(graph, choice).items():
        if path.startswith("model.layers.1"):  # the first one also gathers the embedding
            inside[packet] += count
    forward = inside["all_reduce"] + inside["reduce_scatter"]
    backward = inside["sum_gradient"] + inside["all_gather"]
    assert (forward, backward) == (2, 2), inside


def test_vocabularies_are_split(llama: dict[str, Graph]) -> None:
    choice = plan_layouts(
        llama["tokens"], Mesh.parse("tensor=4"), cluster(4, 1e10, latency=1e-5), range(4)
    )
    held = {entry.value: entry.held.placements[0] for entry in choice.parameter_layouts}
    assert isinstance(held["p_model_embed_tokens_weight"], Shard)
    assert held["p_lm_head_weight"] == Shard(0)


def test_data_parallel_ranks_meet_for_the_loss_alone(llama: dict[str, Graph]) -> None:
    graph, mesh = llama["rows"], Mesh.parse("data=4")
    choice = plan_layouts(graph, mesh, cluster(4, 1e6, latency=1e-4), range(4))
    assert {value.value: value.layout.placements for value in choice.layouts} == {
        "input_ids": (Shard(0),),
        "labels": (Shard(0),),
    }
    assert all(entry.held.placements == (Replicate(),) for entry in choice.parameter_layouts)
    assert sum(collectives(graph, choice).values()) <= 2
    assert choice.step_seconds > 0


def test_memory_limit_splits_parameters(llama: dict[str, Graph]) -> None:
    graph, mesh, machine = llama["rows"], Mesh.parse("tensor=4"), cluster(4, 1e7)
    free = plan_layouts(graph, mesh, machine, range(4), LayoutOptions(num_microbatches=64))
    need = free.static_bytes + free.saved_bytes + free.transient_bytes
    options = LayoutOptions(num_microbatches=64, memory_bytes=need * 3 // 4)
    tight = plan_layouts(graph, mesh, machine, range(4), options)
    assert tight.static_bytes + tight.saved_bytes + tight.transient_bytes <= need * 3 // 4
    assert tight.objective >= free.objective
    assert tight.static_bytes < free.static_bytes


def test_equal_layers_take_one_decision(llama: dict[str, Graph]) -> None:
    from cutset.passes.layouts.classes import node_classes

    classes = node_classes(llama["rows"])
    assert sum(map(len, classes)) == len(llama["rows"].nodes)
