from __future__ import annotations

import pytest

from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.cost_models.discrete_events import Clock, Process, Work
from cutset.cost_models.wires import Flow, Wires

NODES = ("a", "a", "b", "b")


def cluster(*rules: LinkRule, backend: str = "cuda") -> Cluster:
    kind = DeviceType("d", backend, 1 << 30, 1e9, (("f32", 1e9),))
    devices = tuple(Device(index, "d", node) for index, node in enumerate(NODES))
    return Cluster("test", (kind,), devices, rules)


def ends(
    where: Cluster, *flows: tuple[float, Flow], slowed: dict[int, list[tuple[float, float]]]
) -> list[float]:
    """When each of (start, flow) is over."""
    clock = Clock()

    def note(device: int, share: float) -> None:
        slowed.setdefault(device, []).append((clock.now, share))

    wires = Wires(clock, where, note)
    found = [0.0] * len(flows)

    def carry(number: int, begin: float, flow: Flow) -> Process:
        yield clock.later(begin)
        yield from wires.carry(flow)
        found[number] = clock.now

    for number, (begin, flow) in enumerate(flows):
        clock.start(carry(number, begin, flow))
    clock.run()
    return found


def message(source: int, target: int, seconds: float = 4.0, latency: float = 0.0) -> Flow:
    return Flow(((source, target),), latency, seconds)


FAST, SLOW = Link(0.0, 4.0), Link(0.0, 1.0)
PLAIN = (LinkRule(FAST, same_node=True), LinkRule(SLOW, same_node=False))


@pytest.mark.parametrize(
    ("flows", "expected"),
    [
        ([(0.0, message(0, 1)), (0.0, message(0, 1))], [8.0, 8.0]),
        ([(0.0, message(0, 1)), (2.0, message(0, 1))], [6.0, 8.0]),  # 2 alone, 4 shared, 2 alone
        ([(0.0, message(0, 1)), (0.0, message(1, 0))], [4.0, 4.0]),  # both directions at once
        ([(0.0, message(0, 2)), (0.0, message(0, 1))], [4.0, 4.0]),  # out of the node and inside
        ([(0.0, message(0, 2)), (0.0, message(0, 3))], [8.0, 8.0]),  # one port out
        ([(0.0, message(0, 2)), (0.0, message(1, 2))], [8.0, 8.0]),  # one port in
        ([(0.0, message(0, 2)), (0.0, message(1, 3))], [4.0, 4.0]),
        ([(0.0, message(0, 1, latency=1.0)), (0.0, message(0, 1))], [8.0, 7.0]),
        ([(0.0, message(0, 1, 1.0)), (0.0, message(0, 1, 3.0))], [2.0, 4.0]),
    ],
)
def test_ports_are_shared_fairly(flows: list[tuple[float, Flow]], expected: list[float]) -> None:
    assert ends(cluster(*PLAIN), *flows, slowed={}) == pytest.approx(expected)


def test_cpu_workers_share_the_wire_of_their_node() -> None:
    where = cluster(*PLAIN, backend="cpu")
    flows = [(0.0, message(0, 2)), (0.0, message(1, 3))]
    assert ends(where, *flows, slowed={}) == pytest.approx([8.0, 8.0])


def test_a_ring_loads_fast_links_by_its_own_pace() -> None:
    """It crosses nodes at a quarter of the speed of links inside: there it leaves 3/4, of which a
    message takes its half of all, 1 / (1 + 1/4) of it; both last 4 * 5/4."""
    ring = Flow(((0, 1), (1, 2), (2, 3), (3, 0)), 0.0, 4.0, "all_reduce")
    found = ends(cluster(*PLAIN), (0.0, ring), (0.0, message(0, 1)), slowed={})
    assert found == pytest.approx([5.0, 5.0])


def test_streams_of_a_node() -> None:
    """Three messages where a node carries two at full speed: each has 2/3 of it."""
    where = cluster(LinkRule(FAST, same_node=True, streams=2.0), LinkRule(SLOW))
    flows = [(0.0, message(0, 1)), (0.0, message(1, 0)), (0.0, message(2, 3))]
    assert ends(where, *flows, slowed={}) == pytest.approx([4.0, 4.0, 4.0])
    one = cluster(LinkRule(FAST, same_node=True, streams=1.0), LinkRule(SLOW))
    assert ends(one, *flows, slowed={}) == pytest.approx([8.0, 8.0, 4.0])


def test_transfers_take_a_share_of_computation_at_both_ends() -> None:
    """Half of it at full speed: two messages in one port take a quarter each."""
    where = cluster(LinkRule(FAST, compute_share=0.5))
    slowed: dict[int, list[tuple[float, float]]] = {}
    ends(where, (0.0, message(0, 1)), (0.0, message(0, 1)), slowed=slowed)
    assert set(slowed) == {0, 1}
    for changes in slowed.values():
        assert {share for _, share in changes} == {0.5, 0.0}
        assert changes[-1] == (8.0, 0.0)


def test_transfers_are_slower_beside_computation() -> None:
    """A message of 4 s and a latency of 1 s begins beside a computation that goes on for 4 s, in
    which it makes a quarter of the way that it makes alone."""
    where = cluster(LinkRule(Link(1.0, 1.0), progress_share=0.25))
    for computing, expected in ((0, 8.0), (1, 8.0), (2, 5.0)):
        clock = Clock()
        wires = Wires(clock, where, lambda device, share: None)
        done: list[float] = []

        def compute(wires: Wires = wires, clock: Clock = clock, device: int = computing) -> Process:
            wires.computes(device, True)
            yield clock.later(4.0)
            wires.computes(device, False)

        def carry(wires: Wires = wires, clock: Clock = clock, done: list[float] = done) -> Process:
            yield from wires.carry(Flow(((0, 1),), 1.0, 4.0))
            done.append(clock.now)

        clock.start(compute())
        clock.start(carry())
        clock.run()
        assert done == [pytest.approx(expected)]


def test_what_is_handled_takes_nothing_more_of_computation() -> None:
    """Its latency of 1 s passes beside computation, its 4 s on the wire do so at half speed."""
    rule = LinkRule(Link(1.0, 1.0), compute_share=0.5, progress_share=0.5)
    taken: list[float] = []
    clock = Clock()
    wires = Wires(clock, cluster(rule), lambda device, share: taken.append(share))
    done: list[float] = []

    def carry() -> Process:
        yield from wires.carry(Flow(((0, 1),), 1.0, 4.0, is_handled=True))
        done.append(clock.now)

    wires.computes(0, True)
    clock.start(carry())
    clock.run()
    assert done == [pytest.approx(9.0)] and not any(taken)


def test_work_goes_on_at_the_speed_it_has() -> None:
    """2 s of work: one at full speed, one at a quarter."""
    clock, work = Clock(), Work(2.0)

    def slow_down() -> Process:
        clock.set_speed(work, 1.0)
        yield clock.later(1.0)
        clock.set_speed(work, 0.25)

    clock.start(slow_down())
    clock.run()
    assert work.end.seconds == pytest.approx(5.0)


def test_what_happens_at_once_happens_in_order() -> None:
    clock, said = Clock(), []

    def speak(word: str) -> Process:
        yield clock.later(1.0)
        said.append(word)

    for word in "cutset":
        clock.start(speak(word))
    clock.run()
    assert "".join(said) == "cutset"
