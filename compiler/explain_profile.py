"""What measuring changed, in words and as data."""

from __future__ import annotations

from dataclasses import asdict

from .ir.plan import Plan, ProfiledBlock, ProfileReport
from .words import plural, seconds_text

__all__ = ["profile_json", "profile_text"]

_MOST_BLOCKS = 16
_PATH = 24


def profile_json(plan: Plan) -> dict[str, object] | None:
    """The report as plain data; None if nothing was measured."""
    if plan.profile is None:
        return None
    first = plan.profile.first
    return {**asdict(plan.profile), "first": {**asdict(first), "mesh": str(first.mesh)}}


def profile_text(plan: Plan) -> str:
    """The parts that were measured, the plan before and after; empty if nothing was measured."""
    report = plan.profile
    if report is None:
        return ""
    noun = "block" if report.kind == "blocks" else "operator"
    lines = [
        f"measured        {plural(report.num_measured, noun)} in {seconds_text(report.seconds)}, "
        f"{report.num_known} known before; planned again {plural(report.rounds, 'time')}",
        f"                {report.ended}",
        *(_change(plan, report)),
        f"  {noun:<{_PATH}} {'times':>5}  {'predicted (forward + backward)':<30}  measured",
    ]
    shown = sorted(report.blocks, key=lambda block: -block.count * sum(block.measured))
    lines += [_line(block) for block in shown[:_MOST_BLOCKS]]
    if len(shown) > _MOST_BLOCKS:
        lines.append(f"  ... and {len(shown) - _MOST_BLOCKS} more, which take less")
    return "\n".join(lines)


def _change(plan: Plan, report: ProfileReport) -> tuple[str, str]:
    first = report.first
    assert plan.prediction is not None
    now = seconds_text(plan.prediction.step_seconds)
    before = (
        f"  before: {_way(str(first.mesh), first.num_microbatches)}, predicted "
        f"{seconds_text(first.step_seconds)} a step by rates, "
        f"{seconds_text(report.first_seconds)} by what was measured"
    )
    changed = f"changed: {', '.join(report.changed)}" if report.changed else "the same plan"
    return before, f"  now: {_way(str(plan.mesh), plan.num_microbatches)}, {now} a step; {changed}"


def _way(mesh: str, count: int) -> str:
    return f"{mesh or 'one device'} with {plural(count, 'microbatch', 'es')}"


def _line(block: ProfiledBlock) -> str:
    path = block.path or "of no module"
    path = path if len(path) <= _PATH else f"...{path[3 - _PATH :]}"
    predicted = sum(block.predicted)
    times = f"  ({sum(block.measured) / predicted:.2f} times)" if predicted else ""
    return (
        f"  {path:<{_PATH}} {block.count:>5}  {_phases(block.predicted):<30}  "
        f"{_phases(block.measured)}{times}"
    )


def _phases(seconds: tuple[float, float, float]) -> str:
    return f"{seconds_text(seconds[0])} + {seconds_text(seconds[1] + seconds[2])}"
