"""Shardings flow through whole models: batches without communication, heads between two sums."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch

from cutset.compiler.capture import capture
from cutset.compiler.ir.graph import Graph, Mode, OutputKind, Value, ValueKind
from cutset.compiler.ir.mesh import Partial, Placement, Replicate, Shard
from tests.models.exact import EXACT_MODELS

from .flow import flow


@functools.cache
def _graph(name: str) -> Graph:
    torch.manual_seed(3)
    example = EXACT_MODELS[name]()
    return capture(
        example.model,
        example.args,
        example.kwargs,
        mode=Mode.TRAIN,
        loss_fn=example.loss_fn,
        check=False,
    ).graph


def _rows(value: Value) -> Placement:
    return Replicate() if value.batch_dim is None else Shard(value.batch_dim)


@pytest.mark.parametrize("name", EXACT_MODELS)
def test_a_batch_flows_from_inputs_to_the_loss(name: str) -> None:
    graph = _graph(name)
    found = flow(graph, 2, _rows)
    assert not found.conversions, "\n".join(map(str, found.conversions))
    (loss,) = graph.outputs_of(OutputKind.LOSS)
    assert found.placements[loss.value] == Partial(), "each rank has its rows' share of the loss"


def _megatron(columns: str, rows: str, *, transposed: bool = False) -> Callable[[Value], object]:
    """Layouts of weights whose names match: sharded by outputs or by inputs (Shoeybi et al.)."""

    def start(value: Value) -> Placement | None:
        rank = len(value.type.shape)
        if value.kind is not ValueKind.PARAMETER:
            return Replicate()
        if re.search(rows, value.origin) and rank == 2:
            return Shard(0 if transposed else 1)
        if re.search(columns, value.origin):
            return Shard(rank - 1 if transposed else 0)
        return Shard(1) if "relative_attention_bias" in value.origin else Replicate()

    return start


TENSOR_PARALLEL = {
    "llama": (_megatron(r"[qkv]_proj|gate_proj|up_proj", r"[o]_proj|down_proj"), 6),
    "bert": (_megatron(r"query|key|value|intermediate", r"layer.*output\.dense"), 6),
    "t5": (_megatron(r"\.[qkv]\.|\.wi\.", r"\.o\.|\.wo\."), 10),
    "vit": (_megatron(r"[qkv]_proj|intermediate|fc1", r"o_proj|output\.dense|fc2"), 6),
    # the fused projection's thirds do not lie in parts of it: only its heads are sharded
    "gpt2": (_megatron(r"c_fc", r"c_proj", transposed=True), 6),
    "transformer": (_megatron(r"linear1", r"linear2"), 4),
}


@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_heads_and_features_flow_from_columns_to_rows(name: str) -> None:
    start, num_sums = TENSOR_PARALLEL[name]
    found = flow(_graph(name), 2, start, sum_at_once=True)
    assert not found.conversions, "\n".join(map(str, found.conversions))
    assert len(found.sums) == num_sums, [node.name for node in found.sums]
    attention = [
        str(strategy)
        for node, strategy in zip(_graph(name).nodes, found.strategies, strict=True)
        if node.op.packet == "scaled_dot_product_attention" and name not in ("gpt2", "transformer")
    ]
    assert all(text.startswith("S(1),S(1),S(1)") for text in attention), attention
