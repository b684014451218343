"""What the IR says of parameters, devices, draws and mutation, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cutset.compiler.capture import Captured, capture
from cutset.compiler.capture.interpret import run_graph
from cutset.compiler.ir.errors import CaptureError, UsageError
from cutset.compiler.ir.graph import Graph, Mode, OutputKind, ValueKind
from tests.models.example import mean_square


class _Net(nn.Module):
    """A linear layer and whatever a test does around it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)


def _train(model: nn.Module, *args: Any) -> Captured:
    return capture(model, args or (torch.ones(3, 4),), mode=Mode.TRAIN, loss_fn=mean_square)


def _packets(graph: Graph) -> list[str]:
    return [node.op.packet for node in graph.nodes]


def test_nodes_know_their_module_and_source_line() -> None:
    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).relu()

    linear, relu, *_ = _train(Model()).graph.nodes
    assert linear.module_path == "layer" and relu.module_path == ""
    assert linear.source.startswith("test_lower.py:") and relu.source == linear.source


def test_calls_in_helpers_have_the_line_of_the_forward_that_called_them() -> None:
    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return self.helper(y)

        def helper(self, x: Tensor) -> Tensor:
            return torch.ops.aten.mul.Tensor(x, x) + 1.0

    linear, mul, add, *_ = _train(Model()).graph.nodes
    line = int(linear.source.removeprefix("test_lower.py:"))
    assert mul.source == add.source == f"test_lower.py:{line + 1}"
    assert not torch.fx.config.do_not_emit_stack_traces, "torch's setting is put back"


def test_tied_weights_are_one_parameter() -> None:
    class Model(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 4, bias=False)
            self.other.weight = self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.layer(x))

    model = Model()
    captured = _train(model)
    (weight,) = captured.graph.values_of(ValueKind.PARAMETER)
    assert (weight.origin, weight.aliases) == ("layer.weight", ("other.weight",))
    assert captured.tensors["layer.weight"] is model.layer.weight


def test_closed_over_tensors_are_constants() -> None:
    table = torch.arange(4.0)

    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * table

    captured = _train(Model())
    (constant,) = captured.graph.values_of(ValueKind.CONSTANT)
    assert torch.equal(captured.tensors[constant.origin], table)


def test_changed_buffers_are_outputs() -> None:
    class Model(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("steps", torch.zeros((), dtype=torch.long), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return self.norm(self.layer(x))

    graph = _train(Model()).graph
    changed = {output.target for output in graph.outputs_of(OutputKind.BUFFER)}
    assert changed == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "steps",
    }


def test_changed_input_is_refused_by_name() -> None:
    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1.0)
            return self.layer(x)

    with pytest.raises(CaptureError, match="changes its input .* in place"):
        _train(Model())


def test_devices_stand_for_the_device_that_runs_the_graph() -> None:
    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + torch.arange(4, device=x.device))

    with torch.device("meta"):
        model = Model()
    captured = capture(model, (torch.empty(3, 4),), mode=Mode.TRAIN, loss_fn=mean_square)
    (arange,) = (node for node in captured.graph.nodes if node.op.packet == "arange")
    assert dict(arange.kwargs)["device"] == torch.device("cpu")
    given = {"args[0]": torch.ones(3, 4), "layer.weight": torch.ones(4, 4)}
    assert run_graph(captured.graph, given)[0].device == torch.device("cpu")
    given = {name: tensor.to("meta") for name, tensor in given.items()}
    assert run_graph(captured.graph, given)[0].device == torch.device("meta")


def test_dead_draws_are_removed_but_counted() -> None:
    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3)
            nn.functional.dropout(x, 0.0)
            return nn.functional.dropout(self.layer(x), 0.5) + torch.randn(4)

    captured = _train(Model())
    draws = [node.random_draw for node in captured.graph.nodes if node.random_draw is not None]
    assert draws == [1, 2] and captured.num_draws == 3
    given = {**captured.tensors, "args[0]": torch.ones(3, 4)}
    with pytest.raises(UsageError, match="needs a key"):
        run_graph(captured.graph, given)


