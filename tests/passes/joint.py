"""Every plan of a small graph on few devices, to hold the search over meshes to.

Meshes data x pipeline x tensor, microbatches, layouts over every in-stage axis, levels of ZeRO and
cuts into stages are enumerated and priced by the planner's own cost models: a plan counts if each
of its stages fits by liveness. Layouts come in the order of a bound on their step, so that those
that cannot win are not looked at.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cutset.compiler.ir.cluster import Cluster
from cutset.compiler.ir.counts import divisors
from cutset.compiler.ir.fingerprint import fingerprint
from cutset.compiler.ir.graph import Graph, Mode, Value
from cutset.compiler.ir.mesh import Layout, Mesh, local_type
from cutset.compiler.ir.plan import DATA, PIPELINE, TENSOR, Plan, ValueLayout
from cutset.compiler.sharding.sharding import make_sharding
from cutset.compiler.sharding.zero import zero_layouts
from cutset.cost_models.analysis import batch_rows
from cutset.cost_models.collectives import mesh_network
from cutset.cost_models.overlap import LEAST_EXPOSED
from cutset.cost_models.stages import optimizer_seconds
from cutset.passes.columns import column_of, stage_devices
from cutset.passes.context import Context, PlanOptions
from cutset.passes.layouts.choose import node_layouts, parameter_layout
from cutset.passes.layouts.facts import GraphFacts
from cutset.passes.layouts.from_graph import state_layouts
from cutset.passes.layouts.pricing import Pricer
from cutset.passes.layouts.problem import Figures, Option, figures
from cutset.passes.layouts.statement import Decided, LayoutOptions, LayoutStatement
from cutset.passes.mesh_space import meshes
from cutset.passes.partition.fitting import Needs, with_memory
from cutset.passes.partition.from_graph import state_problem
from cutset.passes.partition.objective import excess_bytes, step_seconds
from cutset.passes.partition.prepare import stage_counts, state
from cutset.passes.partition.problem import Assignment, StageProblem
from cutset.passes.recompute import choose_recompute
from tests.ir.builders import GraphBuilder
from tests.passes.layouts.brute import legal_picks

__all__ = ["Optimum", "best_plan", "random_graph"]


_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Optimum:
    """The fastest plan that fits, and how many were priced."""

    seconds: float
    mesh: str
    num_microbatches: int
    zero: int
    num_priced: int


def random_graph(seed: int, num_layers: int, *, plain: bool = False) -> Graph:
    """Linear layers of random widths with activations, skips and branches, unless it is to be
    `plain`, and a sum for a loss."""
    draw = random.Random(seed)
    build = GraphBuilder(f"random{seed}", Mode.TRAIN)
    width = draw.choice((64, 128, 256))
    x = build.input("x", (draw.choice((32, 256, 1024)), width))
    live: list[Value] = [x]
    for number in range(num_layers):
        source = draw.choice(live[-2:])
        wide = draw.choice((width, 64, 256, 512))
        weight = build.parameter(f"w{number}", (wide, source.type.shape[1]))
        made = build.op("aten.linear.default", source, weight)
        if draw.random() < 0.4 and not plain:
            made = build.op("aten.relu.default", made)
        alike = [value for value in live if value.type == made.type]
        if alike and draw.random() < 0.6 and not plain:
            made = build.op("aten.add.Tensor", made, draw.choice(alike))
        live.append(made)
    build.loss(build.op("aten.sum.default", live[-1]))
    return build.build()


def best_plan(
    graph: Graph, cluster: Cluster, batch: int, options: PlanOptions, most: float = math.inf
) -> Optimum | None:
    """The fastest of all plans that fit and take at most `most` seconds a step; None if there is
    none."""
    return _Enumeration(graph, cluster, batch, options, most).run()


class _Enumeration:
    def __init__(
        self, graph: Graph, cluster: Cluster, batch: int, options: PlanOptions, most: float
    ) -> None:
        self.most = most * (1 + 3 * _ROUNDING)
        self.context = Context(graph, options)
        self.facts = GraphFacts.of(graph)
        self.graph = graph
        self.start = Plan(
            fingerprint=fingerprint(graph, graph.name),
            cluster=cluster,
            mode=graph.mode,
            batch_size=batch,
            optimizer=options.optimizer,
        )
        self.best: Optimum | None = None
        self.num_priced = 0
        auto = options.recompute == "auto"
        kinds = ("none", "selective", "full") if auto else (options.recompute,)
        self.recomputed = [choose_recompute(graph, kind) for kind in kinds]

    def run(self) -> Optimum | None:
        """All meshes, those whose fastest layouts promise most first."""
        spaces = []
        for mesh in self.meshes():
            for count in divisors(self.start.batch_size):
                if self.start.batch_size // count % mesh.axis(DATA).size == 0:
                    spaces.append(_Space.of(self, mesh, count))
        for space in sorted(spaces, key=lambda space: space.least):
            self.search(space)
        return None if self.best is None else replace(self.best, num_priced=self.num_priced)

    def meshes(self) -> Iterator[Mesh]:
        """One order of axes each: all links are alike."""
        seen = set()
        pinned = self.context.options.mesh
        every = meshes(len(self.start.cluster.devices), batch_rows(self.graph))
        for mesh in every if pinned is None else (pinned,):
            sizes = tuple(mesh.axis(name).size for name in (DATA, PIPELINE, TENSOR))
            if sizes not in seen:
                seen.add(sizes)
                yield mesh

    def search(self, space: _Space) -> None:
        pinned = self.context.options.zero
        every = (0, 1, 2, 3) if pinned is None else (pinned,)
        levels = every if space.plan.mesh.axis(DATA).size > 1 else (0,)
        limit = self.start.cluster.types[0].memory_bytes
        for bound, held_bytes, decided in space.layouts:
            if bound >= self.best_seconds * (1 - _ROUNDING):
                return
            if held_bytes > limit:
                continue
            for level in levels:
                plan = space.plan
                if decided is not None:
                    plan = self.laid_out(plan, decided, level)
                for recomputed in self.recomputed:
                    self.price(replace(plan, recomputed=recomputed), level)

    @property
    def best_seconds(self) -> float:
        return self.most if self.best is None else self.best.seconds

    def layouts(
        self, plan: Plan, number: int, decided: Decided
    ) -> Iterator[tuple[Figures, Decided]]:
        """All layouts over the in-stage axes from `number` on."""
        axes = plan.stage_mesh.axes
        mesh = Mesh(axes[: number + 1])
        devices = stage_devices(plan.mesh)[0]
        network = mesh_network(plan.cluster, plan.stage_mesh, devices)
        fraction = plan.batch_size / plan.num_microbatches / batch_rows(self.graph)
        kind = plan.cluster.types[0]
        pricer = Pricer(self.facts, mesh, kind, network, fraction)
        options = LayoutOptions(num_microbatches=plan.num_microbatches, batch_fraction=fraction)
        stated = state_layouts(LayoutStatement(self.graph, mesh, decided, options), pricer)
        # axes to come divide the work perfectly at best, ranks of the data axis share the update
        to_come = math.prod(axis.size for axis in axes[number + 1 :])
        stages, data = plan.mesh.axis(PIPELINE).size, plan.mesh.axis(DATA).size
        rounds = (stages + plan.num_microbatches - 1) / stages

        def weight(option: Option) -> float:
            return option.seconds + option.step_seconds / data / stages / rounds

        most = self.best_seconds * to_come / rounds
        for picks in legal_picks(stated.problem, weight, most):
            found = figures(stated.problem, picks)
            if number + 1 == len(axes):
                yield found, stated.decode(picks)
            else:
                yield from self.layouts(plan, number + 1, stated.decode(picks))

    def trained_bytes(self, plan: Plan, decided: Decided) -> int:
        """Of the parameters that a rank holds and trains."""
        first = (0,) * len(plan.stage_mesh.axes)
        return sum(
            local_type(value.type, Layout(decided.held[value.id]), plan.stage_mesh, first).num_bytes
            for value in self.graph.values
            if value.requires_grad and value.id in decided.held
        )

    def update_seconds(self, held: int) -> float:
        """Of updating so many bytes, launches not counted."""
        kind, optimizer = self.start.cluster.types[0], self.start.optimizer
        once, twice = (optimizer_seconds(kind, optimizer, parameter_bytes=n * held) for n in (1, 2))
        return twice - once

    def laid_out(self, plan: Plan, decided: Decided, level: int) -> Plan:
        held = [self.graph.values[index] for index in decided.held]
        nodes = node_layouts(self.graph, decided)
        parameters = tuple(
            parameter_layout(value.name, decided, value.id) for value in held if value.requires_grad
        )
        given = tuple(
            ValueLayout(value.name, Layout(decided.held[value.id]))
            for value in held
            if not value.requires_grad
        )
        if level:
            sharding = make_sharding(self.graph, plan.stage_mesh, nodes, given, parameters)
            parameters = zero_layouts(self.graph, sharding, DATA, level)
        return replace(plan, node_layouts=nodes, layouts=given, parameter_layouts=parameters)

    def price(self, plan: Plan, level: int) -> None:
        """Every cut of `plan` into stages, on any of the devices."""
        column = column_of(plan, self.context)
        statement = state(column.plan, column.context)
        stages = plan.mesh.axis(PIPELINE).size
        if plan.stage_mesh.axes and len(statement.units) < stages:
            return
        problem = state_problem(statement, plan.num_microbatches)
        needs, generous = Needs.of(statement, problem), with_memory(problem, 1.25)
        for count in stage_counts(column.plan, column.context, len(statement.units)):
            for cut in itertools.product(range(count), repeat=len(problem.units)):
                if len(set(cut)) < count or any(cut[a] > cut[b] for a, b in problem.edges()):
                    continue
                for classes in _orders(problem, count):
                    self.num_priced += 1
                    assignment = Assignment(cut, classes)
                    seconds = step_seconds(problem, assignment)
                    if seconds >= self.best_seconds:
                        continue
                    if not plan.stage_mesh.axes and excess_bytes(generous, assignment) > 0:
                        continue  # beyond what the certificate of stages says it covers
                    limits = [problem.classes[cls].memory_bytes for cls in classes]
                    found = needs.by_liveness(assignment)
                    if all(n.total_bytes <= m for n, m in zip(found, limits, strict=True)):
                        mesh = str(plan.mesh)
                        self.best = Optimum(seconds, mesh, plan.num_microbatches, level, 0)


def _orders(problem: StageProblem, count: int) -> Iterator[tuple[int, ...]]:
    """Every class of device for each of `count` stages."""
    for classes in itertools.product(range(len(problem.classes)), repeat=count):
        if all(classes.count(i) <= len(c.devices) for i, c in enumerate(problem.classes)):
            yield classes


@dataclass(frozen=True, slots=True)
class _Space:
    """Layouts of one mesh and number of microbatches, by a bound of their step, with bytes that a
    device holds at least; None if there is nothing to lay out."""

    plan: Plan
    layouts: tuple[tuple[float, float, Decided | None], ...]

    @property
    def least(self) -> float:
        return self.layouts[0][0] if self.layouts else math.inf

    @staticmethod
    def of(search: _Enumeration, mesh: Mesh, count: int) -> _Space:
        plan = replace(search.start, mesh=mesh, num_microbatches=count)
        if not plan.stage_mesh.axes:
            return _Space(plan, ((0.0, 0.0, None),))
        stages, data = mesh.axis(PIPELINE).size, mesh.axis(DATA).size
        states = 2 + plan.optimizer.state_bytes_per_parameter_byte  # with the gradient
        rows = []
        for found, decided in search.layouts(plan, 0, Decided.nothing(search.graph)):
            # work divided evenly among stages, filled and drained; ZeRO shares the update, and
            # its last level gathers instead of summing
            bound = found.seconds * (stages + count - 1) / stages
            held = search.trained_bytes(plan, decided)
            update = search.update_seconds(held)
            summed = LEAST_EXPOSED * found.sum_seconds
            bound += (found.step_seconds - summed - update + update / data) / stages
            rows.append((bound, states * held / stages / data, decided))
        rows.sort(key=lambda row: row[:2])
        return _Space(plan, tuple(rows))
