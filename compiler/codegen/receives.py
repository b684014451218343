"""Post receives early enough that no order of transfers can block.

From programs whose receives are posted one action ahead, to programs that reach their end even if
every `Send` blocked until its `Recv` is posted. A value that skips stages arrives before its
consumer's next action is due; two ranks may then each wait for the other to post a receive.

The programs are executed by turns under blocking sends. Whenever no rank can go on, a receive that
a blocked send waits for is moved up to where its rank stands, along with those of the same
sender before it (between two ranks, transfers keep their order). This only makes registers live
earlier, and ends, as every move lets a send complete.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.program import AllReduce, Free, Instruction, Program, Recv, Register, Send
from ..ir.verify.registers import Registers

__all__ = ["post_receives_early"]


def post_receives_early(programs: tuple[Program, ...]) -> tuple[Program, ...]:
    """The programs with receives moved up where blocking sends would deadlock, else unchanged.

    A deadlock that no earlier receive can break is left for the verifier to report.
    """
    run = _BlockingRun(programs)
    run.advance()
    while run.unblock():
        run.advance()
    return tuple(
        replace(program, instructions=tuple(instructions))
        for program, instructions in zip(programs, run.instructions, strict=True)
    )


class _BlockingRun:
    """Execution by turns; transfers are keyed by (source, target, register)."""

    def __init__(self, programs: tuple[Program, ...]) -> None:
        self.instructions: list[list[Instruction]] = [list(p.instructions) for p in programs]
        self.done = [0] * len(programs)
        self.posted: set[tuple[int, int, Register]] = set()
        self.reached: set[tuple[int, int, Register]] = set()
        self.sources: dict[tuple[int, Register], int] = {}  # (target, register) -> source
        self.arrived: dict[AllReduce, set[int]] = {}
        self.registers = Registers(programs)

    def advance(self) -> None:
        """Run every rank as far as it goes."""
        progress = True
        while progress:
            progress = False
            for rank, instructions in enumerate(self.instructions):
                while self.done[rank] < len(instructions) and self.passes(rank):
                    self.done[rank] += 1
                    progress = True

    def passes(self, rank: int) -> bool:
        """Whether `rank` completes its next instruction now."""
        item = self.instructions[rank][self.done[rank]]
        if isinstance(item, Recv):
            self.posted.add((item.peer, rank, item.register))
            self.sources[rank, item.register] = item.peer
            return True
        if isinstance(item, AllReduce):
            here = self.arrived.setdefault(item, set())
            here.add(rank)
            return here.issuperset(item.ranks)
        read = item.registers if isinstance(item, Free) else self.registers.reads(item)
        for register in read:
            source = self.sources.get((rank, register))
            if source is not None and (source, rank, register) not in self.reached:
                return False
        if isinstance(item, Send):
            self.reached.add((rank, item.peer, item.register))
            return (rank, item.peer, item.register) in self.posted
        return True

    def unblock(self) -> bool:
        """Move up the receive that the first blocked send waits for; False if there is none."""
        for rank, instructions in enumerate(self.instructions):
            if self.done[rank] == len(instructions):
                continue
            item = instructions[self.done[rank]]
            if isinstance(item, Send) and self.move_up(item, rank):
                return True
        return False

    def move_up(self, send: Send, source: int) -> bool:
        target = self.instructions[send.peer]
        here = self.done[send.peer]
        moved: list[Instruction] = []
        for position in range(here, len(target)):
            item = target[position]
            if isinstance(item, Recv) and item.peer == source:
                moved.append(item)
                if item.register == send.register:
                    rest = [entry for entry in target[here : position + 1] if entry not in moved]
                    target[here : position + 1] = [*moved, *rest]
                    return True
        return False
