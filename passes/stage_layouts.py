"""Layouts inside the stages of a mesh: by size of microbatches, and by the memory that there is.

All stages have the same in-stage mesh, so layouts are chosen for the whole graph, with the memory
of one device of each stage.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

from ..compiler.ir.errors import InfeasibleError
from ..compiler.ir.graph import Mode
from ..compiler.ir.mesh import Mesh
from ..compiler.ir.plan import DATA, PIPELINE, TENSOR, Plan
from ..cost_models.analysis import batch_rows
from ..cost_models.collectives import mesh_network
from ..cost_models.overlap import Overlap
from ..cost_models.parameters import stage_bucket_bytes
from ..cost_models.slowest import slowest_type
from .best_devices import BestDevices
from .columns import stage_devices
from .context import Context
from .layout_pins import held_placements
from .layouts.choose import AxesBefore, LayoutChoice, LayoutFront, Memory
from .layouts.facts import GraphFacts
from .layouts.statement import LayoutOptions
from .partition.devices import used_types
from .pinned import updates_elementwise

__all__ = ["StageLayouts"]

_FEW_CLASSES = 32  # of nodes, in a small graph
_MANY_BYTES = 1e9


class StageLayouts:
    """Chooses layouts for one graph and cluster; each is chosen once."""

    def __init__(self, plan: Plan, context: Context) -> None:
        self.plan = plan
        self.context = context
        self.rows = batch_rows(context.graph)
        self.overlap = Overlap.of(plan.cluster)
        self._fronts: dict[object, LayoutFront | None] = {}
        self._choices: dict[tuple[int, Memory], LayoutChoice | None] = {}
        self._bounds: dict[tuple[int, Memory], float] = {}
        self._axes: dict[object, AxesBefore] = {}
        self._groups: dict[object, tuple[int, ...]] = {}

    @functools.cached_property
    def facts(self) -> GraphFacts:
        return GraphFacts.of(self.context.graph)

    @functools.cached_property
    def is_small(self) -> bool:
        """Whether layouts are chosen so fast that each size of microbatches gets its own."""
        return len(self.facts.classes) <= _FEW_CLASSES

    @functools.cached_property
    def gains_with_size(self) -> bool:
        """Whether a row takes no less time in a smaller microbatch."""
        return all(kind.gains_with_size for kind in self.plan.cluster.types)

    @property
    def memory_bytes(self) -> int:
        """Of one device; of several types, of that which has most."""
        limit = max(kind.memory_bytes for kind in used_types(self.plan.cluster))
        return min(limit, self.context.options.memory_limit_bytes or limit)

    def portion(self, count: int) -> float:
        """Rows of one of `count` microbatches, as a multiple of those that were captured."""
        return self.plan.batch_size / count / self.rows

    # -- choices -----------------------------------------------------------------------------------

    def fastest(
        self,
        mesh: Mesh,
        count: int,
        *,
        bounding: bool = False,
        late: float = 0.0,
        devices: tuple[int, ...] | None = None,
    ) -> LayoutChoice | None:
        """Layouts over the in-stage axes without a limit of memory; None if none are legal.

        Sums of gradients count as hidden by the last backward but for a part, or if they are
        `late`, as all that it cannot hide; with a share between, the mean of both so weighted.

        Args:
            devices: of one stage; None: those of the first.
        """
        front = self._front(mesh, count, bounding=bounding, late=late, devices=devices)
        return self._within(front, Memory())

    def choice_within(
        self,
        mesh: Mesh,
        count: int,
        memory: Memory,
        others: Sequence[LayoutChoice] = (),
        *,
        late: float = 0.0,
    ) -> LayoutChoice | None:
        """The fastest layouts whose additive bound is within `memory`, and that are none of
        `others`."""
        front = self._front(mesh, count, late=late)
        if front is not None and others:
            return front.within(memory, others)
        return self._within(front, memory)

    def _within(self, front: LayoutFront | None, memory: Memory) -> LayoutChoice | None:
        if front is None:
            return None
        key = id(front), memory
        if key not in self._choices:
            self._choices[key] = front.within(memory)
        return self._choices[key]

    def effort(self, mesh: Mesh, count: int) -> int:
        """About what one `choice_within` takes, in no unit."""
        front = self._front(mesh, count)
        return 0 if front is None else front.num_options**2

    def sums_are_late(self, mesh: Mesh, count: int, *, bounding: bool = False) -> bool:
        """Whether sums of gradients may take longer than the last backward, which takes about as
        long as forward, or longer; in the fastest layouts, or those for `bounding`."""
        if self.plan.mode is Mode.INFER or all(axis.name == PIPELINE for axis in mesh.axes):
            return False
        choice = self.fastest(mesh, count, bounding=bounding)
        if choice is None:
            return False
        backward = choice.seconds / 2 * self.portion(count) / self._like(count)
        return choice.sum_seconds > self.overlap.hidden * backward

    def between(self, mesh: Mesh, count: int, *, bounding: bool = False) -> float | None:
        """How late sums are best taken to be, where they are late (see `fastest`): the step takes
        the larger of both forms, so at least any mean of them, and most where the layouts that are
        best by the one or the other form come to the same; None if those are the same."""
        plain, late = (
            self._front(mesh, count, bounding=bounding, late=form) for form in (0.0, 1.0)
        )
        if plain is None or late is None:
            return None
        first, second = plain.fastest.picks, late.fastest.picks
        more = plain.objective(second) - plain.objective(first)
        less = late.objective(first) - late.objective(second)
        return more / (more + less) if more > 0.0 and less > 0.0 else None

    def _front(
        self,
        mesh: Mesh,
        count: int,
        *,
        bounding: bool = False,
        late: float = 0.0,
        devices: tuple[int, ...] | None = None,
        rounds: float | None = None,
        before: AxesBefore | None = None,
    ) -> LayoutFront | None:
        if mesh.axis(TENSOR).size > 1 and not updates_elementwise(self.plan.optimizer.name):
            return None
        inner = Mesh(tuple(axis for axis in mesh.axes if axis.name != PIPELINE))
        like = self._like(count)
        rounds = rounds or self._rounds(mesh, count)
        spread = self._spread(mesh, count, bounding=bounding, rounds=rounds)
        gathers = bounding and self._may_gather(mesh)
        shared = self._gathered_share(mesh, rounds) if gathers else math.inf
        usual = self._spread(mesh, count, bounding=False)
        bucket = self._bucket_bytes(mesh)
        devices = self._alike(inner, devices or stage_devices(mesh)[0])
        key = (str(inner), devices, like, spread, usual, late, late and rounds, shared, bucket)
        if key not in self._fronts:
            plain = LayoutOptions(
                num_microbatches=usual,
                batch_fraction=like,
                optimizer=self.plan.optimizer,
                update_share=self._update_share(mesh),
                bucket_bytes=bucket,
                held=held_placements(self.context.graph, self.context.options.layout_pins, inner),
            )
            options = replace(
                plain,
                num_microbatches=spread,
                sum_share=min((1.0 - late) * self.overlap.exposed + late, shared),
                backward_share=1.0 - late * self.overlap.hidden / rounds,
            )
            try:
                before = before or self._before(inner, devices, plain)
                self._fronts[key] = LayoutFront.of(
                    self.facts, inner, self.plan.cluster, devices, options, before
                )
            except InfeasibleError:
                self._fronts[key] = None
        return self._fronts[key]

    def _alike(self, inner: Mesh, devices: tuple[int, ...]) -> tuple[int, ...]:
        """The first devices asked for that are as fast as these and as well linked."""
        network = mesh_network(self.plan.cluster, inner, devices)
        links = tuple(network.ring(axis.name) for axis in inner.axes)
        key = inner, slowest_type(self.plan.cluster, devices).name, links
        return self._groups.setdefault(key, devices)

    def _before(self, inner: Mesh, devices: tuple[int, ...], options: LayoutOptions) -> AxesBefore:
        """What is decided over all in-stage axes but the last; the same for plans and bounds."""
        key = (
            str(inner),
            devices,
            options.batch_fraction,
            options.num_microbatches,
            options.bucket_bytes,
        )
        if key not in self._axes:
            self._axes[key] = AxesBefore.decide(
                self.facts, inner, self.plan.cluster, devices, options
            )
        return self._axes[key]

    def _bucket_bytes(self, mesh: Mesh) -> float:
        """Infinite where backward hides latencies, whatever buckets there are."""
        if self.overlap.hidden == 1.0:
            return math.inf
        return stage_bucket_bytes(self.context.graph, mesh.axis(PIPELINE).size)

    def _like(self, count: int) -> float:
        """Microbatches of like size share layouts: `portion` up to the next power of four; in a
        small graph itself, and where prices of more rows say nothing about fewer."""
        if self.is_small or not self.gains_with_size:
            return self.portion(count)
        return 4.0 ** math.ceil(math.log(self.portion(count), 4) - 1e-9)

    def _rounds(self, mesh: Mesh, count: int) -> float:
        """Microbatches that a step takes with fill and drain of the pipeline."""
        return mesh.axis(PIPELINE).size + count - 1

    def _spread(
        self, mesh: Mesh, count: int, *, bounding: bool = True, rounds: float | None = None
    ) -> float:
        """Microbatches of like size that a step takes, fill and drain of the pipeline included,
        over which is spread what is done once a step: unless it is for `bounding` or in a small
        graph, to the nearest power of two."""
        rounds = rounds or self._rounds(mesh, count)
        spread = rounds * self.portion(count) / self._like(count)
        if bounding or self.is_small or not self.gains_with_size:
            return spread
        return float(1 << max(0, round(math.log2(spread))))

    def gathers_are_fast(self, mesh: Mesh, count: int) -> bool:
        """Whether gathering parameters may take less than summing their gradients, so that ZeRO 3
        may be the fastest even where others fit."""
        rounds = self._rounds(mesh, count)
        is_open = self.context.options.zero is None and self._may_gather(mesh)
        return is_open and self._gathered_share(mesh, rounds) < math.inf

    def _may_gather(self, mesh: Mesh) -> bool:
        """Whether ZeRO 3 is to be had."""
        options, data = self.context.options, mesh.axis(DATA).size
        has_parts = data > 1 and options.zero in (None, 3) and self.plan.mode is Mode.TRAIN
        return has_parts and updates_elementwise(self.plan.optimizer.name)

    def _gathered_share(self, mesh: Mesh, rounds: float) -> float:
        """Of what sums of gradients over the data axis take, the share that ZeRO 3 takes instead,
        at least; infinite where it takes as long."""
        inner = Mesh(tuple(axis for axis in mesh.axes if axis.name != PIPELINE))
        network = mesh_network(self.plan.cluster, inner, stage_devices(mesh)[0])
        waits_at_once = network.waiting_seconds(DATA, "all_gather") > 0.0
        bucket = self._bucket_bytes(mesh) if waits_at_once else math.inf
        summed = network.sum_bytes_seconds(DATA, _MANY_BYTES, bucket)
        share = rounds * network.share_bytes_seconds(DATA, _MANY_BYTES) / summed if summed else 1.0
        latency = network.bucket_latency_seconds(DATA)
        if latency and not waits_at_once:
            share = min(share, rounds * network.share_seconds(DATA, 0.0) / latency)
        return share if share < 1.0 - 1e-9 else math.inf

    def _update_share(self, mesh: Mesh) -> float:
        """What a rank updates of what it holds, if the ranks of the data axis may share it."""
        shares = self.context.options.zero != 0 and updates_elementwise(self.plan.optimizer.name)
        return 1.0 / mesh.axis(DATA).size if shares else 1.0

    # -- bytes -------------------------------------------------------------------------------------

    def memory(
        self,
        mesh: Mesh,
        count: int,
        limit_bytes: int | None,
        *,
        zero: int,
        offload: bool,
        bounding: bool = False,
    ) -> Memory:
        """Of one device of each stage, `limit_bytes` each, as bytes count with ZeRO of level `zero`
        and states that are to `offload`; for choices, or for `bounding` them."""
        stages = mesh.axis(PIPELINE).size
        spread = self._spread(mesh, count, bounding=bounding)
        return Memory(
            limit_bytes=None if limit_bytes is None else stages * limit_bytes,
            in_flight=min(stages, count) * self.portion(count),
            trained_share=self._trained_share(mesh, zero, offload=offload),
            input_share=count * self.portion(count) / (spread * self._like(count)),
        )

    def _trained_share(self, mesh: Mesh, zero: int, *, offload: bool) -> float:
        """What a rank holds of parameters, gradients and states, as a share of what it would
        without ZeRO and offload."""
        states = self.plan.optimizer.state_bytes_per_parameter_byte
        whole = 2.0 + states
        parts = mesh.axis(DATA).size
        parameters, gradients = (1.0 / parts if zero >= level else 1.0 for level in (3, 2))
        if offload:
            states = 0.0
        return (parameters + gradients + (states / parts if zero else states)) / whole

    # -- bounds ------------------------------------------------------------------------------------

    def lower_bound(
        self,
        mesh: Mesh,
        count: int,
        memory: Memory | None = None,
        *,
        enough: float = math.inf,
    ) -> float:
        """No plan on `mesh` with `count` microbatches is faster, whatever its layouts; with
        `memory`, none whose bytes from forward to backward are within it.

        With t the seconds of a microbatch through all stages and u those of the update and of sums
        of gradients as far as they are exposed, the step takes (p + m - 1) / p t + u / p at least,
        as the slowest stage takes no less than the mean. Exposed are most of what one backward
        cannot hide, and a part in any case (`cost_models/overlap.py`); each gives a bound, and a
        mean of both another one. Layouts
        are chosen for t of as many rows or more, which take no more time a row, and for the share
        of the update that is left with ZeRO. Recomputation, and ZeRO beyond that, only add; where
        gathers are so much faster than sums that ZeRO 3 would not, sums count for less. Where
        stages have unlike devices, layouts are chosen on those of `best_devices.py`.

        Args:
            enough: a bound of so much need not be raised any further.
        """
        if all(axis.name == PIPELINE for axis in mesh.axes):
            return 0.0
        if not self._stages_are_alike(mesh):
            return self._bound_on_best(mesh, count)
        least, rounds = 0.0, self._of_step(mesh, count)
        for form in (0.0, 1.0, None):
            if form != 0.0 and (
                rounds * least >= enough or not self.sums_are_late(mesh, count, bounding=True)
            ):
                break
            late = self.between(mesh, count, bounding=True) if form is None else form
            if late is None:
                break
            choice = self.fastest(mesh, count, bounding=True, late=late)
            front = self._front(mesh, count, bounding=True, late=late)
            if choice is None or front is None:
                return math.inf
            least = max(least, choice.lower_bound)
            if memory is not None:
                least = max(least, self._bound_within(front, memory))
        return rounds * least

    def _bound_on_best(self, mesh: Mesh, count: int) -> float:
        """Of stages on unlike devices, whatever the memory; nothing is known where there is no
        fastest type. What is decided before the last axis is so on the devices that there are."""
        if self._best is None:
            return 0.0
        real = self._front(mesh, count)
        if real is None:
            return math.inf
        devices, layouts = self._best
        rounds = devices.rounds(self.plan.cluster, stage_devices(mesh), count)
        front = layouts._front(mesh, count, bounding=True, rounds=rounds, before=real.before)
        if front is None:
            return math.inf
        spread = layouts._spread(mesh, count, rounds=rounds)
        return spread / mesh.axis(PIPELINE).size * front.fastest.lower_bound

    @functools.cached_property
    def _best(self) -> tuple[BestDevices, StageLayouts] | None:
        devices = BestDevices.of(self.plan.cluster)
        if devices is None:
            return None
        plan = replace(self.plan, cluster=devices.cluster)
        layouts = StageLayouts(plan, self.context)
        layouts.facts = self.facts
        return devices, layouts

    def _bound_within(self, front: LayoutFront, memory: Memory) -> float:
        """Infinite too, without another look, where it is so within more memory."""
        key = id(front), memory
        if key not in self._bounds:
            is_starved = any(
                bound == math.inf and known == id(front) and memory.is_within(more)
                for (known, more), bound in self._bounds.items()
            )
            self._bounds[key] = math.inf if is_starved else front.lower_bound(memory)
        return self._bounds[key]

    def _stages_are_alike(self, mesh: Mesh) -> bool:
        cluster = self.plan.cluster
        if len(used_types(cluster)) == 1:
            return True
        return len({slowest_type(cluster, group) for group in stage_devices(mesh)}) == 1

    def least_seconds(self, mesh: Mesh, count: int, choice: LayoutChoice) -> float:
        """No stages of a plan with the layouts `choice` take less, likewise."""
        return self._of_step(mesh, count) * choice.objective

    def _of_step(self, mesh: Mesh, count: int) -> float:
        return self._spread(mesh, count) / mesh.axis(PIPELINE).size
