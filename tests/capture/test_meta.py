"""Models on meta, whole or in part, are captured as they are elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cutset.compiler.capture import capture
from cutset.compiler.ir.fingerprint import fingerprint
from cutset.compiler.ir.graph import Mode


class Net(nn.Module):
    """Has a buffer, makes tensors of numbers, moves them to the device it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)
        self.tied = self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        given = torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)
        moved = torch.tensor(3.0).to(x.device)
        return (self.linear(x) * given * self.scale + moved + self.tied.sum()).mean()


def test_the_graph_is_that_of_a_real_model() -> None:
    real, whole, mixed = Net(), Net().to("meta"), Net()
    mixed.linear.to("meta")
    mixed.tied = mixed.linear.weight
    whole.tied = whole.linear.weight
    inputs = (torch.ones(2, 4),)
    expected = capture(real, inputs, mode=Mode.TRAIN)
    for model in (whole, mixed):
        found = capture(model, inputs, mode=Mode.TRAIN)
        assert fingerprint(found.graph, "Net") == fingerprint(expected.graph, "Net")
        constants = [t for name, t in found.tensors.items() if name.startswith("lifted")]
        assert [t.tolist() for t in constants] == [[1.0, 2.0, 3.0, 4.0], 3.0]
    assert mixed.linear.weight.is_meta
    assert mixed.scale.tolist() == [2.0] * 4, "the model is as it was"
