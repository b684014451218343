"""A plan: every decision that turns a graph and a cluster into programs, with its figures.

A plan is data. It refers to nodes of the captured graph by id and to the model by fingerprint;
code is regenerated from plan and model, never read from a plan file.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cluster import Cluster
from .graph import Mode
from .mesh import Layout, Mesh
from .schedule import Schedule

__all__ = [
    "Certificate",
    "Fingerprint",
    "MemoryPrediction",
    "OptimizerModel",
    "Plan",
    "Prediction",
    "Stage",
    "ValueLayout",
]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identity of a captured model.

    Args:
        name: class name of the model.
        graph_hash: SHA-256 of the graph's text form (shapes included).
        structure_hash: the same without shapes: equal for other batch sizes of the same model.
        num_parameters: scalar parameters, tied ones counted once.
        parameter_bytes: their size.
    """

    name: str
    graph_hash: str
    structure_hash: str
    num_parameters: int
    parameter_bytes: int


@dataclass(frozen=True, slots=True)
class OptimizerModel:
    """What planning assumes of the optimizer: state bytes per parameter byte (AdamW 2, SGD with
    momentum 1, SGD 0)."""

    name: str
    state_bytes_per_parameter_byte: float


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the graph on one device.

    `nodes` are node ids in graph order. A node in several stages is recomputed in each (cheap
    nodes that depend on no parameter and no randomness, such as masks and position tables).
    """

    index: int
    device: int
    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ValueLayout:
    """Layout of one value over the plan's mesh. Values without an entry are replicated."""

    value: str
    layout: Layout


@dataclass(frozen=True, slots=True)
class MemoryPrediction:
    """Upper bound of a device's memory, by part, in bytes."""

    device: int
    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    transients_bytes: int
    communication_bytes: int

    @property
    def total_bytes(self) -> int:
        return (
            self.parameters_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.transients_bytes
            + self.communication_bytes
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the cost model expects of one step."""

    step_seconds: float
    bubble_fraction: float
    stage_forward_seconds: tuple[float, ...]
    stage_backward_seconds: tuple[float, ...]
    memory: tuple[MemoryPrediction, ...]


@dataclass(frozen=True, slots=True)
class Certificate:
    """How good the plan is, at most, within what was searched.

    Args:
        objective: value of the plan in the planner's objective (seconds a step).
        lower_bound: no plan of `search_space` is better than this.
        gap: (objective - lower_bound) / objective.
        search_space: what was searched, in words.
        solver: name and version.
        solver_seconds: wall time; the only field that differs between identical runs.
    """

    objective: float
    lower_bound: float
    gap: float
    search_space: str
    solver: str
    solver_seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions. Passes fill in fields one after the other; see `passes/pipeline.py`."""

    fingerprint: Fingerprint
    cluster: Cluster
    mode: Mode
    batch_size: int
    optimizer: OptimizerModel
    num_microbatches: int = 0
    mesh: Mesh = Mesh(())
    stages: tuple[Stage, ...] = ()
    layouts: tuple[ValueLayout, ...] = ()
    schedule: Schedule | None = None
    prediction: Prediction | None = None
    certificate: Certificate | None = None
    warnings: tuple[str, ...] = ()
