"""Text forms that print and parse back: print followed by parse is the identity."""

from __future__ import annotations

from .graph import parse_graph, print_attributes, print_graph, print_node
from .plan import parse_plan, print_plan
from .program import parse_program, print_instruction, print_program
from .ranges import format_ranges, parse_ranges

__all__ = [
    "format_ranges",
    "parse_graph",
    "parse_plan",
    "parse_program",
    "parse_ranges",
    "print_attributes",
    "print_graph",
    "print_instruction",
    "print_node",
    "print_plan",
    "print_program",
]
