"""Measure the memory of a stage's kernels as a rank runs them: the oracle of memory prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from cutset.compiler.codegen.python import emit_python, stage_function_name
from cutset.compiler.ir.graph import Graph, Mode, OutputKind, Value, ValueKind
from cutset.compiler.ir.program import Program, StageProgram
from cutset.runtime.kernels import Source, StageKernels, trace_training
from cutset.runtime.rng import make_key

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes, defined as in `ActionMemory`; boundary values and arriving gradients included."""

    saved: int
    forward: int
    backward_input: int
    left: int
    weight_parts: tuple[int, ...]  # peak in each

    @property
    def backward_weight(self) -> int:
        return max(self.weight_parts)

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward_input, self.backward_weight)


class StageRun:
    """The kernels of one stage with example tensors.

    Args:
        stage: from `cut_stages`, or a graph with BOUNDARY values wrapped by `alone`.
        tensors: every argument by name (results of other stages) or origin (everything else).
    """

    def __init__(self, stage: StageProgram, tensors: dict[str, Tensor]) -> None:
        self.stage = stage
        self.graph = stage.graph
        source = emit_python(
            Program(0, 1, Mode.TRAIN, 1, (stage,), (0,) * (stage.index + 1), (), "0" * 12, 0)
        )
        namespace: dict[str, object] = {}
        exec(compile(source, "stage", "exec"), namespace)
        function = namespace[stage_function_name(stage.index)]
        self.kernels: StageKernels = trace_training(function, stage.graph, CPU, parts=stage.parts)
        self.arguments = [
            tensors[value.origin or value.name].detach().contiguous()
            for value in self.kernels.signature.arguments
        ]

    def outputs(self) -> dict[str, Tensor]:
        """Boundary outputs by name."""
        results = self.kernels.forward([make_key(0, 0, 0), *self.arguments])
        return {
            output.target or self.graph.values[output.value].name: tensor.clone()
            for output, tensor in zip(self.graph.outputs, results, strict=False)
            if tensor is not None and output.kind is OutputKind.BOUNDARY
        }

    def measure(self) -> Measured:
        """Run F, B and W of one microbatch under the allocator's eye.

        One profile covers all: it knows nothing of the release of what was allocated before it.
        """
        kernels = self.kernels
        early = [torch.zeros_like(self.arguments[i]) for i in kernels.accumulated_early]
        buffers = [torch.zeros_like(self.arguments[i]) for i in self._accumulated()]
        tangents = [
            self.graph.values[self.graph.outputs[position].value].type
            for position in kernels.signature.tangents
        ]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            with record_function("phase forward"):
                context = self._forward()
            saved = self._fresh(context)
            with record_function("phase input"):
                for index, type in enumerate(tangents):
                    arriving = torch.ones(type.shape, dtype=type.dtype)
                    context[Source.TANGENT, index] = arriving
                    del arriving
                self._backward_input(context, early)
            left = self._fresh(context)
            self._backward_weight(context, buffers)
        peaks = _peaks(profiler)
        weights = tuple(peaks[part.name] for part in kernels.backward_weights)
        return Measured(saved, peaks["forward"], peaks["input"], left, weights)

    def _forward(self) -> dict[tuple[Source, int], Tensor | None]:
        arguments: list[Tensor | None] = [
            tensor.clone() if self._value(position).kind is ValueKind.BOUNDARY else tensor
            for position, tensor in enumerate(self.arguments)
        ]
        arguments.insert(0, make_key(0, 0, 0))
        kernels = self.kernels
        context: dict[tuple[Source, int], Tensor | None] = {
            (kind, index): arguments[index]
            for kind, index in {*kernels.input_sources, *_read_by_weights(kernels)}
            if kind is Source.ARGUMENT
        }
        registers = list(arguments)
        results = list(kernels.forward(arguments))
        for index, tensor in enumerate(results[kernels.num_outputs :]):
            context[Source.SAVED, index] = tensor
        registers.clear()
        return context

    def _backward_input(
        self, context: dict[tuple[Source, int], Tensor | None], buffers: list[Tensor]
    ) -> None:
        kernels = self.kernels
        assert kernels.backward_input is not None
        later = _read_by_weights(kernels)
        registers = [tensor for (kind, _), tensor in context.items() if kind is Source.TANGENT]
        arguments = [
            context[source] if source in later else context.pop(source)
            for source in kernels.input_sources
        ]
        for source in [source for source in context if source not in later]:
            del context[source]
        arguments.extend(buffers)
        results = list(kernels.backward_input(arguments))
        registers.clear()
        gradients = len(kernels.signature.differentiable) - len(kernels.zero_inputs)
        for index, tensor in enumerate(results[gradients:]):
            context[Source.PASSED, index] = tensor

    def _backward_weight(
        self, context: dict[tuple[Source, int], Tensor | None], buffers: list[Tensor]
    ) -> None:
        own = dict(zip(self._accumulated(), buffers, strict=True))
        for number, part in enumerate(self.kernels.backward_weights):
            later = {
                s for rest in self.kernels.backward_weights[number + 1 :] for s in rest.sources
            }
            arguments = [
                context[source] if source in later else context.pop(source)
                for source in part.sources
            ]
            arguments.extend(own[i] for i in part.accumulated)
            with record_function(f"phase {part.name}"):
                passed = part.kernel(arguments)
            for index, tensor in zip(part.passed, passed, strict=True):
                context[Source.PASSED, index] = tensor
            del passed

    def _accumulated(self) -> list[int]:
        return [i for part in self.kernels.backward_weights for i in part.accumulated]

    def _value(self, position: int) -> Value:
        return self.kernels.signature.arguments[position]

    def _fresh(self, context: dict[tuple[Source, int], Tensor | None]) -> int:
        """Bytes of the storages in `context` that are not held between steps."""
        held = {tensor.untyped_storage().data_ptr() for tensor in self.arguments}
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in context.values()
            if tensor is not None
        }
        return sum(size for pointer, size in storages.items() if pointer not in held)


def _read_by_weights(kernels: StageKernels) -> set[tuple[Source, int]]:
    return {source for part in kernels.backward_weights for source in part.sources}


def _peaks(profiler: profile) -> dict[str, int]:
    """Most live bytes in each phase, from the profiler's stream of allocations and releases."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    peaks = {"forward": 0}
    phase, live = "forward", 0
    for event in events:
        if event.name().startswith("phase "):
            phase = event.name().removeprefix("phase ")
            peaks[phase] = max(peaks.get(phase, 0), live)
        elif event.name() == "[memory]":
            live += event.nbytes()
            peaks[phase] = max(peaks[phase], live)
    return peaks


def alone(graph: Graph) -> StageProgram:
    """`graph`, which has BOUNDARY values, as the only stage."""
    consumers = tuple(
        (output.target, (1,)) for output in graph.outputs if output.kind is OutputKind.BOUNDARY
    )
    producers = tuple((value.name, 0) for value in graph.values_of(ValueKind.BOUNDARY))
    return StageProgram(0, graph, consumers, producers)
