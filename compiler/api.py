"""One call: `auto_partition(model, devices)`. Capture, plan, generate, verify, run.

`plan_model` stops before running: it works on models that live on `meta` and clusters that are not
here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..cost_models import parse_devices
from ..passes.context import PlanOptions
from ..runtime.launcher import under_torchrun
from ..runtime.session import LocalSession, Session
from .batch import batch_size, signature_of, take_rows
from .batch import contiguous as contiguous_call
from .block_times import ProfileOptions
from .collector import collector_paused
from .compare import STRATEGIES, StrategyFigures, check_strategies, compare
from .constraints import layout_pins, stage_pins, together_groups
from .ir.cluster import Cluster
from .ir.errors import PlanFormatError, UsageError
from .ir.fingerprint import fingerprint
from .ir.graph import Mode
from .ir.mesh import Mesh, MeshAxis, parse_stage_meshes
from .ir.plan import PIPELINE, Objective, OptimizerModel, Plan
from .ir.verify import verify_plan
from .parallel import OptimizerFactory, Parallel, RunOptions
from .plan_json import check_plan_matches, load_plan
from .planned import ModelPlan, PlannedModel, build_programs
from .planning import Planning
from .profile_parts import PROFILES
from .ranks import start_workers
from .simulated import with_simulated_step
from .weights import Weights

__all__ = ["PlannedModel", "auto_partition", "compare_strategies", "plan_model"]

Devices = int | str | PathLike[str] | Cluster | Sequence[torch.device]
Progress = Callable[[str], None]


def plan_model(
    model: nn.Module,
    devices: Devices,
    *,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    mode: str = "train",
    optimizer_model: OptimizerModel | None = None,
    num_microbatches: int | None = None,
    num_stages: int | None = None,
    schedule: str | None = None,
    mesh: str | Mesh | None = None,
    zero: int | None = None,
    recompute: str = "auto",
    offload: str = "auto",
    memory_limit_bytes: int | None = None,
    objective: str = "step",
    granularity: str = "operator",
    contiguous: bool = False,
    profile: str = "off",
    profile_seconds: float = 60.0,
    compile: bool = False,
    cuda_graphs: bool = True,
    placement_seconds: float = 20.0,
    constraints: Mapping[str, int | str] | None = None,
    together: Sequence[Sequence[str]] | None = None,
    clip_grad_norm: float | None = None,
    plan: Plan | str | PathLike[str] | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> PlannedModel:
    """Capture `model`, choose the fastest plan that fits, generate and verify its programs.

    Args:
        model: any `nn.Module`; parameters may be on `meta`.
        devices: number of local workers, list of `torch.device`, `Cluster`, preset name or file.
        example_inputs, example_kwargs: one call with the global batch (see `compiler/batch.py`).
            With a `loss_fn` of several arguments the last ones are targets.
        loss_fn: makes the loss from the model's output (and targets); None: the model returns it.
        mode: `train` or `infer`.
        optimizer_model: what planning assumes of the optimizer; None: AdamW.
        num_microbatches, num_stages, schedule: pin a decision; None: chosen.
        mesh: pin the mesh, as `data=2,pipeline=2,tensor=2`, or those of the stages, from the first
            to the last, as `data=2,tensor=2/data=1`; None: chosen, unless stages are fixed
            by `num_stages` or `constraints`, which leave one device a stage.
        zero: level of ZeRO over the data axis (0 to 3); None: the least that fits.
        recompute: what backward computes again instead of keeping it: `auto` (as much as must be
            for a plan to fit), `none`, `full` (all within each repeated block) or `selective` (what
            is cheap for the memory it frees).
        offload: what lies in the memory of the host: `none`, `optimizer` (its states, which are
            updated there; ZeRO-Offload) or `auto` (its states if nothing fits otherwise).
        memory_limit_bytes: memory of every device, overriding the cluster's.
        objective: what is kept small: `step`, the seconds of a step; or, for inference,
            `throughput` or `latency`: operators are placed one by one, on devices that may differ
            in all respects, so that the busiest has least to do in a stream of microbatches, or so
            that one sample is done soonest.
        granularity: what is placed: `operator`, or `block` (repeated blocks and modules whole).
        contiguous: no device runs several disconnected pieces.
        profile: what is measured on the devices, which must be here, before the plan is final:
            `off` (nothing: times follow from the cluster's rates), `blocks` (each distinct block of
            the plan and of what comes close to it) or `ops` (each distinct operator). Times are
            kept in the user's cache directory.
        profile_seconds: of measuring, at most.
        compile, cuda_graphs: how stages will run, for what is measured.
        placement_seconds: wall time for placing operators.
        constraints: module path pattern -> stage that must hold it (where operators are placed one
            by one: the device); or pattern of parameters ->
            their layout over the tensor axis, as `tensor=S(1)` or `tensor=R`.
        together: groups of module path patterns; the modules that a group matches, and what lies
            between them, are in one stage.
        clip_grad_norm: clip the global gradient norm before the optimizer step.
        plan: use this plan (or plan file) instead of searching one.
        check: compare the captured gradients with the model's own.
        progress: receives one line per phase.

    Raises:
        CaptureError: the model cannot be captured, or its gradients would be wrong.
        InfeasibleError: nothing fits; names the constraint.
        PlanFormatError: `plan` is malformed or for another model or cluster.
    """
    say = progress or (lambda line: None)
    if example_inputs is None and not example_kwargs:
        raise UsageError(
            "no example inputs: the model is captured by running it on them",
            where="auto_partition",
            ways_out=("pass example_inputs=(tensor, ...) and/or example_kwargs={...}",),
        )
    call = contiguous_call((_as_tuple(example_inputs), dict(example_kwargs or {})))
    cluster = _cluster(devices, memory_limit_bytes)
    given = _given_plan(plan)
    rows = batch_size(*call)
    signature_of(call)  # refuses inputs that are no data
    modes = _mode(mode)
    if given is not None and given.mode is not modes:
        raise PlanFormatError(
            f"the plan is for mode={given.mode.value!r}, mode={mode!r} is wanted",
            where="plan: mode",
            ways_out=(f"pass mode={given.mode.value!r}", "plan again for this mode"),
        )
    for name, number in (
        ("num_stages", num_stages),
        ("clip_grad_norm", clip_grad_norm),
        ("placement_seconds", placement_seconds),
        ("profile_seconds", profile_seconds),
    ):
        _refuse_unless_positive(name, number)
    goal = _objective(objective)
    if goal is not Objective.STEP and given is None and under_torchrun():
        raise UsageError(
            f"objective={objective!r} is searched by the clock: the ranks of this job would find "
            "different plans",
            where="objective",
            ways_out=("plan once, by `cutset plan ... -o plan.json`, and pass plan='plan.json'",),
        )
    measured = _profile(profile, profile_seconds, compile, cuda_graphs)
    if measured is not None and given is None and under_torchrun():
        raise UsageError(
            f"profile={profile!r} measures: the ranks of this job would find different plans",
            where="profile",
            ways_out=("plan once, by `cutset plan ... -o plan.json`, and pass plan='plan.json'",),
        )
    pins = stage_pins(constraints)
    options = PlanOptions(
        num_stages=num_stages,
        num_microbatches=given.num_microbatches if given else num_microbatches,
        schedule=schedule,
        recompute=recompute,
        optimizer=optimizer_model or OptimizerModel("adamw", 2.0),
        pins=pins if goal is Objective.STEP else (),
        device_pins=() if goal is Objective.STEP else pins,
        layout_pins=layout_pins(constraints),
        together=together_groups(together),
        **_meshes(mesh),
        zero=_zero(zero),
        offload=offload,
        objective=goal,
        granularity=granularity,
        contiguous=contiguous,
        placement_seconds=placement_seconds,
    )
    planning = Planning(model, call, cluster, modes, loss_fn, check, say, measured)
    with collector_paused():
        if given is not None:
            captured = planning.captured(planning.first_count(options))
            check_plan_matches(given, fingerprint(captured.graph, type(model).__name__), cluster)
            chosen = replace(given, cluster=cluster)
            verify_plan(chosen, captured.graph)
        else:
            captured, chosen = planning.search(options)
        say("generate and verify programs")
        programs = build_programs(captured, chosen, clip_grad_norm)
        if given is None:
            chosen, programs = with_simulated_step(chosen, programs)
    return PlannedModel(
        model=model,
        captured=captured,
        plan=ModelPlan.of(chosen, captured.graph),
        programs=programs,
        call=call,
        loss_fn=loss_fn,
        call_signature=signature_of(take_rows(call, rows // chosen.num_microbatches)),
        training=model.training,
    )


def compare_strategies(
    model: nn.Module,
    devices: Devices,
    *,
    strategies: Sequence[str] = STRATEGIES,
    **planning: Any,
) -> tuple[PlannedModel, tuple[StrategyFigures, ...]]:
    """Plan `model`, and price the usual hand-written strategies beside the plan.

    Args:
        strategies: of `ddp`, `fsdp`, `tp` and `pp` (see `compiler/compare.py`).
        planning: further arguments of `plan_model`.

    Returns:
        The planned model, and a row of figures for its plan and for each strategy.

    Raises:
        See `plan_model`; UsageError for an unknown strategy.
    """
    check_strategies(strategies)
    planned = plan_model(model, devices, **planning)
    plan = planned.plan
    pinned = ("num_microbatches", "schedule", "recompute")
    search = Planning(
        model=model,
        call=planned.call,
        cluster=plan.cluster,
        mode=plan.mode,
        loss_fn=planned.loss_fn,
        check=False,
        say=planning.get("progress") or (lambda line: None),
        graphs={plan.num_microbatches: planned.captured},
    )
    options = PlanOptions(
        optimizer=plan.optimizer, **{name: planning[name] for name in pinned if name in planning}
    )
    return planned, compare(search, plan, options, strategies)


def auto_partition(
    model: nn.Module,
    devices: Devices,
    *,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    mode: str = "train",
    optimizer: OptimizerFactory | None = None,
    compile: bool = False,
    cuda_graphs: bool = True,
    seed: int = 0,
    keep_gradients: bool = False,
    timeout_seconds: float = 300.0,
    clip_grad_norm: float | None = None,
    session: Session | None = None,
    weights: Weights | None = None,
    **planning: Any,
) -> Parallel:
    """Partition `model` over `devices` and return it ready to train and infer.

    Args:
        optimizer: called with the model's parameters, returns a `torch.optim.Optimizer`;
            None: AdamW with learning rate 1e-3.
        compile: run stage graphs through Inductor.
        cuda_graphs: on CUDA, replay stage kernels as CUDA graphs.
        seed: of all randomness; the same seed trains the same weights under any plan.
        keep_gradients: keep each step's gradients for `Parallel.gradients()`.
        timeout_seconds: longest wait for another rank before the run is given up.
        session: run on these ranks instead of starting local workers.
        weights: first values, for a model on `meta`: a safetensors or `torch.save` file, a
            directory of such with a Hugging Face index, a checkpoint, or a function from the name
            and meta tensor of a parameter to its value. Each rank reads or is sent its parts only.
        planning: further arguments of `plan_model`.

    Raises:
        See `plan_model`. Local workers start in the background meanwhile; a failure to start is
        raised by the first step.
    """
    factory = optimizer or _default_optimizer
    _refuse_unless_positive("timeout_seconds", timeout_seconds)
    _refuse_unless_factory(factory)
    planning["plan"] = _given_plan(planning.get("plan"))
    own = None
    if session is None and (example_inputs is not None or example_kwargs):
        own = _early_workers(model, devices, planning, timeout_seconds, weights is not None)
    with contextlib.ExitStack() as on_error:
        if own is not None:
            on_error.callback(own.close)
        planned = plan_model(
            model,
            devices,
            example_inputs=example_inputs,
            example_kwargs=example_kwargs,
            loss_fn=loss_fn,
            mode=mode,
            clip_grad_norm=clip_grad_norm,
            compile=compile,
            cuda_graphs=cuda_graphs,
            optimizer_model=planning.pop("optimizer_model", None)
            or optimizer_model_of(factory, model),
            **planning,
        )
        options = RunOptions(
            loss_fn=loss_fn,
            optimizer=factory,
            compile=compile,
            cuda_graphs=cuda_graphs,
            seed=seed,
            keep_gradients=keep_gradients,
            timeout_seconds=timeout_seconds,
            clip_grad_norm=clip_grad_norm,
            weights=weights,
        )
        if own is not None and own.num_ranks != len(planned.programs):
            own.close()  # others, which share the cores anew, start on first use
            own = None
        parallel = Parallel(planned, options, session or own, owns_session=own is not None)
        on_error.pop_all()
    return parallel


def _profile(kind: str, seconds: float, compile: bool, cuda_graphs: bool) -> ProfileOptions | None:
    if kind not in PROFILES:
        raise UsageError(
            f"profile = {kind!r} is unknown",
            where="profile",
            ways_out=(f"one of: {', '.join(PROFILES)}",),
        )
    return None if kind == "off" else ProfileOptions(kind, seconds, compile, cuda_graphs)


def _cluster(devices: Devices, memory_limit_bytes: int | None) -> Cluster:
    spec = Path(devices) if isinstance(devices, PathLike) else devices
    return parse_devices(spec, memory_limit_bytes)


def _early_workers(
    model: nn.Module,
    devices: Devices,
    planning: Mapping[str, Any],
    timeout_seconds: float,
    has_weights: bool,
) -> LocalSession | None:
    """Workers that start while the model is captured and planned; None if none will be used.

    As many as the plan is likely to need: one a stage if that is pinned, else one a device.
    """
    cluster = _cluster(devices, planning.get("memory_limit_bytes"))
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    if planning.get("profile", "off") != "off":
        return None  # they would start, and slow down, while others measure
    if under_torchrun() or (is_meta and not has_weights) or not cluster.local:
        return None
    plan = planning["plan"]
    count = len(cluster.devices)
    if plan is not None and plan.stages:
        count = min(count, 1 + max(device for stage in plan.stages for device in stage.devices))
    elif planning.get("num_stages"):
        count = min(count, planning["num_stages"])
    return start_workers(cluster, count, timeout_seconds=timeout_seconds, wait=False)


def optimizer_model_of(factory: OptimizerFactory, model: nn.Module) -> OptimizerModel:
    """What planning must assume of the optimizer that `factory` makes, by trying it once.

    One step of an optimizer of the same kind on a small parameter shows how many bytes of state
    a parameter byte costs.
    """
    probe = nn.Parameter(torch.zeros(256, 256))
    with contextlib.suppress(Exception):
        real = factory(model.parameters())
        options = {name: v for name, v in real.param_groups[0].items() if "param" not in name}
        kind: Any = type(real)
        optimizer = kind([{"params": [probe], **options}])
        probe.grad = torch.zeros_like(probe)
        optimizer.step()
        state = optimizer.state[probe].values()
        tensors = [entry for entry in state if isinstance(entry, torch.Tensor) and entry.ndim]
        num_bytes = sum(entry.numel() * entry.element_size() for entry in tensors)
        ratio = num_bytes / (probe.numel() * probe.element_size())
        return OptimizerModel(kind.__name__.lower(), ratio)
    return OptimizerModel("unknown", 2.0)


def _objective(name: str) -> Objective:
    known = [objective.value for objective in Objective]
    if name not in known:
        raise UsageError(
            f"unknown objective {name!r}",
            where="objective",
            ways_out=(f"one of: {', '.join(known)}",),
        )
    return Objective(name)


def _mode(name: str) -> Mode:
    known = [mode.value for mode in Mode]
    if name not in known:
        raise UsageError(
            f"unknown mode {name!r}", where="mode", ways_out=(f"one of: {', '.join(known)}",)
        )
    return Mode(name)


def _refuse_unless_positive(name: str, number: float | None) -> None:
    if number is not None and not number > 0:
        raise UsageError(
            f"{name} = {number} is not positive",
            where=name,
            ways_out=(f"pass a positive {name}, or leave it out",),
        )


def _refuse_unless_factory(factory: Any) -> None:
    if not callable(factory) or isinstance(factory, torch.optim.Optimizer):
        raise UsageError(
            f"the optimizer is a {type(factory).__name__}, not a function that makes one",
            where="optimizer",
            ways_out=("pass e.g. optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3)",),
        )


def _default_optimizer(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    if inputs is None:
        return ()
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _given_plan(plan: Plan | str | PathLike[str] | None) -> Plan | None:
    if plan is None or isinstance(plan, Plan):
        return plan
    return load_plan(plan)


def _meshes(mesh: str | Mesh | None) -> dict[str, Any]:
    """The fields of `PlanOptions` for one mesh, or for the meshes of stages that differ in them."""
    if mesh is None or isinstance(mesh, Mesh):
        return {"mesh": mesh}
    try:
        if "/" not in mesh:
            return {"mesh": Mesh.parse(mesh)}
        stages = parse_stage_meshes(mesh)
    except ValueError as error:
        raise UsageError(
            str(error),
            where="mesh",
            ways_out=(
                "write e.g. mesh='data=2,pipeline=2,tensor=2'",
                "write e.g. mesh='data=2,tensor=2/data=1' for a stage on four devices, then one "
                "on one",
            ),
        ) from error
    if len(set(stages)) == 1:
        return {"mesh": Mesh((MeshAxis(PIPELINE, len(stages)), *stages[0].axes))}
    return {"stage_meshes": stages}


def _zero(level: int | None) -> int | None:
    if level not in (None, 0, 1, 2, 3):
        raise UsageError(
            f"zero = {level!r} is no level of ZeRO", where="zero", ways_out=("one of 0, 1, 2, 3",)
        )
    return level
