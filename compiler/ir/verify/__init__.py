"""Legality rules of every level of the IR, checked between passes and before anything runs.

Every `verify_*` returns None or raises `VerificationError` naming what is wrong and where.
"""

from __future__ import annotations

from .cluster import verify_cluster, verify_layout, verify_mesh
from .graph import verify_graph
from .plan import verify_plan
from .program import held_bytes, verify_programs
from .schedule import verify_schedule

__all__ = [
    "held_bytes",
    "verify_cluster",
    "verify_graph",
    "verify_layout",
    "verify_mesh",
    "verify_plan",
    "verify_programs",
    "verify_schedule",
]
