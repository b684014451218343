"""Which ranks hold today's value of each parameter and buffer.

Every kind of call has programs of its own, which may need a tensor on other ranks than those of
another kind. What a training step changes is today's on the ranks of its programs only: a copy
elsewhere grows stale and is sent again before it is next read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .ir.graph import OutputKind, ValueKind
from .ir.program import Program

__all__ = ["Needs", "Placement"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a set of programs reads and changes.

    Args:
        held: per rank, names of the parameters and buffers that it reads or changes.
        trained: per rank, names of the parameters that it trains.
        changed: what a training step changes, with the ranks that then have it.
    """

    held: tuple[tuple[str, ...], ...]
    trained: tuple[tuple[str, ...], ...]
    changed: tuple[tuple[str, tuple[int, ...]], ...]

    @staticmethod
    def of(programs: Sequence[Program]) -> Needs:
        """Needs of the programs of all ranks, in rank order."""
        held: list[set[str]] = [set() for _ in programs]
        trained: list[set[str]] = [set() for _ in programs]
        changed: set[str] = set()
        for program in programs:
            for stage in program.stages:
                for value in stage.graph.values:
                    if value.kind in (ValueKind.PARAMETER, ValueKind.BUFFER):
                        held[program.rank].add(value.origin)
                    if value.kind is ValueKind.PARAMETER and value.requires_grad:
                        trained[program.rank].add(value.origin)
                changed.update(o.target for o in stage.graph.outputs_of(OutputKind.BUFFER))
        changed.update(*trained)
        ranks = {
            name: tuple(r for r, names in enumerate(held) if name in names) for name in changed
        }
        return Needs(_sorted(held), _sorted(trained), tuple(sorted(ranks.items())))


def _sorted(table: Iterable[set[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(sorted(names)) for names in table)


class Placement:
    """The ranks that have today's value, by name."""

    def __init__(self) -> None:
        self._ranks: dict[str, tuple[int, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._ranks)

    def __contains__(self, name: str) -> bool:
        return name in self._ranks

    @property
    def names(self) -> list[str]:
        """All that is held anywhere, sorted."""
        return sorted(self._ranks)

    def ranks(self, name: str) -> tuple[int, ...]:
        """Ranks that have today's value; none if it was never sent."""
        return self._ranks.get(name, ())

    def missing(self, needed: Sequence[Sequence[str]]) -> list[list[str]]:
        """Per rank, which of the names it needs it lacks today's value of."""
        return [
            [name for name in names if rank not in self.ranks(name)]
            for rank, names in enumerate(needed)
        ]

    def add(self, sent: Sequence[Sequence[str]]) -> None:
        """Each rank was sent these."""
        for rank, names in enumerate(sent):
            for name in names:
                self._ranks[name] = tuple(sorted({*self.ranks(name), rank}))

    def change(self, changed: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """These have new values, on these ranks only."""
        self._ranks.update(changed)
