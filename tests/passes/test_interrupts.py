"""Ctrl-C ends a solver at once, and goes on to mean what it means to Python."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
from ortools.sat.python import cp_model

from cutset.passes.interrupts import solve_interruptibly


def _hard() -> cp_model.CpModel:
    """Knapsacks that take minutes."""
    draw = random.Random(0)
    model = cp_model.CpModel()
    x = [model.new_bool_var(f"x{i}") for i in range(300)]
    for _ in range(200):
        model.add(sum(draw.randint(1, 50) * x[i] for i in draw.sample(range(300), 12)) <= 150)
    model.maximize(sum(draw.randint(1, 40) * one for one in x))
    return model


def _solver(seconds: float) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = seconds
    return solver


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_ends_a_solve_and_python_hears_of_it_each_time() -> None:
    for _ in range(2):
        timer = threading.Timer(1.0, _interrupt)
        timer.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            solve_interruptibly(_solver(60.0), _hard())
        assert time.monotonic() - began < 20.0
        timer.join()
    with pytest.raises(KeyboardInterrupt):  # not the end of the process
        _interrupt()
        time.sleep(5.0)


def test_other_threads_solve_as_well() -> None:
    model = cp_model.CpModel()
    x = model.new_int_var(0, 5, "x")
    model.maximize(x)
    found: list[int] = []

    def solve() -> None:
        solver = _solver(10.0)
        if solve_interruptibly(solver, model) == cp_model.OPTIMAL:
            found.append(solver.value(x))

    thread = threading.Thread(target=solve)
    thread.start()
    thread.join(30.0)
    solve()
    assert found == [5, 5]


def test_what_a_callback_raises_comes_out() -> None:
    class Fails(cp_model.CpSolverSolutionCallback):
        def on_solution_callback(self) -> None:
            raise ValueError("no such solution")

    with pytest.raises(ValueError, match="no such solution"):
        solve_interruptibly(_solver(5.0), _hard(), Fails())
