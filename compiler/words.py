"""Figures as a person reads them."""

from __future__ import annotations

__all__ = ["bytes_text", "count_text", "plural", "seconds_text"]


def plural(count: int, noun: str, ending: str = "s") -> str:
    """`3 stages`, `1 stage`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{ending}"


def count_text(number: int) -> str:
    """`1.25 M`."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)


def bytes_text(number: int) -> str:
    """`5.0 MiB`."""
    for factor, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} B"


def seconds_text(number: float) -> str:
    """`12.5 ms`."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.3g} s"
