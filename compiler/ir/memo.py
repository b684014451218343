"""Answers about immutable objects, found once for each.

Graphs and clusters are large: to look one up by its contents takes as long as many a question about
it. So answers are kept by identity, for as long as the object lives.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TypeVar

__all__ = ["once_per_object"]

_Object = TypeVar("_Object")
_Answer = TypeVar("_Answer")


def once_per_object(function: Callable[[_Object], _Answer]) -> Callable[[_Object], _Answer]:
    """`function` of one immutable object, computed once while that object lives.

    The answer is shared by all callers, so none may change it.
    """
    answers: dict[int, tuple[weakref.ref[_Object], _Answer]] = {}

    @functools.wraps(function)
    def answer(item: _Object) -> _Answer:
        key = id(item)
        known = answers.get(key)
        if known is None:
            reference = weakref.ref(item, lambda _: answers.pop(key, None))
            known = answers[key] = reference, function(item)
        return known[1]

    return answer
