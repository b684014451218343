"""Programs: what one rank executes in one step, as stage graphs and a list of instructions.

The simulator, the verifier and the executor read the same instructions.

A *register* holds one tensor on a rank while a step runs: a boundary value of one microbatch
(`%h@2`), or the gradient of such a value that one consuming stage contributes (`%h@2!3`, from
stage 3). User inputs, parameters and buffers are not registers.

Meaning of the instructions:

* `Forward(s, m)` waits for the `Recv`s of its boundary inputs, runs stage s on microbatch m,
  defines the registers of its boundary outputs and keeps what backward needs.
* `BackwardInput(s, m)` waits for the gradients of its boundary outputs (and sums over consuming
  stages), defines one gradient register per boundary input that requires a gradient.
  `BackwardWeight(s, m)` adds to the parameter gradients. `Backward` is both at once.
  `BackwardWeight(s, m, k)` is part k of that alone; all parts of a stage (`StageProgram.parts`),
  in order, do the whole. So gradients can be summed over ranks while later parts compute.
* `Send` starts a non-blocking send of a register; `Recv` posts a non-blocking receive. The
  register is readable once a later instruction that reads it has waited for it. Where both name a
  rectangle, several `Recv`s together fill the register.
* `Free` drops registers (after their sends have completed).
* `ReduceScatter`, `AllReduce` and `AllGather` start a collective over `ranks`; all its `targets`, a
  *bucket*, travel in one message. `ReduceScatter` sums gradients and leaves each rank the sum of
  the part that it updates; `AllReduce` sums the updated parts of gradients (all of them, unless
  `Program.updates` says less) or, with the target `GRADIENT_NORM`, the squared norm; `AllGather`
  brings the updated parts of parameters to all `ranks`. The i-th rank has the i-th part along the
  target's entry in `dims`, cut by the rule of `torch.chunk`. The next instruction that needs a
  result waits for it: another collective on one of its targets, an `Await`, the norm, clipping, the
  optimizer step, or the end of the step.
* `Await` waits for the collectives under way on its targets, so that their buffers are free before
  others take memory.
* `GradientNorm` takes the squared norm of the updated parts of gradients, `ClipGradients` scales
  them by the global norm. `OptimizerStep` updates the rank's parts of its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from .graph import Graph, Mode, Value, ValueKind
from .ops import Category
from .types import TensorType

__all__ = [
    "GRADIENT_NORM",
    "AllGather",
    "AllReduce",
    "Await",
    "Backward",
    "BackwardInput",
    "BackwardWeight",
    "ClipGradients",
    "Collective",
    "Forward",
    "Free",
    "GradientNorm",
    "GradientPart",
    "Instruction",
    "OptimizerStep",
    "Program",
    "Recv",
    "ReduceScatter",
    "Register",
    "Send",
    "StageProgram",
    "TensorShard",
]

GRADIENT_NORM = "gradient norm"


@dataclass(frozen=True, slots=True)
class Register:
    """A boundary value of one microbatch, or (with `consumer`) a gradient contribution to it."""

    value: str
    microbatch: int
    consumer: int | None = None

    @property
    def is_gradient(self) -> bool:
        return self.consumer is not None

    def __str__(self) -> str:
        suffix = "" if self.consumer is None else f"!{self.consumer}"
        return f"%{self.value}@{self.microbatch}{suffix}"


@dataclass(frozen=True, slots=True)
class Forward:
    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Backward:
    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class BackwardInput:
    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class BackwardWeight:
    stage: int
    microbatch: int
    part: int | None = None  # None: all of it


@dataclass(frozen=True, slots=True)
class Send:
    """Start sending `register` to rank `peer`; `tag` is unique per register in a step.

    With `offset` only a rectangle of it goes: the part of `type` that begins there in the whole
    boundary value (see `StageProgram.boundaries`).
    """

    register: Register
    peer: int
    tag: int
    type: TensorType
    offset: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Recv:
    """Post a receive of `register`, or of the rectangle at `offset`, from rank `peer`, matching the
    `Send` with the same tag."""

    register: Register
    peer: int
    tag: int
    type: TensorType
    offset: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Free:
    registers: tuple[Register, ...]


@dataclass(frozen=True, slots=True)
class GradientNorm:
    """Square norm of the gradients that this rank owns (a tied parameter counts at one rank)."""

    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AllReduce:
    """`copies`, if there are any: for each of `ranks`, how many of them have the same term, which
    each divides by that before it is summed."""

    targets: tuple[str, ...]
    ranks: tuple[int, ...]
    reduction: str = "sum"
    copies: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ReduceScatter:
    """`ranks` are in the order of their parts."""

    targets: tuple[str, ...]
    dims: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AllGather:
    """`ranks` are in the order of their parts."""

    targets: tuple[str, ...]
    dims: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Await:
    """Wait for the collectives under way on `targets`."""

    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClipGradients:
    """Scale gradients by min(1, max_norm / (norm + 1e-6)), as `clip_grad_norm_` does."""

    max_norm: float


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    pass


Collective = AllReduce | ReduceScatter | AllGather

Instruction = (
    Forward
    | Backward
    | BackwardInput
    | BackwardWeight
    | Send
    | Recv
    | Free
    | GradientNorm
    | AllReduce
    | ReduceScatter
    | AllGather
    | Await
    | ClipGradients
    | OptimizerStep
)


@dataclass(frozen=True, slots=True)
class TensorShard:
    """The rectangular part of a tensor that a rank holds.

    Args:
        name: of the parameter, buffer, constant or user input (its origin).
        whole: type of the whole tensor (an input: of one microbatch).
        offset: where the part begins, per dim.
        part: type of the part.
    """

    name: str
    whole: TensorType
    offset: tuple[int, ...]
    part: TensorType

    def within(self, outer: TensorShard | None) -> TensorShard:
        """The same part, as one of the part `outer` (None: of the whole)."""
        if outer is None:
            return self
        offset = tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True))
        return TensorShard(self.name, outer.part, offset, self.part)


@dataclass(frozen=True, slots=True)
class GradientPart:
    """What a stage keeps of the gradient of a parameter that it holds all of along `dim` (ZeRO 2).

    Args:
        name: of the parameter.
        axis: mesh axis whose ranks share the gradient, each having its part.
        dim: that is shared, by the rule of `torch.chunk`.
        summed: whether the gradients of the axis' ranks are terms, which each backward sums.
    """

    name: str
    axis: str
    dim: int
    summed: bool


@dataclass(frozen=True, slots=True)
class StageProgram:
    """One stage on one rank: its local forward graph and who is on the other end of its boundaries.

    Args:
        index: stage number in the plan.
        graph: forward graph; BOUNDARY values are its inputs from other stages, BOUNDARY outputs
            its results for them.
        consumers: for each BOUNDARY output, value name -> stages that read it.
        producers: for each BOUNDARY value, value name -> stage that computes it.
        axes: for each mesh axis that the graph's collectives name, the ranks along it that this
            rank belongs to, in the order of their parts.
        recomputed: nodes of the graph whose results backward computes again instead of keeping
            them, ascending; a view of such a result counts as one.
        kept: gradients of which backward keeps a part only.
        parts: parameters whose gradients are complete after each part of the weight gradients; the
            last part does what is left. Empty: they are computed in one piece.
        boundaries: where stages have meshes of their own, of each boundary value that the stage
            reads or makes, by name, the part that this rank has; its gradient's part is the same.
    """

    index: int
    graph: Graph
    consumers: tuple[tuple[str, tuple[int, ...]], ...]
    producers: tuple[tuple[str, int], ...]
    axes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    recomputed: tuple[int, ...] = ()
    kept: tuple[GradientPart, ...] = ()
    parts: tuple[tuple[str, ...], ...] = ()
    boundaries: tuple[TensorShard, ...] = ()

    @property
    def last_part(self) -> int | None:
        """The part that ends the weight gradients of a microbatch; None if there are no parts."""
        return len(self.parts) - 1 if self.parts else None

    @property
    def meets(self) -> bool:
        """Whether the stage meets other ranks while it computes, in forward or in backward."""
        collective = any(node.op.category is Category.COLLECTIVE for node in self.graph.nodes)
        return collective or any(part.summed for part in self.kept)


@dataclass(frozen=True, slots=True)
class Program:
    """Everything one rank executes in one step.

    Args:
        stage_ranks: rank of each stage in this rank's *column*: the ranks, one a stage, at one
            place of the in-stage mesh. Messages between stages stay in a column. Where stages have
            meshes of their own there are no columns, and it is empty.
        plan_hash: agreed by all ranks before the first step.
        memory_limit_bytes: what the verifier holds the rank to.
        shards: parts of the parameters, buffers, constants and inputs that it does not hold whole.
        updates: parts of the parameters that it updates, where that is less than it holds: its
            optimizer states are of these (ZeRO).
        offloaded: parameters whose optimizer states lie on the host and are updated there.
        gradient_terms: (parameter, ranks whose gradients of their copies are terms of one sum), for
            the parameters of which this rank is not the only one; some may have the same term (see
            `AllReduce`).
    """

    rank: int
    num_ranks: int
    mode: Mode
    num_microbatches: int
    stages: tuple[StageProgram, ...]
    stage_ranks: tuple[int, ...]
    instructions: tuple[Instruction, ...]
    plan_hash: str
    memory_limit_bytes: int
    shards: tuple[TensorShard, ...] = ()
    updates: tuple[TensorShard, ...] = ()
    gradient_terms: tuple[tuple[str, tuple[int, ...]], ...] = ()
    offloaded: tuple[str, ...] = ()

    @staticmethod
    def unscheduled(mode: Mode, stages: tuple[StageProgram, ...]) -> Program:
        """Stages of one rank without instructions, to be measured one by one."""
        return Program(0, 1, mode, 1, stages, (0,) * len(stages), (), "", 0)

    def trained(self) -> dict[str, Value]:
        """The parameters with gradients that the rank holds, by name, with local types."""
        if self.mode is not Mode.TRAIN:
            return {}
        return {
            value.origin: value
            for stage in self.stages
            for value in stage.graph.values_of(ValueKind.PARAMETER)
            if value.requires_grad
        }

    def update_types(self) -> dict[str, TensorType]:
        """Types of the parts of parameters that the rank updates."""
        parts = {shard.name: shard.part for shard in self.updates}
        return {name: parts.get(name, value.type) for name, value in self.trained().items()}

    def gradient_types(self) -> dict[str, TensorType]:
        """Types of the gradients that it accumulates: of what it holds, or updates, of each."""
        kept = {part.name for stage in self.stages for part in stage.kept}
        updated = self.update_types()
        return {
            name: updated[name] if name in kept else value.type
            for name, value in self.trained().items()
        }

    def most_in_flight(self, stage: int) -> int:
        """The most microbatches between forward and the end of backward in `stage`."""
        if self.mode is Mode.INFER:
            return 1
        most = now = 0
        ends = (None, self.stage(stage).last_part)
        for instruction in self.instructions:
            match instruction:
                case Forward(other, _) if other == stage:
                    now += 1
                    most = max(most, now)
                case BackwardWeight(other, _, part) if other == stage and part in ends:
                    now -= 1
                case Backward(other, _) if other == stage:
                    now -= 1
        return most

    def weights_follow(self, stage: int) -> bool:
        """Whether the weight gradients of each microbatch come before the next backward of any."""
        last: int | None = None
        for instruction in self.instructions:
            match instruction:
                case BackwardInput(other, microbatch) | Backward(other, microbatch):
                    last = microbatch if other == stage else last
                case BackwardWeight(other, microbatch) if other == stage and microbatch != last:
                    return False
        return True

    def stage(self, index: int) -> StageProgram:
        """The stage with plan-wide number `index`. Raises KeyError if it is not on this rank."""
        for stage in self.stages:
            if stage.index == index:
                return stage
        raise KeyError(index)
