"""Text, verifier and fingerprint on captured models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cutset.compiler.capture import capture
from cutset.compiler.codegen.programs import generate_programs
from cutset.compiler.ir.fingerprint import fingerprint, plan_hash
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.text import parse_graph, parse_program, print_graph, print_program
from cutset.compiler.ir.verify import verify_graph, verify_plan, verify_programs
from tests.ir.pipelines import make_plan


class ConvNet(nn.Module):
    """Convolution, BatchNorm, pooling, dropout, a long skip and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.dropout = nn.Dropout(0.25)
        self.head = nn.Linear(4, 5)

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.norm(self.first(image)))
        second = self.dropout(self.second(first)) + first
        pooled = nn.functional.adaptive_avg_pool2d(second, 1).flatten(1)
        return nn.functional.cross_entropy(self.head(pooled), label)


def conv_net(batch: int, size: int) -> tuple[nn.Module, dict[str, Any]]:
    image, label = torch.randn(batch, 3, size, size), torch.zeros(batch, dtype=torch.int64)
    return ConvNet(), {"image": image, "label": label}


def gpt2(batch: int, length: int) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        vocab_size=32,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = torch.zeros(batch, length, dtype=torch.int64)
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


Make = Callable[[int, int], tuple[nn.Module, dict[str, Any]]]


def captured(make: Make, batch: int, size: int) -> Graph:
    model, kwargs = make(batch, size)
    return capture(model.train(), (), kwargs, mode=Mode.TRAIN, check=False).graph


@pytest.mark.parametrize("make", [conv_net, gpt2])
def test_captured_models_from_graph_to_programs(make: Make) -> None:
    graph = captured(make, 2, 8)
    verify_graph(graph)
    assert parse_graph(print_graph(graph)) == graph
    plan = make_plan(graph, 3, 4)
    verify_plan(plan, graph)
    programs = generate_programs(graph, plan, plan_hash=plan_hash(plan), clip_grad_norm=1.0)
    verify_programs(programs)
    for program in programs:
        assert parse_program(print_program(program)) == program


@pytest.mark.parametrize("make", [conv_net, gpt2])
def test_other_input_sizes_are_the_same_model(make: Make) -> None:
    one, other = (fingerprint(captured(make, *sizes), "M") for sizes in ((2, 8), (3, 6)))
    assert one.structure_hash == other.structure_hash
    assert one.graph_hash != other.graph_hash
