"""Every memory rule against what torch allocates and keeps when the op runs in a stage."""

from __future__ import annotations

import pytest
import torch

from cutset.cost_models.action_memory import action_memory
from cutset.cost_models.memory_tables import memory_model

from .measured import StageRun, alone
from .op_cases import CASES, LOOSE, case_graph, case_tensors

# A scalar here and there (`2.0` as a tensor, a row of statistics) is not modelled.
SLACK_BYTES = 1100


# Float64 runs through other kernels, or with masks and indices of another relative size.
_PREFIXES = ("conv", "attention", "dropout", "layer", "where")
DOUBLES = [name for name in CASES if name.startswith(_PREFIXES)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES] + [(name, torch.float64) for name in DOUBLES],
)
def test_rule(name: str, dtype: torch.dtype) -> None:
    graph = case_graph(name, dtype)
    predicted = action_memory(memory_model(graph), None)
    measured = StageRun(alone(graph), case_tensors(graph)).measure()
    pairs = {
        "saved": (predicted.saved_bytes, measured.saved),
        "forward": (predicted.forward_bytes, measured.forward),
        "input gradients": (
            predicted.saved_bytes + predicted.backward_input_bytes, measured.backward_input
        ),
        "left for weight gradients": (predicted.left_bytes, measured.left),
        "weight gradients": (
            predicted.left_bytes + predicted.backward_weight_bytes, measured.backward_weight
        ),
    }  # fmt: skip
    for what, (bound, actual) in pairs.items():
        assert bound >= actual - SLACK_BYTES, f"{what}: {bound} predicted, {actual} measured"
        if name not in LOOSE:
            assert bound <= 1.35 * actual + SLACK_BYTES, f"{what}: {bound} against {actual}"


def test_an_op_without_a_rule_is_taken_to_save_everything() -> None:
    graph = case_graph("atan2", torch.float32)
    memory = action_memory(memory_model(graph), None)
    assert memory.saved_bytes == 3 * 64 * 128 * 4
