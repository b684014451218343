"""What computes on this machine: times that were measured are kept by it."""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path

import torch

from ..runtime.launcher import fair_threads
from .ir.cluster import Cluster
from .ranks import place_of

__all__ = ["hardware_of"]

_CPU_INFO = Path("/proc/cpuinfo")


def hardware_of(cluster: Cluster, device: int) -> str:
    """The hardware of one device of a local cluster, and of the workers beside it."""
    others = Counter(_alone(cluster, i) for i in range(len(cluster.devices)) if i != device)
    beside = " and ".join(f"{count} of {name}" for name, count in sorted(others.items()))
    return f"{_alone(cluster, device)}; beside {beside or 'no other'}"


def _alone(cluster: Cluster, device: int) -> str:
    place = place_of(cluster, device)
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    threads = cluster.type_of(device).threads or fair_threads(len(cluster.devices))
    return f"{_cpu_model()}, {threads} threads"


def _cpu_model() -> str:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return " ".join(value.split())
    return platform.processor() or platform.machine()
