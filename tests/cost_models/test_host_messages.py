from dataclasses import replace

import pytest

from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.cost_models.exchanges import exchange
from cutset.cost_models.host_messages import (
    HostSeconds,
    ahead_seconds,
    asking_seconds,
    bucket_seconds,
    send_seconds,
)

MEMORY, WIRE = 10.0, 4.0  # bytes per second
LATENCY = 0.5
ASKING = 0.125


def cluster(backend: str, count: int = 4, message: float = 0.0) -> Cluster:
    kind = DeviceType(
        "one", backend, 1 << 30, MEMORY, (("f32", 1.0),), 0.0,
        instruction_seconds=ASKING, message_seconds=message,
    )  # fmt: skip
    devices = tuple(Device(index, "one", "here") for index in range(count))
    return Cluster("test", (kind,), devices, (LinkRule(Link(LATENCY, WIRE)),))


def bucket(
    name: str, *, backend: str = "cpu", tensors: int = 2, message: float = 0.0
) -> HostSeconds:
    where = cluster(backend, message=message)
    entry = exchange(where, name, (0, 1, 2, 3), 80.0)
    return bucket_seconds(
        where,
        1,
        name,
        (0, 1, 2, 3),
        80.0,
        num_tensors=tensors,
        asking=asking_seconds(where, 1, entry),
    )


def test_a_message_is_copied_into_its_socket_by_the_thread_that_sends_it() -> None:
    assert send_seconds(cluster("cpu"), 0, 1, 8.0) == 8.0 / WIRE
    assert send_seconds(cluster("cuda"), 0, 1, 8.0) == 0.0


def test_an_all_reduce_takes_copies_of_a_bucket_only() -> None:
    assert bucket("all_reduce") == HostSeconds(before=160 / MEMORY, after=160 / MEMORY)
    assert bucket("all_reduce", tensors=1) == HostSeconds()


def test_a_reduce_scatter_is_laid_down_sent_added_up_and_copied_out() -> None:
    found = bucket("reduce_scatter")
    assert found.before == pytest.approx(160 / MEMORY)
    assert found.sending == pytest.approx(6 * ASKING + 40 / MEMORY + 60 / WIRE)
    assert found.finishing == pytest.approx((40 + 180) / MEMORY)
    assert found.after == pytest.approx(40 / MEMORY)


def test_an_all_gather_sends_its_part_and_copies_the_others_out() -> None:
    found = bucket("all_gather")
    assert found.before == pytest.approx(40 / MEMORY)
    assert found.sending == pytest.approx(6 * ASKING + 40 / MEMORY + 60 / WIRE)
    assert (found.finishing, found.after) == (0.0, pytest.approx(120 / MEMORY))


def test_cuda_devices_do_it_beside_their_kernels() -> None:
    assert bucket("reduce_scatter", backend="cuda") == HostSeconds()


def test_collectives_beside_computation_are_asked_for_and_sent_by_its_thread() -> None:
    where = cluster("cpu")
    gather = exchange(where, "all_gather", (0, 1, 2, 3), 80.0)
    own = pytest.approx(6 * ASKING + 60 / WIRE)
    assert ahead_seconds(where, 2, gather) == (own, own)
    assert not any(ahead_seconds(where, 2, exchange(where, "all_reduce", (0, 1, 2, 3), 80.0)))


def test_what_collectives_take_of_computation_may_have_been_measured() -> None:
    rule = LinkRule(Link(LATENCY, WIRE), handling=(("all_gather", Link(3.0, 8.0)),))
    where = replace(cluster("cpu"), links=(rule,))
    gather, scatter = (
        exchange(where, name, (0, 1, 2, 3), 80.0) for name in ("all_gather", "reduce_scatter")
    )
    whole, own = ahead_seconds(where, 2, gather)
    assert whole == pytest.approx(3 * (3.0 + 20 / 8.0))
    assert own == pytest.approx(6 * ASKING + 60 / WIRE)
    assert ahead_seconds(where, 2, gather.scaled(0.5))[0] == pytest.approx(whole / 2)
    assert ahead_seconds(where, 2, scatter)[0] == pytest.approx(6 * ASKING + 60 / WIRE)
    on_cuda = replace(cluster("cuda"), links=(rule,))
    assert not any(ahead_seconds(on_cuda, 2, exchange(on_cuda, "all_gather", (0, 1), 80.0)))


def test_asking_for_messages_takes_no_longer_than_they_do() -> None:
    where = cluster("cpu")
    gather = exchange(where, "all_gather", (0, 1, 2, 3), 80.0)
    assert asking_seconds(where, 0, gather) == 6 * ASKING
    slow = replace(where, types=(replace(where.types[0], instruction_seconds=9.0),))
    assert asking_seconds(slow, 0, gather) == gather.latency_seconds == 3 * LATENCY


def test_what_messages_take_is_known_where_it_was_measured() -> None:
    """A third of a latency for each of six messages would be more than all of them take."""
    where = cluster("cpu", message=0.2)
    assert send_seconds(where, 0, 1, 8.0) == 0.2 + 8.0 / WIRE
    gather, reduce = (exchange(where, n, (0, 1, 2, 3), 80.0) for n in ("all_gather", "all_reduce"))
    assert asking_seconds(where, 0, gather) == pytest.approx(6 * 0.2)
    assert asking_seconds(where, 0, reduce) == 0.2
    assert ahead_seconds(where, 0, reduce) == (0.2, 0.2)
    found = bucket("all_reduce", message=0.2)
    assert found == HostSeconds(160 / MEMORY, 0.2, 0.0, 160 / MEMORY)
