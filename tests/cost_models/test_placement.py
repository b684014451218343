"""What a placement costs, worked out by hand."""

from __future__ import annotations

import pytest

from cutset.compiler.ir.workload import DeviceKind, Operator, Workload
from cutset.cost_models.placement import (
    contiguity_breaks,
    device_loads,
    latency,
    memory_used,
    piece_latency,
    violations,
)

HOST, FAST = DeviceKind("host", 1, concurrent=True), DeviceKind("fast", 2, memory=10.0)


def workload(edges: tuple[tuple[int, int], ...], count: int) -> Workload:
    """Operators of 10 on the host, 1, 2, 3 ... on a machine, a transfer of 0.5 each, 4 bytes."""
    operators = tuple(
        Operator(f"v{v}", (10.0, 1.0 + v), (0.0, 0.5), size=4.0) for v in range(count)
    )
    return Workload((HOST, FAST), operators, edges)


DIAMOND = workload(((0, 1), (0, 2), (1, 3), (2, 3)), 4)


def test_loads_and_memory() -> None:
    loads = device_loads(DIAMOND, (1, 1, 2, 0))
    assert [load.compute for load in loads] == [10.0, 3.0, 3.0]
    # device 1 moves out v0 once and v1; device 2 moves in v0 and moves out v2
    assert [load.communication for load in loads] == [0.0, 1.0, 1.0]
    assert loads[1].total == 4.0
    assert memory_used(DIAMOND, (1, 1, 2, 0)) == (4.0, 8.0, 4.0)


def test_violations_are_sentences() -> None:
    assert violations(DIAMOND, (1, 1, 2, 0)) == ()
    assert "holds 12 of 10 bytes" in violations(DIAMOND, (1, 1, 1, 0))[0]
    assert "does not exist" in violations(DIAMOND, (1, 1, 3, 0))[0]
    assert contiguity_breaks(DIAMOND, (1, 2, 2, 1))[0].startswith("devices wait")


def test_one_piece_a_machine() -> None:
    # device 1: v0, v1 in 1 + 2, v0 and v1 moved out: 4; device 2: v0 in, 3, v2 out: 8; host: 18
    assert latency(DIAMOND, (1, 1, 2, 0)) == 18.0
    assert latency(DIAMOND, (1, 2, 2, 1)) is None
    assert latency(DIAMOND, (0, 0, 0, 0)) == 30.0


def test_pieces_wait_for_their_own_inputs_only() -> None:
    # device 1 runs v0, then v1 while device 2 runs v2, then v3
    pieces = ((0,), (1,), (2,), (3,))
    placement = (1, 1, 2, 1)
    # v0: 1 + 0.5 out = 1.5; v1: until 3.5; v2: 0.5 + 3 + 0.5 = until 5.5; v3: 0.5 + 4 = until 10
    assert piece_latency(DIAMOND, placement, pieces) == 10.0
    # v0 and v1 as one piece end at 3.5, so that v2 starts later
    assert piece_latency(DIAMOND, placement, ((0, 1), (2,), (3,))) == 12.0
    # all of device 1 in one piece waits for device 2, which waits for it
    assert piece_latency(DIAMOND, placement, ((0, 1, 3), (2,))) is None


def test_a_result_is_moved_in_once_a_device() -> None:
    # v0 on device 1; v1 and v2 on device 2, which moves it in for the piece that comes first
    fan = workload(((0, 1), (0, 2)), 3)
    assert piece_latency(fan, (1, 2, 2), ((0,), (1,), (2,))) == 1.5 + 2.5 + 3.0
    assert piece_latency(fan, (1, 2, 2), ((0,), (2,), (1,))) == 1.5 + 3.5 + 2.0
    assert piece_latency(fan, (1, 2, 2), ((0,), (1, 2))) == latency(fan, (1, 2, 2)) == 7.0


def test_hosts_do_not_queue() -> None:
    fan = workload(((0, 1), (0, 2)), 3)
    assert piece_latency(fan, (1, 0, 0), ((0,),)) == 1.5 + 10.0


@pytest.mark.parametrize(
    "pieces",
    [
        ((0, 1), (2,), (2,)),
        ((0, 2), (1,)),
        ((0, 1),),
        ((0, 1), (2,), (3,)),
    ],
    ids=["twice", "two devices", "missing", "on the host"],
)
def test_pieces_of_another_placement_are_refused(pieces: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="piece"):
        piece_latency(DIAMOND, (1, 1, 2, 0), pieces)
