"""A plan: every decision that turns a graph and a cluster into programs, with its figures.

A plan is data. It refers to nodes of the captured graph by id and to the model by fingerprint;
code is regenerated from plan and model, never read from a plan file.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from .cluster import Cluster
from .graph import Mode
from .mesh import Layout, Mesh, Shard, format_stage_meshes
from .schedule import Schedule

__all__ = [
    "DATA",
    "PIPELINE",
    "TENSOR",
    "Alternative",
    "Certificate",
    "DeviceLoad",
    "Fingerprint",
    "MemoryPrediction",
    "NodeLayout",
    "Objective",
    "OptimizerModel",
    "ParameterLayout",
    "Plan",
    "Prediction",
    "ProfileReport",
    "ProfiledBlock",
    "Stage",
    "StageMesh",
    "ValueLayout",
]


PIPELINE = "pipeline"
"""Name of the mesh axis along which stages lie."""

DATA = "data"
"""Name of the mesh axis over which the rows of a microbatch are split."""

TENSOR = "tensor"
"""Name of the mesh axis over which tensors are split."""


class Objective(enum.Enum):
    """What a plan was made to keep small."""

    STEP = "step"  # seconds of a step of so many microbatches
    THROUGHPUT = "throughput"  # seconds a microbatch of the busiest device, in a stream of them
    LATENCY = "latency"  # seconds until one sample is done


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
    """A part of the graph on the devices of one in-stage mesh (one device if nothing is sharded).

    Several stages may stand on one device: the pieces of the graph that it runs, between which
    other devices have their turn.

    `devices` are in the order of the plan's `stage_mesh`, whose last axis varies fastest. The
    devices at one place of the mesh, one a stage, are a *column*: pipeline messages stay within it.
    Where stages have meshes of their `own`, all have, and there are no columns.

    `nodes` are node ids in graph order. A node in several stages is recomputed in each (cheap
    nodes that depend on no parameter and no randomness, such as masks and position tables).
    """

    index: int
    devices: tuple[int, ...]
    nodes: tuple[int, ...]
    own: StageMesh | None = None

    @property
    def device(self) -> int:
        """The device in the first column."""
        return self.devices[0]


@dataclass(frozen=True, slots=True)
class StageMesh:
    """The mesh of one stage where stages differ in it, with layouts of what is in the stage.

    Without axes the stage is on one device.
    """

    mesh: Mesh
    layouts: tuple[ValueLayout, ...] = ()
    parameter_layouts: tuple[ParameterLayout, ...] = ()
    node_layouts: tuple[NodeLayout, ...] = ()


@dataclass(frozen=True, slots=True)
class ValueLayout:
    """Layout over the plan's `stage_mesh` in which a value that no node computes is held: a buffer,
    a constant or a user input. Values without an entry are replicated."""

    value: str
    layout: Layout


@dataclass(frozen=True, slots=True)
class ParameterLayout:
    """Layouts of one parameter; one without an entry is replicated in every respect.

    ZeRO is a matter of layouts (Rajbhandari et al., 2020): sharded states are stage 1, sharded
    gradients stage 2, and if the parameter itself is held sharded over an axis on which its users
    replicate it (so that it is gathered on use), stage 3. Where states lie, the parameter is
    updated, so ZeRO-Offload (Ren et al., 2021) is a matter of one flag.

    Args:
        value: name in the graph.
        held: between its uses.
        gradient: while it accumulates over microbatches; `Partial` on axes over which its terms are
            summed at the end of the step.
        state: of the optimizer's states, and of the part that a rank updates.
        offloaded: whether an accelerator's rank keeps the states in the memory of its host and
            makes the update there.
    """

    value: str
    held: Layout
    gradient: Layout
    state: Layout
    offloaded: bool = False


@dataclass(frozen=True, slots=True)
class NodeLayout:
    """How nodes run over the plan's `stage_mesh`: layouts of what they read and make.

    Nodes without an entry are replicated.
    """

    nodes: tuple[int, ...]
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class MemoryPrediction:
    """Upper bound of a device's memory, by part, in bytes.

    `host_bytes` of what is offloaded lie in the memory of its host and are not in the total, which
    is what the plan takes of the memory that the device has for plans. The allocator may show more
    by `library_bytes`: what libraries allocate for themselves through it.
    """

    device: int
    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    transients_bytes: int
    communication_bytes: int
    host_bytes: int = 0
    library_bytes: int = 0

    @property
    def bound_bytes(self) -> int:
        """The most that the device's allocator shows."""
        return self.total_bytes + self.library_bytes

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
class DeviceLoad:
    """Seconds that a device is busy with one microbatch: computing, and moving values in and out
    (each value once, however many devices take it)."""

    device: int
    compute_seconds: float
    communication_seconds: float

    @property
    def total_seconds(self) -> float:
        return self.compute_seconds + self.communication_seconds


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the cost model expects of one step.

    Args:
        step_seconds: simulated; where no programs were made, by the planner's formula.
        loads: of every device, where operators were placed on devices one by one.
    """

    step_seconds: float
    bubble_fraction: float
    stage_forward_seconds: tuple[float, ...]
    stage_backward_seconds: tuple[float, ...]
    memory: tuple[MemoryPrediction, ...]
    loads: tuple[DeviceLoad, ...] = ()


@dataclass(frozen=True, slots=True)
class Certificate:
    """How good the plan is, at most, within what was searched.

    Args:
        objective: value of the plan in its objective, in seconds (see `Objective`).
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
class Alternative:
    """The best plan that was priced on another mesh.

    Args:
        zero: level of ZeRO over the data axis.
        step_seconds: predicted.
        fits: whether it fits into memory.
    """

    mesh: Mesh
    num_microbatches: int
    zero: int
    step_seconds: float
    fits: bool


