"""Memory of one rank over a simulated step: what is held, saved, under way and transient."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from ..compiler.ir.graph import ValueKind
from ..compiler.ir.mesh import chunk_sizes
from ..compiler.ir.plan import OptimizerModel
from ..compiler.ir.program import (
    GRADIENT_NORM,
    AllGather,
    AllReduce,
    Collective,
    Program,
    ReduceScatter,
    Register,
    StageProgram,
)
from ..compiler.ir.types import TensorType
from .action_memory import ActionMemory, action_memory
from .buffers import bucket_gather_bytes, bucket_scatter_bytes, scatter_bytes
from .held import held_memory
from .memory import optimizer_temporaries
from .memory_tables import memory_model

__all__ = ["MemoryCurve", "MemoryPeak", "types_of"]

_NORM_BYTES = 8.0


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """What a rank holds at the moment at which it holds the most, in bytes.

    Args:
        seconds: since the step began.
        moment: the instruction that runs then, as `event_name` calls it.
        saved_bytes: kept from forwards for their backwards.
        transients_bytes: what lives only while the instruction runs.
        messages_bytes: boundary values and gradients of them, sends under way, buckets of
            collectives, the user's inputs.
    """

    rank: int
    seconds: float
    moment: str
    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    transients_bytes: int
    messages_bytes: int

    @property
    def total_bytes(self) -> int:
        return (
            self.parameters_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.saved_bytes
            + self.transients_bytes
            + self.messages_bytes
        )


class MemoryCurve:
    """Level of one rank's memory, in bytes, told what the rank does in order of time.

    Args:
        program: of the rank.
        optimizer: whose states are held from the start.
        backend: torch device type of the rank.
        known: memory of actions of stages that were seen; new ones are added.
    """

    def __init__(
        self,
        program: Program,
        optimizer: OptimizerModel,
        backend: str,
        known: dict[Hashable, ActionMemory],
    ) -> None:
        self.held = held_memory(program, optimizer, backend)
        self._rank = program.rank
        self._types = {name: value.type for name, value in program.trained().items()}
        self._updated = {n: type.num_bytes for n, type in program.update_types().items()}
        self._closing = optimizer_temporaries(optimizer, self.held.updated_bytes, backend)
        self._backend = backend
        self._actions: dict[int, ActionMemory] = {}
        for stage in program.stages:
            key = stage.index, backend, types_of(stage)
            if key not in known:
                known[key] = action_memory(
                    memory_model(stage.graph, backend=backend),
                    None,
                    stage.recomputed,
                    _summed_early(stage, backend),
                    _parts(stage),
                )
            self._actions[stage.index] = known[key]
        self._registers: dict[Register, float] = {}
        self._saved = 0.0
        self._messages = float(_input_bytes(program))
        self._points: list[tuple[float, float]] = []
        self._peak: MemoryPeak | None = None
        self._note(0.0, "the start of the step")

    @property
    def peak(self) -> MemoryPeak:
        assert self._peak is not None
        return self._peak

    def message_bytes(self, item: Collective) -> float:
        """Bytes of the tensors that a collective joins or sums, whole."""
        if item.targets == (GRADIENT_NORM,):
            return _NORM_BYTES
        if isinstance(item, AllReduce):
            return float(sum(self._updated[name] for name in item.targets))
        return float(sum(self._types[name].num_bytes for name in item.targets))

    def points(self) -> tuple[tuple[float, int], ...]:
        return tuple((seconds, math.ceil(level)) for seconds, level in self._points)

    def define(self, register: Register, type: TensorType, seconds: float, moment: str) -> None:
        """A register occupies memory from now on."""
        if register not in self._registers:
            self._registers[register] = type.num_bytes
            self._messages += type.num_bytes
            self._note(seconds, moment)

    def grow(self, register: Register, num_bytes: float, seconds: float, moment: str) -> None:
        """A register, or what parts of it travel in, takes more until it is freed."""
        self._registers[register] = self._registers.get(register, 0.0) + num_bytes
        self._messages += num_bytes
        self._note(seconds, moment)

    def free(self, registers: Iterable[Register], seconds: float, moment: str) -> None:
        self._messages -= sum(self._registers.pop(register, 0.0) for register in registers)
        self._note(seconds, moment)

    def start(self, item: Collective, seconds: float, moment: str) -> None:
        """The buffers of a collective occupy memory from now on."""
        self._messages += self._buffer_bytes(item)
        self._note(seconds, moment)

    def end(self, item: Collective, seconds: float, moment: str) -> None:
        self._messages -= self._buffer_bytes(item)
        self._note(seconds, moment)

    def _buffer_bytes(self, item: Collective) -> float:
        if item.targets == (GRADIENT_NORM,):
            return 0.0
        if isinstance(item, AllReduce):  # of one tensor: in place
            return self.message_bytes(item) if len(item.targets) > 1 else 0.0
        part, count = self._largest_share(item), len(item.ranks)
        if isinstance(item, AllGather):
            return bucket_gather_bytes(part, count)
        return bucket_scatter_bytes(self.message_bytes(item), part, count, self._backend)

    def _largest_share(self, item: ReduceScatter | AllGather) -> float:
        """Bytes of the largest part of a bucket, which is the first rank's."""
        return sum(
            _first_part(self._types[name], dim, len(item.ranks))
            for name, dim in zip(item.targets, item.dims, strict=True)
        )

    def action(
        self, kind: str, stage: int, part: int | None, begin: float, end: float, moment: str
    ) -> None:
        """A computation: its transients while it runs, what it saves or frees afterwards.

        Boundary values are registers already; a saved one counts twice until it is freed.

        Args:
            part: of weight gradients that are computed in parts.
        """
        memory = self._actions[stage]
        if part is not None:
            piece = memory.weight_parts[part]
            before = memory.weight_parts[part - 1].left_bytes if part else memory.left_bytes
            self._note(begin, moment, piece.peak_bytes)
            self._saved += piece.left_bytes - before
        elif kind == "F":
            self._saved += memory.saved_bytes
            peak = memory.forward_bytes - memory.received_bytes
            self._note(begin, moment, peak - memory.saved_bytes)
        else:
            peak, change = {
                "I": (memory.backward_input_bytes, memory.left_bytes - memory.saved_bytes),
                "W": (memory.backward_weight_bytes, -memory.left_bytes),
                "B": (memory.backward_bytes, -memory.saved_bytes),
            }[kind]
            self._note(begin, moment, peak)
            self._saved += change
        self._note(end, moment)

    def optimizer_step(self, begin: float, end: float, moment: str) -> None:
        self._note(begin, moment, self._closing)
        self._note(end, moment)

    def _note(self, seconds: float, moment: str, transients: float = 0.0) -> None:
        level = self.held.total_bytes + self._saved + self._messages + transients
        self._points.append((seconds, level))
        if self._peak is None or level > self._peak.total_bytes:
            self._peak = MemoryPeak(
                self._rank,
                seconds,
                moment,
                self.held.parameters_bytes,
                self.held.gradients_bytes,
                math.ceil(self.held.optimizer_bytes),
                math.ceil(self._saved),
                math.ceil(transients),
                math.ceil(self._messages),
            )


