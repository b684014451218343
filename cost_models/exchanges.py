"""What ranks send each other in collectives: bytes on every edge, and seconds within an action.

Over each of its p edges, a ring moves 2 (p - 1) / p of the bytes of an all-reduce, and (p - 1) / p
of those of a reduce-scatter or an all-gather (Thakur, Rabenseifner and Gropp, 2005). What the
runtime makes of messages moves 1 / p of the bytes from each rank to each other: all-to-alls, and
over gloo reduce-scatters and all-gathers, too. Parts count as equal.

`stage_costs` divides the seconds of a stage's actions into computation and exchanges with the
other ranks of the stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..compiler.ir.cluster import Cluster, DeviceType
from ..compiler.ir.graph import Graph, Mode, Node, ValueKind
from ..compiler.ir.ops import Category
from ..compiler.ir.program import StageProgram
from .collectives import Network
from .links import SECONDS_OF, group_skew_seconds, handling_seconds, ring
from .memory_tables import rerun_nodes
from .ops import price_once
from .stages import (
    StageSeconds,
    hidden_again_seconds,
    hidden_sum_seconds,
    in_weights,
    reached_values,
    stage_seconds,
)

__all__ = ["ActionCost", "Exchange", "StageCosts", "edge_bytes", "exchange", "stage_costs"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """Collectives over one group of ranks, one after the other.

    Args:
        ranks: who meets, in the order of parts.
        collective: the kind; that of most bytes, where they are of several kinds.
        latency_seconds, wire_seconds: on idle wires.
        skew_seconds: how long its ranks wait for the last of them before.
        edges: ((source, target), bytes).
        kinds: (collective, seconds on idle wires), where they are of several kinds.
        count: how many.
        handling_seconds: what they take of computation beside which they travel, if all of that was
            measured; see `handling_seconds`.
    """

    ranks: tuple[int, ...]
    collective: str
    latency_seconds: float
    wire_seconds: float
    edges: tuple[tuple[tuple[int, int], float], ...]
    kinds: tuple[tuple[str, float], ...]
    count: float = 1.0
    skew_seconds: float = 0.0
    handling_seconds: float = 0.0

    @property
    def travel_seconds(self) -> float:
        return self.latency_seconds + self.wire_seconds

    @property
    def seconds(self) -> float:
        return self.skew_seconds + self.travel_seconds

    def without(self, seconds: float) -> Exchange:
        """Over so much earlier, as far as it travels for so long."""
        return replace(self, wire_seconds=max(self.wire_seconds - seconds, 0.0))

    def faster(self, share: float) -> Exchange:
        """In a share of the seconds."""
        return replace(
            self,
            latency_seconds=self.latency_seconds * share,
            wire_seconds=self.wire_seconds * share,
            kinds=tuple((kind, seconds * share) for kind, seconds in self.kinds),
            skew_seconds=self.skew_seconds * share,
            handling_seconds=self.handling_seconds * share,
        )

    def at_once(self) -> Exchange:
        """The same started together: over gloo, where messages make them (all but all-reduces),
        each has its latency at the same time."""
        return replace(self, latency_seconds=self.latency_seconds / max(self.count, 1.0))

    def among(self, groups: Mapping[tuple[int, ...], tuple[int, ...]]) -> Exchange:
        """The same among the ranks that `groups` has for its own."""
        ranks = groups[self.ranks]
        new = dict(zip(self.ranks, ranks, strict=True))
        edges = tuple(((new[a], new[b]), size) for (a, b), size in self.edges)
        return replace(self, ranks=ranks, edges=edges)

    def scaled(self, share: float) -> Exchange:
        """A part of it."""
        edges = tuple((edge, size * share) for edge, size in self.edges)
        return replace(self.faster(share), edges=edges, count=self.count * share)


@dataclass(frozen=True, slots=True)
class ActionCost:
    """One action of a stage: what it computes, and what it waits for or does not wait for."""

    compute_seconds: float
    exposed: tuple[Exchange, ...] = ()
    hidden: tuple[Exchange, ...] = ()

    @property
    def seconds(self) -> float:
        """On idle wires."""
        return self.compute_seconds + sum(entry.seconds for entry in self.exposed)

    def among(self, groups: Mapping[tuple[int, ...], tuple[int, ...]]) -> ActionCost:
        return ActionCost(
            self.compute_seconds,
            tuple(entry.among(groups) for entry in self.exposed),
            tuple(entry.among(groups) for entry in self.hidden),
        )

    def scaled(self, share: float) -> ActionCost:
        """A part of it."""
        return ActionCost(
            self.compute_seconds * share,
            tuple(entry.scaled(share) for entry in self.exposed),
            tuple(entry.scaled(share) for entry in self.hidden),
        )


@dataclass(frozen=True, slots=True)
class StageCosts:
    """The actions of one stage on one rank.

    Args:
        hidden: shares of what forward and the weight gradients exchange that they do not wait for.
    """

    forward: ActionCost
    backward_input: ActionCost
    backward_weight: ActionCost
    hidden: tuple[float, float]

    def among(self, groups: Mapping[tuple[int, ...], tuple[int, ...]]) -> StageCosts:
        """The same for a rank with other groups, by the groups of this one."""
        return StageCosts(
            self.forward.among(groups),
            self.backward_input.among(groups),
            self.backward_weight.among(groups),
            self.hidden,
        )


def edge_bytes(
    cluster: Cluster, collective: str, ranks: Sequence[int], num_bytes: float
) -> tuple[tuple[tuple[int, int], float], ...]:
    """Bytes that a collective over `ranks` moves: ((source, target), bytes).

    Args:
        num_bytes: of the whole tensor (an all-to-all: what each rank holds).
    """
    count = len(set(ranks))
    on_host = any(cluster.type_of(rank).backend == "cpu" for rank in ranks)
    if collective == "all_to_all" or (on_host and collective != "all_reduce"):
        pairs = [(source, target) for source in ranks for target in ranks if source != target]
        return tuple((pair, num_bytes / count) for pair in sorted(pairs))
    share = (2 if collective == "all_reduce" else 1) * (count - 1) / count
    return tuple((edge, share * num_bytes) for edge in ring(cluster, ranks))


def exchange(cluster: Cluster, collective: str, ranks: Sequence[int], num_bytes: float) -> Exchange:
    """One collective; `num_bytes` as in `edge_bytes`."""
    seconds = SECONDS_OF[collective]
    latency, whole = seconds(cluster, ranks, 0.0), seconds(cluster, ranks, num_bytes)
    return Exchange(
        ranks=tuple(ranks),
        collective=collective,
        latency_seconds=latency,
        wire_seconds=whole - latency,
        edges=edge_bytes(cluster, collective, ranks, num_bytes),
        kinds=((collective, whole),),
        handling_seconds=handling_seconds(cluster, ranks, collective, num_bytes),
    )


def stage_costs(
    stage: StageProgram,
    device_type: DeviceType,
    network: Network,
    measured: StageSeconds | None,
    meets: StageCosts | None = None,
) -> StageCosts:
    """Costs of the actions of `stage`.

    Args:
        measured: seconds of the actions with all that they wait for; None: as predicted.
        meets: of another rank of the stage. The same share of exchanges is hidden on both, even
            where their parts differ in size, as both wait at the same places.
    """
    graph = stage.graph
    costs = price_once(graph, device_type, network=network)
    seconds = stage_seconds(
        graph, device_type, recomputed=stage.recomputed, network=network, kept=stage.kept
    )
    found = _Found(graph, network)
    forward = found.forward()
    first, second = found.backward(stage.recomputed)
    second.extend(_summed_early(stage, network))
    times = measured or seconds
    if meets is None:
        ahead = max(sum(cost.forward_seconds for cost in costs) - seconds.forward, 0.0)
        again = 0.0
        if stage.recomputed:
            again += hidden_again_seconds(graph, costs, stage.recomputed, ahead)
        if graph.mode is Mode.TRAIN:
            again += hidden_sum_seconds(graph, in_weights(graph, costs), network, stage.kept)
        shares = _share(ahead, forward), _share(again, second)
    else:
        shares = meets.hidden
    is_measured = measured is not None
    return StageCosts(
        _divided(times.forward, forward, shares[0], is_measured),
        _divided(times.backward_input, first, 0.0, is_measured),
        _divided(times.backward_weight, second, shares[1], is_measured),
        shares,
    )


def _share(seconds: float, exchanges: Iterable[Exchange]) -> float:
    """What `seconds` are of those of `exchanges`."""
    total = sum(entry.seconds for entry in exchanges)
    return min(seconds / total, 1.0) if total else 0.0


def _divided(
    seconds: float, exchanges: Iterable[Exchange], share: float, is_measured: bool
) -> ActionCost:
    """An action of `seconds`, of whose exchanges a share is hidden; where it was measured, they
    took no longer than all of it."""
    joined = _joined(exchanges)
    total = sum(entry.seconds for entry in joined)
    if not total:
        return ActionCost(seconds, hidden=joined)
    if is_measured and total > seconds:
        joined = tuple(entry.faster(seconds / total) for entry in joined)
        total = seconds
    return ActionCost(
        max(seconds - (1.0 - share) * total, 0.0),
        tuple(entry.scaled(1.0 - share) for entry in joined) if share < 1.0 else (),
        tuple(entry.scaled(share) for entry in joined) if share > 0.0 else (),
    )


def _joined(exchanges: Iterable[Exchange]) -> tuple[Exchange, ...]:
    """One for each group of ranks."""
    groups: dict[tuple[int, ...], list[Exchange]] = {}
    for entry in exchanges:
        groups.setdefault(entry.ranks, []).append(entry)
    return tuple(_sum(groups[ranks]) for ranks in sorted(groups))


def _sum(entries: Sequence[Exchange]) -> Exchange:
    edges: dict[tuple[int, int], float] = {}
    kinds: dict[str, float] = {}
    for entry in entries:
        for edge, size in entry.edges:
            edges[edge] = edges.get(edge, 0.0) + size
        for kind, seconds in entry.kinds:
            kinds[kind] = kinds.get(kind, 0.0) + seconds
    return Exchange(
        ranks=entries[0].ranks,
        collective=max(entries, key=lambda entry: entry.wire_seconds).collective,
        latency_seconds=sum(entry.latency_seconds for entry in entries),
        wire_seconds=sum(entry.wire_seconds for entry in entries),
        edges=tuple(sorted(edges.items())),
        kinds=tuple(kinds.items()),
        count=sum(entry.count for entry in entries),
        skew_seconds=sum(entry.skew_seconds for entry in entries),
        handling_seconds=sum(entry.handling_seconds for entry in entries),
    )


def _summed_early(stage: StageProgram, network: Network) -> list[Exchange]:
    """Gradients of which backward keeps a part, summed over ranks once a microbatch."""
    types = {value.origin: value.type for value in stage.graph.values_of(ValueKind.PARAMETER)}
    return [
        exchange(
            network.cluster, "reduce_scatter", network.group(part.axis), types[part.name].num_bytes
        )
        for part in stage.kept
        if part.summed
    ]


class _Found:
    """The collectives of a stage's graph and of its adjoint."""

    def __init__(self, graph: Graph, network: Network) -> None:
        self._graph = graph
        self._network = network
        self._nodes = [
            node for node in graph.nodes if node.op.category is Category.COLLECTIVE and node.outputs
        ]

    def forward(self, nodes: Iterable[int] | None = None) -> list[Exchange]:
        chosen = None if nodes is None else set(nodes)
        return [
            made
            for node in self._nodes
            if chosen is None or node.id in chosen
            for made in self._exchange(node, _FORWARD)
        ]

    def backward(self, recomputed: Sequence[int]) -> tuple[list[Exchange], list[Exchange]]:
        """Those with the input gradients, and those with the weight gradients."""
        if self._graph.mode is not Mode.TRAIN:
            return [], []
        values = self._graph.values
        reached = reached_values(self._graph)
        first: list[Exchange] = []
        second: list[Exchange] = []
        again = rerun_nodes(self._graph, recomputed)
        (first if reached else second).extend(self.forward(again))
        for node in reversed(self._nodes):
            wanted = any(values[i].requires_grad for i in node.inputs)
            if wanted and any(values[i].requires_grad for i in node.outputs):
                early = any(value in reached for value in node.inputs)
                (first if early else second).extend(self._exchange(node, _ADJOINT))
        return first, second

    def _exchange(self, node: Node, table: _Table) -> Iterable[Exchange]:
        found = table.get(node.op.packet)
        if table is _ADJOINT and node.op.packet == "all_gather" and not _is_sum(node):
            found = None
        if found is not None:
            collective, of_result = found
            value = node.outputs[0] if of_result else node.inputs[0]
            axis = node.args[1]
            assert isinstance(axis, str)
            size = float(self._graph.values[value].type.num_bytes)
            group = self._network.group(axis)
            if len(set(group)) > 1:
                cluster = self._network.cluster
                made = exchange(cluster, collective, group, size)
                yield replace(made, skew_seconds=group_skew_seconds(cluster, group))


# packet -> (collective, whether the result is what it moves), as `collectives.py` prices them
_Table = Mapping[str, tuple[str, bool]]
_FORWARD: _Table = {
    "all_reduce": ("all_reduce", False),
    "all_gather": ("all_gather", True),
    "reduce_scatter": ("reduce_scatter", False),
    "all_to_all": ("all_to_all", False),
}
_ADJOINT: _Table = {
    "sum_gradient": ("all_reduce", False),
    "shard": ("all_gather", False),
    "all_gather": ("reduce_scatter", True),
    "reduce_scatter": ("all_gather", False),
    "all_to_all": ("all_to_all", False),
}


def _is_sum(node: Node) -> bool:
    """Whether the gradient of a gather is a term on each rank."""
    return node.args[5] is True
