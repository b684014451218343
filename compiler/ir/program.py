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
* `Send` starts a non-blocking send of a register; `Recv` posts a non-blocking receive. The
  register is readable once a later instruction that reads it has waited for it.
* `Free` drops registers (after their sends have completed).
* `AllReduce(target, ranks)` sums a parameter's gradient (`target` its name) or, with target
  `GRADIENT_NORM`, the squared norm over ranks. `ClipGradients` scales by the global norm.
* `OptimizerStep` updates the rank's parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from .graph import Graph, Mode
from .types import TensorType

__all__ = [
    "GRADIENT_NORM",
    "AllReduce",
    "Backward",
    "BackwardInput",
    "BackwardWeight",
    "ClipGradients",
    "Forward",
    "Free",
    "GradientNorm",
    "Instruction",
    "OptimizerStep",
    "Program",
    "Recv",
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


@dataclass(frozen=True, slots=True)
class Send:
    """Start sending `register` to rank `peer`; `tag` is unique per register in a step."""

    register: Register
    peer: int
    tag: int
    type: TensorType


@dataclass(frozen=True, slots=True)
class Recv:
    """Post a receive of `register` from rank `peer`, matching the `Send` with the same tag."""

    register: Register
    peer: int
    tag: int
    type: TensorType


@dataclass(frozen=True, slots=True)
class Free:
    registers: tuple[Register, ...]


@dataclass(frozen=True, slots=True)
class GradientNorm:
    """Square norm of the gradients that this rank owns (a tied parameter counts at one rank)."""

    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AllReduce:
    target: str
    ranks: tuple[int, ...]
    reduction: str = "sum"


@dataclass(frozen=True, slots=True)
class ClipGradients:
    """Scale gradients by min(1, max_norm / (norm + 1e-6)), as `clip_grad_norm_` does."""

    max_norm: float


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    pass


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
    """

    index: int
    graph: Graph
    consumers: tuple[tuple[str, tuple[int, ...]], ...]
    producers: tuple[tuple[str, int], ...]
    axes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    recomputed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """Everything one rank executes in one step.

    Args:
        stage_ranks: rank of each stage in this rank's *column*: the ranks, one a stage, at one
            place of the in-stage mesh. Messages between stages stay in a column.
        plan_hash: agreed by all ranks before the first step.
        memory_limit_bytes: what the verifier holds the rank to.
        shards: parts of the parameters, buffers, constants and inputs that it does not hold whole.
        updates: parts of the parameters that it updates, where that is less than it holds: its
            gradients and optimizer states are of these (ZeRO).
        gradient_terms: (parameter, ranks whose gradients of their copies are terms of one sum), for
            the parameters of which this rank is not the only one.
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

    def stage(self, index: int) -> StageProgram:
        """The stage with plan-wide number `index`. Raises KeyError if it is not on this rank."""
        for stage in self.stages:
            if stage.index == index:
                return stage
        raise KeyError(index)
