from __future__ import annotations

import functools
import gc
import os
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from cutset.compiler.ir.errors import RuntimeFailure, UsageError, WaitTimeout, WorkerLost
from cutset.runtime.launcher import launch_local, spmd_session, under_torchrun
from cutset.runtime.session import LocalSession, RemoteTraceback

from .conftest import WorkerPool
from .processes import start_script, wait_gone

FAKE = "tests.distributed.fakes:FakeRank"
launch = functools.partial(launch_local, factory=FAKE, preload=())


@pytest.fixture
def session(pool: WorkerPool) -> LocalSession:
    """Two shared workers; a test that breaks them costs the next one a start."""
    return pool.session(2, FAKE)


class TestCalls:
    def test_replies_come_in_the_order_of_ranks(self, session: LocalSession) -> None:
        replies = session.call("echo", [{"x": "first"}, {"x": "second"}])
        assert replies == [{"x": "first"}, {"x": "second"}]

    def test_one_mapping_serves_all_ranks(self, session: LocalSession) -> None:
        assert session.call("echo", {"x": (1, None, 2.5)}) == [{"x": (1, None, 2.5)}] * 2

    def test_wrong_number_of_arguments(self, session: LocalSession) -> None:
        with pytest.raises(UsageError, match="arguments for 3 ranks were given to 2"):
            session.call("echo", [{}, {}, {}])
        assert session.is_open

    def test_tensors_survive_the_way_there_and_back(self, session: LocalSession) -> None:
        tensor = torch.randn(300, 200).T
        reply = session.call("echo", {"x": {"deep": [tensor]}})[1]["x"]["deep"][0]
        assert torch.equal(reply, tensor)

    def test_what_does_not_travel_is_refused_and_harmless(self, session: LocalSession) -> None:
        with pytest.raises(UsageError, match=r"pathlib.* does not travel"):
            session.call("echo", {"x": Path("a")})
        assert session.is_open

    def test_no_private_methods(self, session: LocalSession) -> None:
        with pytest.raises(UsageError, match="no public method '_wait_for'"):
            session.call("_wait_for", {"rank": 0})
        assert session.is_open

    def test_cores_are_shared(self, session: LocalSession) -> None:
        share = max(1, len(os.sched_getaffinity(0)) // 2)
        threads = min(share, int(os.environ.get("OMP_NUM_THREADS", share)))
        assert session.call("threads") == [(threads, str(threads))] * 2

    def test_memory_of_a_step_stays_for_the_next(self, session: LocalSession) -> None:
        for *_, last in session.call("page_faults"):
            assert last < 100  # of 16384 pages in use


class TestCommunication:
    def test_messages_and_reductions(self, pool: WorkerPool) -> None:
        assert pool.session(3, FAKE).call("ring") == [[3.0, 3.0]] * 3

    def test_non_contiguous_tensors_arrive_in_order(self, session: LocalSession) -> None:
        assert session.call("strided")[1] == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]

    def test_many_messages_at_once(self, session: LocalSession) -> None:
        assert session.call("burst", {"count": 30})[1] == [float(number) for number in range(30)]

    def test_collectives(self, session: LocalSession) -> None:
        expected = {"sum": 3.0, "avg": 1.5, "max": 2.0, "min": 1.0, "bf16": 3.0}
        expected_all = expected | {"broadcast": [1.0, 1.0]}
        assert session.call("collectives") == [expected_all] * 2


class TestFailures:
    def test_error_of_one_rank(self) -> None:
        with launch(2) as session:
            pids = session.process_ids
            began = time.monotonic()
            with pytest.raises(RuntimeFailure, match="ZeroDivisionError: deliberate") as caught:
                session.call("fail", {"rank": 1})
            assert time.monotonic() - began < 10
            assert "rank 1, in fail" in str(caught.value)
            assert isinstance(caught.value.__cause__, RemoteTraceback)
            assert "fakes.py" in str(caught.value.__cause__)
            assert wait_gone(pids, 0) == []
            with pytest.raises(RuntimeFailure, match="has ended: fail failed on rank 1"):
                session.call("ring")

    def test_callers_fault_keeps_the_session(self, session: LocalSession) -> None:
        with pytest.raises(UsageError, match="x must be positive") as caught:
            session.call("refuse")
        assert caught.value.where == "rank 0, in refuse"
        assert caught.value.ways_out == ("pass 1",)
        assert session.call("ring") == [[1.0, 1.0]] * 2

    @pytest.mark.parametrize(
        ("signal_number", "words"), [(signal.SIGKILL, "by SIGKILL"), (0, "with exit code 3")]
    )
    def test_worker_dies_in_the_middle(self, signal_number: int, words: str) -> None:
        with launch(3) as session:
            pids = session.process_ids
            began = time.monotonic()
            with pytest.raises(WorkerLost) as caught:
                session.call("die", {"rank": 2, "signal_number": int(signal_number)})
            assert time.monotonic() - began < 15
            assert f"the worker of rank 2 ended {words}" in str(caught.value)
            assert "last words" in str(caught.value)
            assert wait_gone(pids, 0) == []

    def test_nursery_dies(self) -> None:
        with launch(2) as session:
            pids = session.process_ids
            nursery = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(nursery, signal.SIGKILL)
            with pytest.raises(WorkerLost):
                session.call("nap", {"seconds": 30})
            assert wait_gone([nursery, *pids], 5) == []

    def test_wait_names_what_was_waited_for(self) -> None:
        with launch(2) as session:
            with pytest.raises(WaitTimeout) as caught:
                session.call("await_nothing", {"seconds": 0.5})
            message = "waited 0.5 s for value %h of microbatch 2 from rank 0 (on rank 1)"
            assert message in str(caught.value)

    def test_call_names_who_does_not_answer_and_where_it_is(self) -> None:
        with launch(2) as session:
            pids = session.process_ids
            with pytest.raises(WaitTimeout) as caught:
                session.call("nap", [{"seconds": 0.0}, {"seconds": 60.0}], timeout_seconds=1.0)
            assert "rank 1 did not answer nap within 1 s" in str(caught.value)
            assert "in nap" in str(caught.value)
            assert wait_gone(pids, 0) == []

    def test_stopped_worker_is_killed(self) -> None:
        with launch(1) as session:
            pids = session.process_ids
            with pytest.raises(WaitTimeout, match="rank 0 did not answer stop"):
                session.call("stop", timeout_seconds=0.5)
            assert wait_gone(pids, 0) == []


