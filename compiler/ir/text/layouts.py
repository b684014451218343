"""Text form of a plan's layouts: of values, of parameters, of nodes; one a line.

layout %ids "[S(0),R]"
parameter %w held="[R,S(0)]" gradient="[P(sum),S(0)]" state="[S(1),S(0)]"
nodes 0-3,9 inputs="[S(0),R] [R,S(0)]" outputs="[S(0),S(1)]"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from ..mesh import Layout
from ..plan import NodeLayout, ParameterLayout, Plan, StageMesh, ValueLayout
from .ranges import format_ranges, parse_ranges
from .scan import Line, Scanner, print_literal, print_name, print_text

__all__ = ["print_layouts", "read_all", "read_layouts"]

_Read = TypeVar("_Read")
Tables = tuple[tuple[ValueLayout, ...], tuple[ParameterLayout, ...], tuple[NodeLayout, ...]]


def print_layouts(owner: Plan | StageMesh) -> Iterator[str]:
    """The lines of all layouts of `owner`."""
    for entry in owner.layouts:
        yield f"layout {print_name(entry.value)} {print_literal(str(entry.layout))}"
    for parameter in owner.parameter_layouts:
        yield " ".join(
            [
                f"parameter {print_name(parameter.value)}",
                f"held={print_literal(str(parameter.held))}",
                f"gradient={print_literal(str(parameter.gradient))}",
                f"state={print_literal(str(parameter.state))}",
                *(["offloaded"] if parameter.offloaded else []),
            ]
        )
    for group in owner.node_layouts:
        yield " ".join(
            [
                f"nodes {print_text(format_ranges(group.nodes))}",
                f"inputs={print_literal(' '.join(map(str, group.inputs)))}",
                f"outputs={print_literal(' '.join(map(str, group.outputs)))}",
            ]
        )


def read_layouts(scanner: Scanner) -> Tables:
    """Inverse of `print_layouts`."""
    return (
        tuple(read_all(scanner, "layout", _read_layout)),
        tuple(read_all(scanner, "parameter", _read_parameter)),
        tuple(read_all(scanner, "nodes", _read_nodes)),
    )


def read_all(scanner: Scanner, head: str, read: Callable[[Line], _Read]) -> Iterator[_Read]:
    """What `read` makes of every following line that starts with `head`."""
    while scanner.peek() == head:
        line = scanner.line()
        line.expect(head)
        yield read(line)
        line.end()


def _read_layout(line: Line) -> ValueLayout:
    return ValueLayout(line.name(), Layout.parse(line.string()))


def _read_parameter(line: Line) -> ParameterLayout:
    name, layouts = line.name(), []
    for field in ("held", "gradient", "state"):
        line.expect(field, "=")
        layouts.append(Layout.parse(line.string()))
    held, gradient, state = layouts
    return ParameterLayout(name, held, gradient, state, line.accept("offloaded"))


def _read_nodes(line: Line) -> NodeLayout:
    nodes = parse_ranges(line.string())
    sides = []
    for field in ("inputs", "outputs"):
        line.expect(field, "=")
        sides.append(tuple(map(Layout.parse, line.string().split())))
    return NodeLayout(nodes, *sides)
