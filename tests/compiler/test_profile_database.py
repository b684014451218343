"""The database of measured times: whole records only, whoever writes, dies or scribbles."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cutset.compiler.cli import main
from cutset.compiler.profile_database import BlockKey, Measurement, ProfileDatabase, Record

KEY = BlockKey("ab" * 32, "train", "Some CPU, 1 threads, 2 workers", 4, False, False, "2.13.0")


def record(key: BlockKey = KEY, seconds: float = 0.25, age: float = 0.0) -> Record:
    return Record(key, "layers.0", 17, (seconds, 2 * seconds, 0.0), time.time() - age)


@pytest.fixture
def database(tmp_path: Path) -> ProfileDatabase:
    return ProfileDatabase(tmp_path)


def only_file(database: ProfileDatabase) -> Path:
    (path,) = database.directory.iterdir()
    return path


def test_what_is_put_is_got_and_nothing_else(database: ProfileDatabase) -> None:
    assert database.get(KEY) is None and database.records() == ()
    database.put(record())
    found = database.get(KEY)
    assert found is not None and found.seconds == (0.25, 0.5, 0.0)
    assert found.key == KEY and found.path == "layers.0"
    for name, value in [("torch", "2.12.0"), ("device", "GPU"), ("compiled", True), ("method", 0)]:
        assert database.get(replace(KEY, **{name: value})) is None  # type: ignore[arg-type]
    database.put(record(seconds=1.0))
    assert [item.seconds[0] for item in database.records()] == [1.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(format_version=99), "format version 99"),
        (lambda d: d.update(format="something"), "no record"),
        (lambda d: d.update(seconds=[-1.0, 0.0, 0.0]), "-1.0, which cannot be"),
        (lambda d: d.update(seconds=[0.0, 0.0, 0.0]), "takes no time"),
        (lambda d: d.update(seconds=[1e9, 0.0, 0.0]), "which cannot be"),
        (lambda d: d.update(seconds=["1", 0.0, 0.0]), "no number"),
        (lambda d: d.update(seconds=[0.1, 0.2]), "are 3, not 2"),
        (lambda d: d.update(seconds=0.1), "not of type list"),
        (lambda d: d.update(measured_at=10**400), "which cannot be"),
        (lambda d: d.update(more=1), "more"),
        (lambda d: d.pop("path"), "path"),
        (lambda d: d["key"].update(copies=True), "key.copies"),
        (lambda d: d["key"].pop("torch"), "key has other fields"),
        (lambda d: d["key"].update(torch="2.0"), "about something else"),
        (lambda d: d["key"].update(kind="guess"), "'guess' is not a valid Measurement"),
        (lambda d: d["key"].update(kind="nodes"), "are 18, not 3"),
        (lambda d: d["key"].update(kind="message"), "are 2, not 3"),
    ],
)
def test_a_record_that_cannot_be_used_is_ignored_and_named(
    database: ProfileDatabase, change: Callable[[dict], None], reason: str
) -> None:
    database.put(record())
    path = only_file(database)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.warns(UserWarning, match=reason) as caught:
        assert database.get(KEY) is None
    assert str(path) in str(caught[0].message)
    database.put(record())  # the next measurement replaces it
    assert database.get(KEY) is not None


@pytest.mark.parametrize("text", ["", "{", '{"seconds": [NaN]}', "\x00\x01", "[" * 100_000])
def test_text_that_is_no_record_is_ignored(database: ProfileDatabase, text: str) -> None:
    database.put(record())
    only_file(database).write_text(text)
    with pytest.warns(UserWarning, match="is ignored"):
        assert database.get(KEY) is None


def test_a_pipe_a_folder_or_a_giant_in_its_place_is_ignored(database: ProfileDatabase) -> None:
    database.put(record())
    path = only_file(database)

    def giant() -> None:
        path.write_text("")
        os.truncate(path, 1 << 40)

    for make in (lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to("/dev/zero"), giant):
        path.unlink() if path.is_file() else None
        make()
        with pytest.warns(UserWarning, match="is ignored"):
            assert database.get(KEY) is None
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_full_disk_costs_one_warning_and_leaves_nothing_behind(
    database: ProfileDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.put(record())

    def is_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", is_full)
    with pytest.warns(UserWarning, match="are not kept in .*No space left") as caught:
        database.put(record(seconds=3.0))
        database.put(record(replace(KEY, copies=1)))
    assert len(caught) == 1
    found = database.get(KEY)
    assert found is not None and found.seconds[0] == 0.25
    assert only_file(database).suffix == ".json"


def test_every_truncation_is_ignored(database: ProfileDatabase) -> None:
    database.put(record())
    path = only_file(database)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match="is ignored"):
            assert database.get(KEY) is None


WRITER = """
import sys
from pathlib import Path
from cutset.compiler.profile_database import ProfileDatabase
from tests.compiler.test_profile_database import KEY, record
database = ProfileDatabase(Path(sys.argv[1]))
print("ready", flush=True)
for turn in range(int(sys.argv[2])):
    database.put(record(seconds=float(sys.argv[3]) + turn))
