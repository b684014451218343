"""Execute one rank's instruction list.

The executor plans nothing: it follows the instructions, keeps every pending communication, and
waits only where a value is read. `advance` executes at most one instruction and reports whether it
could, so that several ranks can be run in one process by turns over a simulated network; `run`
waits and executes to the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..compiler.ir.graph import Graph, Mode, OutputKind, Value, ValueKind
from ..compiler.ir.program import (
    GRADIENT_NORM,
    AllGather,
    AllReduce,
    Await,
    Backward,
    BackwardInput,
    BackwardWeight,
    ClipGradients,
    Collective,
    Forward,
    Free,
    GradientNorm,
    Instruction,
    OptimizerStep,
    Program,
    Recv,
    ReduceScatter,
    Register,
    Send,
)
from ..compiler.ir.trace import TraceEvent
from .communicator import Communicator, Pending
from .cuda_graphs import GraphSlots
from .kernels import Kernel, Source, StageKernels
from .optimizer import zero_gradients
from .parts import (
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    updated_parts,
    view_of,
)
from .recorder import Recorder
from .rectangles import Arriving, rectangle_of

__all__ = ["Executor", "Step", "StepResult"]


class Optimizer(Protocol):
    """What the executor needs of an optimizer: one update from accumulated gradients."""

    def __call__(self, gradients: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """Inputs of one step.

    Args:
        inputs: user inputs by origin, whole batch (split here along their batch dim).
        weights: per microbatch, the factor of its loss and gradients.
        keys: per microbatch, the 0-dim int64 key of its random streams.
    """

    inputs: Mapping[str, Tensor]
    weights: tuple[float, ...]
    keys: tuple[Tensor, ...]


@dataclass(slots=True)
class StepResult:
    """What a rank has after a step: the weighted loss if it holds it, user outputs by target, and
    what it did when, if that was recorded: with `busy_seconds` of all instructions by
    `busy_clock`."""

    loss: Tensor | None = None
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    events: list[TraceEvent] = field(default_factory=list)
    busy_seconds: float = 0.0


class _Context:
    """Tensors that backward of one (stage, microbatch) still needs."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Source, int], Tensor | None] = {}
        self.slot: Any = None  # of CUDA graphs, where they are used

    def keep(self, sources: Iterable[tuple[Source, int]], arguments: list[Tensor | None]) -> None:
        """Keep those arguments of F that backward reads."""
        for kind, index in sources:
            if kind is Source.ARGUMENT:
                self.kept[kind, index] = arguments[index]


