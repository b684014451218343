"""A stage on a mesh of its own, before it is known which nodes it has: what runs of units take on
its devices, and what a stage of some nodes is, and needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..compiler.ir.cluster import DeviceType, Link
from ..compiler.ir.errors import InfeasibleError
from ..compiler.ir.graph import Graph, Mode, ValueKind, producers, users
from ..compiler.ir.mesh import Mesh, MeshAxis, Replicate
from ..compiler.ir.plan import (
    DATA,
    PIPELINE,
    MemoryPrediction,
    NodeLayout,
    ParameterLayout,
    Plan,
    Stage,
    StageMesh,
)
from ..compiler.sharding.sharding import Sharding
from ..compiler.sharding.zero import zero_layouts
from ..cost_models.analysis import batch_rows
from ..cost_models.collectives import Network, mesh_network
from ..cost_models.memory import consuming_stages, stage_memory
from ..cost_models.memory_tables import memory_model, rerun_nodes
from ..cost_models.ops import price_once
from ..cost_models.overlap import Overlap
from ..cost_models.parameters import ParameterFigures
from ..cost_models.recompute import with_reruns
from ..cost_models.slowest import slowest_type
from ..cost_models.stages import optimizer_seconds
from .columns import Column, column_of
from .context import Context
from .partition.prepare import state
from .partition.runs import Table
from .stage_layouts import StageLayouts

__all__ = ["OwnStage", "OwnStages", "SplitParameter", "StageFigures", "shared_parameters"]

_MANY_BYTES = 1e6  # a message by which links are compared


class SplitParameter(InfeasibleError):
    """Layouts split a parameter that several stages share."""

    def __init__(
        self, cause: str, *, where: str = "", ways_out: tuple[str, ...] = (), parameter: str = ""
    ) -> None:
        super().__init__(cause, where=where, ways_out=ways_out)
        self.parameter = parameter


@dataclass(frozen=True, slots=True)
class StageFigures:
    """Seconds of a stage by run of units: of the first microbatch, with its transfers, of each
    other one, beside whose computation transfers go, of what it does once a step, and of forward
    and backward alone."""

    first: Table
    steady: Table
    per_step: Table
    forward: Table
    backward: Table

    def later(self, num_microbatches: int) -> Table:
        """All but the first microbatch, and what is done once."""
        seconds: Table = (num_microbatches - 1) * self.steady + self.per_step
        return seconds


@dataclass(frozen=True, slots=True)
class OwnStage:
    """A stage on `devices`, over a mesh.

    Args:
        whole: layouts over the mesh of all that is in the graph.
        column: the graph's part on the first device.
    """

    plan: Plan
    context: Context
    whole: StageMesh
    devices: tuple[int, ...]
    kind: DeviceType
    network: Network | None
    column: Column

    @staticmethod
    def of(
        plan: Plan,
        context: Context,
        layouts: StageLayouts,
        mesh: Mesh,
        devices: tuple[int, ...],
        zero: int,
    ) -> OwnStage:
        """The stage with the layouts that are fastest on `mesh`, and ZeRO of a level.

        Raises:
            InfeasibleError: no layouts are legal over the mesh.
        """
        whole = _layouts(plan, context, layouts, mesh, devices, zero)
        network = mesh_network(plan.cluster, mesh, devices) if mesh.axes else context.network
        kind = slowest_type(plan.cluster, devices)
        column = column_of(plan.over(whole), context)
        return OwnStage(plan, context, whole, devices, kind, network, column)

    @property
    def _fraction(self) -> float:
        """Rows of a microbatch, of those of the local graph."""
        plan = self.column.plan
        return plan.batch_size / plan.num_microbatches / batch_rows(self.column.context.graph)

    def figures(
        self, units: Sequence[tuple[int, ...]], before: tuple[int, ...] | None
    ) -> StageFigures:
        """Of all runs of `units`; replicated nodes, which are cheap, take nothing.

        Args:
            before: devices of the stage before; None: this is the first.
        """
        home = {node: index for index, unit in enumerate(units) for node in unit}
        graph, plan = self.column.context.graph, self.column.plan
        rerun = rerun_nodes(graph, plan.recomputed)
        costs = with_reruns(
            price_once(
                graph,
                self.kind,
                batch_fraction=self._fraction,
                network=self.network,
                ahead=True,
            ),
            rerun,
        )
        forward, backward, per_step = (np.zeros(len(units) + 1) for _ in range(3))
        trains = plan.mode is Mode.TRAIN
        for node, cost in enumerate(costs):
            unit = home.get(self._origin(node))
            if unit is not None:
                forward[unit + 1] += cost.forward_seconds
                backward[unit + 1] += cost.backward_seconds if trains else 0.0
        read_by = users(graph)
        for value in graph.values_of(ValueKind.PARAMETER) if trains else ():
            if value.requires_grad and read_by[value.id]:
                unit = home.get(self._origin(min(read_by[value.id])))
                if unit is not None:
                    each, once = self._parameter_seconds(value.id, value.type.num_bytes)
                    backward[unit + 1] += each
                    per_step[unit + 1] += once
        received, returned = np.zeros(len(units) + 1), np.zeros(len(units) + 1)
        if before is not None:
            received[:-1], returned[:-1] = self._crossing_seconds(units, home, before)
        tables = [_by_run(part) for part in (forward, backward, per_step)]
        computed, both = tables[0] + tables[1], (received + returned)[:, None]
        held = Overlap.of(self.plan.cluster).held
        slower = np.maximum(received, returned)[:, None]
        steady = np.maximum(computed + held * both, slower)
        return StageFigures(computed + both, steady, tables[2], tables[0], tables[1])

    def _origin(self, node: int) -> int:
        """The node of the whole graph that a local one is for."""
        part = self.column.part
        return node if part is None else part.origins[node]

    def _parameter_seconds(self, value: int, num_bytes: int) -> tuple[float, float]:
        """What the update of a parameter and sums of its gradient take, in each backward and once a
        step; of sums beside the last backward the share that is never hidden."""
        found = self.column.context.parameters.get(value) or ParameterFigures(
            num_bytes, 0, num_bytes
        )
        update = optimizer_seconds(
            self.kind,
            self.plan.optimizer,
            parameter_bytes=found.updated_bytes,
            num_parameters=int(self.kind.backend == "cpu"),  # others update all in one go
        )
        exposed = Overlap.of(self.plan.cluster).exposed * found.sum_seconds
        each = found.microbatch_seconds + found.handling_seconds
        return each, update + exposed + found.step_seconds

    def _crossing_seconds(
        self,
        units: Sequence[tuple[int, ...]],
        home: Mapping[int, int],
        before: tuple[int, ...],
    ) -> tuple[Table, Table]:
        """By first unit of the stage, seconds of what it receives, and of the gradients that it
        returns: each rank its part of the whole, or the stage before its own, whichever has fewer
        ranks."""
        graph = self.context.graph
        made_by, read_by = producers(graph), users(graph)
        moved, returned = np.zeros(len(units)), np.zeros(len(units))
        for value in graph.values:
            first = home.get(made_by.get(value.id, -1))
            last = max((home[node] for node in read_by[value.id] if node in home), default=-1)
            if first is not None and last > first:
                moved[first + 1 : last + 1] += value.type.num_bytes
                if value.requires_grad and graph.mode is Mode.TRAIN:
                    returned[first + 1 : last + 1] += value.type.num_bytes
        fraction = self.plan.batch_size / self.plan.num_microbatches / batch_rows(graph)
        width = min(len(before), len(self.devices))
        link = self._slowest_link(before)

        def seconds(size: Table) -> Table:
            sent = size * fraction / width / link.bytes_per_second
            return np.where(size > 0, sent + link.latency_seconds, 0.0)

        return seconds(moved), seconds(returned)

    def _slowest_link(self, before: tuple[int, ...]) -> Link:
        links = [self.plan.cluster.link(a, b) for a in before for b in self.devices]
        return max(links, key=lambda link: link.seconds(_MANY_BYTES))

    def cut(self, index: int, nodes: tuple[int, ...], shared: frozenset[str]) -> Stage:
        """The stage with `nodes`; of parameters that are `shared` with others it has all.

        Raises:
            SplitParameter: the layouts split such a parameter.
        """
        graph, inside = self.context.graph, frozenset(nodes)
        read = {graph.values[v].name for node in nodes for v in graph.nodes[node].inputs}
        parameters = []
        for entry in self.whole.parameter_layouts:
            if entry.value in shared & read:
                self._check_whole(entry)
            elif entry.value in read:
                parameters.append(entry)
        groups = (
            NodeLayout(tuple(n for n in group.nodes if n in inside), group.inputs, group.outputs)
            for group in self.whole.node_layouts
        )
        own = StageMesh(
            self.whole.mesh,
            tuple(entry for entry in self.whole.layouts if entry.value in read),
            tuple(parameters),
            tuple(group for group in groups if group.nodes),
        )
        return Stage(index, self.devices, nodes, own)

    def _check_whole(self, entry: ParameterLayout) -> None:
        if any(not isinstance(item, Replicate) for item in entry.held.placements):
            origin = self.context.graph.by_name()[entry.value].origin
            raise SplitParameter(
                f"several stages use {origin}, which the layouts over {self.whole.mesh} split",
                where="mesh",
                ways_out=(
                    "give stages that share a parameter one device",
                    "give all stages the same mesh, e.g. pipeline=2,tensor=2",
                ),
                parameter=origin,
            )

    def memory(self, own: Stage, stages: Sequence[Stage], in_flight: int) -> list[MemoryPrediction]:
        """What the devices of the stage `own` need, by liveness of its local graph.

        Values from other stages, and gradients, may arrive in larger parts than this graph knows,
        and in pieces: each counts whole, twice, for every microbatch in flight.
        """
        graph, plan = self.column.context.graph, self.column.plan
        local = self.column.narrow(tuple(self._moved(stage) for stage in stages))
        need = stage_memory(
            memory_model(graph, batch_fraction=self._fraction, backend=self.kind.backend),
            local[own.index].nodes,
            in_flight=in_flight,
            optimizer=plan.optimizer,
            mode=plan.mode,
            num_microbatches=plan.num_microbatches,
            consumers=consuming_stages(graph, local),
            recomputed=plan.recomputed,
            parameters=self.column.context.parameters,
        )
        pieces = 2 * in_flight * self._boundary_bytes(own)
        need = replace(need, communication_bytes=need.communication_bytes + pieces)
        return [replace(need, device=device) for device in self.devices]

    def _moved(self, stage: Stage) -> Stage:
        """A stage as if it were on this mesh."""
        devices = self.column.groups[0] if self.column.groups else stage.devices
        return Stage(stage.index, devices, stage.nodes)

    def _boundary_bytes(self, stage: Stage) -> int:
        """Of what crosses the bounds of a stage, for one microbatch, and gradients of it."""
        graph, inside = self.context.graph, frozenset(stage.nodes)
        read_by = users(graph)
        made = {value for node in stage.nodes for value in graph.nodes[node].outputs}
        read = {value for node in stage.nodes for value in graph.nodes[node].inputs}
        crossing = {v for v in read - made if graph.values[v].kind is ValueKind.RESULT}
        crossing |= {v for v in made if any(node not in inside for node in read_by[v])}
        total = sum(graph.values[value].type.num_bytes for value in crossing)
        rows = self.plan.batch_size / self.plan.num_microbatches / batch_rows(graph)
        return round(2 * rows * total)


class OwnStages:
    """Stages on meshes of their own for one graph and cluster; each is made and priced once."""

    def __init__(self, plan: Plan, context: Context) -> None:
        self.plan = plan
        self.context = context
        self.layouts = StageLayouts(plan, context)
        self._units: dict[int, tuple[tuple[int, ...], ...]] = {}
        self._stages: dict[object, OwnStage] = {}
        self._figures: dict[object, StageFigures] = {}

    def units(self, num_stages: int) -> tuple[tuple[int, ...], ...]:
        """What runs are made of, in their order."""
        if num_stages not in self._units:
            options = replace(self.context.options, num_stages=num_stages)
            plan = replace(self.plan, mesh=Mesh(()))
            self._units[num_stages] = state(plan, replace(self.context, options=options)).units
        return self._units[num_stages]

    def stage(self, plan: Plan, mesh: Mesh, devices: tuple[int, ...], zero: int) -> OwnStage:
        """The stage of `plan` on `devices`; see `OwnStage.of`."""
        key = self._key(plan, mesh, devices, zero)
        if key not in self._stages:
            self._stages[key] = OwnStage.of(plan, self.context, self.layouts, mesh, devices, zero)
        return self._stages[key]

    def figures(
        self,
        plan: Plan,
        mesh: Mesh,
        devices: tuple[int, ...],
        zero: int,
        before: tuple[int, ...] | None,
    ) -> StageFigures:
        """Figures of that stage behind one on the devices `before`."""
        key = self._key(plan, mesh, devices, zero), before
        if key not in self._figures:
            units = self.units(plan.mesh.axis(PIPELINE).size)
            self._figures[key] = self.stage(plan, mesh, devices, zero).figures(units, before)
        return self._figures[key]

    def _key(self, plan: Plan, mesh: Mesh, devices: tuple[int, ...], zero: int) -> object:
        stages = plan.mesh.axis(PIPELINE).size
        return stages, plan.num_microbatches, plan.recomputed, mesh, devices, zero


def shared_parameters(graph: Graph, stages: Iterable[Collection[int]]) -> frozenset[str]:
    """Names of parameters that nodes of several stages read."""
    homes: dict[str, set[int]] = defaultdict(set)
    for index, nodes in enumerate(stages):
        for node in nodes:
            for value in graph.nodes[node].inputs:
                if graph.values[value].kind is ValueKind.PARAMETER:
                    homes[graph.values[value].name].add(index)
    return frozenset(name for name, found in homes.items() if len(found) > 1)


def _layouts(
    plan: Plan,
    context: Context,
    layouts: StageLayouts,
    mesh: Mesh,
    devices: tuple[int, ...],
    zero: int,
) -> StageMesh:
    """Layouts of the whole graph over `mesh` on `devices`."""
    if not mesh.axes:
        return StageMesh(mesh)
    piped = Mesh((MeshAxis(PIPELINE, plan.mesh.axis(PIPELINE).size), *mesh.axes))
    choice = layouts.fastest(piped, plan.num_microbatches, devices=devices)
    if choice is None:
        raise InfeasibleError(
            f"no layouts over mesh {mesh} are legal for {plan.num_microbatches} microbatches",
            where="mesh",
            ways_out=("use smaller axes", "use fewer microbatches"),
        )
    found = StageMesh(mesh, choice.layouts, choice.parameter_layouts, choice.node_layouts)
    if zero and mesh.axis(DATA).size > 1:
        sharding = Sharding.of(plan.over(found), context.graph)
        parameters = zero_layouts(context.graph, sharding, DATA, zero)
        found = replace(found, parameter_layouts=parameters)
    return found


def _by_run(units: Table) -> Table:
    """Sums over runs, of figures of single units with a zero before them."""
    total = np.cumsum(units)
    runs: Table = total[None, :] - total[:, None]
    return runs
