"""Closes the gap from both sides by asking for placements below the best value.

A placement is the next value to beat, by twice as much as the one before; that there is none is a
bound. Where there is no answer in time, the smallest improvement is asked for, and then weaker
bounds, as they are easier to prove.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar

from .incumbent import Incumbent

__all__ = ["Answer", "SMALLEST_STEP", "descend"]

SMALLEST_STEP = 1e-6  # relative; proofs do not try to tell closer values apart
_LARGEST_AIM = 0.5
_WEAKER = 3.0
_BOLDER = 2.0  # times the aim after a success
_BOLD_SHARE = 0.15  # of the time left, for an aim that is larger than it need be

Found = TypeVar("Found")


class Answer(Generic[Found]):
    """A placement below a limit (`found`), or that there is none, or neither in time."""

    def __init__(self, found: Found | None, *, none_exists: bool) -> None:
        self.found, self.none_exists = found, none_exists


def descend(
    best: Incumbent,
    ask: Callable[[float, float], Answer[Found]],
    take: Callable[[Found], bool],
    *,
    method: str,
    first_aim: float,
    share: float,
    share_each: float,
    enough: float = math.inf,
) -> None:
    """Ask, and take what is found, until the gap is closed or a share of the time is over.

    Args:
        best: bounds are given to it.
        ask: from a limit and seconds to the answer.
        take: is given a placement; whether it is better.
        method: what proves, in words.
        first_aim: relative improvement to ask for first; the allowed gap if that is larger.
        share: of the time limit, after which nothing is asked.
        share_each: of the time left until then, for one answer.
        enough: a bound at which to stop, too.
    """
    step = max(0.9 * best.gap, SMALLEST_STEP)
    aim = first = max(step, first_aim)
    unanswered, bold = 0.0, False
    while not best.done and best.left(share) > 0.02 and best.value > 0:
        if best.bound >= enough:
            break
        room = 1 - best.bound / best.value
        if room <= step:
            break
        if aim >= room:
            aim = max(step, room / 2)
        if aim <= unanswered or aim > _LARGEST_AIM:
            break
        limit = best.value * (1 - aim)
        each = min(share_each, _BOLD_SHARE) if bold else share_each
        answer = ask(limit, best.left(share) * each)
        if answer.none_exists:
            best.prove(limit, method)
            if aim <= step:
                break
            aim, bold = max(step, aim / 2), False
        elif answer.found is not None:
            if not take(answer.found):
                break
            aim, unanswered, bold = min(_BOLDER * aim, _LARGEST_AIM), 0.0, True
        elif bold:
            aim, bold = first, False
        else:
            unanswered = aim
            aim *= _WEAKER
