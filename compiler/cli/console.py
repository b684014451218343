"""Where the command line writes: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

from ..ir.errors import CutsetError

__all__ = ["Console"]


@dataclass(slots=True)
class Console:
    """Output of one command.

    Args:
        json_wanted: results are one JSON value instead of text.
        out, err: streams, those of the process when the console was made.
        quiet: write nothing but errors to stderr (a rank of a torchrun job, other than the first).
    """

    json_wanted: bool
    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)
    quiet: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Time since the command started."""
        return time.monotonic() - self.started

    def progress(self, line: str) -> None:
        """One line on what is being done now."""
        self._write(self.err, f"[{self.seconds:6.1f} s] {line}\n")

    def result(self, data: object, text: str) -> None:
        """What the command was asked for: `data` as JSON, or `text`."""
        if self.json_wanted:
            text = json.dumps(data, indent=2, allow_nan=False)
        self._write(self.out, text.rstrip("\n") + "\n")

    def error(self, error: CutsetError) -> None:
        """A failure: the message on stderr, and as JSON on stdout where that is wanted."""
        self.err.write(f"cutset: {error.render()}\n")
        if self.json_wanted:
            data = {
                "kind": type(error).__name__,
                "cause": error.cause,
                "where": error.where,
                "ways_out": list(error.ways_out),
            }
            self._write(self.out, json.dumps({"error": data}, indent=2) + "\n")

    def note(self, line: str) -> None:
        """A message that is not progress."""
        self._write(self.err, f"cutset: {line}\n")

    def _write(self, stream: TextIO, text: str) -> None:
        if not self.quiet:
            stream.write(text)
            stream.flush()
