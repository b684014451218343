"""Gathers of parameters ahead of their use, and sums of gradients behind what computes next."""

from __future__ import annotations

from cutset.compiler.ir.buckets import early_starts, late_ends
from cutset.cost_models.liveness import Step, live_bytes
from cutset.cost_models.prefetch import finish_late, late_seconds, overlapped_seconds, start_early

MIB = 1 << 20


def test_as_many_are_under_way_as_the_limit_says() -> None:
    """Of 16 MiB, two buckets of an eighth: 4 MiB."""
    assert early_starts([1 * MIB] * 16) == (0, 0, 0, 0, *range(1, 13))
    assert early_starts([4 * MIB] * 4) == (0, 1, 2, 3)


def test_one_starts_however_large_it_is() -> None:
    assert early_starts([1 * MIB, 14 * MIB, 1 * MIB]) == (0, 1, 2)
    assert early_starts([]) == ()


def test_what_arrives_takes_memory_from_the_start() -> None:
    """Two gathers of 8 MiB with a product of 1 MiB before each and after: while the first product
    runs, one gather is under way, while the second does, the other."""
    steps = [
        Step(0, (), ((10, 1.0 * MIB),)),
        Step(1, (), ((11, 8.0 * MIB),), 8.0 * MIB),
        Step(2, (10, 11), ((12, 1.0 * MIB),)),
        Step(3, (), ((13, 8.0 * MIB),), 8.0 * MIB),
        Step(4, (12, 13), ((14, 1.0 * MIB),)),
    ]
    numbers = iter(range(100, 200))
    ahead = start_early(steps, [0, 8 * MIB, 0, 8 * MIB, 0], lambda: next(numbers))
    assert [step.node for step in ahead] == [1, 0, 1, 3, 2, 3, 4]
    live = [size / MIB for size in live_bytes(ahead, {}, {14}).at_step]
    assert live == [8, 9, 17, 17, 18, 17, 10]


def test_gathers_hide_behind_what_computes() -> None:
    """One is under way at a time: the first is exposed, the second takes 2 s beside 3."""
    sizes = [8 * MIB, 0, 8 * MIB, 0]
    assert overlapped_seconds([2.0, 3.0, 2.0, 3.0], sizes) == 8.0
    assert overlapped_seconds([2.0, 1.0, 2.0, 3.0], sizes) == 7.0
    assert overlapped_seconds([2.0, 1.0, 2.0, 3.0], [0, 0, 0, 0]) == 8.0


def test_messages_wait_for_their_latencies_together() -> None:
    """Both start at once, wait for 1 s, and travel for 1 s each: the first is exposed for 2 s, the
    second is there when 1 s has been computed; one after the other it would not be."""
    sizes = [1 * MIB, 0, 1 * MIB, 0, 14 * MIB]
    gathers = [2.0, 1.0, 2.0, 1.0, 0.0]
    assert overlapped_seconds(gathers, sizes, 1.0) == 4.0
    assert overlapped_seconds(gathers, sizes) == 5.0
    # no more of it is waiting than there is
    assert overlapped_seconds([2.0, 3.0, 2.0, 3.0], [8 * MIB, 0, 8 * MIB, 0], 9.0) == 8.0


def test_sums_end_where_the_next_has_no_room() -> None:
    """Of 16 MiB, two buckets of an eighth: 4 MiB. Reversed, sums are to ends what gathers are to
    starts."""
    sizes = [1 * MIB] * 16
    assert late_ends(sizes) == (*range(4, 16), 16, 16, 16, 16)
    assert late_ends([4 * MIB] * 4) == (1, 2, 3, 4)
    assert late_ends([1 * MIB, 14 * MIB, 1 * MIB]) == (1, 2, 3)
    assert late_ends([]) == ()
    mixed = [2 * MIB, 1 * MIB, 3 * MIB, 1 * MIB, 9 * MIB]
    backwards = early_starts(mixed[::-1])
    assert late_ends(mixed) == tuple(len(mixed) - waited for waited in backwards[::-1])


def test_a_sum_takes_memory_until_it_is_waited_for() -> None:
    """Two gradients of 8 MiB, each sent and received in buffers of 16: what the first has under way
    is there while the second is computed, and the gradient is not, but as it is sent."""
    steps = [
        Step(0, (), ((10, 8.0 * MIB),)),
        Step(1, (10,), (), 16.0 * MIB),
        Step(2, (), ((12, 8.0 * MIB),)),
        Step(3, (12,), (), 16.0 * MIB),
        Step(4, (), (), 1.0 * MIB),
    ]
    numbers = iter(range(100, 200))
    late = finish_late(steps, [0, 8 * MIB, 0, 8 * MIB, 0], lambda: next(numbers))
    assert [step.node for step in late] == [0, 1, 2, 1, 3, 4, 3]
    live = [size / MIB for size in live_bytes(late, {}, ()).at_step]
    assert live == [8, 24, 24, 24, 24, 17, 16]


def test_a_sum_of_a_part_keeps_the_whole_until_it_is_waited_for() -> None:
    """Of a tensor of 32 MiB, or one of which nothing is known, a quarter is summed."""
    steps = [
        Step(0, (), ((10, 32.0 * MIB),)),
        Step(1, (10, 11), (), 16.0 * MIB),
        Step(2, (), (), 1.0 * MIB),
    ]
    late = finish_late(steps, [0, 8 * MIB, 0], lambda: 100)
    live = [size / MIB for size in live_bytes(late, {11: 64.0 * MIB}, ()).at_step]
    assert live == [96, 112, 113, 112]


def test_sums_hide_behind_what_computes_next() -> None:
    """One is under way at a time: the last is exposed, and of a long one what nothing hides."""
    size = 8.0 * MIB
    assert late_seconds([(2.0, 1.0, size), (2.0, 1.0, size), (2.0, 0.0, 0.0)]) == 6.0
    assert late_seconds([(2.0, 1.0, size), (2.0, 1.0, size)]) == 5.0
    assert late_seconds([(2.0, 3.0, size), (2.0, 1.0, size)]) == 6.0
    assert late_seconds([(2.0, 0.0, 0.0), (2.0, 0.0, 0.0)]) == 4.0
    together = [(0.0, 2.0, size), (0.0, 2.0, size), (0.0, 0.0, 14 * size)]
    assert late_seconds(together, waiting=1.0) == 3.0
    assert late_seconds(together) == 4.0
