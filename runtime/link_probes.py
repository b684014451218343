"""Measures messages and collectives between ranks, alone and beside others or beside computation.

Times are wall times, as messages run in threads of their own (gloo) or on the device (NCCL).
Everything is repeated. On CUDA the lower quartile counts: what else a machine does only ever adds.
On CPUs threads wait for each other's processors, the more so beside threads that compute, and steps
pay for that every time: ranks compute before each transfer, as they do in a step, and the mean
counts, without the extremes.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.ir.types import TensorType
from .clock import busy_clock
from .communicator import Communicator, Pending, Split

__all__ = ["LinkProbes", "Rounds", "lower_quartile", "trimmed_mean"]

_LEAST_ROUNDS, _MOST_ROUNDS = 9, 200
_ENOUGH_SECONDS = 0.25  # of one kind of operation and size
_ANSWER_BYTES = 8
_COMPUTED = {"cpu": 256, "cuda": 2048}  # rows of matrices that are multiplied beside a transfer
_LONGER, _LONGER_ON_HOST = (2.0,), (1.0, 3.0)  # than the transfer
_BETWEEN_SECONDS = 10e-3  # of computing before a transfer, on CPUs: more than a tick of a scheduler
_BETWEEN_ROUNDS = 30
_BUCKETS = 8  # all-reduces under way at once
_STARTED, _UNDER_WAY = 24, 8  # collectives among pieces of a computation, and at once
_ASKED = 4  # for in a row, as for the parameters of a layer, before each piece
_SHORTER = 5  # than the computation before a transfer is such a piece
_TRIMMED = 0.1  # of the rounds at either end


@dataclass(frozen=True, slots=True)
class Rounds:
    """One collective on one rank, round by round.

    Args:
        num_bytes: that the cost model counts: of the whole tensor, of an all-to-all what each rank
            holds.
        times: when this rank reached it and when it was over, by a clock of its machine.
    """

    num_bytes: int
    times: tuple[tuple[float, float], ...]


class LinkProbes:
    """The probes of one rank; all ranks call the same ones in the same order.

    Args:
        on_host: whether any of the ranks computes on a CPU.
        num_rounds: of what is made beside others or beside computation.
    """

    def __init__(
        self,
        communicator: Communicator,
        device: torch.device,
        timeout_seconds: float,
        *,
        on_host: bool,
        num_rounds: int,
    ) -> None:
        self._communicator = communicator
        self._device = device
        self._timeout = timeout_seconds
        self._on_host = on_host
        self._num_rounds = num_rounds
        self._rank, self._num_ranks = communicator.rank, communicator.num_ranks
        self._between = self._multiplications() if on_host else 0

    # -- messages ------------------------------------------------------------------------------

    def asking(self) -> float:
        """Seconds of this thread for asking for a short message, to be sent or received: after it
        has computed, as caches then hold little of what it takes."""
        message = self._bytes(_ANSWER_BYTES)
        clock = busy_clock(self._device)
        found = []
        for _ in range(_BETWEEN_ROUNDS):
            self._computing()()
            begin = clock()
            pending = self._exchange(message)
            found.append((clock() - begin) / len(pending))
            self._finish(pending)
        return trimmed_mean(found)

    def messages(
        self, pairs: Sequence[tuple[int, int]], sizes: Sequence[int]
    ) -> dict[tuple[int, int], list[tuple[int, float]]]:
        """Over those of `pairs` that this rank is the source of, one pair after the other, (bytes,
        seconds) of two messages, there and back."""
        table = {}
        for source, target in pairs:
            self._communicator.barrier(label="the next pair")
            with self._others((source, target)) as among_them:
                if not among_them:
                    continue
                found = [
                    (size + _ANSWER_BYTES, self._round_trip(source, target, size)) for size in sizes
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

        if not self._on_host:
            return self._quartile(once, agreed=(source, target))
        compute = self._computing() if self._rank == source else _nothing
        return trimmed_mean([end - begin for begin, end in self._after(compute, once)])

    @contextlib.contextmanager
    def _others(self, ranks: Sequence[int]) -> Iterator[bool]:
        """Whether this rank is of `ranks`, which measure within; others compute meanwhile on CPUs,
        as they do in a step."""
        among_them = self._rank in ranks
        yield among_them
        if len(set(ranks)) == self._num_ranks:
            return
        with ThreadPoolExecutor(1) as pool:
            over = pool.submit(self._communicator.barrier, label="what others measure")
            while self._on_host and not among_them and not over.done():
                _multiply(self._matrix(), 1)
                self._synchronize()
            over.result()

    def streams(self, size: int) -> tuple[float, float]:
        """Seconds of a message of `size` bytes to the next rank around a ring, when rank 0 alone
        sends one and when all do at once."""
        message = self._bytes(size)
        before, after = self._neighbours()

        def exchange(senders: Sequence[int]) -> float:
            found = []
            for _ in range(self._num_rounds):
                self._communicator.barrier(label="the next exchange")
                begin = time.perf_counter()
                pending = [self._recv(size, before)] if before in senders else []
                pending += [self._send(message, after)] if self._rank in senders else []
                self._finish(pending)
                self._synchronize()
                found.append(time.perf_counter() - begin)
            return lower_quartile(found)

        return exchange((0,)), exchange(range(self._num_ranks))

    def _neighbours(self) -> tuple[int, int]:
        """The ranks before and after this one around the ring."""
        return (self._rank - 1) % self._num_ranks, (self._rank + 1) % self._num_ranks

    # -- collectives ---------------------------------------------------------------------------

    def collective(self, name: str, ranks: tuple[int, ...], sizes: Sequence[int]) -> list[Rounds]:
        """Collectives called `name` over `ranks`, of each size; none on other ranks."""
        self._communicator.barrier(label="the next collective")
        with self._others(ranks) as among_them:
            return [self._rounds(name, ranks, size) for size in sizes if among_them]

    def _rounds(self, name: str, ranks: tuple[int, ...], size: int) -> Rounds:
        num_bytes, start = self._starter(name, ranks, size)
        once = functools.partial(self._at_once, start)
        if self._on_host:
            return Rounds(num_bytes, tuple(self._after(self._computing(), once)))
        return Rounds(num_bytes, ((0.0, self._quartile(once, agreed=ranks)),))

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

    def overlap(self, sizes: Sequence[int]) -> list[tuple[float, float, float, float]]:
        """Transfers of `sizes` bytes and a computation that start together: seconds of the former
        alone, of the latter alone, until the latter is done beside them, and until both are.

        All-reduces over all ranks, several at once; on CPUs also messages around the ring. A
        computation lasts as long as the transfers, or longer: the former tells what is still under
        way afterwards, the latter what all of them take from it.
        """
        found = []
        for size in sizes:
            ranks = tuple(range(self._num_ranks))
            reduces = [self._starter("all_reduce", ranks, size)[1] for _ in range(_BUCKETS)]
            found += self._beside(functools.partial(_all, reduces))
            if self._on_host:
                found += self._beside(functools.partial(self._exchange, self._bytes(size)))
        return found

    def _exchange(self, message: Tensor) -> list[Pending]:
        """A message to the next rank around the ring and one from the rank before."""
        before, after = self._neighbours()
        return [self._recv(message.numel(), before), self._send(message, after)]

    def _beside(
        self, start: Callable[[], Sequence[Pending]]
    ) -> list[tuple[float, float, float, float]]:
        """What `overlap` tells of the transfers that `start` starts, for each computation.

        The three are timed in turns: a machine that is slower for a while is that for all of them.
        """
        matrix = self._matrix()
        before = self._computing() if self._on_host else _nothing
        moving = self._together(lambda: self._finish(start()))
        one = self._together(lambda: _multiply(matrix, 1))
        everyone = tuple(range(self._num_ranks))
        found = []
        for longer in _LONGER_ON_HOST if self._on_host else _LONGER:
            count = self._agreed(max(1, round(longer * moving / one)), everyone)
            compute = functools.partial(_multiply, matrix, count)
            alone, computing, beside = [], [], []
            for _ in range(self._num_rounds):
                alone.append(self._timed(before, start, _nothing)[1])
                computing.append(self._timed(before, list, compute)[0])
                beside.append(self._timed(before, start, compute))
            columns = (alone, computing, *zip(*beside, strict=True))
            transfers, computation, computed, over = map(self._typical, columns)
            found.append((transfers, computation, computed, over))
        return found

    def _timed(
        self,
        before: Callable[[], None],
        start: Callable[[], Sequence[Pending]],
        compute: Callable[[], None],
    ) -> tuple[float, float]:
        """After `before`, seconds until `compute` is done, and until what `start` starts is."""
        self._communicator.barrier(label="the next round")
        before()
        self._synchronize()
        begin = time.perf_counter()
        pending = start()
        compute()
        self._synchronize()
        computed = time.perf_counter()
        self._finish(pending)
        self._synchronize()
        return computed - begin, time.perf_counter() - begin

    def handling(self, name: str, sizes: Sequence[int]) -> list[tuple[int, float]]:
        """(bytes, seconds) that one collective called `name` over all ranks takes of a computation.

        A few start before each piece of it and are waited for when others have started, as in
        stages that gather and sum beside what they compute: in a row they take less of it than each
        on its own. The pieces alone are timed in turns with that.
        """
        count = max(1, self._between // _SHORTER)
        piece = functools.partial(_multiply, self._matrix(), count)
        alone = functools.partial(_among, piece, None, self._finish)
        found = []
        for size in sizes:
            num_bytes, start = self._starter(name, tuple(range(self._num_ranks)), size)
            beside = functools.partial(_among, piece, start, self._finish)
            rows = []
            for _ in range(max(1, self._num_rounds // 2)):  # each has many of them
                before = self._computing()
                rows.append([self._timed(before, list, each)[0] for each in (alone, beside)])
            first, second = map(trimmed_mean, zip(*rows, strict=True))
            found.append((num_bytes, max(second - first, 0.0) / _STARTED))
        return found

    # -- how it is timed -----------------------------------------------------------------------

    def _together(self, once: Callable[[], None]) -> float:
        """Seconds of `once` when all ranks begin at the same time."""
        found = []
        for _ in range(self._num_rounds):
            self._communicator.barrier(label="the next round")
            begin = time.perf_counter()
            once()
            self._synchronize()
            found.append(time.perf_counter() - begin)
        return self._typical(found)

    def _typical(self, found: Sequence[float]) -> float:
        return trimmed_mean(found) if self._on_host else lower_quartile(found)

    def _after(
        self, compute: Callable[[], None], once: Callable[[], None]
    ) -> list[tuple[float, float]]:
        """Begin and end of `once`, each time after `compute`; the first rounds warm up."""
        found = []
        for _ in range(_BETWEEN_ROUNDS):
            compute()
            self._synchronize()
            begin = time.perf_counter()
            once()
            self._synchronize()
            found.append((begin, time.perf_counter()))
        return found[2:]

    def _multiplications(self) -> int:
        """How many take about `_BETWEEN_SECONDS`, on all ranks."""
        matrix = self._matrix()
        one = self._together(lambda: _multiply(matrix, 1))
        return self._agreed(max(1, round(_BETWEEN_SECONDS / one)), range(self._num_ranks))

    def _computing(self) -> Callable[[], None]:
        """Computes for about `_BETWEEN_SECONDS`."""
        return functools.partial(_multiply, self._matrix(), self._between)

    def _matrix(self) -> Tensor:
        rows = _COMPUTED[self._device.type]
        return torch.ones(rows, rows, device=self._device) / rows

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


def _among(
    compute: Callable[[], None],
    start: Callable[[], Pending] | None,
    finish: Callable[[Sequence[Pending]], None],
) -> None:
    """Pieces of a computation; before each `start` starts a few things."""
    under_way: list[Pending] = []
    for number in range(_STARTED):
        if start is not None:
            finish(under_way[: -_UNDER_WAY + 1])
            under_way = [*under_way[-_UNDER_WAY + 1 :], start()]
        if (number + 1) % _ASKED == 0:
            compute()
    finish(under_way)


def _all(starts: Sequence[Callable[[], Pending]]) -> list[Pending]:
    return [start() for start in starts]


def _nothing() -> None:
    pass


def trimmed_mean(found: Sequence[float]) -> float:
    """The mean of `found` without the least and the greatest of it."""
    cut = round(_TRIMMED * len(found))
    return statistics.fmean(sorted(found)[cut : len(found) - cut])


def lower_quartile(found: Sequence[float]) -> float:
    """A quarter of `found` is at most this."""
    if len(found) < 2:
        return found[0]
    return statistics.quantiles(found, n=4, method="inclusive")[0]
