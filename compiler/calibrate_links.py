"""Measure the links between the devices of a cluster: messages, collectives, and how they disturb.

Pairs of devices are sorted by the nodes that they join; every such class gets a rule of its own.
Messages are measured between neighbours around the ring of all devices, in both directions;
collectives over all devices of a node and over the first two, and over all devices where nodes are
joined.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from ..cost_models.calibration import (
    Beside,
    collective_sample,
    fitted_link,
    overlap_shares,
    rounded,
    seconds_of_all,
    skew_seconds,
    streams,
)
from ..cost_models.fits import Quality, Sample
from ..runtime.link_probes import trimmed_mean
from ..runtime.session import Session
from .ir.cluster import COLLECTIVES, HANDLED, Cluster, DeviceType, Link, LinkRule
from .ir.graph import Mode
from .ir.program import AllReduce, Instruction, Program, Recv, Register, Send
from .ir.text import print_program
from .ir.types import TensorType

__all__ = ["measured_links"]

_TIMEOUT_SECONDS = 300.0
_LARGEST = 1 << 25  # where not all devices are CUDA devices
_AT_ONCE_BYTES, _AT_ONCE_ON_CUDA = 1 << 20, 1 << 26  # so much that latency is next to nothing
_SMALLER = 8  # a size at which latency counts, where threads of CPUs carry it
_HANDLED_BYTES = (1 << 12, 1 << 17, 1 << 20)  # as of parameters: from biases to large matrices
_LEAST_SECONDS = 1e-6
_Class = tuple[str, str]


def measured_links(
    session: Session,
    cluster: Cluster,
    progress: Callable[[str], None],
    sizes: Sequence[int],
    *,
    rounds: int,
) -> tuple[Cluster, tuple[Quality, ...]]:
    """`cluster` with rules for all pairs of its devices and what messages take of CPU workers, and
    how well the figures fit.

    Args:
        sizes: of messages and collectives, in bytes.
        rounds: of transfers beside others and beside computation.
    """
    return _Links(session, cluster, sizes, rounds).run(progress)


class _Links:
    def __init__(
        self, session: Session, cluster: Cluster, sizes: Sequence[int], rounds: int
    ) -> None:
        self._session = session
        self._cluster = cluster
        alike = all(cluster.type_of(d.index).backend == "cuda" for d in cluster.devices)
        self._on_host = not alike
        self._rounds = rounds
        self._late: list[float] = []  # seconds by which the last is later, a round
        self._sizes = [size for size in sizes if alike or size <= _LARGEST]
        self._at_once = _AT_ONCE_ON_CUDA if alike else _AT_ONCE_BYTES
        self._qualities: list[Quality] = []

    def run(self, progress: Callable[[str], None]) -> tuple[Cluster, tuple[Quality, ...]]:
        count = len(self._cluster.devices)
        groups = self._groups()
        every = sorted(
            {ranks for own in groups.values() for ranks in own}
            | {(min(pair), max(pair)) for own in self._pairs().values() for pair in own}
        )
        programs = [
            {
                "program": print_program(_meeting(rank, count, every)),
                "on_host": self._on_host,
                "num_rounds": self._rounds,
            }
            for rank in range(count)
        ]
        self._call("prepare_links", programs)
        progress("messages")
        types = tuple(self._asking()) if self._on_host else self._cluster.types
        rules = self._messages()
        for name in COLLECTIVES:
            progress(name.replace("_", "-"))
            for key, own in groups.items():
                rules[key] = self._collective(rules[key], name, own)
        progress("transfers beside others and beside computation")
        sizes = [self._at_once, self._at_once // _SMALLER] if self._on_host else [self._at_once]
        rows = self._call("time_overlap", {"sizes": sizes})
        taken, kept = overlap_shares([Beside(*one) for row in rows for one in row])
        rows = self._call("time_streams", {"size": self._at_once})
        alone, together = (max(row[way] for row in rows) for way in (0, 1))
        at_once = streams(alone, together, count) if len(self._nodes()) == 1 else None
        handling = self._handling() if self._on_host else ()
        found = [
            replace(
                rule,
                streams=at_once,
                compute_share=taken,
                progress_share=kept,
                skew_seconds=skew_seconds(self._late),
                handling=handling,
            )
            for rule in rules.values()
        ]
        if len(found) == 1:
            found = [replace(found[0], a="*", b="*", same_node=None)]
        return replace(self._cluster, types=types, links=tuple(found)), tuple(self._qualities)

    def _call(self, method: str, arguments: Any = ()) -> list[Any]:
        return self._session.call(method, arguments, timeout_seconds=_TIMEOUT_SECONDS)

    def _nodes(self) -> list[str]:
        return list(dict.fromkeys(device.node for device in self._cluster.devices))

    def _class(self, first: int, second: int) -> _Class:
        nodes = self._nodes()
        ends = sorted(
            (self._cluster.devices[index].node for index in (first, second)), key=nodes.index
        )
        return ends[0], ends[1]

    def _pairs(self) -> dict[_Class, list[tuple[int, int]]]:
        """Of each class the pairs, in both directions, that are neighbours around the ring; the
        first one where none are."""
        count = len(self._cluster.devices)
        every: dict[_Class, list[tuple[int, int]]] = {}
        for first in range(count):
            for second in range(first + 1, count):
                every.setdefault(self._class(first, second), []).append((first, second))
        chosen = {}
        for key, pairs in every.items():
            near = [(a, b) for a, b in pairs if b - a in (1, count - 1)] or pairs[:1]
            chosen[key] = [*near, *((b, a) for a, b in near)]
        return chosen

    def _groups(self) -> dict[_Class, list[tuple[int, ...]]]:
        """Of each class the devices over which collectives are measured."""
        everyone = tuple(device.index for device in self._cluster.devices)
        table = {}
        for first, second in self._pairs():
            inside = tuple(d.index for d in self._cluster.devices if d.node == first)
            group = inside if first == second else everyone
            pair = next(p for p in self._pairs()[first, second] if p[0] < p[1])
            table[first, second] = list(dict.fromkeys((pair, group)))
        return table

    def _asking(self) -> Iterator[DeviceType]:
        """The types of devices, with what a message takes of CPU workers."""
        found = self._call("time_asking")
        for kind in self._cluster.types:
            if kind.backend == "cpu":
                ranks = [d.index for d in self._cluster.devices if d.type == kind.name]
                share = min(map(self._cluster.core_share, ranks))
                seconds = statistics.median(found[rank] for rank in ranks) / share
                kind = replace(kind, message_seconds=rounded(seconds))
            yield kind

    def _messages(self) -> dict[_Class, LinkRule]:
        pairs = self._pairs()
        ordered = [pair for own in pairs.values() for pair in own]
        rows = self._call("time_messages_between", {"pairs": ordered, "sizes": self._sizes})
        times = {pair: found for row in rows for pair, found in row.items()}
        rules = {}
        for key, own in pairs.items():
            samples = [Sample(2.0, float(n), t) for pair in own for n, t in times[pair]]
            link, quality = fitted_link(samples, _title("send", key))
            self._qualities.append(quality)
            rules[key] = LinkRule(link, key[0], key[1], key[0] == key[1])
        return rules

    def _handling(self) -> tuple[tuple[str, Link], ...]:
        """What collectives take of computation beside which they travel, over all devices."""
        count = len(self._cluster.devices)
        found = []
        for name in HANDLED:
            rows = self._call("time_handling", {"name": name, "sizes": _HANDLED_BYTES})
            samples = [
                collective_sample(name, count, num_bytes, max(seconds, _LEAST_SECONDS))
                for row in rows
                for num_bytes, seconds in row
            ]
            link, quality = fitted_link(samples, f"handling of {name}")
            self._qualities.append(quality)
            found.append((name, link))
        return tuple(found)

    def _collective(self, rule: LinkRule, name: str, groups: Sequence[tuple[int, ...]]) -> LinkRule:
        samples = []
        for ranks in groups:
            arguments = {"name": name, "ranks": ranks, "sizes": self._sizes}
            rows = self._call("time_collective", arguments)
            for own in zip(*(rows[rank] for rank in ranks), strict=True):
                rounds = list(zip(*(one.times for one in own), strict=True))
                shared = rule.same_node is not False  # one clock
                lasted = trimmed_mean([seconds_of_all(times, shared=shared) for times in rounds])
                samples.append(collective_sample(name, len(ranks), own[0].num_bytes, lasted))
                if self._on_host:  # else they did not compute before
                    whole = fmean(end - begin for times in rounds for begin, end in times)
                    self._late.append(whole - lasted)
        link, quality = fitted_link(samples, _title(name, (rule.a, rule.b)))
        self._qualities.append(quality)
        return replace(rule, collectives=(*rule.collectives, (name, link)))


def _title(name: str, key: _Class) -> str:
    return f"{name} in {key[0]}" if key[0] == key[1] else f"{name} {key[0]} to {key[1]}"


def _meeting(rank: int, count: int, groups: Sequence[tuple[int, ...]]) -> Program:
    """A program that names all connections that probes use."""
    instructions: list[Instruction] = []
    kind = TensorType((1,), torch.uint8)
    for peer in range(count):
        if peer != rank:
            instructions.append(Send(Register(f"from{rank}", 0), peer, 0, kind))
            instructions.append(Recv(Register(f"from{peer}", 0), peer, 0, kind))
    for ranks in groups:
        if rank in ranks:
            instructions.append(AllReduce(("probe",), ranks))
    return Program(rank, count, Mode.INFER, 1, (), (), tuple(instructions), "calibration", 1)
