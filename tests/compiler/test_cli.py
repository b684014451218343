"""The command line's manners: help, exit codes, one clear error, JSON alone on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from cutset.compiler.checkpoint import refuse_existing
from cutset.compiler.cli import main
from cutset.compiler.cli.main import COMMANDS
from cutset.compiler.cli.model_loader import choose_optimizer, load_model
from cutset.compiler.ir.errors import UsageError

FACTORIES = """
import warnings

import torch
from torch import nn

import neighbour

def pair():
    return nn.Linear(3, 3), (torch.randn(4, 3),)

def triple():
    return nn.Linear(3, 3), [], {"input": torch.randn(4, 3)}

def mapping():
    x = torch.randn(4, 3)
    return {
        "model": nn.Linear(3, 3), "args": (x, torch.arange(4)), "loss_fn": neighbour.loss,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    }

def meta():
    with torch.device("meta"):
        return nn.Linear(3, 3), (torch.randn(4, 3),)

def fails():
    raise RuntimeError("no such weights")

def wrong():
    return 7

def warns():
    for text in ("it is old", "it is slow", "it is old"):
        warnings.warn(text)
    warnings.warn("it is old", FutureWarning)
    return 7

def unknown_key():
    return {"model": nn.Linear(3, 3), "arguments": ()}

def not_a_model():
    return "gpt2", ()
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("def loss(output, target): return output.sum()\n")
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES)
    return path


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_verb_has_help_with_examples(
    command: object, capsys: pytest.CaptureFixture[str]
) -> None:
    name = command.name  # type: ignore[attr-defined]
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert f"examples:\n  cutset {name}" in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["plan", "m.py:f"],
        ["run", "m.py:f", "--plan", "p", "--steps", "0"],
        ["run", "m.py:f", "--plan", "p", "--lr", "nan"],
        ["plan", "m.py:f", "--devices", "2", "--dtype", "float8"],
        ["plan", "m.py:f", "--devices", "2", "--schedule", "foo"],
        ["export", "p", "--model", "m.py:f"],
        ["plan", "m.py:f", "--devices", "2", "--seed", "9" * 30],
        ["plan", "m.py:f", "--devices", "2", "--memory-limit", "1e300"],
        ["plan", "m.py:f", "--devices", "2", "--memory-limit", "1e-12"],
        ["plan", "m.py:f", "--devices", "2", "--compare", ","],
    ],
)
def test_malformed_command_lines_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "cutset" in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["simulate", "no-plan.json", "--trace"],
        ["run", "no-model.py:f", "--plan", "no-plan.json", "--trace"],
        ["export", "no-plan.json", "--model", "no-model.py:f", "--onnx"],
        ["plan", "no-model.py:f", "--devices", "2", "-o"],
    ],
)
def test_a_result_that_has_nowhere_to_go_is_refused_before_any_work(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, reason in ((tmp_path / "no" / "x.json", "does not exist"), (tmp_path, "a folder")):
        assert main([*arguments, str(target)]) == 2
        told = capsys.readouterr().err
        assert reason in told and str(target) in told


def test_help_starts_without_torch() -> None:
    code = "import sys; from cutset.compiler.cli import main; main(['--help']); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", ["pair", "triple", "mapping"])
def test_all_forms_of_a_factory(factories: Path, name: str) -> None:
    loaded = load_model(f"{factories}:{name}", seed=5)
    again = load_model(f"{factories}:{name}", seed=5)
    other = load_model(f"{factories}:{name}", seed=6)
    weight = loaded.model.weight
    assert torch.equal(weight, again.model.weight)
    assert not torch.equal(weight, other.model.weight)
    assert (len(loaded.args), sorted(loaded.kwargs)) == {
        "pair": (1, []), "triple": (0, ["input"]), "mapping": (2, []),
    }[name]  # fmt: skip
    assert (loaded.loss_fn is not None) == (name == "mapping")


def test_dtype_converts_the_model_and_its_float_inputs(factories: Path) -> None:
    loaded = load_model(f"{factories}:mapping", dtype="float64")
    assert loaded.model.weight.dtype == torch.float64
    assert [item.dtype for item in loaded.args] == [torch.float64, torch.int64]


