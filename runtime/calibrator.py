"""What a worker does while its device and its links are measured; see `compiler/calibrate.py`."""

from __future__ import annotations

import os
import socket
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from ..compiler.ir.text import parse_program
from .clock import busy_clock
from .launcher import num_cores
from .link_probes import LinkProbes, Rounds, lower_quartile
from .optimizer import OptimizerSpec, RankOptimizer, zero_gradients
from .profiler import Profiler

__all__ = ["Calibrator"]

_ROUNDS = 9
_STEPS = 5  # of an optimizer, in a round
_HOST_BYTES = (1 << 12, 1 << 20, 1 << 26)


class Calibrator(Profiler):
    """What a worker has instead of a `Rank` during calibration; arguments as there."""

    def describe(self) -> dict[str, Any]:
        """Name of the node and the cores of it that this worker may use, name of the device and its
        memory in bytes."""
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        name, memory = "", host
        if self._device.type == "cuda":
            properties = torch.cuda.get_device_properties(self._device)
            name, memory = properties.name, properties.total_memory
        return {
            "node": socket.gethostname(),
            "cores": num_cores(),
            "device": name,
            "memory_bytes": int(memory),
        }

    def time_optimizer(
        self, *, spec: OptimizerSpec, sizes: Sequence[tuple[int, int]]
    ) -> list[float]:
        """For each (elements, tensors) of `sizes`, median seconds of zeroing so many gradients of
        so many numbers each and of one update by them."""
        self._communicator.barrier(label="the start of measuring")
        return [self._optimizer_seconds(spec, elements, count) for elements, count in sizes]

    def _optimizer_seconds(self, spec: OptimizerSpec, elements: int, count: int) -> float:
        names = [f"p{index}" for index in range(count)]
        parameters = {
            name: torch.nn.Parameter(torch.ones(elements, device=self._device)) for name in names
        }
        gradients = {name: torch.ones(elements, device=self._device) for name in names}
        group = (tuple(names), spec.groups[0][1])
        optimizer = RankOptimizer(OptimizerSpec(spec.class_name, (group,)), parameters)
        options = (spec.groups[0][1],)
        clock = busy_clock(self._device)
        found = []
        for _ in range(_ROUNDS):
            begin = clock()
            for _ in range(_STEPS):
                zero_gradients(gradients.values())
                optimizer.step(gradients, options)
            found.append((clock() - begin) / _STEPS)
        return statistics.median(found[1:])

    def time_host(self) -> dict[str, list[tuple[int, float]]]:
        """(bytes, seconds) of copies from and to pinned memory of the host, and within it; nothing
        on a CPU. Processes that share the host only ever add: the lower quartile counts."""
        self._communicator.barrier(label="the start of measuring")
        if self._device.type != "cuda":
            return {}
        clock = busy_clock(self._device)
        table: dict[str, list[tuple[int, float]]] = {"down": [], "up": [], "host": []}
        for size in _HOST_BYTES:
            here = torch.ones(size, dtype=torch.uint8, device=self._device)
            there = torch.ones(size, dtype=torch.uint8, pin_memory=True)
            other = torch.empty_like(there)
            for name, (target, source) in {
                "down": (there, here),
                "up": (here, there),
                "host": (other, there),
            }.items():
                found = []
                for _ in range(_ROUNDS):
                    begin = clock()
                    target.copy_(source)
                    found.append(clock() - begin)
                table[name].append((size, lower_quartile(found[1:])))
        return table

    # -- links ---------------------------------------------------------------------------------

    def prepare_links(self, *, program: str, on_host: bool, num_rounds: int) -> None:
        """Make the connections that `program` names; the others as in `LinkProbes`."""
        self._communicator.prepare(parse_program(program))
        self._links = LinkProbes(
            self._communicator,
            self._device,
            self._timeout,
            on_host=on_host,
            num_rounds=num_rounds,
        )

    def time_asking(self) -> float:
        """See `LinkProbes.asking`."""
        return self._links.asking()

    def time_messages_between(
        self, *, pairs: list[tuple[int, int]], sizes: list[int]
    ) -> dict[tuple[int, int], list[tuple[int, float]]]:
        """See `LinkProbes.messages`."""
        return self._links.messages(pairs, sizes)

    def time_streams(self, *, size: int) -> tuple[float, float]:
        """See `LinkProbes.streams`."""
        return self._links.streams(size)

    def time_collective(
        self, *, name: str, ranks: tuple[int, ...], sizes: list[int]
    ) -> list[Rounds]:
        """See `LinkProbes.collective`."""
        return self._links.collective(name, ranks, sizes)

    def time_handling(self, *, name: str, sizes: list[int]) -> list[tuple[int, float]]:
        """See `LinkProbes.handling`."""
        return self._links.handling(name, sizes)

    def time_overlap(self, *, sizes: list[int]) -> list[tuple[float, float, float, float]]:
        """See `LinkProbes.overlap`."""
        return self._links.overlap(sizes)
