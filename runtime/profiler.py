"""Measures operators of a graph on the device of a worker: seconds of each, as a model runs them.

The nodes of the graph run one after the other, each a function of its own on what those before it
have made, so that operands have the strides and the caches the state that they have in the model.
The values of parameters and inputs are made up: how long an operator takes follows from shapes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..compiler.ir.graph import Value, ValueKind
from ..compiler.ir.program import StageProgram
from ..compiler.ir.text import parse_program
from .communicator import Communicator
from .rank import stage_functions

__all__ = ["Profiler"]

_Kernel = Callable[..., tuple[Tensor, ...]]


class Profiler:
    """What a worker that only measures has instead of a `Rank`; arguments as there."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        device: torch.device,
        communicator: Communicator,
        timeout_seconds: float = 300.0,
    ) -> None:
        self._rank = rank
        self._device = device
        self._communicator = communicator

    def reset(self) -> None:
        """Nothing is kept between calls."""

    def time_nodes(self, *, program: str, source: str, repeats: int) -> list[float]:
        """Median seconds of every node.

        Args:
            program: text form of a program with one node a stage, in an order in which they run.
            source: their stage functions.
            repeats: runs that are timed, after one that is not.
        """
        stages = parse_program(program).stages
        functions = stage_functions(source, f"<cutset profile of rank {self._rank}>")
        run = _Run(stages, functions, self._device)
        self._communicator.barrier(label="the start of measuring")
        run.times()
        rows = [run.times() for _ in range(repeats)]
        return [statistics.median(column) for column in zip(*rows, strict=True)]


class _Run:
    def __init__(
        self,
        stages: tuple[StageProgram, ...],
        functions: dict[str, _Kernel],
        device: torch.device,
    ) -> None:
        self._device = device
        self._key = torch.zeros((), dtype=torch.int64, device=device)
        self._nodes = [(functions[f"stage_{stage.index}"], stage) for stage in stages]
        self._given: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        for stage in stages:
            for value in stage.graph.values:
                named = value.kind not in (ValueKind.RESULT, ValueKind.BOUNDARY)
                if named and value.name not in self._given:
                    self._given[value.name] = _made_up(value, generator).to(device)
        last = {
            value.name: stage.index
            for stage in stages
            for value in stage.graph.values_of(ValueKind.BOUNDARY)
        }
        self._dead: list[list[str]] = [[] for _ in stages]
        position = {stage.index: place for place, stage in enumerate(stages)}
        for name, index in last.items():
            self._dead[position[index]].append(name)

    def times(self) -> list[float]:
        """Seconds of every node in one run."""
        made: dict[str, Tensor] = {}
        seconds = []
        with torch.no_grad():
            for (function, stage), dead in zip(self._nodes, self._dead, strict=True):
                graph = stage.graph
                arguments = [
                    made[value.name]
                    if value.kind is ValueKind.BOUNDARY
                    else self._given[value.name]
                    for value in graph.values
                    if value.kind is not ValueKind.RESULT
                ]
                begin = self._now()
                results = function(self._key, self._device, *arguments)
                seconds.append(self._now() - begin)
                for output, tensor in zip(graph.outputs, results, strict=True):
                    made[graph.values[output.value].name] = tensor
                del arguments, results
                for name in dead:
                    made.pop(name, None)
        return seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _made_up(value: Value, generator: torch.Generator) -> Tensor:
    """Random numbers that neither grow nor vanish through layers; ones for vectors (variances),
    zeros for integers (legal indices)."""
    shape, dtype = value.type.shape, value.type.dtype
    if not value.type.is_float or len(shape) < 2 and value.kind is not ValueKind.INPUT:
        fill = torch.ones if value.type.is_float or dtype is torch.bool else torch.zeros
        return fill(shape, dtype=dtype)
    numbers = torch.randn(shape, generator=generator)
    if value.kind is ValueKind.PARAMETER:
        fan_in = max(1, value.type.numel // max(1, shape[0]))
        numbers *= (2.0 / fan_in) ** 0.5
    return numbers.to(dtype)
