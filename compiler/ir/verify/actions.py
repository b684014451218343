"""Rules of one rank's instruction list on its own: registers and actions.

A register is defined once, by a computation, a `Recv`, or `Recv`s whose rectangles cover the rank's
part of the value, each element once. That is before it is read, and it is not read after `Free`;
what is defined is also read or freed. Every stage of the rank runs forward once per microbatch and,
when training, backward once: whole, or input half and then weight half, which may be in the parts
that the stage has, one after the other.
"""

from __future__ import annotations

from ..errors import VerificationError
from ..graph import Mode
from ..program import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Free,
    Program,
    Recv,
    Register,
    Send,
)
from .rectangles import Cover, is_inside
from .registers import Registers
from .report import fail_at

__all__ = ["verify_actions"]

_Compute = Forward | Backward | BackwardInput | BackwardWeight


def verify_actions(program: Program, registers: Registers) -> None:
    """Check every rule of the module docstring. Raises VerificationError."""
    _verify_registers(program, registers)
    _verify_complete(program)


def _verify_registers(program: Program, registers: Registers) -> None:
    defined: dict[Register, int] = {}
    freed: dict[Register, int] = {}
    read: set[Register] = set()
    covers: dict[Register, Cover] = {}
    for position, item in enumerate(program.instructions):
        needed = item.registers if isinstance(item, Free) else registers.reads(item)
        for register in needed:
            if register in freed:
                fail_at(
                    program,
                    position,
                    f"{register} is used after instruction {freed[register]} freed it",
                )
            if register not in defined:
                fail_at(program, position, f"{register} is used before it is defined")
            if register in covers and not covers[register].is_complete:
                told = f"{register} is used before all parts of it are received"
                fail_at(program, position, told)
            read.add(register)
        if isinstance(item, Free):
            freed.update(dict.fromkeys(item.registers, position))
            if len(set(item.registers)) < len(item.registers):
                fail_at(program, position, "a register is freed twice")
        if isinstance(item, (Send, Recv)):
            _verify_transfer(program, position, item, registers)
        made = (item.register,) if isinstance(item, Recv) else registers.defines(item)
        for register in made:
            if isinstance(item, Recv) and item.offset is not None:
                part = registers.part_of(program.rank, register)
                cover = covers.setdefault(register, Cover(part)) if part is not None else None
                if cover is None or not cover.add(item.offset, item.type):
                    told = f"this part of {register} is not in what the rank has, or twice there"
                    fail_at(program, position, told)
                defined.setdefault(register, position)
                continue
            if register in defined:
                fail_at(
                    program,
                    position,
                    f"{register} is defined again (first by instruction {defined[register]})",
                )
            defined[register] = position
    for register, position in defined.items():
        if register not in read:
            fail_at(program, position, f"{register} is defined but neither used nor freed")


def _verify_transfer(
    program: Program, position: int, item: Send | Recv, registers: Registers
) -> None:
    if item.peer == program.rank or item.peer not in range(program.num_ranks):
        fail_at(program, position, f"rank {item.peer} is not another rank of this run")
    expected = registers.type_of(program.rank, item.register)
    if expected is None:
        fail_at(program, position, f"no stage sends or receives %{item.register.value}")
    part = registers.part_of(program.rank, item.register)
    if part is None or item.offset is None:
        if item.type != expected or item.offset is not None or part is not None:
            fail_at(program, position, f"{item.register} is {expected}, not {item.type}")
    elif not is_inside(part, item.offset, item.type):
        told = f"it is {part.part} at {part.offset} of {part.whole}, which does not hold this"
        fail_at(program, position, f"of {item.register} the rank has a part: {told}")
    if item.register.microbatch not in range(program.num_microbatches):
        fail_at(program, position, f"there are {program.num_microbatches} microbatches")


def _verify_complete(program: Program) -> None:
    places: dict[_Compute, int] = {}
    own = {stage.index for stage in program.stages}
    for position, item in enumerate(program.instructions):
        if not isinstance(item, _Compute):
            continue
        if item.stage not in own:
            fail_at(program, position, f"rank {program.rank} does not hold stage {item.stage}")
        if item.microbatch not in range(program.num_microbatches):
            fail_at(program, position, f"there are {program.num_microbatches} microbatches")
        if program.mode is Mode.INFER and not isinstance(item, Forward):
            fail_at(program, position, "an inference program runs backward")
        if item in places:
            fail_at(program, position, f"instruction {places[item]} does the same")
        places[item] = position
    for stage in sorted(own):
        for microbatch in range(program.num_microbatches):
            _verify_action_order(program, places, stage, microbatch)


def _verify_action_order(
    program: Program, places: dict[_Compute, int], stage: int, microbatch: int
) -> None:
    order: list[_Compute] = [Forward(stage, microbatch)]
    here = f"program {program.rank}"
    if program.mode is Mode.TRAIN:
        whole = Backward(stage, microbatch)
        halves: list[_Compute] = [BackwardInput(stage, microbatch)]
        halves += _weights(program, places, stage, microbatch)
        if whole not in places:
            order += halves
        elif any(half in places for half in halves):
            raise VerificationError(
                f"stage {stage} runs backward of microbatch {microbatch} whole and in halves",
                where=here,
            )
        else:
            order.append(whole)
    for item in order:
        if item not in places:
            raise VerificationError(
                f"{_name(item)} of stage {stage} on microbatch {microbatch} is missing", where=here
            )
    for first, second in zip(order, order[1:], strict=False):
        if places[second] < places[first]:
            fail_at(program, places[second], f"it comes before its {_name(first)}")


def _weights(
    program: Program, places: dict[_Compute, int], stage: int, microbatch: int
) -> list[BackwardWeight]:
    """The weight half: whole, or in parts if there is one of them."""
    whole = BackwardWeight(stage, microbatch)
    found = [
        item
        for item in places
        if isinstance(item, BackwardWeight)
        and (item.stage, item.microbatch) == (stage, microbatch)
        and item.part is not None
    ]
    if not found:
        return [whole]
    parts = range(len(program.stage(stage).parts))
    for item in found:
        if item.part not in parts:
            fail_at(program, places[item], f"stage {stage} has {len(parts)} parts")
    if whole in places:
        fail_at(program, places[whole], f"instruction {places[found[0]]} does a part of it")
    return [BackwardWeight(stage, microbatch, part) for part in parts]


def _name(item: _Compute) -> str:
    part = item.part if isinstance(item, BackwardWeight) else None
    return type(item).__name__ if part is None else f"{type(item).__name__} part {part}"
