from __future__ import annotations

import torch
from torch import Tensor, nn

from cutset.compiler.capture import capture
from cutset.compiler.ir.graph import Graph, Mode


class _Flat(nn.Module):
    """A linear layer on flattened rows; `kept` reads the rows a second time."""

    def __init__(self, kept: bool = False, other: bool = False) -> None:
        super().__init__()
        self.map = nn.Linear(6, 5)
        self.kept, self.other = kept, other

    def forward(self, x: Tensor) -> Tensor:
        steps, batch = x.shape[1], x.shape[0]
        rows = x.transpose(0, 1).reshape(steps * batch, 6)
        mapped = self.map(rows)
        shape = (5, steps * batch) if self.other else (steps, batch, 5)
        total = mapped.view(shape).square().mean()
        return total + rows.mean() if self.kept else total


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the operand and of the result of the linear; capture checks gradients."""
    graph: Graph = capture(model.double(), (torch.randn(4, 3, 6).double(),), mode=Mode.TRAIN).graph
    (node,) = (node for node in graph.nodes if node.op.packet == "linear")
    return [graph.values[value].type.shape for value in (node.inputs[0], *node.outputs)]


def test_rows_are_not_flattened_for_a_linear() -> None:
    assert _shapes(_Flat()) == [(3, 4, 6), (3, 4, 5)]


def test_rows_that_others_read_stay_flat() -> None:
    assert _shapes(_Flat(kept=True)) == [(12, 6), (12, 5)]


def test_rows_that_are_not_unflattened_stay_flat() -> None:
    assert _shapes(_Flat(other=True)) == [(12, 6), (12, 5)]


def test_attention_keeps_its_batch() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0].square().mean()

    graph = capture(Attend().double(), (torch.randn(4, 3, 8).double(),), mode=Mode.TRAIN).graph
    shapes = [graph.values[n.outputs[0]].type.shape for n in graph.nodes if n.op.packet == "linear"]
    assert shapes[-1] == (3, 4, 8)
