"""Where a kernel cannot be captured, a stage goes on without graphs; with kernels that run here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from cutset.compiler.ir.graph import Graph, Mode, OutputKind
from cutset.runtime import cuda_graphs
from cutset.runtime.cuda_graphs import GraphSlots
from cutset.runtime.kernels import Source, StageKernels, trace_inference, trace_training
from tests.ir.builders import GraphBuilder
from tests.runtime.test_kernels import CPU, compile_stage, values_for

PARTS = (("v",), ("w",))


def linears() -> Graph:
    build = GraphBuilder("linears", Mode.TRAIN)
    h = build.boundary("h", (2, 8), torch.float64)
    w, v = (build.parameter(name, (8, 8), torch.float64) for name in "wv")
    y = build.op("aten.tanh.default", build.op("aten.linear.default", h, w))
    y = build.op("aten.tanh.default", build.op("aten.linear.default", y, v))
    build.output(y, OutputKind.BOUNDARY, target=y.name)
    return build.build()


class Recorded:
    """In place of a kernel's graph: runs the kernel, or fails to capture the one named."""

    def __init__(self, failing: str) -> None:
        self.failing = failing

    def __call__(self, graphed: cuda_graphs._GraphedKernel) -> Sequence[Tensor | None]:
        if graphed._kernel is self.kernels[self.failing]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return graphed._kernel(list(graphed._static))

    kernels: Mapping[str, object] = MappingProxyType({})


def microbatch(slots: GraphSlots, kernels: StageKernels, tensors: list[Tensor]) -> list[Tensor]:
    """Output, input gradient and weight gradient of one microbatch, as the executor runs it."""
    kept: dict[tuple[Source, int], Tensor | None] = {
        (Source.TANGENT, 0): torch.ones_like(tensors[0])
    }

    def keep(arguments: list[Tensor | None]) -> None:
        kept.update({(Source.ARGUMENT, i): tensor for i, tensor in enumerate(arguments)})

    results, slot = slots.forward([torch.tensor(0), *tensors], keep)
    saved = results[kernels.num_outputs :]
    kept.update({(Source.SAVED, i): tensor for i, tensor in enumerate(saved)})
    assert kernels.backward_input is not None
    arguments = [kept[source] for source in kernels.input_sources]
    back = slots.backward(slot, "input", kernels.backward_input, arguments)
    kept.update({(Source.PASSED, i): tensor for i, tensor in enumerate(back[1:])})
    slot_is_free = len(slots._free)
    buffers = {i: torch.zeros_like(tensors[i]) for i in kernels.signature.trained}
    for part in kernels.backward_weights:
        own = [buffers[i] for i in part.accumulated]
        arguments = [*(kept[source] for source in part.sources), *own]
        passed = slots.backward(slot, part.name, part.kernel, arguments)
        kept.update(
            {(Source.PASSED, i): tensor for i, tensor in zip(part.passed, passed, strict=True)}
        )
        last = part is kernels.backward_weights[-1]
        assert len(slots._free) == slot_is_free + (last and slot is not None and not slots._broken)
    assert results[0] is not None and back[0] is not None
    return [results[0], back[0], *buffers.values()]


def named(kernels: StageKernels) -> dict[str, object]:
    weights = {part.name: part.kernel for part in kernels.backward_weights}
    return {"forward": kernels.forward, "input": kernels.backward_input, **weights}


