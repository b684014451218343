"""Keeps torch's own log of a failing trace off the screen: the error that is raised says it all."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["without_trace_log"]

_LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


@contextlib.contextmanager
def without_trace_log() -> Iterator[None]:
    """While active, torch logs no tracebacks of operators that fail on fake tensors."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
