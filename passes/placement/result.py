"""What a solver of operator placement returns: a placement, its value and a proven bound."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PlacementResult"]


@dataclass(frozen=True, slots=True)
class PlacementResult:
    """A placement with its certificate.

    Args:
        placement: device of every operator, by the operator's position in the workload.
        value: the objective, computed in floating point on the original graph; the workload's unit.
        lower_bound: no placement of the same problem has a smaller value.
        seconds: wall time that the search took.
        method: what found the placement and what proved the bound, in words.
    """

    placement: tuple[int, ...]
    value: float
    lower_bound: float
    seconds: float
    method: str

    @property
    def gap(self) -> float:
        """How far the value can be above the optimum, relative to the value; 0 when it is 0."""
        return (self.value - self.lower_bound) / self.value if self.value else 0.0
