"""Measures parts of a graph on the device of a worker: operators one after the other, or blocks.

Of a graph whose operators are placed one by one, the nodes run one after the other, each a function
of its own on what those before it have made, so that operands have the strides and the caches the
state that they have in the model. The values of parameters and inputs are made up: how long an
operator takes follows from shapes.

A block is measured by the kernels that a stage of it would run: F, B and W of `kernels.py`,
compiled or as CUDA graphs if that is asked for, with stand-ins for collectives. A block that occurs
several times runs on as many sets of tensors in turn, forward and then backward, so that caches
hold of each what they hold in the model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..compiler.ir.text import parse_program
from ..compiler.ir.types import TensorType
from .clock import busy_clock
from .communicator import Communicator
from .instructions import instruction_seconds
from .memory import if_it_fits
from .profile_block import BlockRun, block_kernels
from .profile_nodes import NodeRun
from .rank import stage_functions

__all__ = ["Profiler"]

_MESSAGE_BYTES = (4 << 10, 4 << 20)
_MESSAGES = 15
_RUNNING_SECONDS = 0.3  # of a block
_RESTING = 1 / 3  # of the time that a phase takes
T = TypeVar("T")


class Profiler:
    """What a worker that only measures has instead of a `Rank`; arguments as there."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        device: torch.device,
        communicator: Communicator,
        timeout_seconds: float = 300.0,
    ) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self._device = device
        self._communicator = communicator
        self._timeout = timeout_seconds

    def reset(self) -> None:
        """Nothing is kept between calls."""

    def time_nodes(
        self, *, program: str, source: str, seconds: float, cuda_graphs: bool
    ) -> list[float] | str:
        """Median seconds of every node, and how unsteady a whole run is: the variance of its time
        over its mean, in seconds; where memory does not suffice, at which node and by how much.

        Args:
            program: text form of a program with one node a stage, in an order in which they run;
                what none of them computes is made up.
            source: their stage functions.
            seconds: for which runs are timed at least, so that workers of different speed measure
                beside each other all the time.
            cuda_graphs: see `Rank.load`.
        """
        stages = parse_program(program).stages
        functions = stage_functions(source, f"<cutset profile of rank {self._rank}>")
        run, reason = if_it_fits(
            lambda: NodeRun(stages, functions, self._device, cuda_graphs), self._device
        )
        self._communicator.barrier(label="the start of measuring")
        if run is None:
            return f"parameters and inputs: {reason}"
        found, reason = if_it_fits(lambda: run.repeated(seconds), self._device)
        if found is None:
            return f"{run.current}: {reason}"
        rows, wholes = found
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        return [*medians, statistics.pvariance(wholes) / statistics.mean(wholes)]

    def time_block(self, **block: Any) -> tuple[float, float, float] | str:
        """Typical seconds of F, B and W of a block on a device that does nothing else; arguments
        and errors as of `block_runs`."""
        return self._measured(BlockRun.typical_seconds, **block)

    def block_runs(self, **block: Any) -> list[tuple[float, float, float]] | str:
        """Seconds of F, B and W of the one stage of a program, run by run, on a worker that rests
        as ranks of a step do, which wait for each other: a processor that has rested is slower when
        it goes on, on virtual machines by a tenth to a third. Where memory does not suffice, what
        the allocator says.

        Args:
            program: text form.
            source: its stage function.
            copies: sets of tensors that it runs on in turn.
            compile, cuda_graphs: see `Rank.load`.
        """
        return self._measured(lambda run: run.runs(_RUNNING_SECONDS, resting=_RESTING), **block)

    def _measured(
        self,
        measure: Callable[[BlockRun], T],
        *,
        program: str,
        source: str,
        copies: int,
        compile: bool,
        cuda_graphs: bool,
    ) -> T | str:
        parsed = parse_program(program)
        (stage,) = parsed.stages
        functions = stage_functions(source, f"<cutset profile of rank {self._rank}>")
        function = functions[f"stage_{stage.index}"]

        def prepared() -> BlockRun:
            kernels = block_kernels(function, stage, self._device, compile)
            return BlockRun(stage, kernels, self._device, copies, cuda_graphs)

        run, reason = if_it_fits(prepared, self._device)
        self._communicator.barrier(label="the start of measuring")
        if run is None:
            return reason
        found, reason = if_it_fits(lambda: measure(run), self._device)
        return reason if found is None else found

    def time_instructions(self, *, program: str, source: str) -> float:
        """See `instruction_seconds`."""
        return instruction_seconds(
            parse_program(program),
            source,
            rank=self._rank,
            device=self._device,
            communicator=self._communicator,
            timeout_seconds=self._timeout,
        )

    def time_messages(self) -> tuple[float, float]:
        """Seconds for which this rank works on a message, sent or received: on any, and on a byte.

        Ranks send to the next one around a ring, all at the same time. Time on the way, in which a
        rank may compute, is not counted.
        """
        if self._num_ranks == 1:
            return 0.0, 0.0
        small, large = (self._message_seconds(size) for size in _MESSAGE_BYTES)
        per_byte = max(0.0, large - small) / (_MESSAGE_BYTES[1] - _MESSAGE_BYTES[0])
        return max(0.0, small - per_byte * _MESSAGE_BYTES[0]), per_byte

    def _message_seconds(self, size: int) -> float:
        clock = busy_clock(self._device)
        after, before = (self._rank + 1) % self._num_ranks, (self._rank - 1) % self._num_ranks
        kind = TensorType((size,), torch.uint8)
        tensor = torch.zeros(size, dtype=torch.uint8, device=self._device)
        seconds = []
        for turn in range(_MESSAGES):
            label = f"message {turn} of {size} bytes"
            begin = clock()
            arriving = self._communicator.recv(kind, before, turn, label=label)
            leaving = self._communicator.send(tensor, after, turn, label=label)
            seconds.append(clock() - begin)
            for pending in (leaving, arriving):
                pending.wait(self._timeout)
        return statistics.median(seconds) / 2
