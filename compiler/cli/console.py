"""Where the command line writes: results to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import StringIO
from typing import TextIO

from ..ir.errors import CutsetError, UsageError

__all__ = ["Console"]


@dataclass(slots=True)
class Console:
    """Output of one command.

    Args:
        json_wanted: results are one JSON value instead of text.
        out, err: streams; by default those of the process now, or nowhere if it has none.
        quiet: write nothing but errors to stderr (a rank of a torchrun job, other than the first).
    """

    json_wanted: bool
    out: TextIO = field(default_factory=lambda: sys.stdout or StringIO())
    err: TextIO = field(default_factory=lambda: sys.stderr or StringIO())
    quiet: bool = False
    started: float = field(default_factory=time.monotonic)
    _warned: set[str] = field(default_factory=set)

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
        self._write_always(self.err, f"cutset: {error.render()}\n")
        if self.json_wanted:
            data = {
                "kind": type(error).__name__,
                "cause": error.cause,
                "where": error.where,
                "ways_out": list(error.ways_out),
            }
            with contextlib.suppress(UsageError):  # that it cannot be written has been said
                self._write(self.out, json.dumps({"error": data}, indent=2) + "\n")

    def note(self, line: str) -> None:
        """A message that is not progress."""
        self._write(self.err, f"cutset: {line}\n")

    @contextlib.contextmanager
    def catching_warnings(self) -> Iterator[None]:
        """What Python warns of while the block runs, this or that library's warnings among it, is
        said like all that the command says, and once."""
        with warnings.catch_warnings():
            warnings.showwarning = self._show_warning
            yield

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        if text not in self._warned:
            self._warned.add(text)
            self.note(f"warning: {text}")

    def _write(self, stream: TextIO, text: str) -> None:
        if not self.quiet:
            self._write_always(stream, text)

    def _write_always(self, stream: TextIO, text: str) -> None:
        encoding = stream.encoding or "utf-8"
        try:
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()
        except BrokenPipeError:  # whoever reads has read enough
            _give_up(stream)
            raise
        except OSError as error:
            _give_up(stream)
            if stream is self.out:
                raise UsageError(
                    f"the result cannot be written: {error.strerror or error}",
                    where="standard output",
                    ways_out=("free space, or send it elsewhere",),
                ) from error


def _give_up(stream: TextIO) -> None:
    """Let what `stream` still holds go nowhere, or Python tries it again when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
