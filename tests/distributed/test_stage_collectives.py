"""Collectives between real processes over gloo: by themselves, and inside stages."""

from __future__ import annotations

import pytest

from cutset.compiler.ir.program import AllReduce
from tests.runtime.tensor_parallel import check_step, load_arguments
from tests.runtime.traces import events_inside, recorded_and_simulated

from .conftest import WorkerPool
from .test_agreement import program

FAKE = "tests.distributed.fakes:FakeRank"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "int16", "complex64"])
def test_parts_of_any_size_and_dtype(pool: WorkerPool, dtype: str) -> None:
    groups = [
        program(rank, AllReduce(("w",), (0, 2))) if rank != 1 else program(1) for rank in range(3)
    ]
    session = pool.session(3, FAKE)
    session.call("prepare", [{"program": item} for item in groups])
    for ranks in ((0, 1, 2), (0, 2), (2, 0)):
        assert session.call("parts", {"ranks": ranks, "dtype": dtype}) == [None] * 3


def test_functional_collectives_take_parts_of_any_size(pool: WorkerPool) -> None:
    session = pool.session(3, FAKE)
    assert session.call("functional_parts", {"ranks": (0, 1, 2)}) == [None] * 3


def test_functional_collectives_wait_late(pool: WorkerPool) -> None:
    session = pool.session(2, FAKE)
    assert session.call("functional_sums") == [None] * 2


def test_stages_that_meet_inside_are_exact(pool: WorkerPool) -> None:
    session = pool.session(4)
    session.call("reset")  # other tests leave an optimizer there
    session.call("load", load_arguments())
    for step in range(2):
        check_step(session, step)


def test_a_recorded_step_tells_of_collectives_inside_stages(pool: WorkerPool) -> None:
    session = pool.session(4)
    session.call("reset")  # other tests leave an optimizer there
    measured, simulated = recorded_and_simulated(session, "data=2,tensor=2", 0)
    names = [{(one.rank, one.lane, one.name) for one in each} for each in (measured, simulated)]
    assert names[0] == names[1]
    assert all(one.begin_seconds <= one.end_seconds for one in events_inside(measured))
    assert {one.rank for one in events_inside(measured)} == set(range(4))


@pytest.mark.slow
def test_compiled_stages_hold_functional_collectives(pool: WorkerPool) -> None:
    session = pool.session(4)
    session.call("reset")  # other tests leave an optimizer there
    session.call("load", load_arguments(compile=True))
    check_step(session)
