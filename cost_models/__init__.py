"""Predictions: what ops, links, memory, the optimizer and whole programs will cost."""

from __future__ import annotations

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
