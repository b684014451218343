"""CP-SAT that Ctrl-C ends at once, and that leaves Ctrl-C to Python.

CP-SAT's own handler of the signal takes the place of Python's for good: it turns the first Ctrl-C
into a solution that counts, and any later one ends the process with no `KeyboardInterrupt`, so that
nothing is cleaned up. Without it Python learns of the signal when the solver returns. So the solver
runs beside the main thread, which waits where it can be interrupted.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

__all__ = ["solve_interruptibly"]

_POLL_SECONDS = 0.05


def solve_interruptibly(solver: Any, model: Any, callback: Any = None) -> Any:
    """What `solver.solve(model, callback)` returns.

    Args:
        solver: a `CpSolver`; its parameter for the signal is set.
        model: a `CpModel`.

    Raises:
        KeyboardInterrupt: on Ctrl-C, when the solver has stopped.
    """
    solver.parameters.catch_sigint_signal = False
    if threading.current_thread() is not threading.main_thread():
        return solver.solve(model, callback)
    with ThreadPoolExecutor(1, "cp-sat") as pool:
        solving = pool.submit(solver.solve, model, callback)
        try:
            return solving.result()
        except BaseException:
            while not solving.done():  # it may not have begun
                solver.stop_search()
                wait([solving], _POLL_SECONDS)
            raise
