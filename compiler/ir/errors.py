"""The errors a user of cutset can meet.

Every error says what went wrong (`cause`), where (`where`: a node, module path, file and line,
field of a file, rank or device) and what may legally be done about it (`ways_out`). `ValueError`
subclasses are the user's to fix; `assert` is for our own bugs.
"""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "ClusterError",
    "CutsetError",
    "InfeasibleError",
    "PlanFormatError",
    "RuntimeFailure",
    "UsageError",
    "VerificationError",
    "WaitTimeout",
    "WorkerLost",
]


class CutsetError(Exception):
    """Root of all errors raised on purpose by cutset.

    Args:
        cause: one sentence saying what is wrong, with the figures that show it.
        where: the place: node, module path, user source line, file and field, rank.
        ways_out: legal remedies, most useful first.
    """

    exit_code = 1

    def __init__(self, cause: str, *, where: str = "", ways_out: tuple[str, ...] = ()) -> None:
        self.cause = cause
        self.where = where
        self.ways_out = ways_out
        super().__init__(self.render())

    def render(self) -> str:
        """The message as shown to a person: cause, then place, then ways out, one a line."""
        lines = [self.cause]
        if self.where:
            lines.append(f"  at: {self.where}")
        if self.ways_out:
            lines.append("  legal ways out:")
            lines.extend(f"    - {way}" for way in self.ways_out)
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.cause, self.where, self.ways_out)


def _rebuild(
    kind: type[CutsetError], cause: str, where: str, ways_out: tuple[str, ...]
) -> CutsetError:
    return kind(cause, where=where, ways_out=ways_out)


class UsageError(CutsetError, ValueError):
    """The call or command line is malformed (bad argument, missing file, no example inputs)."""

    exit_code = 2


class CaptureError(CutsetError, ValueError):
    """The model cannot be turned into a graph, or the graph's gradients would be wrong."""

    exit_code = 2


class ClusterError(CutsetError, ValueError):
    """A cluster description is malformed or names an unknown device."""

    exit_code = 2


class PlanFormatError(CutsetError, ValueError):
    """A plan file is truncated, edited, of another version, or of another model or cluster."""

    exit_code = 2


class InfeasibleError(CutsetError):
    """No plan satisfies the constraints; the cause names one that fails and by how much."""


class VerificationError(CutsetError):
    """A graph, plan or program breaks a rule of its level and must not run."""


class RuntimeFailure(CutsetError):
    """The distributed run failed: a worker raised, died, or a wait timed out."""


class WorkerLost(RuntimeFailure):
    """A worker process ended before its work was done."""


class WaitTimeout(RuntimeFailure):
    """A wait exceeded its limit; the cause names what was waited for and from whom."""
