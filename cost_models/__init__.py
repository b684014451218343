"""Predictions: what ops, links, memory, the optimizer and whole programs will cost.

Names are loaded on first use: what costs nothing but arithmetic (`placement`) loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cluster_file import read_cluster, write_cluster
    from .memory import stage_memory
    from .memory_tables import MemoryModel, memory_model
    from .node_memory import NodeMemory, memory_profile
    from .ops import NodeCost, price
    from .presets import limit_memory, make_cluster, parse_devices, preset, preset_names
    from .simulator import Simulation, Span, simulate
    from .stages import StageSeconds, optimizer_seconds, stage_seconds
    from .timeline import render_timeline

__all__ = [
    "MemoryModel",
    "NodeCost",
    "NodeMemory",
    "Simulation",
    "Span",
    "StageSeconds",
    "limit_memory",
    "make_cluster",
    "memory_model",
    "memory_profile",
    "optimizer_seconds",
    "parse_devices",
    "preset",
    "preset_names",
    "price",
    "read_cluster",
    "render_timeline",
    "simulate",
    "stage_memory",
    "stage_seconds",
    "write_cluster",
]

_HOMES = {
    "cluster_file": ("read_cluster", "write_cluster"),
    "memory": ("stage_memory",),
    "memory_tables": ("MemoryModel", "memory_model"),
    "node_memory": ("NodeMemory", "memory_profile"),
    "ops": ("NodeCost", "price"),
    "presets": ("limit_memory", "make_cluster", "parse_devices", "preset", "preset_names"),
    "simulator": ("Simulation", "Span", "simulate"),
    "stages": ("StageSeconds", "optimizer_seconds", "stage_seconds"),
    "timeline": ("render_timeline",),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Load a name from the module that defines it."""
        for module, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f".{module}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
