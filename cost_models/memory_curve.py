"""Memory of one rank over a simulated step: what is held, saved, under way and transient."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..compiler.ir.graph import Mode, ValueKind
from ..compiler.ir.plan import OptimizerModel
from ..compiler.ir.program import Program, Register
from ..compiler.ir.types import TensorType
from .memory import ActionMemory, action_memory, memory_model, optimizer_temporaries

__all__ = ["MemoryCurve"]


class MemoryCurve:
    """Level of one rank's memory, in bytes, told what the rank does in order of time.

    Args:
        program: of the rank.
        optimizer: whose states are held from the start.
        backend: torch device type of the rank.
    """

    def __init__(self, program: Program, optimizer: OptimizerModel, backend: str) -> None:
        train = program.mode is Mode.TRAIN
        held: dict[str, int] = {}
        self._trained: dict[str, int] = {}
        for stage in program.stages:
            for value in stage.graph.values:
                if value.kind in (ValueKind.PARAMETER, ValueKind.BUFFER, ValueKind.CONSTANT):
                    held[value.origin] = value.type.num_bytes
                if value.kind is ValueKind.PARAMETER and value.requires_grad and train:
                    self._trained[value.origin] = value.type.num_bytes
        self.gradient_bytes = float(sum(self._trained.values()))
        self._closing = optimizer_temporaries(optimizer, tuple(self._trained.values()), backend)
        states = self.gradient_bytes * optimizer.state_bytes_per_parameter_byte
        self._level = sum(held.values()) + self.gradient_bytes + states
        self._actions: dict[int, ActionMemory] = {
            stage.index: action_memory(
                memory_model(stage.graph, backend=backend), None, stage.recomputed
            )
            for stage in program.stages
        }
        self._registers: dict[Register, float] = {}
        self._points: list[tuple[float, float]] = [(0.0, self._level)]

    @property
    def num_gradients(self) -> int:
        return len(self._trained)

    @property
    def peak_bytes(self) -> int:
        return math.ceil(max(level for _, level in self._points))

    def parameter_bytes(self, name: str) -> float:
        """Bytes of the gradient of parameter `name`."""
        return float(self._trained[name])

    def points(self) -> tuple[tuple[float, int], ...]:
        return tuple((seconds, math.ceil(level)) for seconds, level in self._points)

    def define(self, register: Register, type: TensorType, seconds: float) -> None:
        """A register occupies memory from now on."""
        if register not in self._registers:
            self._registers[register] = type.num_bytes
            self._change(seconds, type.num_bytes)

    def free(self, registers: Iterable[Register], seconds: float) -> None:
        freed = sum(self._registers.pop(register, 0.0) for register in registers)
        self._change(seconds, -freed)

    def action(self, kind: str, stage: int, microbatch: int, begin: float, end: float) -> None:
        """A computation: its transients while it runs, what it saves or frees afterwards.

        Boundary values are registers already; a saved one counts twice until it is freed.
        """
        memory = self._actions[stage]
        peak, change = {
            "F": (memory.forward_bytes - memory.received_bytes, memory.saved_bytes),
            "I": (memory.backward_input_bytes, memory.left_bytes - memory.saved_bytes),
            "W": (memory.backward_weight_bytes, -memory.left_bytes),
            "B": (memory.backward_bytes, -memory.saved_bytes),
        }[kind]
        self._points.append((begin, self._level + peak))
        self._change(end, change)

    def optimizer_step(self, begin: float, end: float) -> None:
        self._points.append((begin, self._level + self._closing))
        self._points.append((end, self._level))

    def _change(self, seconds: float, size: float) -> None:
        self._level += size
        self._points.append((seconds, self._level))
