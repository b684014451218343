"""Answers about immutable objects, found once for each.

Graphs and clusters are large: to look one up by its contents takes as long as many a question about
it. So answers are kept by identity, for as long as the object lives.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

__all__ = ["once_per_object"]

_Object = TypeVar("_Object")
_Rest = ParamSpec("_Rest")
_Answer = TypeVar("_Answer")


def once_per_object(
    function: Callable[Concatenate[_Object, _Rest], _Answer],
) -> Callable[Concatenate[_Object, _Rest], _Answer]:
    """`function` of an immutable object, computed once while that object lives.

    Further arguments must be hashable. The answer is shared by all callers, so none may change it.
    """
    answers: dict[int, tuple[weakref.ref[_Object], dict[object, _Answer]]] = {}

    @functools.wraps(function)
    def answer(item: _Object, /, *args: _Rest.args, **named: _Rest.kwargs) -> _Answer:
        key = id(item)
        if key not in answers:
            answers[key] = weakref.ref(item, lambda _: answers.pop(key, None)), {}
        known = answers[key][1]
        rest = (args, tuple(named.items())) if args or named else None
        if rest not in known:
            known[rest] = function(item, *args, **named)
        return known[rest]

    return answer
