"""How each distinct block of a sharded model lies on the mesh, where its ranks meet, what it holds.

Blocks that compute the same and lie alike are told of once (`compiler/ir/blocks.py`); what is in no
repeated block goes by its module. Figures are of the first rank, whose parts are the largest.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..cost_models.node_memory import memory_profile
from ..cost_models.ops import NodeCost, price
from ..cost_models.slowest import slowest_type
from ..passes.columns import Column, column_of
from ..passes.context import Context, PlanOptions
from ..passes.partition.problem import in_flight_microbatches
from .explain_runner_up import BlockRunnerUp, RunnerUps, runner_up_text
from .ir.blocks import find_blocks
from .ir.graph import Graph, Node, Value, ValueKind, users
from .ir.mesh import Layout, Partial, Replicate, Shard
from .ir.ops import Category
from .ir.plan import DATA, TENSOR, Plan
from .module_names import block_of, join_runs
from .sharding.sharding import Sharding
from .words import bytes_text, plural, seconds_text

__all__ = ["BlockSummary", "Traffic", "blocks_text", "summarize_blocks"]

_WIDTH = 76
_LINES = 4
_BOUNDARY_VALUES = 3

# packet -> whether ranks meet in forward, and in backward
_MEETS = {
    "all_reduce": (True, False),
    "sum_gradient": (False, True),
    "shard": (False, True),
    "reduce_scatter": (True, True),
    "all_to_all": (True, True),
}


@dataclass(frozen=True, slots=True)
class Traffic:
    """Collectives of one pass over a block: how many, bytes of the whole tensors, seconds."""

    count: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class BlockSummary:
    """One distinct block.

    Args:
        label: where it occurs, e.g. `layers.0-31`.
        parameters: (layout in words and placements, names within the block).
        inputs, outputs: (value, layout) of the largest activations at its boundary.
        seconds: of forward and backward of one microbatch, collectives included.
        step: summing gradients and gathering parameters, once a step.
        held_bytes: parameters, gradients and optimizer states.
        kept_bytes: for backward, of one microbatch.
        memory_share: of the device's memory, with the microbatches in flight.
        replicated_seconds: as `seconds`, if nothing were split over the tensor axis.
        runner_up: the next best layouts over the tensor axis, if there are others.
    """

    label: str
    count: int
    parameters: tuple[tuple[str, tuple[str, ...]], ...]
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    seconds: float
    forward: Traffic
    backward: Traffic
    step: Traffic
    held_bytes: int
    kept_bytes: int
    memory_share: float
    replicated_seconds: float | None
    runner_up: BlockRunnerUp | None


def summarize_blocks(plan: Plan, graph: Graph) -> tuple[BlockSummary, ...]:
    """The distinct blocks in graph order; none if nothing is sharded."""
    if plan.stage_mesh.size == 1 or not plan.stages or plan.schedule is None:
        return ()
    view = _View.of(plan, graph)
    groups: dict[object, list[tuple[str, tuple[int, ...]]]] = {}
    for number, (path, nodes) in enumerate(_parts(graph)):
        looks = view.look(nodes)
        key = looks if any(looks) else (number, looks)
        groups.setdefault(key, []).append((path, nodes))
    return tuple(
        view.summary(", ".join(join_runs([path for path, _ in group])), len(group), group[0])
        for group in groups.values()
    )


def _parts(graph: Graph) -> list[tuple[str, tuple[int, ...]]]:
    """(module path, nodes) of repeated blocks, and of modules outside of them that hold
    parameters, in graph order."""
    found = [(i.path, i.nodes) for block in find_blocks(graph) for i in block.instances]
    covered = {node for _, nodes in found for node in nodes}
    rest: dict[str, list[int]] = {}
    for node in graph.nodes:
        if node.id not in covered:
            rest.setdefault(block_of(node.module_path), []).append(node.id)
    held = {value.id for value in graph.values_of(ValueKind.PARAMETER)}
    for path, members in rest.items():
        if any(value in held for node in members for value in graph.nodes[node].inputs):
            found.append((path or "(the model itself)", tuple(members)))
    return sorted(found, key=lambda part: part[1])


@dataclass(slots=True)
class _View:
    """A plan's column, priced."""

    plan: Plan
    graph: Graph
    sharding: Sharding
    column: Column
    costs: tuple[NodeCost, ...]
    whole: tuple[Column, tuple[NodeCost, ...]] | None  # without the tensor axis
    readers: dict[int, tuple[int, ...]]
    kept: tuple[int, ...]
    runner_ups: RunnerUps

    @staticmethod
    def of(plan: Plan, graph: Graph) -> _View:
        column, costs = _priced(plan, graph)
        splits = plan.mesh.axis(TENSOR).size > 1
        backend = plan.cluster.type_of(0).backend
        profile = memory_profile(
            column.context.graph, backend=backend, recomputed=column.plan.recomputed
        )
        return _View(
            plan=plan,
            graph=graph,
            sharding=Sharding.of(plan, graph),
            column=column,
            costs=costs,
            whole=_priced(_without_tensor(plan), graph) if splits else None,
            readers=dict(users(graph)),
            kept=tuple(entry.saved_bytes for entry in profile),
            runner_ups=RunnerUps(plan, graph),
        )

    def look(self, nodes: tuple[int, ...]) -> tuple[object, ...]:
        """Equal for blocks that compute the same and lie alike."""
        rows = []
        for number in nodes:
            node = self.graph.nodes[number]
            held = tuple(
                self.sharding.parameters.get(value.name) and str(self._layouts(value))
                for value in self._inputs(node)
                if value.kind is ValueKind.PARAMETER
            )
            types = tuple(str(self.graph.values[value].type) for value in node.outputs)
            ways = self.sharding.node_strategies(node)
            rows.append((node.op.name, types, str(ways and [*map(str, ways)]), held))
        return tuple(rows)

    def _inputs(self, node: Node) -> list[Value]:
        return [self.graph.values[index] for index in node.inputs]

    def _layouts(self, value: Value) -> tuple[Layout, Layout, Layout]:
        entry = self.sharding.parameters.get(value.name)
        if entry is None:
            layout = self.sharding.layout(value)
            return layout, layout, layout
        return entry.held, entry.gradient, entry.state

    def summary(self, label: str, count: int, first: tuple[str, tuple[int, ...]]) -> BlockSummary:
        path, nodes = first
        part = self.column.part
        assert part is not None, "a sharded plan has a local graph"
        inside = set(nodes)
        local = [i for i, origin in enumerate(part.origins) if origin in inside]
        held, step = self._held(local)
        kept = sum(self.kept[i] for i in local)
        stage = next(s for s in self.plan.stages if nodes[0] in s.nodes)
        assert self.plan.schedule is not None
        in_flight = in_flight_microbatches(
            self.plan.schedule.name,
            self.plan.num_microbatches,
            len(self.plan.stages),
            stage.index,
        )
        limit = self.plan.cluster.type_of(stage.device).memory_bytes
        return BlockSummary(
            label=label,
            count=count,
            parameters=self._parameters(path, nodes),
            inputs=self._boundary(nodes, made=False),
            outputs=self._boundary(nodes, made=True),
            seconds=sum(self.costs[i].total_seconds for i in local),
            forward=self._traffic(local, backward=False),
            backward=self._traffic(local, backward=True),
            step=step,
            held_bytes=held,
            kept_bytes=kept,
            memory_share=(held + kept * in_flight) / limit,
            replicated_seconds=self._replicated_seconds(inside),
            runner_up=self.runner_ups.of(nodes),
        )

    def _held(self, local: list[int]) -> tuple[int, Traffic]:
        """Bytes held for parameters, and the sums of their gradients once a step."""
        graph, figures = self.column.context.graph, self.column.context.parameters
        read = {value for i in local for value in graph.nodes[i].inputs}
        num_bytes = count = summed = 0
        seconds = 0.0
        for value in graph.values_of(ValueKind.PARAMETER):
            if value.id not in read:
                continue
            num_bytes += value.type.num_bytes
            if value.id in figures:
                entry = figures[value.id]
                num_bytes += entry.gradient_bytes + entry.state_bytes
                once = entry.sum_seconds + entry.step_seconds
                if once:
                    count, summed = count + 1, summed + value.type.num_bytes
                    seconds += once
        return num_bytes, Traffic(count, summed, seconds)

    def _traffic(self, local: list[int], *, backward: bool) -> Traffic:
        graph = self.column.context.graph
        count = num_bytes = 0
        seconds = 0.0
        for i in local:
            node, cost = graph.nodes[i], self.costs[i]
            spent = cost.backward_seconds if backward else cost.forward_seconds
            if spent and _meets(node)[backward]:
                sizes = (graph.values[v].type.num_bytes for v in (*node.inputs, *node.outputs))
                count, num_bytes = count + 1, num_bytes + max(sizes)
                seconds += spent
        return Traffic(count, num_bytes, seconds)

    def _replicated_seconds(self, inside: set[int]) -> float | None:
        if self.whole is None:
            return None
        column, costs = self.whole
        if column.part is None:
            return sum(costs[node].total_seconds for node in inside)
        origins = enumerate(column.part.origins)
        return sum(costs[i].total_seconds for i, origin in origins if origin in inside)

    # -- layouts in words --------------------------------------------------------------------------

    def _parameters(
        self, path: str, nodes: tuple[int, ...]
    ) -> tuple[tuple[str, tuple[str, ...]], ...]:
        table: dict[str, list[str]] = {}
        for number in nodes:
            for value in self._inputs(self.graph.nodes[number]):
                if value.kind is ValueKind.PARAMETER:
                    name = (value.origin or value.name).removeprefix(f"{path}.")
                    name = name.removesuffix(".weight")
                    names = table.setdefault(self._words(value, number), [])
                    if name not in names:
                        names.append(name)
        split_first = sorted(table, key=lambda words: words.startswith("replicated"))
        return tuple((words, tuple(table[words])) for words in split_first)

    def _words(self, value: Value, reader: int) -> str:
        """How a parameter lies, e.g. `column [R,S(0)], ZeRO-1`."""
        held, gradient, state = self._layouts(value)
        kinds = []
        level = 0
        for axis, entry in enumerate(self.sharding.mesh.axes):
            if entry.name == DATA:
                sides = [isinstance(x.placements[axis], Shard) for x in (held, gradient, state)]
                level = 3 if sides[0] else 2 if sides[1] else int(sides[2])
            elif entry.size > 1:
                kinds.append(self._kind(value, reader, axis))
        kind = kinds[0] if kinds else "replicated"
        return f"{kind} {held}" + (f", ZeRO-{level}" if level else "")

    def _kind(self, value: Value, reader: int, axis: int) -> str:
        """`column` if a split of it splits the features of what is computed with it, `row` if it
        makes terms of a sum (Shoeybi et al., Megatron-LM, 2019)."""
        if isinstance(self.sharding.layout(value).placements[axis], Replicate):
            return "replicated"
        node = self.graph.nodes[reader]
        while node.op.category is Category.VIEW and len(self.readers[node.outputs[0]]) == 1:
            node = self.graph.nodes[self.readers[node.outputs[0]][0]]
        ways = self.sharding.node_strategies(node)
        made = ways[axis].outputs[0] if ways else Replicate()
        last = len(self.graph.values[node.outputs[0]].type.shape) - 1
        if isinstance(made, Partial):
            return "row"
        return "column" if made == Shard(last) else "split"

    def _boundary(self, nodes: Iterable[int], *, made: bool) -> tuple[tuple[str, str], ...]:
        """The largest activations that leave the block (`made`), or enter it."""
        inside = set(nodes)
        own = {value for node in inside for value in self.graph.nodes[node].outputs}
        if made:
            returned = {output.value for output in self.graph.outputs}
            crossing = {v for v in own if v in returned or not inside.issuperset(self.readers[v])}
        else:
            crossing = {v for node in inside for v in self.graph.nodes[node].inputs} - own
        activations = (ValueKind.RESULT, ValueKind.INPUT, ValueKind.BOUNDARY)
        values = [self.graph.values[v] for v in crossing]
        values = [value for value in values if value.kind in activations]
        values.sort(key=lambda value: (-value.type.num_bytes, value.id))
        return tuple(
            (value.name, str(self.sharding.layout(value))) for value in values[:_BOUNDARY_VALUES]
        )


