"""Several plans loaded at once, each on workers of its own, that take turns step by step.

Each turn goes round in another order, so that what else the machine does hits all plans alike.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from _report import Pair
from _runs import VARIANTS, WARM_UP, Measured, Workers, measure_memory, phase_seconds, record_trace

from cutset.compiler.parallel import Parallel

__all__ = ["run_in_turns"]


def run_in_turns(pairs: Sequence[Pair], workers: Workers, repeats: int) -> None:
    """Fill in two rounds of `repeats` steps, the phases of a traced step and the peaks of `pairs`;
    or the error of one that fails."""
    ranks = max(pair.planned.case.devices for pair in pairs)
    at_once = max(1, (os.cpu_count() or 1) // (2 * ranks))
    running: dict[int, Parallel] = {}

    def start(number: int) -> None:
        planned = pairs[number].planned.planned
        assert planned is not None
        running[number] = workers.parallel(
            planned, number, **VARIANTS[pairs[number].planned.case.variant]
        )

    with ThreadPoolExecutor(at_once) as pool:
        tasks = [pool.submit(_kept, pair, start, place) for place, pair in enumerate(pairs)]
    for task in tasks:
        task.result()
    for _ in range(2):
        seconds: dict[int, list[float]] = {place: [] for place in running}
        for turn in range(WARM_UP + repeats):
            order = sorted(running)
            first = turn % max(1, len(order))
            for place in (*order[first:], *order[:first]):
                if not pairs[place].error:
                    _kept(pairs[place], _step, running[place], seconds[place])
        for place, found in seconds.items():
            pairs[place].rounds.append(Measured(tuple(found[WARM_UP:])))
    for place, parallel in running.items():
        if not pairs[place].error:
            _kept(pairs[place], _look_inside, pairs[place], parallel)


def _kept(pair: Pair, call: Callable[..., None], *arguments: Any) -> None:
    """Call; a failure is the pair's own, as the others are still worth measuring."""
    try:
        call(*arguments)
    except Exception as error:
        pair.error = f"{type(error).__name__}: {error}"


def _step(parallel: Parallel, seconds: list[float]) -> None:
    args, kwargs = parallel.planned.call
    begin = time.perf_counter()
    parallel.train_step(*args, **kwargs)
    seconds.append(time.perf_counter() - begin)


def _look_inside(pair: Pair, parallel: Parallel) -> None:
    events = record_trace(parallel, parallel.planned)
    pair.phases = phase_seconds(events, len(parallel.planned.programs))
    pair.busy = parallel.busy_seconds()
    pair.peaks = measure_memory(parallel, parallel.planned)