@pytest.mark.parametrize("failing", ["forward", "input", "weight 0", "weight 1"])
def test_a_stage_that_cannot_be_captured_runs_without_graphs(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = linears()
    kernels = trace_training(compile_stage(graph), graph, CPU, parts=PARTS)
    recorded = Recorded(failing)
    recorded.kernels = named(kernels)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(cuda_graphs._GraphedKernel, "__call__", lambda graphed: recorded(graphed))
    slots = GraphSlots(kernels)
    tensors = values_for(graph)
    eager = microbatch(slots, kernels, tensors)
    with pytest.warns(UserWarning, match="without CUDA graphs.*not permitted"):
        second = microbatch(slots, kernels, tensors)
    third = microbatch(slots, kernels, tensors)
    for got in (second, third):
        for mine, theirs in zip(got, eager, strict=True):
            assert torch.equal(mine, theirs)


class Captured:
    """In place of a graph: it has computed when it was captured, and computes no more."""

    def __init__(self, graphed: cuda_graphs._GraphedKernel) -> None:
        graphed._results = graphed._kernel(list(graphed._static))

    def replay(self) -> None:
        pass


@pytest.mark.parametrize("follow", [True, False])
def test_slots_hold_nothing_between_b_and_w_once_captured(
    follow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = linears()
    kernels = trace_training(compile_stage(graph), graph, CPU, parts=PARTS)
    assert any(kind is Source.PASSED for kind, _ in kernels.backward_weights[0].sources)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(cuda_graphs._GraphedKernel, "_capture", lambda graphed: Captured(graphed))
    slots = GraphSlots(kernels, in_flight=2, weights_follow=follow)
    tensors = values_for(graph)
    made = [slots._new_slot() for _ in range(2)]
    pools = {id(one._pool) for slot in made for one in slot.backward.values()}
    assert len(pools) == (1 if follow else 2)
    assert made[0].forward._pool is not made[1].forward._pool
    first, second, third = (microbatch(slots, kernels, tensors) for _ in range(3))
    assert all(map(torch.equal, second, first))
    assert torch.equal(third[0], first[0]) and torch.equal(third[1], first[1])
    (slot,) = slots._free
    for name, graphed in slot.backward.items():
        held = [tensor for tensor in graphed._results if tensor is not None]
        assert len(held) == (1 if name == "input" else 0), name
        assert [i for i, tensor in enumerate(graphed._static) if tensor is not None] == sorted(
            graphed._dynamic
        )


class Rerun:
    """In place of a graph: computes into the tensors of its first run."""

    def __init__(self, graphed: cuda_graphs._GraphedKernel) -> None:
        self.static = list(graphed._static)
        self.kernel = graphed._kernel
        graphed._results = self.kernel(list(self.static))
        self.results = list(graphed._results)
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for into, made in zip(self.results, self.kernel(list(self.static)), strict=True):
            if into is not None and made is not None:
                into.copy_(made)


def shifted(mode: Mode) -> Graph:
    """A product, and a buffer added to it."""
    build = GraphBuilder("shifted", mode)
    h, w = build.boundary("h", (2, 8), torch.float64), build.parameter("w", (8, 8), torch.float64)
    b = build.buffer("b", (8,), torch.float64)
    y = build.op("aten.add.Tensor", build.op("aten.linear.default", h, w), b)
    build.output(y, OutputKind.BOUNDARY, target=y.name)
    return build.build()


def test_buffers_are_copied_when_they_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = shifted(Mode.INFER)
    kernels = trace_inference(compile_stage(graph), graph, CPU)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(cuda_graphs._GraphedKernel, "_capture", lambda graphed: Rerun(graphed))
    slots = GraphSlots(kernels)
    h, w, b = values_for(graph)

    def forward() -> Tensor:
        (result,), slot = slots.forward([torch.tensor(0), h, w, b], lambda staged: None)
        slots.release(slot)
        assert result is not None
        return result

    for _ in range(3):
        assert torch.equal(forward(), torch.nn.functional.linear(h, w) + b)
    (slot,) = slots._free
    static = slot.forward._static[3]
    assert static is not None and static is not b
    copies = static._version
    forward()
    assert static._version == copies, "nothing to copy"
    b += 1.0
    assert torch.equal(forward(), torch.nn.functional.linear(h, w) + b)
    b = torch.full_like(b, 3.0)
    assert torch.equal(forward(), torch.nn.functional.linear(h, w) + b)
    assert static._version == copies + 2


def test_recorded_kernels_can_be_replayed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = linears()
    kernels = trace_training(compile_stage(graph), graph, CPU, parts=PARTS)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(cuda_graphs._GraphedKernel, "_capture", lambda graphed: Rerun(graphed))
    slots = GraphSlots(kernels)
    tensors = values_for(graph)
    microbatch(slots, kernels, tensors)
    (slot,) = slots._free
    assert slots.replays(slot) == slots.replays(None) == {}
    microbatch(slots, kernels, tensors)
    again = slots.replays(slot)
    assert set(again) == set(named(kernels))
    for replay in again.values():
        replay()
    graphs = [slot.forward._graph, *(graphed._graph for graphed in slot.backward.values())]
    assert [graph.replays for graph in graphs if isinstance(graph, Rerun)] == [2] * len(again)
