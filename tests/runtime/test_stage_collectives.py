"""Ranks whose stages meet while they compute: exact in one process, and quick to fail."""

from __future__ import annotations

import time

import pytest
import torch

from cutset.compiler.codegen.python import emit_python
from cutset.compiler.ir.errors import RuntimeFailure, VerificationError
from cutset.compiler.ir.program import Program
from cutset.compiler.ir.text import parse_program, print_program
from cutset.compiler.ir.verify.axes import verify_axes
from cutset.runtime.contract import Contract, agree
from cutset.runtime.inprocess import InProcessSession
from tests.runtime.tensor_parallel import check_step, load_arguments, programs


def test_gradients_are_those_of_the_whole_model() -> None:
    session = InProcessSession(4)
    session.call("load", load_arguments())
    for step in range(2):
        check_step(session, step)


@pytest.mark.slow
def test_kernels_that_cannot_be_compiled_run_as_they_are() -> None:
    session = InProcessSession(4)
    with pytest.warns(UserWarning, match="a kernel is not compiled: ranks 0, 1 have no process"):
        session.call("load", load_arguments(compile=True))
    check_step(session)


def test_programs_with_axes_print_and_parse() -> None:
    for program in programs():
        assert parse_program(print_program(program)) == program
    assert "axis tensor (2, 3)" in print_program(programs()[3])


def step_of(session: InProcessSession) -> None:
    inputs = {"args[0]": torch.zeros(4, 6).double(), "targets[0]": torch.zeros(4, 3).double()}
    arguments = {"key": "k", "inputs": inputs, "weights": (0.5, 0.5), "seed": 0, "step": 0}
    session.call("train_step", arguments | {"hyperparameters": ()})


def test_failure_of_one_rank_ends_the_waits_of_all() -> None:
    session = InProcessSession(4)
    session.call("load", load_arguments())
    began = time.monotonic()
    with pytest.raises(RuntimeFailure, match="KeyError.*up") as caught:
        step_of(session)  # no rank has its weights
    assert caught.value.where == "rank 0, in train_step"
    assert time.monotonic() - began < 30.0  # the communicator's limit is 60
    with pytest.raises(RuntimeFailure, match="train_step failed"):
        step_of(session)


def changed(program: Program, old: str, new: str) -> Program:
    text = print_program(program)
    assert old in text
    return parse_program(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  Forward 0.0", "  Forward 0.1", "meetings of ranks 0 and 1 differ: number 0"),
        ("sum", "max", "collectives of ranks 0 and 1 differ: number 0"),
        ("axis tensor (0, 1)", "axis tensor (1, 0)", "differ: number 0"),
        ("axis tensor (0, 1)", "axis tensor (1, 3)", "missing on the other"),
    ],
    ids=["order", "reduction", "places", "group"],
)
def test_ranks_that_disagree_refuse(old: str, new: str, words: str) -> None:
    first, second = programs()[:2]
    agree(Contract.of(first, "cpu"), [Contract.of(second, "cpu")])
    with pytest.raises(VerificationError, match=words):
        agree(Contract.of(first, "cpu"), [Contract.of(changed(second, old, new), "cpu")])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("axis tensor (2, 3)", "axis pair (2, 3)", "has no mesh axis 'tensor'"),
        ("axis tensor (2, 3)", "axis tensor (3, 2)", "rank 2 has place 1 in"),
        ("axis tensor (2, 3)", "axis tensor (1, 2, 3)", "3 ranks of axis 'tensor' cannot hold"),
        ("axis tensor (2, 3)", "axis tensor (1, 3)", "the rank is not on its axis"),
        ("axis tensor (2, 3)", "axis tensor (2, 4)", "which are not distinct ranks"),
    ],
)
def test_verifier_knows_axes(old: str, new: str, words: str) -> None:
    program = programs()[2]
    verify_axes(program, program.stages[0])
    broken = changed(program, old, new)
    with pytest.raises(VerificationError, match=words):
        verify_axes(broken, broken.stages[0])


def test_generated_source_shows_the_collectives() -> None:
    assert "h = torch.ops.cutset.all_reduce.default(" in emit_python(programs()[0])
