"""Measures messages and collectives between ranks, alone and beside others or beside computation.

Times are wall times, as messages run in threads of their own (gloo) or on the device (NCCL).
Everything is repeated, and the lower quartile counts: what else a machine does only ever adds.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..compiler.ir.types import TensorType
from .communicator import Communicator, Pending, Split

__all__ = ["LinkProbes", "lower_quartile"]

_ROUNDS = 16
_LEAST_ROUNDS, _MOST_ROUNDS = 9, 200
_ENOUGH_SECONDS = 0.25  # of one kind of operation and size
_ANSWER_BYTES = 8
_COMPUTED = {"cpu": 256, "cuda": 2048}  # rows of matrices that are multiplied beside a transfer
_LONGER = 2.0  # than the transfer


class LinkProbes:
    """The probes of one rank; all ranks call the same ones in the same order."""

    def __init__(
        self, communicator: Communicator, device: torch.device, timeout_seconds: float
    ) -> None:
        self._communicator = communicator
        self._device = device
        self._timeout = timeout_seconds
        self._rank, self._num_ranks = communicator.rank, communicator.num_ranks

    # -- messages ------------------------------------------------------------------------------

    def messages(
        self, pairs: Sequence[tuple[int, int]], sizes: Sequence[int]
    ) -> dict[tuple[int, int], list[tuple[int, float]]]:
        """(bytes, seconds) of messages over those of `pairs` that this rank is the source of, one
        pair after the other."""
        table = {}
        for source, target in pairs:
            self._communicator.barrier(label="the next pair")
            if self._rank in (source, target):
                answer = self._round_trip(source, target, _ANSWER_BYTES) / 2
                found = [
                    (size, max(self._round_trip(source, target, size) - answer, answer / 10))
                    for size in sizes
                ]
                if self._rank == source:
                    table[source, target] = found
        return table

    def _round_trip(self, source: int, target: int, size: int) -> float:
        """Seconds of a message of `size` bytes and a short answer."""
        message, answer = self._bytes(size), self._bytes(_ANSWER_BYTES)

        def once() -> None:
            if self._rank == source:
                self._finish([self._send(message, target), self._recv(_ANSWER_BYTES, target)])
            else:
                self._finish([self._recv(size, source)])
                self._finish([self._send(answer, source)])

        return self._quartile(once, agreed=(source, target))

    def streams(self, size: int) -> tuple[float, float]:
        """Seconds of a message of `size` bytes to the next rank around a ring, when rank 0 alone
        sends one and when all do at once."""
        message = self._bytes(size)
        after, before = (self._rank + 1) % self._num_ranks, (self._rank - 1) % self._num_ranks

        def exchange(senders: Sequence[int]) -> float:
            found = []
            for _ in range(_ROUNDS):
                self._communicator.barrier(label="the next exchange")
                begin = time.perf_counter()
                pending = [self._recv(size, before)] if before in senders else []
                pending += [self._send(message, after)] if self._rank in senders else []
                self._finish(pending)
                self._synchronize()
                found.append(time.perf_counter() - begin)
            return lower_quartile(found)

        return exchange((0,)), exchange(range(self._num_ranks))

    # -- collectives ---------------------------------------------------------------------------

    def collective(
        self, name: str, ranks: tuple[int, ...], sizes: Sequence[int]
    ) -> list[tuple[int, float]]:
        """(bytes, seconds) of collectives called `name` over `ranks`; the bytes are those that the
        cost model counts: of the whole tensor, of an all-to-all what each rank holds. Nothing on
        other ranks."""
        self._communicator.barrier(label="the next collective")
        if self._rank not in ranks:
            return []
        found = []
        for size in sizes:
            num_bytes, start = self._starter(name, ranks, size)
            once = functools.partial(self._at_once, start)
            found.append((num_bytes, self._quartile(once, agreed=ranks)))
        return found

    def _at_once(self, start: Callable[[], Pending]) -> None:
        self._finish([start()])

    def _starter(
        self, name: str, ranks: tuple[int, ...], size: int
    ) -> tuple[int, Callable[[], Pending]]:
        """What starts one collective on float32 of about `size` bytes, and how many there are."""
        count = len(ranks)
        rows = max(1, size // (4 * count * count)) * count
        whole = torch.zeros(rows, count, device=self._device)
        split = Split(0, (rows // count,) * count)
        part = whole[: rows // count].clone()
        communicator = self._communicator
        starters: dict[str, Callable[[], Pending]] = {
            "all_reduce": lambda: communicator.start_all_reduce(whole, ranks, "sum", label=name),
            "all_gather": lambda: communicator.start_all_gather(part, ranks, split, label=name),
            "reduce_scatter": lambda: communicator.start_reduce_scatter(
                whole, ranks, split, label=name
            ),
            "all_to_all": lambda: communicator.start_all_to_all(
                whole,
                ranks,
                gathered=Split(0, (rows,) * count),
                split=Split(1, (1,) * count),
                label=name,
            ),
        }
        return whole.numel() * whole.element_size(), starters[name]

    def overlap(self, size: int) -> tuple[float, float, float]:
        """Seconds of an all-reduce of `size` bytes over all ranks alone, of a computation alone
        that takes longer, and of the computation when the all-reduce starts with it."""
        ranks = tuple(range(self._num_ranks))
        _, start = self._starter("all_reduce", ranks, size)
        alone = self._together(functools.partial(self._at_once, start))
        rows = _COMPUTED[self._device.type]
        matrix = torch.ones(rows, rows, device=self._device) / rows
        one = self._together(lambda: _multiply(matrix, 1))
        count = self._agreed(max(1, round(_LONGER * alone / one)), ranks)
        computing = self._together(lambda: _multiply(matrix, count))
        found = []
        for _ in range(_ROUNDS):
            self._communicator.barrier(label="the next overlap")
            begin = time.perf_counter()
            pending = start()
            _multiply(matrix, count)
            self._synchronize()
            found.append(time.perf_counter() - begin)
            self._finish([pending])
        return alone, computing, lower_quartile(found)

    # -- how it is timed -----------------------------------------------------------------------

    def _together(self, once: Callable[[], None]) -> float:
        """Seconds of `once` when all ranks begin at the same time."""
        found = []
        for _ in range(_ROUNDS):
            self._communicator.barrier(label="the next round")
            begin = time.perf_counter()
            once()
            self._synchronize()
            found.append(time.perf_counter() - begin)
        return lower_quartile(found)

    def _quartile(self, once: Callable[[], None], *, agreed: Sequence[int]) -> float:
        """Seconds of `once`, which those of `agreed` do together, one after the other."""
        found: list[float] = []
        rounds = _LEAST_ROUNDS
        while len(found) < rounds:
            begin = time.perf_counter()
            once()
            self._synchronize()
            found.append(time.perf_counter() - begin)
            if len(found) == _LEAST_ROUNDS:
                wanted = round(_ENOUGH_SECONDS / statistics.median(found))
                rounds = self._agreed(min(_MOST_ROUNDS, max(wanted, _LEAST_ROUNDS)), agreed)
        return lower_quartile(found[1:])

    def _agreed(self, number: int, ranks: Sequence[int]) -> int:
        """The least of the numbers of `ranks`."""
        token = torch.tensor([float(number)], device=self._device)
        group = tuple(sorted(ranks))
        self._communicator.all_reduce(token, group, "min", label="a number of repetitions")
        return int(token.item())

    def _finish(self, pending: Sequence[Pending]) -> None:
        for item in pending:
            item.wait(self._timeout)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _bytes(self, size: int) -> Tensor:
        return torch.ones(size, dtype=torch.uint8, device=self._device)

    def _send(self, tensor: Tensor, peer: int) -> Pending:
        return self._communicator.send(tensor, peer, 0, label="a probe")

    def _recv(self, size: int, peer: int) -> Pending:
        kind = TensorType((size,), torch.uint8)
        return self._communicator.recv(kind, peer, 0, label="a probe")


def _multiply(matrix: Tensor, times: int) -> None:
    for _ in range(times):
        torch.mm(matrix, matrix)


def lower_quartile(found: Sequence[float]) -> float:
    """A quarter of `found` is at most this."""
    if len(found) < 2:
        return found[0]
    return statistics.quantiles(found, n=4, method="inclusive")[0]
