"""What one rank holds and does: tensors, loaded programs, gradients, optimizer.

The same object serves every mode: in a worker process its methods are called by the driver over
RPC, under `torchrun` directly by the user's process. Method arguments and replies are plain data
and tensors.
"""

from __future__ import annotations

import linecache
import time
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiler.ir.graph import Mode, Output, OutputKind
from ..compiler.ir.program import Program, StageProgram
from ..compiler.ir.text import parse_program
from .checkpoint_files import SavedPart, WrittenPart, begin, discard, publish, write_parts
from .collective_ops import StageCollectives
from .communicator import Communicator
from .executor import Executor, Step
from .gradient_parts import parts_kept
from .kernels import StageKernels, trace_inference, trace_training
from .memory import (
    measure_peak,
    peak_resident_bytes,
    reset_peak_resident,
    resident_bytes,
    storage_bytes,
)
from .optimizer import Hyperparameters, OptimizerSpec, RankOptimizer
from .parts import Part, view_of
from .rng import make_key
from .weights import StoredPart, WeightReader

__all__ = ["Rank", "stage_functions"]


class Rank:
    """State and methods of one rank.

    Args:
        rank: position in the plan's device order.
        num_ranks: ranks in the job.
        device: where this rank computes.
        communicator: to the other ranks.
        timeout_seconds: longest wait for another rank.
        host: where offloaded optimizer states lie; None: they stay on `device`. By default the CPU
            that an accelerator belongs to.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        device: torch.device,
        communicator: Communicator,
        timeout_seconds: float = 300.0,
        host: torch.device | None = None,
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self._communicator = communicator
        self._timeout = timeout_seconds
        self._host = host or (None if device.type == "cpu" else torch.device("cpu"))
        self._tensors: dict[str, Tensor] = {}
        self._constants: dict[str, dict[str, Tensor]] = {}
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._gradients: dict[str, Tensor] = {}
        self._kept_gradients: dict[str, Tensor] = {}
        self._optimizer: RankOptimizer | None = None
        self._executors: dict[str, Executor] = {}
        self._programs: dict[str, Program] = {}

    # -- set-up --------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all tensors and programs, for another model."""
        self._tensors.clear()
        self._constants.clear()
        self._parameters.clear()
        self._gradients.clear()
        self._kept_gradients.clear()
        self._optimizer = None
        self._executors.clear()
        self._programs.clear()

    def load(
        self,
        *,
        key: str,
        program: str,
        source: str,
        constants: Mapping[str, Tensor] | None = None,
        compile: bool = False,
        cuda_graphs: bool = True,
    ) -> dict[str, float]:
        """Make the program with text form `program` and stage functions `source` runnable.

        Args:
            key: names the program in later calls.
            constants: of this program alone: another may call others by the same names.
            compile: run kernels through Inductor.
            cuda_graphs: on CUDA, replay kernels as CUDA graphs.

        Returns:
            `trace_seconds`, the time to derive the kernels.
        """
        began = time.perf_counter()
        parsed = parse_program(program)
        functions = stage_functions(source, f"<cutset rank {self.rank} {key}>")
        self._communicator.prepare(parsed)  # first: kernels may hold collectives
        kernels = {
            stage.index: self._kernels(functions[f"stage_{stage.index}"], stage, compile)
            for stage in parsed.stages
        }
        if parsed.mode is Mode.TRAIN:
            self._allocate_gradients(parsed)
        self._programs[key] = parsed
        self._constants[key] = {
            name: tensor.detach().to(self.device, copy=True)
            for name, tensor in (constants or {}).items()
        }
        self._executors[key] = Executor(
            parsed,
            kernels,
            tensors=ChainMap(self._tensors, self._constants[key]),
            gradients=self._gradients if parsed.mode is Mode.TRAIN else {},
            communicator=self._communicator,
            device=self.device,
            timeout_seconds=self._timeout,
            cuda_graphs=cuda_graphs,
        )
        return {"trace_seconds": time.perf_counter() - began}

    def _kernels(self, function: Any, stage: StageProgram, compile: bool) -> StageKernels:
        graph = stage.graph
        collectives = None
        if stage.meets:
            collectives = StageCollectives(self._communicator, dict(stage.axes), stage.index)
        if graph.mode is Mode.INFER and collectives is None:
            if compile:
                function = torch.compile(function, dynamic=False)
            return trace_inference(function, graph, self.device)
        if graph.mode is Mode.INFER:
            kernels = trace_inference(function, graph, self.device, collectives)
        else:
            kept = parts_kept(stage, self.rank)
            kernels = trace_training(function, graph, self.device, collectives, kept, stage.parts)
        return kernels.compiled() if compile else kernels

    def meets_inside(self, *, key: str) -> bool:
        """Whether stages of program `key` wait for other ranks while they compute."""
        return any(stage.meets for stage in self._programs[key].stages)

    def _allocate_gradients(self, program: Program) -> None:
        for name, type in program.gradient_types().items():
            if name not in self._gradients:
                self._gradients[name] = torch.zeros(
                    type.shape, dtype=type.dtype, device=self.device
                )

    def set_tensors(
        self, *, tensors: Mapping[str, Tensor], parameters: list[str], shared: bool = True
    ) -> None:
        """Take parameters and buffers by name; `parameters` names the first.

        A parameter that is already here keeps its storage, which the optimizer knows.

        Args:
            shared: the caller has these tensors too, so that copies are taken.
        """
        for name, tensor in tensors.items():
            if name in self._parameters:
                self._parameters[name].data.copy_(tensor.detach())
            else:
                value = tensor.detach().to(self.device, copy=shared)
                self._add_tensor(name, value, name in parameters)
        self._refresh_optimizer()

    def read_tensors(self, *, parts: Mapping[str, StoredPart], parameters: list[str]) -> None:
        """As `set_tensors`, of what lies in files, one after the other."""
        reader = WeightReader()
        for name, part in parts.items():
            if name in self._parameters:
                self._parameters[name].data.copy_(reader.read(part, self.device))
            else:
                self._add_tensor(name, reader.read(part, self.device), name in parameters)
        reader.close()
        self._refresh_optimizer()

    def _refresh_optimizer(self) -> None:
        if self._optimizer is not None:
            self._optimizer.refresh()

    def _add_tensor(self, name: str, value: Tensor, is_parameter: bool) -> None:
        self._tensors[name] = value
        if is_parameter:
            self._parameters[name] = torch.nn.Parameter(
                value, requires_grad=value.is_floating_point()
            )
            self._tensors[name] = self._parameters[name].detach()

    def configure_optimizer(
        self,
        *,
        spec: OptimizerSpec,
        parts: Mapping[str, Part] | None = None,
        offloaded: Sequence[str] = (),
    ) -> None:
        """Build the optimizer of the parameters held here.

        Args:
            parts: (offset, shape) of the part that is updated, for those not updated whole.
            offloaded: those whose states and update are on the host.
        """
        whole = self._parameters
        updated = {
            name: torch.nn.Parameter(view_of(whole[name].detach(), *part))
            for name, part in (parts or {}).items()
            if name in whole
        }
        host = self._host if offloaded else None
        self._optimizer = RankOptimizer(spec, {**whole, **updated}, host, offloaded)

    # -- steps ---------------------------------------------------------------------------------

    def begin_train_step(
        self,
        *,
        key: str,
        inputs: Mapping[str, Tensor],
        weights: tuple[float, ...],
        seed: int,
        step: int,
        hyperparameters: tuple[Hyperparameters, ...],
        keep_gradients: bool = False,
        record: bool = False,
    ) -> Executor:
        """Prepare a training step; the caller runs the executor it returns."""

        def optimize(gradients: Mapping[str, Tensor]) -> None:
            if self._optimizer is not None:
                self._optimizer.step(gradients, hyperparameters)

        executor = self._executors[key]
        executor.begin(
            self._step(inputs, weights, seed, step),
            optimize=optimize,
            record=record,
            keep=self._kept_gradients if keep_gradients else None,
        )
        return executor

    def begin_infer(
        self,
        *,
        key: str,
        inputs: Mapping[str, Tensor],
        weights: tuple[float, ...],
        seed: int = 0,
        step: int = 0,
        record: bool = False,
    ) -> Executor:
        """Prepare a forward-only step; the caller runs the executor it returns."""
        executor = self._executors[key]
        executor.begin(self._step(inputs, weights, seed, step), record=record)
        return executor

    def train_step(self, *, measure_memory: bool = False, **arguments: Any) -> dict[str, Any]:
        """Forward, backward, gradient sync and optimizer; arguments of `begin_train_step`.

        Returns:
            `loss` (float, or None on ranks that do not hold it), `seconds`, `times` (instruction,
            begin, end) if recorded, `outputs`, and with `measure_memory` `peak_bytes`.
        """
        return self._run(self.begin_train_step(**arguments), arguments["key"], measure_memory)

    def infer(self, *, measure_memory: bool = False, **arguments: Any) -> dict[str, Any]:
        """Forward only; arguments of `begin_infer`, reply as of `train_step`."""
        return self._run(self.begin_infer(**arguments), arguments["key"], measure_memory)

    def _outputs(self, key: str, found: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        """User outputs of a step of program `key`, microbatches joined."""
        table = {
            output.target: output
            for stage in self._programs[key].stages
            for output in stage.graph.outputs
            if output.kind is OutputKind.USER
        }
        return {target: _joined(table[target], tensors) for target, tensors in found.items()}

    def _step(
        self, inputs: Mapping[str, Tensor], weights: tuple[float, ...], seed: int, step: int
    ) -> Step:
        return Step(
            inputs={name: tensor.to(self.device) for name, tensor in inputs.items()},
            weights=tuple(weights),
            keys=tuple(
                make_key(seed, step, microbatch).to(self.device)
                for microbatch in range(len(weights))
            ),
        )

    def _run(self, executor: Executor, key: str, measure_memory: bool) -> dict[str, Any]:
        began = time.perf_counter()
        peak = None
        if self.device.type == "cuda":
            executor.rehearse()
        if measure_memory:
            _, peak = measure_peak(executor.run, self.device, self._held_tensors())
        else:
            executor.run()
        return self.reply(key) | {"seconds": time.perf_counter() - began, "peak_bytes": peak}

    def reply(self, key: str) -> dict[str, Any]:
        """Results of the finished step of program `key`, which are kept no longer here."""
        result = self._executors[key].take_result()
        return {
            "loss": None if result.loss is None else float(result.loss),
            "outputs": self._outputs(key, result.outputs),
            "events": result.events,
            "busy_seconds": result.busy_seconds,
        }

    def _held_tensors(self) -> list[Tensor]:
        """Tensors alive between steps: parameters, buffers, gradients, optimizer states (unless
        they are offloaded)."""
        held = [*self._tensors.values(), *self._gradients.values()]
        for constants in self._constants.values():
            held.extend(constants.values())
        if self._optimizer is not None:
            held.extend(self._optimizer.state_tensors())
        return held

    # -- state ---------------------------------------------------------------------------------

    def tensors(self, *, names: list[str]) -> dict[str, Tensor]:
        """Those of the named parameters and buffers that are held here."""
        return {name: self._tensors[name] for name in names if name in self._tensors}

    def gradients(self, *, names: list[str]) -> dict[str, Tensor]:
        """Gradients kept by the last step that ran with `keep_gradients`."""
        kept = self._kept_gradients
        return {name: kept[name] for name in names if name in kept}

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        return {} if self._optimizer is None else self._optimizer.state()

    def load_optimizer_state(self, *, state: Mapping[str, dict[str, Any]]) -> None:
        if self._optimizer is not None:
            self._optimizer.load_state(state)

    def optimizer_state_types(self) -> dict[str, dict[str, Any]]:
        """`optimizer_state` with tensors on meta."""
        return {
            name: {
                key: value.to("meta") if isinstance(value, Tensor) else value
                for key, value in entries.items()
            }
            for name, entries in self.optimizer_state().items()
        }

    def read_optimizer_state(self, *, state: Mapping[str, dict[str, Any]]) -> None:
        """Take the state that lies in files, or is plain data, one parameter after the other."""
        reader = WeightReader()
        for name, entries in state.items():
            self.load_optimizer_state(
                state={
                    name: {
                        key: reader.read(value, self.device)
                        if isinstance(value, StoredPart)
                        else value
                        for key, value in entries.items()
                    }
                }
            )
        reader.close()

    # -- checkpoints ---------------------------------------------------------------------------
    # What may go wrong with files is a reply, so that the job goes on after a failed save.

    def begin_checkpoint(self, *, directory: str) -> str | None:
        """Make `directory` (on rank 0); what went wrong."""
        return _failure_of_files(begin, directory) if self.rank == 0 else None

    def write_checkpoint(
        self,
        *,
        directory: str,
        parts: list[SavedPart],
        others: Mapping[str, Tensor],
        objects: Mapping[str, Any],
    ) -> list[WrittenPart] | str:
        """Write parts of what is held here, other whole tensors and objects, both by key.

        Returns:
            what was written, or what went wrong.
        """
        state = self.optimizer_state()
        held = [
            (
                part.key,
                part.whole,
                part.offset,
                self._tensors[part.name] if part.entry is None else state[part.name][part.entry],
            )
            for part in parts
        ]
        whole = [(key, tuple(t.shape), (0,) * t.ndim, t.detach()) for key, t in others.items()]
        try:
            return write_parts(directory, self.rank, [*held, *whole], objects)
        except (OSError, RuntimeError) as error:  # torch has the latter for a full disk
            return f"{type(error).__name__}: {error}"

    def publish_checkpoint(
        self,
        *,
        directory: str,
        target: str,
        parts: list[WrittenPart],
        paths: Mapping[str, tuple[str | int, ...]],
    ) -> str | None:
        """Give the checkpoint in `directory` its name (on rank 0); what went wrong."""
        if self.rank:
            return None
        return _failure_of_files(publish, directory, target, parts, paths)

    def discard_checkpoint(self, *, directory: str) -> None:
        """Remove what a failed save has written (on rank 0)."""
        if self.rank == 0:
            discard(directory)

    def memory(self) -> dict[str, int]:
        """Bytes held between steps, the resident size of the process and its peak."""
        held = storage_bytes(self._held_tensors())
        return {
            "held_bytes": held,
            "resident_bytes": resident_bytes(),
            "peak_resident_bytes": peak_resident_bytes(),
        }

    def reset_peak(self) -> None:
        """Measure the peak of the resident size from now on."""
        reset_peak_resident()


def _failure_of_files(run: Callable[..., None], *arguments: Any) -> str | None:
    try:
        run(*arguments)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


def stage_functions(source: str, filename: str) -> dict[str, Any]:
    """The functions of generated source, by name; its lines stay visible in tracebacks."""
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    namespace: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), namespace)
    return namespace


def _joined(output: Output, tensors: list[Tensor]) -> Tensor:
    """One user output from its microbatches."""
    if output.batch_dim is not None:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=output.batch_dim)
    if tensors[0].ndim == 0 and tensors[0].is_floating_point():
        return torch.stack(tensors).mean()
    return tensors[-1]