class TestStart:
    def test_rank_that_cannot_be_made(self) -> None:
        with pytest.raises(RuntimeFailure, match="no such device here"):
            launch(2, factory="tests.distributed.fakes:Unstartable")

    def test_module_that_cannot_be_imported(self) -> None:
        with pytest.raises(WorkerLost, match="No module named 'no_such_module'"):
            launch(1, factory="no_such_module:Class")

    def test_port_in_use(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with pytest.raises(RuntimeFailure, match=f"port {port} .*cannot be used") as caught:
                launch(2, master_port=port)
        assert "leave master_port at 0" in str(caught.value)

    def test_too_short_a_time_is_told_in_words(self, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(RuntimeFailure, match="timed out"):
            launch(2, timeout_seconds=1e-9)
        assert "frame #" not in capfd.readouterr().err

    def test_contradicting_arguments(self) -> None:
        with pytest.raises(UsageError, match="1 devices were given for 2 ranks"):
            launch_local(2, devices=[torch.device("cpu")])
        with pytest.raises(UsageError, match="unknown backend 'mpi'"):
            launch_local(2, backend="mpi")

    def test_more_workers_than_the_memory_of_this_machine_holds(self) -> None:
        """They would be killed, and other processes with them."""
        with pytest.raises(UsageError, match="1000000 workers take .* GiB before") as caught:
            launch_local(1_000_000)
        assert "use at most" in caught.value.ways_out[0]

    def test_not_under_torchrun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RANK", raising=False)
        assert not under_torchrun()
        with pytest.raises(UsageError, match="start the script with torchrun"):
            spmd_session()


class TestEnd:
    def test_last_reference(self) -> None:
        session = launch(1)
        pids = session.process_ids
        del session
        gc.collect()
        assert wait_gone(pids, 0) == []

    def test_close_twice_then_call(self) -> None:
        session = launch(1, wait=False)
        session.close()
        session.close()
        with pytest.raises(RuntimeFailure, match="it was closed"):
            session.call("ring")

    def test_fork_of_the_driver_leaves_the_workers_alone(self, session: LocalSession) -> None:
        child = os.fork()
        if child == 0:
            try:
                session.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert session.call("ring") == [[1.0, 1.0]] * 2


# A driver without `if __name__ == "__main__"`, which workers must not need.
DRIVER = f"""
from cutset.runtime.launcher import launch_local
session = launch_local(2, factory={FAKE!r}, preload=())
print(*session.process_ids, flush=True)
"""
HANGING_DRIVER = f"{DRIVER}\nsession.call('nap', {{'seconds': 60.0}})\n"


class TestDriver:
    def test_leaves_nothing_behind(self, tmp_path: Path) -> None:
        with start_script(DRIVER, tmp_path) as driver:
            output, errors = driver.communicate(timeout=60)
        assert (driver.returncode, errors) == (0, "")
        assert wait_gone(map(int, output.split()), 0) == []

    def test_killed(self, tmp_path: Path) -> None:
        with start_script(HANGING_DRIVER, tmp_path) as driver:
            assert driver.stdout is not None
            pids = [int(pid) for pid in driver.stdout.readline().split()]
            assert len(pids) == 2
            driver.kill()
        assert wait_gone(pids, 10) == []

    def test_interrupted(self, tmp_path: Path) -> None:
        with start_script(HANGING_DRIVER, tmp_path) as driver:
            assert driver.stdout is not None
            pids = [int(pid) for pid in driver.stdout.readline().split()]
            os.killpg(driver.pid, signal.SIGINT)
            _, errors = driver.communicate(timeout=10)
        assert driver.returncode == -signal.SIGINT
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert len(pids) == 2
        assert wait_gone(pids, 0) == []


def test_workers_start_from_a_process_with_many_open_files() -> None:
    """`select` takes no descriptor above 1023."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1200:
        pytest.skip(f"this process may open {soft} files only")
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1050)]
    try:
        with launch_local(1) as session:
            assert session.process_ids
    finally:
        for descriptor in opened:
            os.close(descriptor)