"""


def writer(directory: Path, turns: int, first: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(directory), str(turns), str(first)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def test_two_processes_that_write_at_once_leave_a_whole_record(tmp_path: Path) -> None:
    database = ProfileDatabase(tmp_path)
    writers = [writer(tmp_path, 100, first) for first in (1.0, 1001.0)]
    for process in writers:
        wait_until_ready(process)
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a reader never sees a part
        while any(process.poll() is None for process in writers):
            found = database.get(KEY)
            if found is not None:
                seen.add(found.seconds[0])
                assert found.seconds[1] == 2 * found.seconds[0]
        last = database.get(KEY)
    assert [process.wait(30) for process in writers] == [0, 0]
    assert last is not None and last.seconds[0] in (100.0, 1100.0)
    assert seen
    assert only_file(database).suffix == ".json"


def test_a_writer_killed_in_the_middle_leaves_the_old_record_or_the_new_one(
    tmp_path: Path,
) -> None:
    database = ProfileDatabase(tmp_path)
    for turn in range(3):
        process = writer(tmp_path, 1_000_000, 1.0)
        wait_until_ready(process)
        time.sleep(0.05 + 0.013 * turn)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = database.get(KEY)
            assert found is not None and found.seconds[1] == 2 * found.seconds[0]
            assert len(database.records()) == 1


def test_files_of_dead_writers_are_cleared_once_they_are_old(database: ProfileDatabase) -> None:
    database.put(record())
    old, new = (database.directory / f".{name}.json.x.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    assert database.clear() == 1
    assert list(database.directory.iterdir()) == [new]


def test_a_directory_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    database = ProfileDatabase(blocked)
    with pytest.warns(UserWarning, match="are not kept") as caught:
        database.put(record())
        database.put(record(replace(KEY, copies=1)))
    assert len(caught) == 1
    assert database.get(KEY) is None and database.records() == ()


def test_a_directory_without_permission_costs_one_warning(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(0o500)
    with pytest.warns(UserWarning, match="are not kept"):
        ProfileDatabase(tmp_path).put(record())
    tmp_path.chmod(0o700)


def test_only_files_are_records(database: ProfileDatabase) -> None:
    database.put(record())
    (database.directory / "folder.json").mkdir()
    (database.directory / "nowhere.json").symlink_to("/nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(database.records()) == 1
    assert database.clear() == 2
    assert [path.name for path in database.directory.iterdir()] == ["folder.json"]


def test_records_of_a_clock_that_is_ahead_are_cleared_too(database: ProfileDatabase) -> None:
    database.put(record(age=-86400.0))
    assert database.clear(older_than_seconds=60.0) == 0
    assert database.clear() == 1


def test_clear_takes_what_is_meant(database: ProfileDatabase) -> None:
    gpu = replace(KEY, device="NVIDIA H200, 2 workers")
    database.put(record(age=10 * 86400.0))
    database.put(record(gpu))
    assert database.clear(older_than_seconds=86400.0, device="h200") == 0
    assert database.clear(older_than_seconds=86400.0) == 1
    assert [item.key for item in database.records()] == [gpu]
    assert database.clear(device="H200") == 1


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProfileDatabase:
    monkeypatch.setenv("CUTSET_CACHE", str(tmp_path))
    database = ProfileDatabase(tmp_path)
    database.put(record())
    database.put(record(replace(KEY, device="NVIDIA H200, 2 workers", cuda_graphs=True), age=1e6))
    return database


def test_records_are_listed_by_device(
    filled: ProfileDatabase, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "list"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"2 records in {filled.directory}")
    assert "layers.0" in text and "250 ms + 500 ms + 0 s" in text and "11.6 days" in text
    assert main(["profile", "list", "--device", "h200", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["records"]
    assert entry["device"] == "NVIDIA H200, 2 workers"
    assert entry["runs_as"] == "eager in CUDA graphs"
    assert entry["forward_seconds"] == 0.25


def test_nodes_and_messages_are_listed_beside_blocks(
    filled: ProfileDatabase, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, seconds in [
        (Measurement.NODES, (0.1, 0.0, 0.2, 1e-5)),
        (Measurement.INSTRUCTION, (2e-5,)),
        (Measurement.MESSAGE, (1e-4, 0.0)),
    ]:
        key = replace(KEY, kind=kind, device=kind)
        kept = Record(key, "", len(seconds) - 1, seconds, time.time())
        filled.put(kept)
        assert filled.get(key) == kept
    assert main(["profile", "list"]) == 0
    text = capsys.readouterr().out
    assert "nodes, each in its place" in text and "300 ms" in text
    assert "a message" in text and "100 us + 0 s" in text
    assert "an instruction" in text and "20 us" in text
    assert main(["profile", "list", "--device", "message", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["records"]
    assert entry["kind"] == "message" and entry["message_seconds"] == 1e-4
    filled.clear(device="nodes")
    filled.clear(device="message")
    filled.clear(device="instruction")
    assert len(filled.records()) == 2


def test_records_are_cleared(filled: ProfileDatabase, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "clear", "--older-than", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 1
    assert main(["profile", "clear"]) == 0
    assert capsys.readouterr().out == f"removed 1 record from {filled.directory}\n"
    assert filled.records() == ()
    assert main(["profile", "list"]) == 0


@pytest.mark.parametrize(
    "arguments", [[], ["forget"], ["list", "--older-than", "3"], ["clear", "--older-than", "-1"]]
)
def test_bad_usage_ends_with_2(arguments: list[str], filled: ProfileDatabase) -> None:
    assert main(["profile", *arguments]) == 2
    assert len(filled.records()) == 2
