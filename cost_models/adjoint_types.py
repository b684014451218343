"""What a memory rule looks at (`NodeContext`) and what it says (`Adjoint`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..compiler.ir.graph import Graph, Node, Operand, Value
from .analysis import Storages
from .flops import positional

__all__ = ["Adjoint", "Gradient", "NodeContext", "Rule", "joint_gradients", "unknown"]


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient of one operand: value ids that its kernel reads, and bytes that are live while
    it runs beside those, the arriving gradient and the result."""

    operand: int
    reads: tuple[int, ...] = ()
    temporary_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Adjoint:
    """Memory behaviour of one node, forward and backward. Bytes are at the batch asked for.

    Args:
        gradients: one for each operand that wants one.
        extra_bytes: tensors made in forward for backward alone; every gradient reads them.
        forward_temporary_bytes: live while the forward runs, beside operands, results, extras.
        joint: one kernel computes all gradients; temporaries add up.
        aliased: operands whose gradient shares the storage of the arriving gradient.
    """

    gradients: tuple[Gradient, ...] = ()
    extra_bytes: float = 0.0
    forward_temporary_bytes: float = 0.0
    joint: bool = False
    aliased: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class NodeContext:
    """One node of a graph. `sizes` are bytes by value id; `backend` is the torch device type."""

    graph: Graph
    node: Node
    storages: Storages
    sizes: tuple[float, ...]
    backend: str

    @property
    def wanted(self) -> tuple[int, ...]:
        """Operands that want a gradient; none if no result carries one."""
        values = self.graph.values
        if not any(values[index].requires_grad for index in self.node.outputs):
            return ()
        return tuple(i for i in self.node.inputs if values[i].requires_grad)

    @property
    def out_bytes(self) -> float:
        """Bytes of the first result."""
        return self.sizes[self.node.outputs[0]]

    @property
    def out_elements(self) -> float:
        """Elements of the first result (bytes of a boolean mask of its shape)."""
        return self.out_bytes / self.value(self.node.outputs[0]).type.dtype.itemsize

    @property
    def all_bytes(self) -> float:
        return sum(self.sizes[i] for i in (*self.node.inputs, *self.node.outputs))

    def value(self, index: int) -> Value:
        return self.graph.values[index]

    def operand(self, position: int) -> int | None:
        """Value id of the tensor argument at `position`, or None."""
        argument = positional(self.node, position)
        return self.node.inputs[argument.index] if isinstance(argument, Operand) else None

    def each(self, *reads: int, temporary: float = 0.0) -> tuple[Gradient, ...]:
        """Every wanted gradient reads `reads`."""
        return tuple(Gradient(index, reads, temporary) for index in self.wanted)


Rule = Callable[[NodeContext], Adjoint]


def joint_gradients(gradients: tuple[Gradient, ...], temporary: float) -> tuple[Gradient, ...]:
    """Gradients of one kernel, whose workspace is counted with the first."""
    if not gradients:
        return ()
    first = Gradient(gradients[0].operand, gradients[0].reads, temporary)
    return (first, *gradients[1:])


def unknown(c: NodeContext) -> Adjoint:
    """An op without a rule: everything it touches is saved, temporaries are generous."""
    return Adjoint(
        gradients=c.each(*c.node.inputs, *c.node.outputs, temporary=2 * c.all_bytes),
        forward_temporary_bytes=c.all_bytes,
    )
