"""The command line: `cutset VERB ...`, also `python -m cutset`.

Each verb is a module of this package with a `COMMAND`. Results go to stdout (with `--json` as one
JSON value and nothing else), progress and messages to stderr. Exit codes: 0 success, 1 infeasible
or failed, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

from .main import main

__all__ = ["main"]
