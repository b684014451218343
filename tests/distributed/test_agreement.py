"""What ranks of real processes agree on before the first step."""

from __future__ import annotations

import pytest
import torch

from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.graph import Mode
from cutset.compiler.ir.program import AllReduce, Instruction, Program, Recv, Register, Send
from cutset.compiler.ir.types import TensorType

from .conftest import WorkerPool

FAKE = "tests.distributed.fakes:FakeRank"
HIDDEN = TensorType((2, 4), torch.float32)


def program(rank: int, *instructions: Instruction, plan_hash: str = "abc") -> Program:
    return Program(
        rank=rank,
        num_ranks=3,
        mode=Mode.TRAIN,
        num_microbatches=1,
        stages=(),
        stage_ranks=(0, 1, 2),
        instructions=instructions,
        plan_hash=plan_hash,
        memory_limit_bytes=0,
    )


def test_programs_that_agree_can_reduce_over_subsets(pool: WorkerPool) -> None:
    tied = AllReduce(("wte.weight",), (0, 2))
    programs = [program(0, tied), program(1), program(2, tied)]
    arguments = [{"program": item, "ranks": (0, 2)} for item in programs]
    session = pool.session(3, FAKE)
    assert session.call("subset", arguments) == [4.0, 2.0, 4.0]
    assert session.call("subset", arguments) == [4.0, 2.0, 4.0]  # the group is there already


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (program(2, plan_hash="xyz"), "rank 0 runs plan abc, rank 2 runs plan xyz"),
        (
            program(2, Recv(Register("h", 0), 0, 5, TensorType((2, 5), torch.float32))),
            r"rank 0 sends %h@0 f32\[2,4\] to rank 2, which expects %h@0 f32\[2,5\]",
        ),
        (program(2), r"rank 0 sends %h@0 f32\[2,4\] to rank 2, which expects nothing"),
    ],
    ids=["plan", "shape", "missing"],
)
def test_programs_that_contradict_each_other(pool: WorkerPool, last: Program, words: str) -> None:
    first = program(0, Send(Register("h", 0), 2, 5, HIDDEN))
    session = pool.session(3, FAKE)
    with pytest.raises(VerificationError, match=words):
        session.call("prepare", [{"program": item} for item in (first, program(1), last)])
