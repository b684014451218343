"""Which registers each instruction defines and reads, from the stage graphs of all programs."""

from __future__ import annotations

from dataclasses import replace

from ..graph import OutputKind, Value, ValueKind
from ..program import (
    Backward,
    BackwardInput,
    Forward,
    Instruction,
    Program,
    Register,
    Send,
    StageProgram,
    TensorShard,
)
from ..types import TensorType

__all__ = ["Registers", "boundary_inputs", "boundary_outputs"]


def boundary_inputs(stage: StageProgram) -> tuple[Value, ...]:
    """Values that the stage receives."""
    return stage.graph.values_of(ValueKind.BOUNDARY)


def boundary_outputs(stage: StageProgram) -> tuple[Value, ...]:
    """Values that the stage sends, under the names that they have for others."""
    graph = stage.graph
    return tuple(
        replace(graph.values[item.value], name=item.target)
        for item in graph.outputs_of(OutputKind.BOUNDARY)
    )


class Registers:
    """Tables of the registers of a set of programs.

    The columns of a mesh send values of the same names, but their parts may differ in size.
    """

    def __init__(self, programs: tuple[Program, ...]) -> None:
        self._types: dict[tuple[int, str], TensorType] = {}
        self._parts: dict[tuple[int, str], TensorShard] = {}
        self._inputs: dict[int, tuple[str, ...]] = {}
        self._outputs: dict[int, tuple[str, ...]] = {}
        self._input_gradients: dict[int, tuple[str, ...]] = {}
        self._output_gradients: dict[int, tuple[tuple[str, int], ...]] = {}
        for program in programs:
            for stage in program.stages:
                self._add(program.rank, stage)

    def _add(self, rank: int, stage: StageProgram) -> None:
        received, sent = boundary_inputs(stage), boundary_outputs(stage)
        self._types.update({(rank, value.name): value.type for value in (*received, *sent)})
        self._parts.update({(rank, shard.name): shard for shard in stage.boundaries})
        self._inputs[stage.index] = tuple(value.name for value in received)
        self._outputs[stage.index] = tuple(value.name for value in sent)
        self._input_gradients[stage.index] = tuple(
            value.name for value in received if value.requires_grad
        )
        differentiable = {value.name for value in sent if value.requires_grad}
        self._output_gradients[stage.index] = tuple(
            (name, consumer)
            for name, consumers in stage.consumers
            if name in differentiable
            for consumer in consumers
        )

    def type_of(self, rank: int, register: Register) -> TensorType | None:
        """Type of the value on `rank` (a gradient has its value's type); None if it has none."""
        return self._types.get((rank, register.value))

    def part_of(self, rank: int, register: Register) -> TensorShard | None:
        """Which part of the whole value `rank` has, where stages have meshes of their own."""
        return self._parts.get((rank, register.value))

    def defines(self, item: Instruction) -> tuple[Register, ...]:
        """Registers that `item` computes (not those that a `Recv` fills)."""
        if isinstance(item, Forward):
            names = self._outputs.get(item.stage, ())
            return tuple(Register(name, item.microbatch) for name in names)
        if isinstance(item, (Backward, BackwardInput)):
            names = self._input_gradients.get(item.stage, ())
            return tuple(Register(name, item.microbatch, item.stage) for name in names)
        return ()

    def reads(self, item: Instruction) -> tuple[Register, ...]:
        """Registers that must hold their tensor before `item` runs."""
        if isinstance(item, Forward):
            names = self._inputs.get(item.stage, ())
            return tuple(Register(name, item.microbatch) for name in names)
        if isinstance(item, (Backward, BackwardInput)):
            edges = self._output_gradients.get(item.stage, ())
            return tuple(Register(name, item.microbatch, consumer) for name, consumer in edges)
        return (item.register,) if isinstance(item, Send) else ()
