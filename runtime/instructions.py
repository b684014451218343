"""Measures what the host of a worker takes for an instruction beside the operators in it."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from ..compiler.ir.program import Program
from .clock import busy_clock
from .communicator import Communicator
from .executor import Executor, Step
from .profile_block import block_kernels
from .rank import stage_functions
from .rng import make_key

__all__ = ["instruction_seconds"]

_ROUNDS = 9


def instruction_seconds(
    program: Program,
    source: str,
    *,
    rank: int,
    device: torch.device,
    communicator: Communicator,
    timeout_seconds: float,
) -> float:
    """Mean seconds of the host for one instruction of `program`, whose kernels do next to
    nothing and are counted in; the median of some steps.

    Args:
        source: its stage functions.
    """
    functions = stage_functions(source, f"<cutset measurement of rank {rank}>")
    kernels = {
        stage.index: block_kernels(functions[f"stage_{stage.index}"], stage, device, False)
        for stage in program.stages
    }
    tensors, gradients, inputs = _made_up(program, device)
    executor = Executor(
        program,
        kernels,
        tensors=tensors,
        gradients=gradients,
        communicator=communicator,
        device=device,
        timeout_seconds=timeout_seconds,
        cuda_graphs=True,
    )
    count = program.num_microbatches
    keys = tuple(make_key(0, 0, index).to(device) for index in range(count))
    clock = busy_clock(device)
    communicator.barrier(label="the start of measuring")
    found = []
    for _ in range(_ROUNDS):
        executor.begin(Step(inputs, (1.0 / count,) * count, keys))
        if device.type == "cuda":
            executor.rehearse()
        begin = clock()
        executor.run()
        found.append(clock() - begin)
        executor.take_result()
    return statistics.median(found) / len(program.instructions)


def _made_up(
    program: Program, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Parameters, gradients and user inputs, all ones."""
    values = [value for stage in program.stages for value in stage.graph.values]
    tensors: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for value in values:
        if value.origin:
            made = torch.ones(value.type.shape, dtype=value.type.dtype, device=device)
            (tensors if value.batch_dim is None else inputs)[value.origin] = made
    inputs = {
        name: tensor.repeat(program.num_microbatches, *[1] * (tensor.ndim - 1))
        for name, tensor in inputs.items()
    }
    gradients = {
        name: torch.zeros(type.shape, dtype=type.dtype, device=device)
        for name, type in program.gradient_types().items()
    }
    return tensors, gradients, inputs
