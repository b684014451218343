"""Train a model partitioned and unpartitioned and measure how far apart the two are."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cutset.compiler.batch import signature_of, take_rows
from cutset.compiler.capture import Captured, capture
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.mesh import Mesh, MeshAxis, parse_stage_meshes
from cutset.compiler.ir.plan import OptimizerModel, Plan, Stage, StageMesh
from cutset.compiler.ir.schedule import Action
from cutset.compiler.measure import MeasuredRun, measure_training
from cutset.compiler.parallel import Parallel, RunOptions
from cutset.compiler.planned import PlannedModel, build_programs
from cutset.compiler.reference import ReferenceRun, WorstError, relative_errors, train_reference
from cutset.cost_models import parse_devices
from cutset.passes.context import PlanOptions
from cutset.passes.pipeline import plan_graph
from cutset.runtime.session import Session
from tests.models.exact import IN_FLOAT32, ROWS, ExactModel
from tests.sharding.choices import Layouts, flowing_layouts, random_layouts, zero_layouts_of

__all__ = [
    "Numerics",
    "Subject",
    "adamw64",
    "in_stage",
    "layouts_over",
    "sgd32",
    "sharded_tolerance_of",
    "spread",
    "with_meshes",
]

STEPS = 3
SEED = 5


@dataclass(frozen=True, slots=True)
class Numerics:
    """In which precision, under which optimizer, and how exact.

    Args:
        gain: what a step makes of a gradient that is rounding alone, as a multiple of it; None: no
            more than of others.
    """

    dtype: torch.dtype
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    state_ratio: float
    tolerance: float
    gain: float | None = None


_RATE, _EPS = 1e-3, 1e-8
_FLOOR, _NOISE = 0.01, 1e-12  # shares of the largest gradient: see `Subject.errors`
adamw64 = Numerics(
    torch.float64, lambda p: torch.optim.AdamW(p, lr=_RATE, eps=_EPS), 2.0, 1e-10, _RATE / _EPS
)
sgd32 = Numerics(torch.float32, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), 1.0, 1e-5)


class Subject:
    """One model in one precision: captured once, trained under many plans."""

    def __init__(
        self,
        make: Callable[[], ExactModel],
        numerics: Numerics,
        *,
        num_microbatches: int = 2,
        clip_grad_norm: float | None = None,
        device: str = "cpu",
    ) -> None:
        _compute_exactly()
        torch.manual_seed(SEED)
        made = make()
        self.numerics = numerics
        self.device = device
        self.clip = clip_grad_norm
        self.count = num_microbatches
        self.model = made.model.to(numerics.dtype).train()
        self.loss_fn = made.loss_fn
        self.args = tuple(_cast(item, numerics.dtype) for item in made.args)
        self.kwargs = {name: _cast(item, numerics.dtype) for name, item in made.kwargs.items()}
        self.micro = take_rows((self.args, self.kwargs), ROWS // num_microbatches)
        self.captured: Captured = capture(
            self.model, *self.micro, mode=Mode.TRAIN, loss_fn=self.loss_fn
        )
        self._reference: ReferenceRun | None = None

    @property
    def reference(self) -> ReferenceRun:
        """The unpartitioned run, computed once."""
        if self._reference is None:
            self._reference = train_reference(
                copy.deepcopy(self.model).to(self.device),
                _moved(self.args, self.device),
                _moved(self.kwargs, self.device),
                loss_fn=self.loss_fn,
                optimizer=self.numerics.optimizer,
                num_microbatches=self.count,
                steps=STEPS,
                seed=SEED,
                clip_grad_norm=self.clip,
            )
        return self._reference

    def planned(
        self,
        num_stages: int,
        schedule: str,
        mesh: Mesh | None = None,
        layouts: Layouts | None = None,
        recompute: str = "none",
    ) -> PlannedModel:
        """A plan with so many stages, with `layouts` over the in-stage `mesh`."""
        plan = plan_graph(
            self.captured.graph,
            parse_devices(f"cpu:{num_stages}"),
            batch_size=ROWS,
            options=PlanOptions(
                num_stages=num_stages,
                num_microbatches=self.count,
                schedule=schedule,
                recompute=recompute,
                optimizer=OptimizerModel("test", self.numerics.state_ratio),
            ),
        )
        if mesh is not None and layouts is not None:
            plan = spread(plan, mesh, layouts)
        return self.bound(plan)

    def bound(self, plan: Plan) -> PlannedModel:
        """`plan` with its programs, ready to run."""
        programs = build_programs(self.captured, plan, self.clip)
        return PlannedModel(
            model=self.model,
            captured=self.captured,
            plan=plan,
            programs=programs,
            call=(self.args, self.kwargs),
            loss_fn=self.loss_fn,
            call_signature=signature_of(self.micro),
            training=True,
        )

    def run(
        self,
        num_stages: int,
        schedule: str,
        session: Session,
        mesh: Mesh | None = None,
        layouts: Layouts | None = None,
        recompute: str = "none",
    ) -> MeasuredRun:
        """Train under a plan with so many stages on `session`."""
        planned = self.planned(num_stages, schedule, mesh, layouts, recompute)
        assert len(planned.plan.stages) == num_stages
        return self.train(planned, session)

    def train(self, planned: PlannedModel, session: Session) -> MeasuredRun:
        """Train under a plan on `session`."""
        options = RunOptions(
            loss_fn=self.loss_fn,
            optimizer=self.numerics.optimizer,
            seed=SEED,
            keep_gradients=True,
            clip_grad_norm=self.clip,
            timeout_seconds=60.0,
        )
        parallel = Parallel(planned, options, session)
        return measure_training(
            parallel, self.args, self.kwargs, loss_fn=self.loss_fn, steps=STEPS, compare=True
        )

    def errors(
        self,
        num_stages: int,
        schedule: str,
        session: Session,
        mesh: Mesh | None = None,
        layouts: Layouts | None = None,
        recompute: str = "none",
    ) -> dict[str, WorstError]:
        """Worst relative error by kind of tensor (see `compared`)."""
        return self.compared(self.run(num_stages, schedule, session, mesh, layouts, recompute))

    def compared(self, measured: MeasuredRun) -> dict[str, WorstError]:
        """Worst relative error by kind of tensor.

        A gradient that is zero but for rounding (of a bias in front of BatchNorm) has a difference
        as large as itself, and Adam's step is `gain` times a gradient that is far smaller than its
        epsilon. So the difference that such a weight comes to have is measured as that of a
        gradient, with the same floor; in units of the weight it would say how far the gain is from
        one, and nothing of sums over ranks.
        """
        run, reference, gain = measured.run, self.reference, self.numerics.gain
        sizes = {name: float(item.abs().max()) for name, item in reference.gradients.items()}
        largest = max(sizes.values())
        noisy = [name for name, size in sizes.items() if gain and size <= _NOISE * largest]
        found = relative_errors(_without(run, noisy), _without(reference, noisy))
        for name in noisy:
            apart = float((run.weights[name] - reference.weights[name]).abs().max())
            error = apart / (gain or 1.0) / (_FLOOR * largest)
            if error > found["weights"].value:
                found["weights"] = WorstError(name, error)
        return found

    def sharded_errors(
        self,
        mesh: Mesh,
        session: Session,
        *,
        seed: int | None = None,
        schedule: str = "1f1b",
    ) -> dict[str, WorstError]:
        """`errors` over a mesh whose axis `pipeline`, if it has one, gives the stages; under random
        layouts, or flowing ones if there is no seed."""
        inner = in_stage(mesh)
        layouts = layouts_over(self.captured.graph, inner, seed)
        return self.errors(mesh.axis("pipeline").size, schedule, session, inner, layouts)

    def mixed_errors(
        self,
        meshes: str,
        session: Session,
        *,
        seed: int | None = None,
        schedule: str = "1f1b",
        zero: int = 0,
    ) -> dict[str, WorstError]:
        """`errors` over stages with meshes of their own (`data=2/tensor=2`), under random layouts,
        or flowing ones if there is no seed, with ZeRO of level `zero`."""
        planned = self.planned(len(meshes.split("/")), schedule)
        plan = with_meshes(planned.plan, self.captured.graph, meshes, seed, zero)
        return self.compared(self.train(self.bound(plan), session))


def with_meshes(
    plan: Plan, graph: Graph, meshes: str, seed: int | None = None, zero: int = 0
) -> Plan:
    """A pipeline plan with its stages on meshes of their own, one after the other."""
    stages, first = [], 0
    for stage, mesh in zip(plan.stages, parse_stage_meshes(meshes), strict=True):
        has_data = mesh.axis("data").size > 1
        layouts = (
            zero_layouts_of(graph, mesh, zero)
            if zero and has_data
            else layouts_over(graph, mesh, seed)
        )
        devices = tuple(range(first, first + mesh.size))
        stages.append(replace(stage, devices=devices, own=own_layouts(graph, stage, mesh, layouts)))
        first += mesh.size
    schedule = plan.schedule
    assert schedule is not None
    rows: list[tuple[Action, ...]] = [()] * first
    for stage, old in zip(stages, plan.stages, strict=True):
        rows[stage.device] = schedule.ranks[old.device]
    return replace(
        plan,
        cluster=parse_devices(f"cpu:{first}"),
        stages=tuple(stages),
        schedule=replace(schedule, ranks=tuple(rows)),
        prediction=None,
        certificate=None,
    )


def own_layouts(graph: Graph, stage: Stage, mesh: Mesh, layouts: Layouts) -> StageMesh:
    """Of layouts of a whole graph, those of what is in one stage."""
    nodes = set(stage.nodes)
    read = {graph.values[v].name for number in nodes for v in graph.nodes[number].inputs}
    kept = (
        replace(group, nodes=tuple(n for n in group.nodes if n in nodes)) for group in layouts.nodes
    )
    return StageMesh(
        mesh,
        tuple(entry for entry in layouts.values if entry.value in read),
        tuple(entry for entry in layouts.parameters if entry.value in read),
        tuple(group for group in kept if group.nodes),
    )


def sharded_tolerance_of(name: str, numerics: Numerics) -> float:
    """How exact training of one of `SHARDED_MODELS` is over a mesh.

    Sums over ranks, taken in another order, round otherwise. Of a gradient that is zero but for
    rounding (of a bias in front of BatchNorm) the measure takes that for a hundred times as much,
    and the running mean follows what Adam makes of it. Norms in float32 round what is in float64,
    and under autocast terms are rounded to bfloat16 before they are summed.
    """
    single = numerics.dtype is torch.float32
    if name in ("resnet", "unet"):
        return 5e-5 if single else 1e-9
    if name == "autocast" and single:
        return 5e-2
    if name in IN_FLOAT32 and not single:
        return 1e-4
    return numerics.tolerance


def in_stage(mesh: Mesh) -> Mesh:
    """`mesh` without its axis `pipeline`, whose size is the number of stages."""
    return Mesh(tuple(axis for axis in mesh.axes if axis.name != "pipeline"))


def layouts_over(graph: Graph, mesh: Mesh, seed: int | None) -> Layouts:
    """Random layouts over an in-stage mesh, or flowing ones if there is no seed."""
    return flowing_layouts(graph, mesh) if seed is None else random_layouts(graph, mesh, seed)


def spread(plan: Plan, mesh: Mesh, layouts: Layouts) -> Plan:
    """A pipeline plan with every stage on `mesh` instead of one device."""
    count, size = len(plan.stages), mesh.size
    stages = tuple(
        replace(stage, devices=tuple(column * count + stage.index for column in range(size)))
        for stage in plan.stages
    )
    return replace(
        plan,
        cluster=parse_devices(f"cpu:{count * size}"),
        mesh=Mesh((*mesh.axes, MeshAxis("pipeline", count))),
        stages=stages,
        layouts=layouts.values,
        parameter_layouts=layouts.parameters,
        node_layouts=layouts.nodes,
        prediction=None,
        certificate=None,
    )


def _without(run: ReferenceRun, names: Collection[str]) -> ReferenceRun:
    """`run` without some of its weights."""
    rest = {name: item for name, item in run.weights.items() if name not in names}
    return replace(run, weights=rest)


def _compute_exactly() -> None:
    """In this process, and in workers that it starts from now on.

    On CUDA, convolutions of float32 tensors multiply in TF32, of ten bits, and cuDNN's fastest
    gradients of convolutions are sums in no fixed order.
    """
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # read by cuDNN and cuBLAS, where flags do not reach


def _cast(item: Any, dtype: torch.dtype) -> Any:
    return item.to(dtype) if isinstance(item, torch.Tensor) and item.is_floating_point() else item


def _moved(items: Any, device: str) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), items)
