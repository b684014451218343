"""What follows the last action of a training step on each rank.

Sum the gradients of parameters whose terms lie on several ranks, then (if asked for) the global
gradient norm and clipping, then the optimizer step. Parameters come in the order of their names on
all ranks, so that no two ranks wait for each other in different collectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..ir.program import (
    GRADIENT_NORM,
    AllReduce,
    ClipGradients,
    GradientNorm,
    Instruction,
    OptimizerStep,
)
from .columns import Copies

__all__ = ["Tail"]


@dataclass(frozen=True, slots=True)
class Tail:
    """Makes the tails of all ranks.

    Args:
        copies: of every trained parameter, in the order of names.
        ranks: that take part in the norm: all that have a stage.
        clip: largest global norm of the gradients; None: not clipped.
    """

    copies: Mapping[str, Copies]
    ranks: tuple[int, ...]
    clip: float | None

    def terms(self, rank: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """`Program.gradient_terms` of `rank`."""
        return tuple(
            (name, copies.terms[rank])
            for name, copies in self.copies.items()
            if len(copies.terms.get(rank, ())) > 1
        )

    def instructions(self, rank: int) -> Iterator[Instruction]:
        """The tail of a rank that has a stage."""
        for name, ranks in self.terms(rank):
            yield AllReduce(name, ranks)
        if self.clip is not None:
            owned = (name for name, copies in self.copies.items() if rank in copies.owners)
            yield GradientNorm(tuple(owned))
            if len(self.ranks) > 1:
                yield AllReduce(GRADIENT_NORM, self.ranks)
            yield ClipGradients(self.clip)
        yield OptimizerStep()