class Executor:
    """Runs steps of one program. Parameters, buffers and gradient buffers are owned outside.

    Args:
        program: what to run.
        kernels: by stage index.
        tensors: parameters, buffers and constants by name; buffers are replaced as they change.
        gradients: gradient buffers by parameter name; empty for inference.
        communicator: how registers travel.
        device: where this rank computes.
        timeout_seconds: longest wait for one register or collective.
        cuda_graphs: replay kernels as CUDA graphs (on CUDA devices only).
    """

    def __init__(
        self,
        program: Program,
        kernels: Mapping[int, StageKernels],
        *,
        tensors: MutableMapping[str, Tensor],
        gradients: dict[str, Tensor],
        communicator: Communicator,
        device: torch.device,
        timeout_seconds: float,
        cuda_graphs: bool = True,
    ) -> None:
        self._program = program
        self._kernels = kernels
        self._tensors = tensors
        self._gradients = gradients
        self._updated = _updated_views(program, gradients)
        self._communicator = communicator
        self._device = device
        self._timeout = timeout_seconds
        self._stages = {stage.index: stage for stage in program.stages}
        self._boundaries = {
            shard.name: shard for stage in program.stages for shard in stage.boundaries
        }
        self._consumers = {stage.index: dict(stage.consumers) for stage in program.stages}
        self._later = {index: _read_later(entry) for index, entry in kernels.items()}
        self._slots: dict[int, GraphSlots] = {}
        if cuda_graphs and device.type == "cuda":
            self._slots = {
                index: GraphSlots(
                    entry,
                    in_flight=program.most_in_flight(index),
                    weights_follow=program.weights_follow(index),
                )
                for index, entry in kernels.items()
                if entry.is_capturable
            }
        self.touched: set[str] = set()
        self._step: Step | None = None
        self._optimize: Optimizer | None = None
        self._rehearsed = False

    def begin(
        self,
        step: Step,
        *,
        optimize: Optimizer | None = None,
        record: bool = False,
        keep: dict[str, Tensor] | None = None,
    ) -> None:
        """Prepare a step; `advance` or `run` executes it.

        Args:
            optimize: called at `OptimizerStep` with the gradients of the parts it updates.
            record: note when every instruction ran.
            keep: receives copies of these gradients as they are before clipping.
        """
        self._step = step
        self._keep = keep
        self._optimize = optimize
        self._recorder = Recorder(self._program.rank, self._device) if record else None
        for kernels in self._kernels.values():
            if kernels.collectives is not None:
                kernels.collectives.recorder = self._recorder
        self._position = 0
        self._registers: dict[Register, Tensor | Pending | Arriving] = {}
        self._contexts: dict[tuple[int, int], _Context] = {}
        self._draining: list[Pending] = []
        self._sends: dict[Register, list[Pending]] = {}
        self._collectives: list[tuple[Collective, Pending]] = []
        self._norm = torch.zeros((), dtype=torch.float64)
        self.touched = set()
        self.result = StepResult()
        self._microbatches = {
            value.origin: _split(value, step.inputs[value.origin], len(step.weights))
            for stage in self._program.stages
            for value in stage.graph.values_of(ValueKind.INPUT)
        }
        zero_gradients(self._gradients.values())
        if self._recorder is not None:
            self._recorder.restart()

    def rehearse(self) -> None:
        """Run every stage on zeros, as often as microbatches are in flight, and forget the results;
        the first time it is called, between `begin` and `run`.

        On CUDA the first run of a kernel loads code, and recording a graph allocates; both may wait
        for all that the device was given. Within a step that would be a deadlock: a receive under
        way waits for a rank that waits for this one. Here nothing is under way but what the ranks
        of a stage do together.
        """
        if self._rehearsed:
            return
        self._rehearsed = True
        buffers = {
            output.target: self._tensors[output.target]
            for stage in self._program.stages
            for output in stage.graph.outputs
            if output.kind is OutputKind.BUFFER
        }
        for index, stage in self._stages.items():
            count = self._program.most_in_flight(index) if index in self._slots else 1
            for _ in range(2 if index in self._slots else 1):  # to record, graphs need a run before
                self._rehearse_stage(stage.graph, index, count)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                    torch.cuda.empty_cache()  # recorded graphs cannot use what is cached
        self._tensors.update(buffers)
        self.touched = set()
        self.result = StepResult()
        zero_gradients(self._gradients.values())
        if self._recorder is not None:
            self._recorder.restart()

    def _rehearse_stage(self, graph: Graph, stage: int, count: int) -> None:
        """Forward of `count` microbatches, then the backward of each."""
        for microbatch in range(count):
            for value in graph.values_of(ValueKind.BOUNDARY):
                self._registers[Register(value.name, microbatch)] = self._zeros(value)
            self._forward(stage, microbatch)
        for microbatch in range(count if self._program.mode is Mode.TRAIN else 0):
            positions = self._kernels[stage].signature.tangents
            for position, reads in zip(positions, self._tangents(stage, microbatch), strict=True):
                value = graph.values[graph.outputs[position].value]
                self._registers.update((register, self._zeros(value)) for register in reads)
            self._backward_input(stage, microbatch)
            self._backward_weight(stage, microbatch, None)
        self._registers.clear()

    def _zeros(self, value: Value) -> Tensor:
        return torch.zeros(value.type.shape, dtype=value.type.dtype, device=self._device)

    def run(self) -> StepResult:
        """Execute all instructions, waiting as needed."""
        while not self.finished:
            for pending in self._awaited(self._next):
                pending.wait(self._timeout)
            self.advance()
        return self.result

    def take_result(self) -> StepResult:
        """The result of the finished step; nothing of the step stays alive here."""
        result, self.result = self.result, StepResult()
        if self._recorder is not None:
            result.events = self._recorder.events
            result.busy_seconds = self._recorder.busy_seconds
        self._step = self._optimize = self._keep = None
        self._microbatches = {}
        self._registers.clear()
        self._contexts.clear()
        return result

    @property
    def position(self) -> int:
        """Index of the next instruction."""
        return self._position

    @property
    def finished(self) -> bool:
        return self._next is None and self._drained()

    @property
    def _next(self) -> Instruction | None:
        """The next instruction; None at the end."""
        instructions = self._program.instructions
        return instructions[self._position] if self._position < len(instructions) else None

    def advance(self) -> bool:
        """Execute the next instruction unless it must wait; whether anything was done."""
        instruction = self._next
        if instruction is None:
            return self._drained()
        awaited = self._awaited(instruction)
        if any(not pending.done() for pending in awaited):
            return False
        recorder = self._recorder
        if recorder is None:
            self._execute(instruction)
        else:
            self._saw_end(awaited)
            began = recorder.begin(instruction)
            self._execute(instruction)
            recorder.executed(instruction, began)
        self._position += 1
        return True

    def _saw_start(self, pending: Pending, instruction: Instruction) -> None:
        if self._recorder is not None:
            self._recorder.started(pending, instruction)

    def _saw_end(self, pendings: Iterable[Pending]) -> None:
        if self._recorder is not None:
            self._recorder.ended(pendings)

    def _drained(self) -> bool:
        """Whether all communication is over."""
        awaited = self._awaited(None)
        if any(not pending.done() for pending in awaited):
            return False
        self._saw_end(awaited)
        self._settle(None)
        for pending in self._draining:
            pending.wait(self._timeout)
        self._saw_end(self._draining)
        self._draining.clear()
        return True

    # -- what an instruction waits for ---------------------------------------------------------

    def _awaited(self, instruction: Instruction | None) -> list[Pending]:
        """Communications that must be complete before `instruction` (None: the end of the step)."""
        match instruction:
            case Forward(stage, microbatch):
                read = [Register(name, microbatch) for name, _ in self._stages[stage].producers]
            case BackwardInput(stage, microbatch) | Backward(stage, microbatch):
                read = [r for reads in self._tangents(stage, microbatch) for r in reads]
            case _:
                return [pending for _, pending in self._needed(instruction)]
        awaited: list[Pending] = []
        for item in (self._registers.get(register) for register in read):
            if isinstance(item, Arriving):
                awaited += item.pieces
            elif item is not None and not isinstance(item, Tensor):
                awaited.append(item)
        return awaited

    def _needed(self, instruction: Instruction | None) -> list[tuple[Collective, Pending]]:
        """Collectives under way whose results `instruction` (None: the end of the step) needs."""
        match instruction:
            case AllReduce() | ReduceScatter() | AllGather() | Await():
                targets = set(instruction.targets)
                return [entry for entry in self._collectives if targets & set(entry[0].targets)]
            case GradientNorm() | ClipGradients() | OptimizerStep() | None:
                return self._collectives
            case _:
                return []

    def _settle(self, instruction: Instruction | None) -> None:
        """Complete the collectives that `instruction` needs."""
        needed = self._needed(instruction)
        for _, pending in needed:
            pending.wait(self._timeout)
        self._collectives = [entry for entry in self._collectives if entry not in needed]

    def _start(self, item: Collective) -> Pending:
        label = f"{type(item).__name__} of {', '.join(item.targets)}"
        communicator = self._communicator
        if isinstance(item, AllGather):
            tensors = [self._tensors[name] for name in item.targets]
            return start_all_gather(communicator, tensors, item.dims, item.ranks, label=label)
        if isinstance(item, ReduceScatter):
            tensors = [self._gradients[name] for name in item.targets]
            return start_reduce_scatter(communicator, tensors, item.dims, item.ranks, label=label)
        if item.copies:
            for name in item.targets:
                self._updated[name].div_(item.copies[item.ranks.index(self._program.rank)])
        is_norm = item.targets == (GRADIENT_NORM,)
        tensors = [self._norm] if is_norm else [self._updated[name] for name in item.targets]
        return start_all_reduce(communicator, tensors, item.ranks, item.reduction, label=label)

    def _tangents(self, stage: int, microbatch: int) -> list[list[Register]]:
        """Per tangent of the stage, the gradient registers that are summed (none: the loss)."""
        graph = self._stages[stage].graph
        table = []
        for position in self._kernels[stage].signature.tangents:
            output = graph.outputs[position]
            consumers: tuple[int, ...] = ()
            if output.kind is OutputKind.BOUNDARY:
                consumers = self._consumers[stage][output.target]
            table.append([Register(output.target, microbatch, c) for c in consumers])
        return table

    # -- instructions --------------------------------------------------------------------------

    def _execute(self, instruction: Instruction) -> None:
        self._settle(instruction)
        match instruction:
            case Forward(stage, microbatch):
                self._forward(stage, microbatch)
            case BackwardInput(stage, microbatch):
                self._backward_input(stage, microbatch)
            case BackwardWeight(stage, microbatch, part):
                self._backward_weight(stage, microbatch, part)
            case Backward(stage, microbatch):
                self._backward_input(stage, microbatch)
                self._backward_weight(stage, microbatch, None)
            case Send():
                self._send(instruction)
            case Recv():
                self._receive(instruction)
            case Free(registers):
                self._free(registers)
            case GradientNorm(parameters):
                self._keep_gradients()
                self._square_norm(parameters)
            case AllReduce() | ReduceScatter() | AllGather():
                pending = self._start(instruction)
                self._collectives.append((instruction, pending))
                self._saw_start(pending, instruction)
                if not isinstance(instruction, AllGather):
                    self.touched.update({*instruction.targets} - {GRADIENT_NORM})
            case ClipGradients(max_norm):
                self._clip(max_norm)
            case OptimizerStep():
                self._keep_gradients()
                if self._optimize is not None:
                    self._optimize({name: self._updated[name] for name in sorted(self.touched)})

    def _read(self, register: Register) -> Tensor:
        held = self._registers[register]
        if isinstance(held, Tensor):
            return held
        pieces = held.pieces if isinstance(held, Arriving) else (held,)
        tensor = held.wait(self._timeout)
        self._saw_end(pieces)
        assert tensor is not None
        self._registers[register] = tensor
        return tensor

    def _arguments(self, stage: int, microbatch: int) -> list[Tensor]:
        arguments = []
        for value in self._kernels[stage].signature.arguments:
            if value.kind is ValueKind.BOUNDARY:
                arguments.append(self._read(Register(value.name, microbatch)))
            elif value.kind is ValueKind.INPUT:
                arguments.append(self._microbatches[value.origin][microbatch])
            else:
                arguments.append(self._tensors[value.origin])
        return arguments

    def _forward(self, stage: int, microbatch: int) -> None:
        assert self._step is not None
        kernels = self._kernels[stage]
        key = self._step.keys[microbatch]
        arguments: list[Tensor | None] = [key, *self._arguments(stage, microbatch)]
        context = _Context()
        needed = {*kernels.input_sources, *self._later[stage][0]}
        slots = self._slots.get(stage)
        if slots is None:
            context.keep(needed, arguments)
            results = list(kernels.forward(arguments))
        else:
            results, context.slot = slots.forward(
                arguments, lambda staged: context.keep(needed, staged)
            )
        for index, tensor in enumerate(results[kernels.num_outputs :]):
            context.kept[Source.SAVED, index] = tensor
        del results[kernels.num_outputs :]
        if kernels.backward_input is not None:
            self._contexts[stage, microbatch] = context
        elif slots is not None:
            slots.release(context.slot)
        self._store_outputs(stage, microbatch, results)

    def _store_outputs(self, stage: int, microbatch: int, results: Sequence[Tensor | None]) -> None:
        assert self._step is not None
        outputs = self._stages[stage].graph.outputs
        for output, tensor in zip(outputs, results, strict=True):
            assert tensor is not None
            match output.kind:
                case OutputKind.BOUNDARY:
                    self._registers[Register(output.target, microbatch)] = tensor
                case OutputKind.BUFFER:
                    self._tensors[output.target] = self._own(tensor)
                case OutputKind.USER:
                    self.result.outputs.setdefault(output.target, []).append(tensor)
                case OutputKind.LOSS:
                    term = tensor.double() * self._step.weights[microbatch]
                    self.result.loss = term if self.result.loss is None else self.result.loss + term

    def _own(self, tensor: Tensor) -> Tensor:
        """`tensor` itself, or a copy if it is part of an input, which its owner may change."""
        assert self._step is not None
        storage = tensor.untyped_storage().data_ptr()
        inputs = self._step.inputs.values()
        shared = any(item.untyped_storage().data_ptr() == storage for item in inputs)
        return tensor.clone() if shared else tensor

    def _backward_input(self, stage: int, microbatch: int) -> None:
        kernels = self._kernels[stage]
        assert kernels.backward_input is not None
        context = self._contexts[stage, microbatch]
        for index, reads in enumerate(self._tangents(stage, microbatch)):
            context.kept[Source.TANGENT, index] = self._tangent(stage, index, reads, microbatch)
        later = self._later[stage][0]
        arguments = [
            context.kept[source] if source in later else context.kept.pop(source)
            for source in kernels.input_sources
        ]
        for source in [source for source in context.kept if source not in later]:
            del context.kept[source]
        names = [kernels.signature.arguments[i].origin for i in kernels.accumulated_early]
        arguments.extend(self._gradients[name] for name in names)
        self.touched.update(names)
        results = self._call(stage, context, "input", kernels.backward_input, arguments)
        gradients = _with_zeros(kernels, results, self._device)
        for index, tensor in enumerate(results):
            context.kept[Source.PASSED, index] = tensor
        for position, gradient in zip(kernels.signature.differentiable, gradients, strict=True):
            name = kernels.signature.arguments[position].name
            self._registers[Register(name, microbatch, stage)] = gradient

    def _call(
        self,
        stage: int,
        context: _Context,
        name: str,
        kernel: Kernel,
        arguments: list[Tensor | None],
    ) -> list[Tensor | None]:
        slots = self._slots.get(stage)
        if slots is None:
            return list(kernel(arguments))
        return slots.backward(context.slot, name, kernel, arguments)

    def _tangent(self, stage: int, index: int, reads: list[Register], microbatch: int) -> Tensor:
        graph = self._stages[stage].graph
        output = graph.outputs[self._kernels[stage].signature.tangents[index]]
        if output.kind is OutputKind.LOSS:
            assert self._step is not None
            dtype = graph.values[output.value].type.dtype
            return torch.full((), self._step.weights[microbatch], dtype=dtype, device=self._device)
        total = self._read(reads[0])
        for register in reads[1:]:
            total = total + self._read(register)
        return total

    def _backward_weight(self, stage: int, microbatch: int, number: int | None) -> None:
        """The weight gradients, or part `number` of them."""
        parts = self._kernels[stage].backward_weights
        context = self._contexts[stage, microbatch]
        for position in range(len(parts)) if number is None else (number,):
            self._weight_part(stage, context, position)
            if position == len(parts) - 1:
                del self._contexts[stage, microbatch]

    def _weight_part(self, stage: int, context: _Context, number: int) -> None:
        kernels = self._kernels[stage]
        part = kernels.backward_weights[number]
        names = [kernels.signature.arguments[i].origin for i in part.accumulated]
        later = self._later[stage][number + 1]
        # One list, which the kernel empties: a second one would keep all that is saved alive.
        arguments = [
            context.kept[source] if source in later else context.kept.pop(source)
            for source in part.sources
        ]
        arguments.extend(self._gradients[name] for name in names)
        results = self._call(stage, context, part.name, part.kernel, arguments)
        for index, tensor in zip(part.passed, results, strict=True):
            context.kept[Source.PASSED, index] = tensor
        self.touched.update(names)

    def _receive(self, recv: Recv) -> None:
        register = recv.register
        label = self._label(register)
        arriving = self._communicator.recv(recv.type, recv.peer, recv.tag, label=label)
        if recv.offset is None:
            self._registers[register] = arriving
        else:
            part = self._boundaries[register.value]
            held = self._registers.setdefault(register, Arriving(part, self._device))
            assert isinstance(held, Arriving)
            held.add(arriving, recv.offset, recv.type)
        self._saw_start(arriving, recv)

    def _send(self, send: Send) -> None:
        tensor = self._read(send.register)
        if send.offset is not None:
            part = self._boundaries[send.register.value]
            tensor = rectangle_of(tensor, part, send.offset, send.type.shape)
        pending = self._communicator.send(
            tensor, send.peer, send.tag, label=self._label(send.register)
        )
        self._sends.setdefault(send.register, []).append(pending)
        self._saw_start(pending, send)

    def _free(self, registers: tuple[Register, ...]) -> None:
        """Drop registers; tensors on their way stay alive until they have left."""
        for register in registers:
            self._registers.pop(register, None)
            self._draining.extend(self._sends.pop(register, ()))
        draining, self._draining = self._draining, []
        for pending in draining:
            if pending.done():
                self._saw_end([pending])
            else:
                self._draining.append(pending)

    def _keep_gradients(self) -> None:
        if self._keep is not None:
            self._keep.clear()
            self._keep.update({name: self._updated[name].clone() for name in self.touched})
            self._keep = None

    def _square_norm(self, parameters: tuple[str, ...]) -> None:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for name in parameters:
            if name in self.touched:
                total += _norm(self._updated[name]).double().square()
        self._norm = total

    def _clip(self, max_norm: float) -> None:
        factor = float(max_norm / (self._norm.sqrt() + 1e-6))
        if not factor >= 1.0:  # a norm of NaN spoils every gradient, as in torch
            for name in self.touched:
                self._updated[name].mul_(factor)

    def _label(self, register: Register) -> str:
        kind = "gradient of" if register.is_gradient else "value"
        return f"{kind} %{register.value} of microbatch {register.microbatch}"


