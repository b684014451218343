"""Arithmetic of counts, for all who split a batch or a number of devices."""

from __future__ import annotations

__all__ = ["divisors"]


def divisors(number: int) -> tuple[int, ...]:
    """Divisors of `number`, ascending."""
    return tuple(d for d in range(1, number + 1) if number % d == 0)
