"""Where in the user's code something happened, and what may be done about a failed capture."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from ..ir.errors import CaptureError

__all__ = [
    "called_by_capture",
    "current_place",
    "explain_broken_call",
    "explain_failure",
    "is_internal",
    "last_user_line",
]

_TORCH, _CAPTURE = str(Path(torch.__file__).parent), str(Path(__file__).parent)
_INTERNAL = (_TORCH, _CAPTURE)
_LINE = re.compile(r'File "([^"]+)", line (\d+)')


def is_internal(file: str) -> bool:
    """Whether code in `file` is torch's or that of capture, not the user's."""
    return file.startswith(_INTERNAL)


def last_user_line(stack_trace: str | None) -> str:
    """`file.py:123` of the innermost frame in a stack trace that is not torch's, or empty."""
    places = _LINE.findall(stack_trace or "")
    for file, line in reversed(places):
        if not is_internal(file):
            return f"{Path(file).name}:{line}"
    return ""


def current_place(model: nn.Module) -> str:
    """Module path and line of the user's code that is running now."""
    return _place(model, _outwards(sys._getframe(1)))


def called_by_capture(own_file: str) -> bool:
    """Whether code of capture called the torch function that is running, seen from `own_file`."""
    for frame, _ in _outwards(sys._getframe(1)):
        file = frame.f_code.co_filename
        if file != own_file and not file.startswith(_TORCH):
            return file.startswith(_CAPTURE)
    return False


def _outwards(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _place(model: nn.Module, frames: Iterator[tuple[FrameType, int]]) -> str:
    """Of the innermost user frame, and of the innermost module that was running."""
    paths = {id(module): path for path, module in model.named_modules()}
    line = ""
    for frame, number in frames:
        file = frame.f_code.co_filename
        if not line and not file.startswith(_INTERNAL) and not file.startswith("<"):
            line = f"{Path(file).name}:{number} in {frame.f_code.co_name}"
        owner = frame.f_locals.get("self")
        if id(owner) in paths:
            path = paths[id(owner)] or "(the model)"
            return f"module {path} ({type(owner).__name__}), {line or 'line unknown'}"
    return line or "the model"


def explain_failure(model: nn.Module, refusal: Exception, fallback: Exception) -> CaptureError:
    """The error for a model that neither torch.export nor symbolic tracing gets through."""
    place = _place(model, reversed(list(traceback.walk_tb(refusal.__traceback__))))
    summary = _first_line(refusal)
    return CaptureError(
        f"torch.export cannot trace {type(model).__name__}: {summary} "
        f"(symbolic tracing fails too: {_first_line(fallback)})",
        where=place,
        ways_out=_ways_out(f"{type(refusal).__name__} {refusal}", place),
    )


def explain_broken_call(model: nn.Module, error: Exception) -> CaptureError:
    """The error for a model that raises when it is called on the example inputs as it is."""
    frames = reversed(list(traceback.walk_tb(error.__traceback__)))
    return CaptureError(
        f"{type(model).__name__} itself fails on the example inputs: {_first_line(error)}",
        where=_place(model, frames),
        ways_out=("pass example inputs that the model accepts",),
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def _ways_out(message: str, place: str) -> tuple[str, ...]:
    experts = "expert" in place.lower() or "moe" in place.lower()
    ways: list[str] = []
    if experts:
        ways.append(
            "a loop over experts depends on the data: use grouped_mm or batched_mm experts "
            '(transformers: config._experts_implementation = "grouped_mm" or "batched_mm")'
        )
    if re.search(r"data.?dependent|unbacked|DynamicOutputShape|GuardOn|\.item\(\)", message, re.I):
        ways.append(
            "the control flow or a shape depends on tensor values: use torch.where, masks or "
            "torch.cond in place of Python branches, nonzero and boolean indexing"
        )
    ways.append("move this code out of the model, and pass its result as an input")
    return tuple(ways)