def test_random_operator_without_replacement_is_refused() -> None:
    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.poisson(x)

    with pytest.raises(CaptureError, match="poisson"):
        _train(Model())


def test_branch_on_data_is_refused_with_place_and_way_out() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    class Model(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.layer(x))

    with pytest.raises(CaptureError, match="cannot trace Model") as refusal:
        _train(Model())
    assert "module inner (Inner), test_lower.py:" in refusal.value.where
    assert any("torch.where" in way for way in refusal.value.ways_out)


def test_shape_that_depends_on_data_is_refused() -> None:
    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[x > 0]

    with pytest.raises(CaptureError, match="depends on data"):
        capture(Model(), (torch.ones(3, 4),), mode=Mode.INFER)


def test_loop_over_experts_names_the_other_implementations() -> None:
    class Experts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for index in range(int(x.sum())):
                x = x + index
            return x

    class Model(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

        def forward(self, x: Tensor) -> Tensor:
            return self.experts(self.layer(x))

    with pytest.raises(CaptureError) as refusal:
        _train(Model())
    assert "grouped_mm" in refusal.value.ways_out[0]


def test_model_that_fails_by_itself_is_told_apart() -> None:
    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[:, :3])

    with pytest.raises(CaptureError, match="Model itself fails on the example inputs"):
        _train(Model())


def test_operator_of_a_library_is_refused_by_name() -> None:
    @torch.library.custom_op("cutset_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_fake(lambda x: torch.empty_like(x))

    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            return double(self.layer(x))

    with pytest.raises(CaptureError, match=r"cutset_test\.double.* not torch's own"):
        capture(Model(), (torch.ones(3, 4),), mode=Mode.INFER)


def test_lists_of_one_are_single_results() -> None:
    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            (whole,) = self.layer(x).chunk(1)
            (only,) = whole.unsqueeze(0).unbind(0)
            return only

    graph = _train(Model()).graph
    assert all(len(node.outputs) == 1 for node in graph.nodes)
    assert "select" in _packets(graph) and "unbind" not in _packets(graph)


def test_names_do_not_collide_with_generated_code() -> None:
    class Model(_Net):
        def forward(self, key: Tensor, device: Tensor, **rest: Tensor) -> Tensor:
            return self.layer(key) + device + rest["lambda"]

    named = {"key": torch.ones(3, 4), "device": torch.ones(4), "lambda": torch.ones(4)}
    captured = capture(Model(), (), named, mode=Mode.INFER)
    names = [value.name for value in captured.graph.values]
    assert not {"key", "device", "lambda"} & set(names)
    assert all(name.isidentifier() for name in names) and len(set(names)) == len(names)


def test_what_export_refuses_is_traced_symbolically() -> None:
    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_exporting():
                raise RuntimeError("not under export")
            return self.layer(x).tanh()

    captured = _train(Model())
    assert _packets(captured.graph)[:2] == ["linear", "tanh"]
    assert captured.graph.nodes[0].module_path == "layer"
    assert "layer.weight" in captured.tensors


def test_symbolic_traces_that_miss_a_region_are_refused() -> None:
    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_exporting():
                raise RuntimeError("not under export")
            with torch.no_grad():
                x = x * 2
            return self.layer(x)

    with pytest.raises(CaptureError, match="switches gradients"):
        _train(Model())


def test_attributes_that_a_call_sets_are_put_back_and_reported() -> None:
    class Model(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("total", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.cache = self.layer(x)
            self.total = self.total + self.cache.detach().mean(0)
            return self.cache + self.total

    model = Model()
    total = model.total
    captured = _train(model)
    assert model.calls == 0 and not hasattr(model, "cache") and model.total is total
    assert torch.equal(total, torch.zeros(4))
    assert len(captured.warnings) == 1 and "attribute cache" in captured.warnings[0]
    assert [output.target for output in captured.graph.outputs] == ["", "total"]


def test_errors_that_the_model_catches_leave_no_node() -> None:
    class Model(_Net):
        def forward(self, x: Tensor) -> Tensor:
            try:
                x = x.view(7, 7)
            except RuntimeError:
                x = x * 2
            return self.layer(x)

    assert _packets(_train(Model()).graph)[:2] == ["mul", "linear"]
