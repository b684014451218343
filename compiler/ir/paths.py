"""Patterns of module paths, as users name modules by."""

from __future__ import annotations

import fnmatch

__all__ = ["matches"]


def matches(pattern: str, path: str) -> bool:
    """Whether a module path, or one of the modules around it, matches `pattern`."""
    parts = path.split(".")
    return any(
        fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1)
    )
