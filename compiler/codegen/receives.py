"""Post receives early enough that no order of transfers can block.

From programs whose receives are posted one action ahead, to programs that reach their end even if
every `Send` blocked until its `Recv` is posted. A value that skips stages arrives before its
consumer's next action is due; two ranks may then each wait for the other to post a receive.

The programs are executed by turns under blocking sends; collectives are left out, as ranks start
them without waiting and need no result of theirs before their last transfer. Whenever no rank can
go on, a receive that a blocked send waits for is moved up to where its rank stands, along with
those of the same sender before it (between two ranks, transfers keep their order). This only makes
registers live earlier, and ends, as every move lets a send complete.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from ..ir.program import Free, Instruction, Program, Recv, Register, Send
from ..ir.verify.registers import Registers

__all__ = ["post_receives_early"]


def post_receives_early(programs: tuple[Program, ...]) -> tuple[Program, ...]:
    """The programs with receives moved up where blocking sends would deadlock, else unchanged.

    A deadlock that no earlier receive can break is left for the verifier to report.
    """
    run = _BlockingRun(programs)
    run.advance(range(len(programs)))
    while (rank := run.unblock()) is not None:
        run.advance([rank])
    return tuple(
        replace(program, instructions=tuple(instructions))
        for program, instructions in zip(programs, run.instructions, strict=True)
    )


class _BlockingRun:
    """Execution by turns. An event is `(Send | Recv, source, target, register)`: a send was
    reached or a receive posted."""

    def __init__(self, programs: tuple[Program, ...]) -> None:
        self.instructions: list[list[Instruction]] = [list(p.instructions) for p in programs]
        self.done = [0] * len(programs)
        self.happened: set[Hashable] = set()
        self.waiting: dict[Hashable, list[int]] = {}  # event -> ranks to try again after it
        self.ready: list[int] = []
        self.sources: dict[tuple[int, Register], list[int]] = {}  # by (target, register)
        self.registers = Registers(programs)

    def advance(self, ranks: range | list[int]) -> None:
        """Run `ranks`, and those that wait for them, as far as they go."""
        self.ready.extend(ranks)
        while self.ready:
            rank = self.ready.pop()
            instructions = self.instructions[rank]
            while self.done[rank] < len(instructions):
                missing = self.start(rank, instructions[self.done[rank]])
                if missing is not None:
                    self.waiting.setdefault(missing, []).append(rank)
                    break
                self.done[rank] += 1

    def start(self, rank: int, item: Instruction) -> Hashable | None:
        """Begin `item`; the event that must happen before it ends, None if it ends at once."""
        if isinstance(item, Recv):
            self.sources.setdefault((rank, item.register), []).append(item.peer)
            self.happen((Recv, item.peer, rank, item.register))
            return None
        read = item.registers if isinstance(item, Free) else self.registers.reads(item)
        for register in read:
            for source in self.sources.get((rank, register), ()):
                sent = (Send, source, rank, register)
                if sent not in self.happened:
                    return sent
        if isinstance(item, Send):
            self.happen((Send, rank, item.peer, item.register))
            posted = (Recv, rank, item.peer, item.register)
            return None if posted in self.happened else posted
        return None

    def happen(self, event: Hashable) -> None:
        if event not in self.happened:
            self.happened.add(event)
            self.ready += self.waiting.pop(event, [])

    def unblock(self) -> int | None:
        """Move up the receive that a blocked send waits for; the rank that receives, if any."""
        for rank, instructions in enumerate(self.instructions):
            if self.done[rank] < len(instructions):
                item = instructions[self.done[rank]]
                if isinstance(item, Send) and self.move_up(item, rank):
                    return item.peer
        return None

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