@dataclass(frozen=True, slots=True)
class ProfiledBlock:
    """A part of a rank's graph that was measured: a repeated block, what lies between such, or one
    operator.

    Args:
        path: module path of the first place where it occurs.
        num_nodes: operators in it.
        count: how often it occurs in the graph of one rank.
        predicted: seconds of forward, input and weight gradients by the device's rates.
        measured: the same, as they ran.
    """

    path: str
    device_type: str
    num_nodes: int
    count: int
    predicted: tuple[float, float, float]
    measured: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """What measuring changed; how the plan's devices were corrected stands in the cluster.

    Args:
        kind: what was measured: `blocks` or `ops`.
        rounds: how often it was planned again.
        num_measured, num_known: parts that were measured now, and that the database had.
        seconds: that measuring took; differs between identical runs.
        ended: why no further round was made.
        changed: what of the plan is another one than before.
        first: the plan before anything was measured, as it was predicted then.
        first_seconds: what a plan on its mesh takes by what was measured.
        blocks: of the plan that was chosen.
    """

    kind: str
    rounds: int
    num_measured: int
    num_known: int
    seconds: float
    ended: str
    changed: tuple[str, ...]
    first: Alternative
    first_seconds: float
    blocks: tuple[ProfiledBlock, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions. Passes fill in fields one after the other; see `passes/pipeline.py`.

    Args:
        mesh: all axes, `pipeline` among them if there are several stages; no others where stages
            have meshes of their own, which hold the layouts, too.
        recomputed: nodes whose results backward computes again instead of keeping them.
        alternatives: what other meshes would have given, best first; those that fit come first.
        profile: of what was measured to find it, if anything was.
    """

    fingerprint: Fingerprint
    cluster: Cluster
    mode: Mode
    batch_size: int
    optimizer: OptimizerModel
    objective: Objective = Objective.STEP
    num_microbatches: int = 0
    mesh: Mesh = Mesh(())
    stages: tuple[Stage, ...] = ()
    layouts: tuple[ValueLayout, ...] = ()
    parameter_layouts: tuple[ParameterLayout, ...] = ()
    node_layouts: tuple[NodeLayout, ...] = ()
    recomputed: tuple[int, ...] = ()
    schedule: Schedule | None = None
    prediction: Prediction | None = None
    certificate: Certificate | None = None
    alternatives: tuple[Alternative, ...] = ()
    profile: ProfileReport | None = None
    warnings: tuple[str, ...] = ()

    @property
    def is_mixed(self) -> bool:
        """Whether stages have meshes of their own."""
        return any(stage.own is not None for stage in self.stages)

    def over(self, own: StageMesh) -> Plan:
        """The same plan with one mesh, and layouts over it."""
        return replace(
            self,
            mesh=own.mesh,
            layouts=own.layouts,
            parameter_layouts=own.parameter_layouts,
            node_layouts=own.node_layouts,
        )

    def of_stage(self, stage: Stage) -> Plan:
        """The same plan with the mesh and the layouts that `stage` has, as if all stages had."""
        if stage.own is None:
            return self
        stages = tuple(replace(entry, own=None) for entry in self.stages)
        return replace(self.over(stage.own), stages=stages)

    @property
    def mesh_text(self) -> str:
        """The mesh as users write it: those of the stages, one after the other, if they differ."""
        if not self.is_mixed:
            return str(self.mesh)
        return format_stage_meshes(stage.own.mesh for stage in self.stages if stage.own)

    @property
    def stage_mesh(self) -> Mesh:
        """The axes inside a stage: over them tensors are laid out. Where stages have meshes of
        their own, ask `of_stage`."""
        return Mesh(tuple(axis for axis in self.mesh.axes if axis.name != PIPELINE))

    @property
    def objective_seconds(self) -> float:
        """The step by the formula that planners minimise, in which plans are compared."""
        if self.objective is Objective.STEP and self.certificate is not None:
            return self.certificate.objective
        return self.prediction.step_seconds if self.prediction is not None else 0.0

    @property
    def is_offloaded(self) -> bool:
        """Whether optimizer states of some parameter lie in the memory of a host."""
        own = [stage.own.parameter_layouts for stage in self.stages if stage.own]
        return any(entry.offloaded for table in (self.parameter_layouts, *own) for entry in table)

    @property
    def zero_level(self) -> int:
        """The highest level of ZeRO over the data axis of any parameter (see `ParameterLayout`)."""
        if self.is_mixed:
            return max(self.of_stage(stage).zero_level for stage in self.stages)
        names = [axis.name for axis in self.stage_mesh.axes]
        if DATA not in names:
            return 0
        axis = names.index(DATA)
        levels = [0]
        for entry in self.parameter_layouts:
            sides = (entry.held, entry.gradient, entry.state)
            shares = [isinstance(side.placements[axis], Shard) for side in sides]
            levels.append(3 if shares[0] else 2 if shares[1] else int(shares[2]))
        return max(levels)