def test_a_model_of_a_package(factories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(factories.parent)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert load_model("factories:pair").args[0].shape == (4, 3)


def test_meta_models_are_recognised(factories: Path) -> None:
    assert load_model(f"{factories}:meta").is_meta
    assert not load_model(f"{factories}:pair").is_meta


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "the factory fails failed: RuntimeError: no such weights"),
        ("wrong", "the factory returned int"),
        ("unknown_key", "unknown keys: arguments"),
        ("not_a_model", "a str as model"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_bad_factories_are_named(factories: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(f"{factories}:{name}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("model.py", "does not name a model"),
        ("absent.py:build", "there is no file absent.py"),
        ("no.such.package:build", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_bad_model_names(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(spec)


def test_a_file_with_a_mistake_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ndef build(:\n")
    with pytest.raises(UsageError, match=r"SyntaxError.*\n  at: .*broken\.py:2"):
        load_model(f"{path}:build")


def test_which_optimizer_trains(factories: Path) -> None:
    plain = load_model(f"{factories}:pair")
    own = load_model(f"{factories}:mapping")
    parameters = list(plain.model.parameters())
    assert type(choose_optimizer(plain)(parameters)) is torch.optim.AdamW
    assert choose_optimizer(plain, "sgd", 0.1)(parameters).defaults["momentum"] == 0.9
    assert choose_optimizer(own)(parameters).defaults["lr"] == 0.5
    assert type(choose_optimizer(own, "adamw", 0.1)(parameters)) is torch.optim.AdamW
    with pytest.raises(UsageError, match="its own optimizer"):
        choose_optimizer(own, None, 0.1)


def test_an_error_is_one_message_and_with_json_an_object(
    factories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", f"{factories}:wrong", "--devices", "2"]
    assert main(arguments) == 2
    plain = capsys.readouterr()
    assert plain.out == ""
    assert "cutset: the factory returned int" in plain.err
    assert "Traceback" not in plain.err
    assert main([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "UsageError"
    assert main([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_warnings_of_python_are_said_once_as_the_commands_own(
    factories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = warnings.showwarning
    assert main(["plan", f"{factories}:warns", "--devices", "2", "--json"]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "it is" in line]
    assert lines == ["cutset: warning: it is old", "cutset: warning: it is slow"]
    assert "Warning" not in captured.err
    assert set(json.loads(captured.out)) == {"error"}
    assert warnings.showwarning is shown


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["clear", "--json"]])
def test_a_result_that_cannot_be_written_is_one_error(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cutset", "profile", *arguments]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        )  # fmt: skip
    assert ended.returncode == 2
    told = "cutset: the result cannot be written: No space left on device\n  at: standard output\n"
    assert ended.stderr.startswith(told) and ended.stderr.count("cutset") == 1
    assert "Traceback" not in ended.stderr and "ignored" not in ended.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "2>/dev/full", "</dev/null >&- 2>&-"])
def test_a_process_without_streams_still_ends_well(closed: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m cutset profile list {closed}"],
        capture_output=True, timeout=60, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert ended.returncode == 0
    assert ended.stderr == b""


def test_a_reader_that_stops_early_ends_the_command_in_silence(tmp_path: Path) -> None:
    for arguments in ("profile list", "profile list --json"):
        reading, writing = os.pipe()
        os.close(reading)
        ended = subprocess.run(
            [sys.executable, "-m", "cutset", *arguments.split()],
            stdout=writing, stderr=subprocess.PIPE, timeout=60,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        )  # fmt: skip
        os.close(writing)
        assert (ended.returncode, ended.stderr) == (1, b""), arguments


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_a_terminal_cannot_show_are_escaped(encoding: str, tmp_path: Path) -> None:
    cache = tmp_path / "ordn\u00fcng\udcff"
    ended = subprocess.run(
        [sys.executable, "-m", "cutset", "profile", "list"],
        capture_output=True, timeout=60,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    shown = "ordn\u00fcng" if encoding == "utf-8" else "ordn\\xfcng"
    assert f"{shown}\\udcff" in ended.stdout.decode(encoding)


@pytest.mark.parametrize("name", ["file/checkpoint", "file/new/checkpoint"])
def test_a_checkpoint_that_has_nowhere_to_go_is_refused_before_training(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    refuse_existing(tmp_path / "new" / "checkpoint")
    with pytest.raises(UsageError, match=r"cannot be made in .*file: it is not a folder"):
        refuse_existing(tmp_path / name)


def test_ctrl_c_while_torch_is_imported(tmp_path: Path) -> None:
    """torch drops what importing numpy raises, as this one does."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n    pass\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "cutset", "plan", "model.py:build", "--devices", "2"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (done.returncode, done.stderr, done.stdout) == (130, "cutset: interrupted\n", "")
