"""Receives are posted early enough for sends that block."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cutset.compiler.codegen.receives import post_receives_early
from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.program import Instruction, Program, Recv
from cutset.compiler.ir.verify import verify_programs
from cutset.compiler.ir.verify.registers import Registers
from tests.ir.pipelines import make_programs


def with_late_receives(program: Program, registers: Registers) -> Program:
    """Each receive moved down to just before its register is read."""
    receives = {item.register: item for item in program.instructions if isinstance(item, Recv)}
    kept: list[Instruction] = []
    for item in program.instructions:
        if not isinstance(item, Recv):
            needed = [register for register in registers.reads(item) if register in receives]
            kept += [*(receives.pop(register) for register in needed), item]
    return replace(program, instructions=tuple(kept))


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("num_stages", [2, 3, 4, 6])
def test_skips_across_stages_do_not_deadlock(num_stages: int, split: bool) -> None:
    verify_programs(make_programs(num_stages, 8, split=split))


def test_a_deadlock_is_broken_by_moving_receives_only() -> None:
    programs = make_programs(2, 4)
    late = tuple(with_late_receives(program, Registers(programs)) for program in programs)
    with pytest.raises(VerificationError, match="deadlock"):
        verify_programs(late)
    early = post_receives_early(late)
    verify_programs(early)
    for before, after in zip(late, early, strict=True):
        assert sorted(map(str, before.instructions)) == sorted(map(str, after.instructions))


def test_programs_that_cannot_block_are_left_alone() -> None:
    programs = make_programs(3, 4)
    assert post_receives_early(programs) == programs
