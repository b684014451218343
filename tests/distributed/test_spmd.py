"""Sessions of processes that `torchrun` starts: one script on every rank."""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import AbstractContextManager
from pathlib import Path

from .processes import ROOT, start_script, wait_gone

PREFIX = f"""
import os
sys.path.insert(0, {str(ROOT)!r})
import torch
from cutset.compiler.ir.errors import UsageError
from cutset.runtime.launcher import spmd_session
FAKE = "tests.distributed.fakes:FakeRank"

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())
"""


def torchrun(source: str, folder: Path) -> AbstractContextManager[subprocess.Popen[str]]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return start_script(PREFIX + source, folder, *command)


def test_calls(tmp_path: Path) -> None:
    source = """
session = spmd_session(factory=FAKE)
assert session.num_ranks == 2
rank, = session.local_ranks
assert session.call("ring") == [[1.0, 1.0]] * 2
assert session.call("strided")[1] == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
big = torch.arange(100_000)
replies = session.call("echo", [{"x": big}, {"x": "short"}])
assert torch.equal(replies[0]["x"], big) and replies[1] == {"x": "short"}
try:
    session.call("refuse")
except UsageError as error:
    assert "rank 0, in refuse" in str(error)
assert session.call("ring") == [[1.0, 1.0]] * 2
session.close()
session = spmd_session(factory=FAKE)  # another one, in the same job
assert session.call("ring") == [[1.0, 1.0]] * 2
session.close()
tell("finished", rank)
"""
    with torchrun(source, tmp_path) as job:
        output, errors = job.communicate(timeout=100)
    assert job.returncode == 0, errors
    assert sorted(output.splitlines()) == ["finished 0", "finished 1"]


def test_session_in_a_job_that_is_initialised(tmp_path: Path) -> None:
    source = """
torch.distributed.init_process_group("gloo")
session = spmd_session(factory=FAKE)
assert session.call("ring") == [[1.0, 1.0]] * 2
session.close()
torch.distributed.barrier()
tell("finished")
"""
    with torchrun(source, tmp_path) as job:
        output, errors = job.communicate(timeout=100)
    assert job.returncode == 0, errors
    assert output.split() == ["finished"] * 2


def test_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    source = """
session = spmd_session(factory=FAKE)
try:
    session.call("fail", {"rank": 1})
except Exception as error:
    tell(os.getpid(), type(error).__name__, str(error).splitlines())
    raise SystemExit(1)
"""
    began = time.monotonic()
    with torchrun(source, tmp_path) as job:
        output, errors = job.communicate(timeout=100)
    assert time.monotonic() - began < 60
    assert job.returncode == 1, errors
    lines = output.splitlines()
    expected = "['ZeroDivisionError: deliberate failure of this test', '  at: rank 1, in fail']"
    assert [line.split(" ", 1)[1] for line in lines] == [f"RuntimeFailure {expected}"] * 2
    assert wait_gone([int(line.split()[0]) for line in lines], 5) == []


def test_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = f"""
os.environ |= dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}")
spmd_session(factory=FAKE, timeout_seconds=5.0)
"""
        with start_script(PREFIX + source, tmp_path) as job:
            _, errors = job.communicate(timeout=60)
    assert job.returncode == 1
    assert f"RuntimeFailure: cannot join the job at 127.0.0.1:{port}" in errors
    assert "name a free MASTER_PORT" in errors