def _read_later(kernels: StageKernels) -> list[frozenset[tuple[Source, int]]]:
    """For each part of W, what it and later parts read; nothing after the last."""
    table: list[frozenset[tuple[Source, int]]] = [frozenset()]
    for part in reversed(kernels.backward_weights):
        table.insert(0, table[0] | {*part.sources})
    return table


def _updated_views(program: Program, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each gradient, the part that the rank updates its parameter by."""
    parts = updated_parts(program)
    types = program.gradient_types()
    return {
        name: view_of(gradients[name], *parts[name])
        if name in parts and parts[name][1] != types[name].shape
        else gradients[name]
        for name in types
    }


def _norm(tensor: Tensor) -> Tensor:
    """Norm of a tensor in its own precision, at least float32; no copy of it is made."""
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    wide = torch.promote_types(parts.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(parts, dtype=wide)
    return norm


def _with_zeros(
    kernels: StageKernels, results: list[Tensor | None], device: torch.device
) -> list[Tensor]:
    """Input gradients in order, zeros where structurally absent; removes them from `results`."""
    signature = kernels.signature
    gradients = []
    for index, position in enumerate(signature.differentiable):
        if index in kernels.zero_inputs:
            type = signature.arguments[position].type
            gradients.append(torch.zeros(type.shape, dtype=type.dtype, device=device))
        else:
            tensor = results.pop(0)
            assert tensor is not None
            gradients.append(tensor)
    return gradients


def _split(value: Value, tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    """Microbatches of a user input (the same tensor each time if it has no batch dim)."""
    if value.batch_dim is None or tensor.shape == value.type.shape:
        return (tensor,) * count
    rows = value.type.shape[value.batch_dim]
    return tuple(torch.split(tensor, rows, dim=value.batch_dim))
