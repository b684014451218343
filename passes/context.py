"""What passes are given beside the plan, and the form they all have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..compiler.ir.cluster import Link
from ..compiler.ir.graph import Graph
from ..compiler.ir.mesh import Mesh, Placement
from ..compiler.ir.plan import Objective, OptimizerModel, Plan
from ..cost_models.collectives import Network
from ..cost_models.parameters import ParameterFigures

__all__ = [
    "RECOMPUTES",
    "SCHEDULES",
    "Context",
    "LayoutPin",
    "Measured",
    "Pass",
    "PlanOptions",
    "silent",
]

ADAMW = OptimizerModel("adamw", 2.0)
SCHEDULES = ("1f1b", "gpipe")  # of training
RECOMPUTES = ("auto", "none", "full", "selective")


def silent(message: str) -> None:
    """Show no progress."""


@dataclass(frozen=True, slots=True)
class LayoutPin:
    """Parameters whose path, or that of a module around them, matches `pattern` are held in
    `placement` over `axis`."""

    pattern: str
    axis: str
    placement: Placement

    def __str__(self) -> str:
        return f"{self.pattern!r}: '{self.axis}={self.placement}'"


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on a device of each type, by the type's name.

    Args:
        nodes: seconds of every node of the graph.
        messages: seconds for which a device works on a message, sent or received, as a link.
        instructions: seconds of one instruction of a program beside its operators.
        unsteady: variance of the time of a run over its mean, in seconds: how far the time of a
            piece is from what it takes in the mean (see `placement/unsteady.py`).
    """

    nodes: Mapping[str, tuple[float, ...]]
    messages: Mapping[str, Link]
    instructions: Mapping[str, float] = field(default_factory=dict)
    unsteady: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user fixes; None leaves the decision to the planner.

    Args:
        num_stages: exactly this many stages, instead of at most one a device.
        num_microbatches: of a step; must divide the batch size.
        schedule: `1f1b` or `gpipe` (training).
        memory_limit_bytes: memory of every device, where it is less than the device's own.
        optimizer: states that training keeps.
        pins: (module path pattern, stage): the stage must hold the modules that match.
        device_pins: (module path pattern, device index), likewise.
        together: groups of module path patterns; what a group matches is in one stage.
        layout_pins: how parameters are held over the tensor axis.
        recompute: what backward computes again instead of keeping it: `auto` (as much as must be
            for a plan to fit), `none`, `full` (all within each repeated block) or `selective` (what
            is cheap for the memory it frees).
        mesh: axes and sizes, in the order of ranks; None: searched if nothing else says how many
            stages there are.
        stage_meshes: in-stage meshes, one a stage, where stages differ; empty: they do not.
        one_mesh: no meshes of the stages' own are tried where nothing asks for them.
        zero: level of ZeRO over the data axis; None: the least that fits.
        offload: what lies in the memory of the host: `none`, `optimizer` (its states, which are
            updated there) or `auto` (its states if nothing fits otherwise).
        objective: what is kept small: a step, or the busiest device or the latency of operators
            that are placed one by one.
        granularity: what is placed: `operator`, or `block` (repeated blocks and modules whole).
        contiguous: a device runs one piece only.
        measured: seconds of operators that are placed, where they were measured for that.
        placement_seconds: wall time for placing operators.
        time_limit_seconds: deterministic time for the integer programs.
        seed: of the solver.
        tolerance: gap at which a plan counts as optimal.
    """

    num_stages: int | None = None
    num_microbatches: int | None = None
    schedule: str | None = None
    memory_limit_bytes: int | None = None
    optimizer: OptimizerModel = ADAMW
    pins: tuple[tuple[str, int], ...] = ()
    device_pins: tuple[tuple[str, int], ...] = ()
    together: tuple[tuple[str, ...], ...] = ()
    layout_pins: tuple[LayoutPin, ...] = ()
    recompute: str = "auto"
    mesh: Mesh | None = None
    stage_meshes: tuple[Mesh, ...] = ()
    one_mesh: bool = False
    zero: int | None = None
    offload: str = "auto"
    objective: Objective = Objective.STEP
    granularity: str = "operator"
    contiguous: bool = False
    measured: Measured | None = None
    placement_seconds: float = 20.0
    time_limit_seconds: float = 4.0
    seed: int = 0
    tolerance: float = 1e-3


@dataclass(frozen=True, slots=True)
class Context:
    """The graph that is planned for, the user's options and where to report progress.

    Args:
        graph: of the whole model; for the pipeline of one column of a mesh, its local graph.
        network: who meets in the collectives of a local graph.
        parameters: figures of its trained parameters, by value id.
        bound: groups of its nodes that are in one stage, as what they are for is one node.
        parts: local graphs that passes have made of the graph (see `columns.py`).
    """

    graph: Graph
    options: PlanOptions
    progress: Callable[[str], None] = silent
    network: Network | None = None
    parameters: Mapping[int, ParameterFigures] = field(default_factory=dict)
    bound: tuple[tuple[int, ...], ...] = ()
    parts: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)


class Pass(Protocol):
    """A frozen dataclass whose fields are its options."""

    @property
    def name(self) -> str:
        """Name in errors and progress."""

    def run(self, plan: Plan, context: Context) -> Plan:
        """`plan` with one more decision made."""
