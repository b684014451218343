"""What a calibration says: figures, how well they fit, and the cluster file that holds both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..cost_models.cluster_text import render_cluster
from ..cost_models.fits import Quality
from .calibrate import Calibration
from .ir.cluster import COLLECTIVES, Cluster, DeviceType, LinkRule
from .words import seconds_text

__all__ = ["calibration_file", "figure_lines", "quality_lines"]

_GIGA = 1e9


def calibration_file(found: Calibration, *, format: str = "toml") -> str:
    """The cluster file, which is valid without its comments (JSON has none)."""
    text = render_cluster(found.cluster, format=format)
    if format != "toml":
        return text
    head = [
        f"measured by cutset calibrate in {found.seconds:.0f} s, torch {torch.__version__}",
        "edit what you know better; docs/cost-models.md explains the keys",
        *_not_measured(found.cluster),
        "",
        *quality_lines(found.qualities),
    ]
    return "\n".join([*(f"# {line}".rstrip() for line in head), "", text])


def quality_lines(qualities: Sequence[tuple[str, tuple[Quality, ...]]]) -> Iterator[str]:
    """A table of how well models fit. Errors are relative; of curves, those of a size that is
    left out."""
    rows = [(f"{title}: {entry.name}", entry) for title, found in qualities for entry in found]
    width = max((len(name) for name, _ in rows), default=0)
    yield f"{'fit':<{width}} samples  median   worst"
    for name, quality in rows:
        errors = (quality.median_error, quality.worst_error)
        told = " ".join("      -" if error is None else f"{error:7.1%}" for error in errors)
        yield f"{name:<{width}} {quality.samples:7d} {told}"


def figure_lines(cluster: Cluster) -> Iterator[str]:
    """The main figures of device types and links."""
    for entry in cluster.types:
        yield from _type_lines(cluster, entry)
    yield from _not_measured(cluster)
    if len(cluster.devices) > 1:
        for rule in cluster.links:
            yield from _link_lines(rule)


def _not_measured(cluster: Cluster) -> Iterator[str]:
    for entry in cluster.types:
        guessed = [d for d, _ in entry.flops_per_second if entry.curve("matmul", d) is None]
        if guessed:
            yield f"{entry.name}: products of {', '.join(guessed)} have typical rates, not measured"
    if len(cluster.devices) == 1:
        yield "one device has no links to measure: theirs are typical figures"


def _type_lines(cluster: Cluster, entry: DeviceType) -> Iterator[str]:
    count = sum(device.type == entry.name for device in cluster.devices)
    rates = ", ".join(f"{dtype} {rate / _GIGA:.4g}" for dtype, rate in entry.flops_per_second)
    cores = "" if entry.cores is None else f" on {entry.cores} cores"
    yield f"{entry.name}: {count} of them at once{cores}, {entry.memory_bytes / 2**30:.1f} GiB each"
    yield f"  products {rates} GFLOP/s"
    memory = entry.curve("memory")
    cached = "" if memory is None else f", {memory.points[0][1] / _GIGA:.4g} from caches"
    yield f"  memory {entry.memory_bytes_per_second / _GIGA:.4g} GB/s{cached}"
    asked = entry.message_seconds
    message = f", asking for a message {seconds_text(asked)}" if asked else ""
    yield (
        f"  an operator {seconds_text(entry.overhead_seconds)}, an instruction "
        f"{seconds_text(entry.instruction_seconds)}{message}"
    )


def _link_lines(rule: LinkRule) -> Iterator[str]:
    ends = "" if (rule.a, rule.b) == ("*", "*") else f" {rule.a} to {rule.b}"
    yield f"link{ends}:"
    for name in (None, *COLLECTIVES):
        link = rule.link_of(name)
        yield (
            f"  {name or 'send':<15} {seconds_text(link.latency_seconds):>9} + "
            f"{link.bytes_per_second / _GIGA:.4g} GB/s"
        )
    most = "any number of" if rule.streams is None else f"{rule.streams:g}"
    yield f"  {most} messages at once; {rule.compute_share:.0%} of computing while one runs"
    yield (
        f"  {rule.progress_share:.0%} of its speed beside computing; "
        f"{seconds_text(rule.skew_seconds)} until the last rank comes"
    )
    for name, link in rule.handling:
        yield (
            f"  {name} takes {seconds_text(link.latency_seconds)} + "
            f"{link.bytes_per_second / _GIGA:.4g} GB/s of computing beside it"
        )
