"""Rank objects for tests of launcher and sessions: small, and able to fail in every way."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from cutset.compiler.codegen.python import stage_source
from cutset.compiler.ir.errors import UsageError
from cutset.compiler.ir.program import Program
from cutset.compiler.ir.types import TensorType
from cutset.runtime.collective_ops import StageCollectives
from cutset.runtime.communicator import Communicator, Split
from cutset.runtime.kernels import trace_inference
from cutset.runtime.rank import Rank
from tests.ir.builders import GraphBuilder
from tests.runtime.late_sums import ROWS, SIZE, traced
from tests.runtime.test_kernels import run_kernels

TOKEN = TensorType((2,), torch.float32)


class RankBesideHost(Rank):
    """A rank on the CPU that keeps what is offloaded apart, as if the host were another device."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, host=torch.device("cpu"))

    def num_states_on_device(self) -> int:
        assert self._optimizer is not None
        return len(self._optimizer.state_tensors())


class FakeRank:
    """Stands in for `cutset.runtime.rank.Rank`."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        device: torch.device,
        communicator: Communicator,
        timeout_seconds: float,
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self.communicator = communicator

    def echo(self, **arguments: Any) -> dict[str, Any]:
        return arguments

    def threads(self) -> tuple[int, str]:
        return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]

    def page_faults(self) -> list[int]:
        """Pages that each of three equal passes, which free what they use, takes of the kernel."""
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
        libc.free.restype, libc.free.argtypes = None, (ctypes.c_void_p,)
        counts = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            blocks = [libc.malloc(1 << 20) for _ in range(64)]
            for block in blocks:
                ctypes.memset(block, 1, 1 << 20)
            for block in blocks:
                libc.free(block)
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return counts

    def ring(self) -> list[float]:
        """Passes the own rank on to the right, and sums what all have got from the left."""
        right = (self.rank + 1) % self.num_ranks
        left = (self.rank - 1) % self.num_ranks
        pending = self.communicator.recv(TOKEN, left, 7, label="token")
        token = torch.full((2,), float(self.rank), device=self.device)
        sent = self.communicator.send(token, right, 7, label="token")
        received = pending.wait()
        assert received is not None
        assert received.tolist() == [left, left]
        assert sent.wait() is None
        assert sent.done()
        assert pending.done()
        ranks = range(self.num_ranks)
        return self.communicator.all_reduce(received, ranks, "sum", label="tokens").tolist()

    def strided(self) -> list[float]:
        """Rank 0 sends a transposed matrix, which is not contiguous, to rank 1."""
        matrix = torch.arange(6.0, device=self.device).reshape(2, 3)
        if self.rank == 0:
            self.communicator.send(matrix.T, 1, 3, label="matrix").wait()
        if self.rank != 1:
            return []
        kind = TensorType((3, 2), torch.float32)
        received = self.communicator.recv(kind, 0, 3, label="matrix").wait()
        assert received is not None
        return received.flatten().tolist()

    def burst(self, count: int) -> list[float]:
        """Rank 0 sends more messages at once than may be outstanding; rank 1 takes its time."""
        if self.rank == 0:
            tokens = [
                torch.full((2,), float(number), device=self.device) for number in range(count)
            ]
            pendings = [
                self.communicator.send(token, 1, 20 + number, label="token")
                for number, token in enumerate(tokens)
            ]
            for pending in pendings:
                pending.wait()
        if self.rank != 1:
            return []
        received = []
        for number in range(count):
            time.sleep(0.005)
            token = self.communicator.recv(TOKEN, 0, 20 + number, label="token").wait()
            assert token is not None
            received.append(token[0].item())
        return received

    def collectives(self) -> dict[str, Any]:
        """Every kind of reduction, a non-contiguous operand, broadcast and barrier."""
        ranks = range(self.num_ranks)
        result: dict[str, Any] = {}
        for reduction in ("sum", "avg", "max", "min"):
            base = torch.full((2, 3), float(self.rank + 1), device=self.device).T
            self.communicator.all_reduce(base, ranks, reduction, label=reduction)
            result[reduction] = base[0, 0].item()
        half = torch.full((2,), 1.5, dtype=torch.bfloat16, device=self.device)
        self.communicator.all_reduce(half, ranks, "sum", label="bf16")
        result["bf16"] = half[0].item()
        start = torch.full((2,), float(self.rank), device=self.device)
        result["broadcast"] = self.communicator.broadcast(start, 1, ranks, label="start").tolist()
        self.communicator.barrier(label="end")
        return result

    def prepare(self, program: Program) -> None:
        self.communicator.prepare(program)

    def subset(self, program: Program, ranks: tuple[int, ...]) -> float:
        """Prepares `program`, then reduces over `ranks` on those."""
        self.communicator.prepare(program)
        tensor = torch.tensor([self.rank + 1.0], dtype=torch.float64, device=self.device)
        if self.rank in ranks:
            self.communicator.all_reduce(tensor, ranks, "sum", label="subset")
        return tensor.item()

    def parts(self, ranks: tuple[int, ...], dtype: str) -> None:
        """Gathers, scatters and exchanges uneven parts over `ranks`, on those."""
        if self.rank not in ranks:
            return
        count, index = len(ranks), ranks.index(self.rank)
        rows, columns = (Split(dim, tuple(range(1, count + 1))) for dim in (0, 1))
        size = sum(rows.sizes)
        wholes = [(torch.arange(size * size) % (i + 2)).view(size, size) for i in range(count)]
        wholes = [whole.to(getattr(torch, dtype)) for whole in wholes]
        whole, own = wholes[0], wholes[index]
        end = self.communicator
        for split in (rows, columns):
            part = split.parts(whole)[index]
            got = end.start_all_gather(part, ranks, split, label="gather").wait()
            assert got is not None and torch.equal(got, whole)
            got = end.start_reduce_scatter(own, ranks, split, label="scatter").wait()
            total = torch.stack(wholes).sum(0).to(whole.dtype)
            assert got is not None and torch.equal(got, split.parts(total)[index])
        part = rows.parts(whole)[index]
        pending = end.start_all_to_all(part, ranks, gathered=rows, split=columns, label="exchange")
        got = pending.wait()
        assert got is not None and torch.equal(got, columns.parts(whole)[index])
        reduced = end.all_reduce(own.clone(), ranks, "sum", label="reduce")
        assert torch.equal(reduced, torch.stack(wholes).sum(0).to(whole.dtype))

    def functional_parts(self, ranks: tuple[int, ...]) -> None:
        """A stage of collectives over uneven parts gives the same with functional ones."""
        index, count = ranks.index(self.rank), len(ranks)
        sizes, size = tuple(range(1, count + 1)), count * (count + 1) // 2
        build = GraphBuilder("parts")
        x = build.input("x", (sizes[index], size))
        y = build.op("cutset.all_to_all.default", x, "t", 0, sizes, 1, sizes, index)
        y = build.op("cutset.all_gather.default", y, "t", 1, sizes, index, False)
        y = build.op("cutset.reduce_scatter.default", y, "t", 1, sizes, index)
        y = build.op("cutset.all_gather.default", y, "t", 1, sizes, index, False)
        y = build.op("cutset.reduce_scatter.default", y, "t", 0, sizes, index)
        y = build.op("cutset.all_gather.default", y, "t", 0, sizes, index, False)
        build.output(build.op("cutset.all_reduce.default", y, "t", "max"))
        graph = build.build()
        namespace: dict[str, Any] = {"torch": torch}
        exec(stage_source(0, graph), namespace)
        bound = StageCollectives(self.communicator, {"t": ranks}, 0)
        kernels = trace_inference(namespace["stage_0"], graph, self.device, bound)
        module, reason = bound.functional(kernels.modules["forward"])
        assert reason == ""
        whole = torch.arange(float(size * size)).view(size, size)
        part = whole.split(sizes)[index]
        expected = whole * count**2
        for result in (kernels.forward([torch.tensor(0), part]), module(torch.tensor(0), part)):
            assert torch.equal(result[0], expected)

    def functional_sums(self) -> None:
        """Sums of gradients kept in parts, and gathers of parameters, give the same with functional
        collectives, whose start and wait are apart as well."""
        kernels = traced(self.communicator)
        assert kernels.collectives is not None
        torch.manual_seed(self.rank)
        count = len(kernels.signature.trained)
        tensors = [torch.randn(ROWS, SIZE, dtype=torch.float64)]
        tensors += [torch.randn(SIZE // 2, SIZE, dtype=torch.float64) for _ in range(count)]
        tangents = [torch.randn(ROWS, SIZE, dtype=torch.float64)]
        modules = {}
        for name in ("forward", "input", "weight"):
            modules[name], reason = kernels.collectives.functional(kernels.modules[name])
            assert reason == ""
        (part,) = kernels.backward_weights
        other = replace(
            kernels,
            forward=lambda given: modules["forward"](*given),
            backward_input=lambda given: modules["input"](*given),
            backward_weights=(replace(part, kernel=lambda given: modules["weight"](*given)),),
        )
        found, same = (run_kernels(each, tensors, tangents) for each in (kernels, other))
        for expected, result in zip(found[0] + found[1], same[0] + same[1], strict=True):
            torch.testing.assert_close(result, expected)
        assert found[2].keys() == same[2].keys() and len(found[2]) == count
        for index, expected in found[2].items():
            torch.testing.assert_close(same[2][index], expected)

    def await_nothing(self, seconds: float) -> None:
        """Rank 1 waits for a message that nobody sends."""
        if self.rank == 1:
            self.communicator.recv(TOKEN, 0, 9, label="value %h of microbatch 2").wait(seconds)

    def refuse(self) -> None:
        raise UsageError("x must be positive", ways_out=("pass 1",))

    def fail(self, rank: int) -> None:
        """One rank raises; the others wait for it."""
        if self.rank == rank:
            raise ZeroDivisionError("deliberate failure of this test")
        self._wait_for(rank)

    def die(self, rank: int, signal_number: int) -> None:
        """One rank is killed, or exits if the signal is 0; the others wait for it."""
        if self.rank == rank:
            print("last words", file=sys.stderr, flush=True)
            if signal_number:
                os.kill(os.getpid(), signal_number)
            os._exit(3)
        self._wait_for(rank)

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def nap(self, seconds: float) -> None:
        time.sleep(seconds)

    def _wait_for(self, rank: int) -> None:
        self.communicator.recv(TOKEN, rank, 8, label="value %x of microbatch 0").wait()


class Unstartable:
    """A rank that cannot be made."""

    def __init__(self, *arguments: object) -> None:
        raise RuntimeError("no such device here")
