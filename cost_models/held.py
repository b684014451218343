"""What a rank holds between steps, from its program: parameters, gradients, optimizer states.

Layouts decide it: the program's types are of parts, and `Program.updates` says of which parts of
them the rank has states (ZeRO 1), its stages of which it has gradients (ZeRO 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.ir.graph import ValueKind
from ..compiler.ir.plan import OptimizerModel
from ..compiler.ir.program import Program

__all__ = ["HeldMemory", "held_memory"]


@dataclass(frozen=True, slots=True)
class HeldMemory:
    """Bytes on the rank's device, and of states in the memory of its host.

    Args:
        parameters_bytes: with buffers and constants; a tensor of several stages counts once.
        updated_bytes: of the parts of parameters that the rank updates on its device, one by one.
        offloaded_bytes: of those that it updates on the host.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: float
    host_bytes: float
    updated_bytes: tuple[int, ...]
    offloaded_bytes: tuple[int, ...]

    @property
    def total_bytes(self) -> float:
        """On the device."""
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes


def held_memory(program: Program, optimizer: OptimizerModel, backend: str) -> HeldMemory:
    """What the rank of `program` holds; offloading changes nothing where `backend` is `cpu`."""
    held = {
        value.origin: value.type.num_bytes
        for stage in program.stages
        for value in stage.graph.values
        if value.kind in (ValueKind.PARAMETER, ValueKind.BUFFER, ValueKind.CONSTANT)
    }
    away = set(program.offloaded) if backend != "cpu" else set()
    sizes = {name: type.num_bytes for name, type in program.update_types().items()}
    updated = tuple(size for name, size in sizes.items() if name not in away)
    offloaded = tuple(size for name, size in sizes.items() if name in away)
    ratio = optimizer.state_bytes_per_parameter_byte
    return HeldMemory(
        parameters_bytes=sum(held.values()),
        gradients_bytes=sum(type.num_bytes for type in program.gradient_types().values()),
        optimizer_bytes=sum(updated) * ratio,
        host_bytes=sum(offloaded) * (ratio + 2),  # weights and gradients pass through there
        updated_bytes=updated,
        offloaded_bytes=offloaded,
    )