def _priced(plan: Plan, graph: Graph) -> tuple[Column, tuple[NodeCost, ...]]:
    column = column_of(plan, Context(graph, PlanOptions(mesh=plan.mesh, optimizer=plan.optimizer)))
    devices = [device for stage in plan.stages for device in stage.devices]
    kind = slowest_type(plan.cluster, devices)
    return column, price(column.context.graph, kind, network=column.context.network, ahead=True)


def _without_tensor(plan: Plan) -> Plan:
    """`plan` with everything replicated over its tensor axis."""
    axis = [entry.name for entry in plan.stage_mesh.axes].index(TENSOR)

    def whole(layout: Layout) -> Layout:
        rows = layout.placements
        return Layout((*rows[:axis], Replicate(), *rows[axis + 1 :]))

    return replace(
        plan,
        layouts=tuple(replace(entry, layout=whole(entry.layout)) for entry in plan.layouts),
        parameter_layouts=tuple(
            replace(
                entry,
                held=whole(entry.held),
                gradient=whole(entry.gradient),
                state=whole(entry.state),
            )
            for entry in plan.parameter_layouts
        ),
        node_layouts=tuple(
            replace(
                group,
                inputs=tuple(map(whole, group.inputs)),
                outputs=tuple(map(whole, group.outputs)),
            )
            for group in plan.node_layouts
        ),
    )


