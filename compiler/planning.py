"""A model with a call and a cluster: capture it at the sizes that are asked for, search plans.

A graph is captured at the size of one microbatch, and what that is, is a decision. So a plan is
searched on a first guess, and searched again, under the mesh and the number of microbatches that
were found, on a graph captured at that size. Where times are to be measured, that is repeated
(`replan.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..passes.context import Measured, PlanOptions
from ..passes.pinned import check_pinned, mesh_is_open
from ..passes.pipeline import plan_graph
from ..passes.place import check_placement
from ..runtime.launcher import cache_directory
from .batch import Call, batch_size, take_rows
from .block_times import BlockTimes, BlockWorkers, Measurer, ProfileOptions
from .capture import Captured, capture
from .capture.signature import LossFunction
from .ir.cluster import Cluster
from .ir.counts import divisors
from .ir.errors import CaptureError, UsageError
from .ir.graph import Mode
from .ir.plan import DATA, PIPELINE, Objective, Plan
from .place_measured import place_measured
from .profile import NodeTimes, NotMeasured
from .profile_database import ProfileDatabase
from .replan import search_measured

__all__ = ["Planning"]

_A_STAGE = 4  # microbatches
_A_DEVICE = 8  # microbatches, in a stream


@dataclass(slots=True)
class Planning:
    """What plans are searched for; graphs that were captured are kept, by number of microbatches.

    Args:
        call: with the global batch.
        check: compare captured gradients with the model's own.
        say: receives one line a phase.
        profile: what is measured; None: nothing.
        measurer: what measures.
    """

    model: nn.Module
    call: Call
    cluster: Cluster
    mode: Mode
    loss_fn: LossFunction | None
    check: bool
    say: Callable[[str], None]
    profile: ProfileOptions | None = None
    measurer: Callable[[Cluster, ProfileOptions], Measurer] = BlockWorkers
    graphs: dict[int, Captured] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return batch_size(*self.call)

    def captured(self, num_microbatches: int) -> Captured:
        """The model at the size of one of so many microbatches.

        Raises:
            CaptureError: see `capture`; or the model computes nothing.
        """
        if num_microbatches not in self.graphs:
            rows = self.rows // num_microbatches
            args, kwargs = take_rows(self.call, rows)
            name = type(self.model).__name__
            self.say(f"capture {name} at {rows} rows a microbatch")
            found = capture(
                self.model, args, kwargs, mode=self.mode, loss_fn=self.loss_fn, check=self.check
            )
            if not found.graph.nodes:
                raise CaptureError(
                    "the model computes nothing from its inputs: there is nothing to partition",
                    where=f"model {name}",
                    ways_out=("pass a model with at least one operator on tensors",),
                )
            self.graphs[num_microbatches] = found
        return self.graphs[num_microbatches]

    def search(self, options: PlanOptions) -> tuple[Captured, Plan]:
        """The fastest plan under `options`, and the graph that it is for.

        Raises:
            CaptureError, InfeasibleError, UsageError: see `plan_model`.
        """
        profile = self.profile
        if profile is not None and options.stage_meshes:
            raise UsageError(
                f"profile = {profile.kind!r} measures blocks over one mesh, and stages have meshes "
                "of their own",
                where="profile",
                ways_out=("leave profile out", "give all stages the same mesh"),
            )
        if profile is None or self._measures_nodes(options):
            return self.search_once(options)
        options = replace(options, one_mesh=True)
        measurer = self.measurer(self.cluster, profile)
        times = BlockTimes(
            self.cluster, profile, ProfileDatabase(cache_directory()), measurer, self.say
        )
        try:
            return search_measured(self, options, times)
        finally:
            times.close()

    def search_once(self, options: PlanOptions) -> tuple[Captured, Plan]:
        """As `search`, by the times that the cluster says."""
        if options.objective is not Objective.STEP:
            return self._placed(options)
        check_pinned(self.cluster, self.mode, options)
        count = self.first_count(options)
        captured = self.captured(count)
        plan = self._plan(captured, options)
        if plan.num_microbatches == count:
            return captured, plan
        captured = self.captured(plan.num_microbatches)
        pinned = replace(options, num_microbatches=plan.num_microbatches, **_meshes(plan))
        return captured, _joined(plan, self._plan(captured, pinned))

    def _placed(self, options: PlanOptions) -> tuple[Captured, Plan]:
        """Operators placed one by one, at the microbatches asked for or guessed."""
        check_placement(self.mode, options)
        count = self.first_count(options)
        captured = self.captured(count)
        options = replace(options, num_microbatches=count)
        warnings = self._crowding()
        if self._measures_nodes(options):
            database = ProfileDatabase(cache_directory())
            try:
                plan, _ = self.placed_by_measuring(captured, options, database)
                return captured, replace(plan, warnings=(*plan.warnings, *warnings))
            except NotMeasured as error:
                cause = f"operators could not be measured, times are predicted ones: {error}"
                self.say(cause)
                warnings = (*warnings, cause)
        plan = self._plan(captured, options)
        return captured, replace(plan, warnings=(*plan.warnings, *warnings))

    def placed_by_measuring(
        self, captured: Captured, options: PlanOptions, database: ProfileDatabase
    ) -> tuple[Plan, Measured]:
        """The operators of `captured` placed by times measured here, and these times.

        Args:
            database: of times that are known.

        Raises:
            NotMeasured: the memory of a device does not suffice to run all operators.
        """
        profile = self.profile or ProfileOptions("ops")
        times = NodeTimes(captured, self.cluster, database, self.say, profile.cuda_graphs)
        try:
            return place_measured(
                captured.graph, options, times, lambda now: self._plan(captured, now), self.say
            )
        finally:
            times.close()

    def _measures_nodes(self, options: PlanOptions) -> bool:
        """Whether every node is measured in its place, as for placing single operators."""
        wanted = self.profile is not None and self.profile.kind == "ops"
        return wanted and options.objective is not Objective.STEP

    def _crowding(self) -> tuple[str, ...]:
        """A warning where CPU workers have more threads than this machine has cores."""
        threads = [self.cluster.type_of(device.index).threads for device in self.cluster.devices]
        wanted, cores = sum(filter(None, threads)), os.cpu_count() or 1
        if not self.cluster.local or wanted <= cores:
            return ()
        return (
            f"workers have {wanted} threads on {cores} cores: they will wait for each other inside "
            "operators, which no figure of this plan counts",
        )

    def _plan(self, captured: Captured, options: PlanOptions) -> Plan:
        return plan_graph(
            captured.graph, self.cluster, batch_size=self.rows, options=options, progress=self.say
        )

    def first_count(self, options: PlanOptions) -> int:
        """The number of microbatches asked for, or a first guess: up to eight a device.

        Where a data axis may split the rows of a microbatch, it has one for each device. On a mesh
        that is asked for, it is four a stage: the middle of the numbers that are priced.
        """
        legal = divisors(self.rows)
        wanted = options.num_microbatches
        if wanted is None:
            devices = len(self.cluster.devices)
            if options.objective is Objective.LATENCY:
                return 1
            if options.objective is Objective.THROUGHPUT:
                return max(count for count in legal if count <= _A_DEVICE * devices)
            target = devices * (8 if self.mode is Mode.TRAIN else 1)
            if options.mesh is not None:
                data = options.mesh.axis(DATA).size
                legal = tuple(n for n in legal if self.rows // n % data == 0) or legal
                target = _A_STAGE * options.mesh.axis(PIPELINE).size
            elif options.stage_meshes:
                data = math.lcm(*(mesh.axis(DATA).size for mesh in options.stage_meshes))
                legal = tuple(n for n in legal if self.rows // n % data == 0) or legal
                target = _A_STAGE * len(options.stage_meshes)
            elif mesh_is_open(self.cluster, options):
                target = max(1, self.rows // devices)
            return max(count for count in legal if count <= max(1, target))
        if wanted not in legal:
            raise UsageError(
                f"num_microbatches = {wanted} does not divide the batch of {self.rows} rows "
                f"({self.rows} % {wanted} = {self.rows % wanted})"
                if wanted > 0
                else f"num_microbatches = {wanted} is not positive",
                ways_out=(f"legal counts here: {', '.join(map(str, legal))}",),
            )
        return wanted


def _meshes(plan: Plan) -> dict[str, Any]:
    """The fields of `PlanOptions` that ask for the meshes of `plan`."""
    own = tuple(stage.own.mesh for stage in plan.stages if stage.own is not None)
    return {"stage_meshes": own} if own else {"mesh": plan.mesh}


def _joined(searched: Plan, plan: Plan) -> Plan:
    """`plan`, found under the mesh and microbatches of `searched`, with what was searched before.

    Costs scale with rows, so bounds hold for either graph.
    """
    before, now = searched.certificate, plan.certificate
    assert before is not None and now is not None
    bound = min(before.lower_bound, now.objective)
    certificate = replace(
        now,
        lower_bound=bound,
        gap=max(0.0, 1.0 - bound / now.objective) if now.objective else 0.0,
        search_space=before.search_space,
    )
    return replace(plan, certificate=certificate, alternatives=searched.alternatives)
