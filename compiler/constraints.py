"""What the user pins, as written: `{"model.layers.0": 0, "*.down_proj.weight": "tensor=S(1)"}`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..passes.context import LayoutPin
from .ir.errors import UsageError
from .ir.mesh import Layout, Partial

__all__ = ["layout_pins", "stage_pins", "together_groups"]

_FORMS = (
    "a stage, as an int: the modules that match are in it",
    "a layout over the tensor axis, as 'tensor=S(0)' or 'tensor=R': parameters that match lie so",
)


def stage_pins(constraints: Mapping[str, int | str] | None) -> tuple[tuple[str, int], ...]:
    """The (module path pattern, stage) pairs of `constraints`."""
    table = sorted((constraints or {}).items())
    return tuple((pattern, value) for pattern, value in table if isinstance(value, int))


def layout_pins(constraints: Mapping[str, int | str] | None) -> tuple[LayoutPin, ...]:
    """The pinned layouts of `constraints`.

    Raises:
        UsageError: a value is neither a stage nor a layout.
    """
    table = sorted((constraints or {}).items())
    return tuple(_pin(pattern, value) for pattern, value in table if not isinstance(value, int))


def _pin(pattern: str, value: object) -> LayoutPin:
    axis, _, text = value.partition("=") if isinstance(value, str) else ("", "", "")
    try:
        placements = Layout.parse(f"[{text}]").placements
    except ValueError:
        placements = ()
    if not axis or len(placements) != 1 or isinstance(placements[0], Partial):
        raise UsageError(
            f"{value!r} is neither a stage nor a layout of parameters",
            where=f"constraints: {pattern!r}",
            ways_out=_FORMS,
        )
    return LayoutPin(pattern, axis, placements[0])


def together_groups(together: Iterable[Iterable[str]] | None) -> tuple[tuple[str, ...], ...]:
    """Groups of patterns.

    Raises:
        UsageError: a group is a string, or has fewer than two patterns.
    """
    groups = []
    for group in together or ():
        patterns = () if isinstance(group, str) else tuple(group)
        if len(patterns) < 2 or not all(isinstance(item, str) for item in patterns):
            raise UsageError(
                f"{group!r} is no group of modules to keep together",
                where="together",
                ways_out=('write e.g. together=[("blocks.0", "blocks.1")]',),
            )
        groups.append(patterns)
    return tuple(groups)
