"""The order of pieces in a stream: complete, without deadlock, and close to the busiest device."""

from __future__ import annotations

import random

import pytest

from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.graph import Mode
from cutset.compiler.ir.verify import verify_schedule
from cutset.passes.placement.stream import stream_schedule


def random_line(seed: int) -> dict[str, object]:
    draw = random.Random(seed)
    count = draw.randrange(2, 14)
    edges = {
        (a, b): draw.choice([0.0, 0.1, 0.5])
        for b in range(1, count)
        for a in range(b)
        if draw.random() < 0.3
    }
    return {
        "devices": [draw.randrange(3) for _ in range(count)],
        "seconds": [draw.choice([0.0, 0.25, 1.0, 2.0]) for _ in range(count)],
        "edges": edges,
    }


def busiest(line: dict[str, object]) -> float:
    loads = [0.0, 0.0, 0.0]
    for device, seconds in zip(line["devices"], line["seconds"], strict=True):  # type: ignore[call-overload]
        loads[device] += seconds
    return max(loads)


@pytest.mark.parametrize("seed", range(40))
def test_orders_are_legal_and_rates_those_of_the_busiest_device(seed: int) -> None:
    line = random_line(seed)
    runs = {n: stream_schedule(**line, num_microbatches=n) for n in (1, 7, 60)}  # type: ignore[arg-type]
    for run in runs.values():
        verify_schedule(run.schedule, mode=Mode.INFER, edges=line["edges"])  # type: ignore[arg-type]
    load = busiest(line)
    alone = runs[1].seconds
    assert runs[60].seconds >= 60 * load - 1e-9
    assert runs[60].seconds <= 1.02 * (60 * load + alone + 3 * load)


def test_equal_lines_give_equal_orders() -> None:
    line = random_line(3)
    first, again = (stream_schedule(**line, num_microbatches=9) for _ in range(2))  # type: ignore[arg-type]
    assert first == again


def test_a_device_that_is_returned_to_serves_the_oldest_microbatch() -> None:
    run = stream_schedule(
        devices=[0, 1, 0], seconds=[1.0, 1.0, 1.0], edges={(0, 1): 0, (1, 2): 0}, num_microbatches=4
    )
    assert str(run.schedule).splitlines()[1] == "0: F0.0 F0.1 F2.0 F2.1 F0.2 F0.3 F2.2 F2.3"


def test_few_microbatches_are_under_way() -> None:
    run = stream_schedule(
        devices=[0, 1], seconds=[0.1, 1.0], edges={(0, 1): 0.0}, num_microbatches=64
    )
    assert run.window <= 4
    ahead = [action.microbatch for action in run.schedule.ranks[0]]
    assert ahead == sorted(ahead)


def test_pieces_wait_for_what_they_read_and_not_for_the_piece_before() -> None:
    edges = {(0, 1): 0.0, (1, 2): 0.0}
    run = stream_schedule(
        devices=[0, 1, 0, 1], seconds=[4.0, 1.0, 1.0, 1.0], edges=edges, num_microbatches=1
    )
    assert str(run.schedule).splitlines()[2] == "1: F3.0 F1.0"
    verify_schedule(run.schedule, mode=Mode.INFER, edges=edges)
    with pytest.raises(VerificationError, match="deadlock"):
        verify_schedule(run.schedule, mode=Mode.INFER)  # as a chain
