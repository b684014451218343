"""How verifiers complain: one `VerificationError` that names the place and prints the line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import NoReturn, TypeVar

from ..errors import VerificationError
from ..graph import Graph, Node
from ..program import Program
from ..text import print_instruction, print_node

__all__ = ["check", "fail_at", "fail_node", "first_repeated", "node_place"]

_Item = TypeVar("_Item", bound=Hashable)


def check(holds: bool, cause: str, where: str) -> None:
    """Raise VerificationError with `cause` unless `holds`."""
    if not holds:
        raise VerificationError(cause, where=where)


def first_repeated(items: Iterable[_Item]) -> _Item | None:
    """The first item that occurs more than once, or None."""
    return next((item for item, count in Counter(items).items() if count > 1), None)


def node_place(graph: Graph, node: Node) -> str:
    """`node linear_3 of module layers.3 (model.py:7) in graph mlp: <its line>`."""
    module = f" of module {node.module_path}" if node.module_path else ""
    source = f" ({node.source})" if node.source else ""
    try:
        line = print_node(graph, node)
    except (TypeError, IndexError, KeyError):  # it is the broken node that we report
        line = node.op.name
    return f"node {node.name}{module}{source} in graph {graph.name}: {line}"


def fail_node(graph: Graph, node: Node, cause: str) -> NoReturn:
    raise VerificationError(cause, where=node_place(graph, node))


def fail_at(program: Program, position: int, cause: str) -> NoReturn:
    """Complain about the instruction at `position`."""
    text = print_instruction(program.instructions[position])
    raise VerificationError(
        cause, where=f"rank {program.rank}, instruction {position} of its program: {text}"
    )
