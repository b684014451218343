"""One measurement at a time, whoever holds the lock, dies with it or keeps it from others."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cutset.compiler.turns import measuring_turn

HOLDER = """
import sys, time
from pathlib import Path
from cutset.compiler.turns import measuring_turn
with measuring_turn(print, path=Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "measuring.lock"


@pytest.fixture(autouse=True)
def warnings_fail() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@contextmanager
def held(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_the_second_waits_for_the_first_and_says_so_once(lock: Path) -> None:
    order: list[str] = []
    said: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait(5.0)
        with measuring_turn(said.append, path=lock):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with measuring_turn(said.append, path=lock):
        assert said == []
        inside.set()
        deadline = time.monotonic() + 5.0
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)  # several times of looking
        order.append("first")
    thread.join(5.0)
    assert order == ["first", "second"]
    (line,) = said
    assert line.startswith("waits for another measurement on this machine") and str(lock) in line


def test_an_error_ends_the_turn(lock: Path) -> None:
    with pytest.raises(ZeroDivisionError), measuring_turn(print, path=lock):
        raise ZeroDivisionError
    said: list[str] = []
    with measuring_turn(said.append, path=lock):
        assert said == []


def test_after_the_time_out_it_measures_with_a_warning(lock: Path) -> None:
    ran = False
    told = pytest.warns(UserWarning, match=r"goes on after 0\.2 s: times .* too long")
    with held(lock), told, measuring_turn(lambda line: None, limit_seconds=0.2, path=lock):
        ran = True
    assert ran


def test_the_lock_of_a_process_that_was_killed_is_free(lock: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "holds\n"
            turn = measuring_turn(lambda line: None, limit_seconds=0.0, path=lock)
            with pytest.warns(UserWarning, match="goes on"), turn:
                pass
        finally:
            holder.kill()
    with measuring_turn(lambda line: None, limit_seconds=5.0, path=lock):
        pass


def test_no_child_inherits_the_lock(lock: Path) -> None:
    with measuring_turn(print, path=lock):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with measuring_turn(lambda line: None, limit_seconds=0.0, path=lock):
            pass
    finally:
        child.communicate(b"\n")


def test_others_can_lock_it_whatever_the_umask(lock: Path) -> None:
    before = os.umask(0o077)
    try:
        with measuring_turn(print, path=lock):
            assert lock.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_a_lock_file_that_cannot_be_had_is_warned_of(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    link = tmp_path / "link"
    link.symlink_to(target)
    for path in (tmp_path / "missing" / "lock", link):
        ran = False
        told = pytest.warns(UserWarning, match="cannot be locked")
        with told, measuring_turn(print, path=path):
            ran = True
        assert ran
    assert not target.exists()


def test_a_pipe_in_its_place_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    began = time.monotonic()
    with measuring_turn(print, path=path):
        pass
    assert time.monotonic() - began < 5.0