def types_of(stage: StageProgram) -> tuple[TensorType, ...]:
    """Of its values: they tell its program on one rank from that on others of its mesh."""
    return tuple(value.type for value in stage.graph.values)


def _input_bytes(program: Program) -> int:
    """Bytes of the user's inputs of a step."""
    inputs = {
        value.origin: value.type.num_bytes
        * (program.num_microbatches if value.batch_dim is not None else 1)
        for stage in program.stages
        for value in stage.graph.values_of(ValueKind.INPUT)
    }
    return sum(inputs.values())


def _summed_early(stage: StageProgram, backend: str) -> dict[int, float]:
    """Parameters of whose gradients backward keeps parts, and bytes of the buffers for that."""
    axes = {name: len(ranks) for name, ranks in stage.axes}
    parts = {part.name: part for part in stage.kept}
    table = {}
    for value in stage.graph.values_of(ValueKind.PARAMETER):
        part = parts.get(value.origin)
        if part is not None:
            count = axes[part.axis]
            own = _first_part(value.type, part.dim, count)
            table[value.id] = own + scatter_bytes(value.type.num_bytes, own, count, backend)
    return table


def _parts(stage: StageProgram) -> list[list[int]]:
    """`stage.parts` by value ids of its graph."""
    ids = {value.origin: value.id for value in stage.graph.values_of(ValueKind.PARAMETER)}
    return [[ids[name] for name in part] for part in stage.parts]


def _first_part(type: TensorType, dim: int, count: int) -> float:
    """Bytes of the first of `count` parts along `dim`."""
    return type.num_bytes * chunk_sizes(type.shape[dim], count)[0] / type.shape[dim]