def _meets(node: Node) -> tuple[bool, bool]:
    """Whether ranks meet in a node forward, and backward."""
    if not node.op.name.startswith("cutset."):
        return (False, False)
    if node.op.packet == "all_gather":
        return (True, node.args[5] is True)
    return _MEETS.get(node.op.packet, (False, False))


def blocks_text(blocks: Iterable[BlockSummary], step_seconds: float) -> str:
    """A few lines for each block of a plan whose step takes `step_seconds`."""
    return "\n".join(line for block in blocks for line in _lines(block, step_seconds))


def _lines(block: BlockSummary, step_seconds: float) -> Iterable[str]:
    times = f" ({block.count} times)" if block.count > 1 else ""
    yield f"{block.label}{times}: {seconds_text(block.seconds)} a microbatch"
    parameters = "; ".join(f"{words}: {', '.join(names)}" for words, names in block.parameters)
    entering = ", ".join(f"{name} {layout}" for name, layout in block.inputs)
    leaving = ", ".join(f"{name} {layout}" for name, layout in block.outputs)
    yield from _wrapped("parameters", parameters)
    yield from _wrapped("boundary", f"reads {entering or 'nothing'}; makes {leaving or 'nothing'}")
    passes = (("forward", block.forward), ("backward", block.backward), ("a step", block.step))
    meets = [f"{name} {_traffic_text(traffic)}" for name, traffic in passes if traffic.count]
    yield from _wrapped("meets", "; ".join(meets) or "nowhere")
    yield from _wrapped(
        "memory",
        f"{bytes_text(block.held_bytes)} held, {bytes_text(block.kept_bytes)} kept a microbatch: "
        f"{block.memory_share:.1%} of a device",
    )
    if block.replicated_seconds is not None:
        yield from _wrapped(
            "instead", f"replicated over {TENSOR}: {seconds_text(block.replicated_seconds)}"
        )
    if block.runner_up is not None:
        yield from _wrapped("runner-up", runner_up_text(block.runner_up, step_seconds))


def _traffic_text(traffic: Traffic) -> str:
    return (
        f"{plural(traffic.count, 'collective')}, {bytes_text(traffic.num_bytes)}, "
        f"{seconds_text(traffic.seconds)}"
    )


def _wrapped(label: str, text: str) -> Iterable[str]:
    lines = textwrap.wrap(text, _WIDTH - 13, max_lines=_LINES, placeholder=" ...")
    yield from (f"  {label if number == 0 else '':<11}{line}" for number, line in enumerate(lines))
