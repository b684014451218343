"""A partitioned model as the user drives it: steps, inference, state.

`Parallel` owns a session (local workers or this job's ranks) and, for each kind of call it has
seen (training or inference, input shapes, train/eval flag), a *variant*: the model captured for
that call, the plan's stages carried over to it, programs, all verified. The first variant comes
from `auto_partition`; others are captured when first needed, and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..passes.schedule import build_schedule
from ..passes.transfer import transfer, transfer_layouts
from ..runtime.launcher import launch_local, spmd_session, under_torchrun
from ..runtime.optimizer import (
    current_hyperparameters,
    describe_optimizer,
)
from ..runtime.parts import updated_parts
from ..runtime.session import LocalSession, Session
from .batch import Call, batch_size, contiguous, divisors, signature_of, take_rows
from .capture import Captured, capture
from .codegen.python import emit_python
from .elementwise import check_elementwise, first_part
from .ir.cluster import Cluster
from .ir.errors import CaptureError, UsageError
from .ir.fingerprint import fingerprint
from .ir.graph import Mode, ValueKind
from .ir.plan import Plan
from .ir.program import Program, TensorShard
from .ir.text import print_program
from .parts import batch_part, first_holders, joined, part_of, shards_by_name
from .placement import Needs, Placement
from .planned import PlannedModel, build_programs

__all__ = ["OptimizerFactory", "Parallel", "RunOptions", "start_workers"]

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run; see `auto_partition`."""

    loss_fn: Callable[..., Tensor] | None
    optimizer: OptimizerFactory
    compile: bool = False
    cuda_graphs: bool = True
    seed: int = 0
    keep_gradients: bool = False
    timeout_seconds: float = 300.0
    clip_grad_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """The model captured for one kind of call, with programs for it."""

    key: str
    captured: Captured
    plan: Plan
    programs: tuple[Program, ...]
    needs: Needs


class Parallel:
    """A model running on several devices. Use as a context manager, or `close()` it.

    `parallel.plan` is the plan, `parallel.optimizer` the mirror optimizer to attach learning-rate
    schedulers to.
    """

    def __init__(
        self,
        planned: PlannedModel,
        options: RunOptions,
        session: Session | None = None,
        *,
        owns_session: bool = False,
    ) -> None:
        if session is not None and session.num_ranks != len(planned.programs):
            raise UsageError(
                f"the plan is for {len(planned.programs)} ranks, the session has "
                f"{session.num_ranks}",
                where="session",
                ways_out=(f"pass num_stages={session.num_ranks}", "pass a session of as many"),
            )
        model = planned.model
        self.model = model
        self.plan = planned.plan
        self.optimizer = options.optimizer(model.parameters())
        self._options = options
        self._names = {id(p): n for n, p in model.named_parameters(remove_duplicate=True)}
        self._spec = describe_optimizer(self.optimizer, self._names)
        in_parts = first_part(planned.programs)
        if in_parts is not None:
            check_elementwise(self.optimizer, in_parts)
        self._planned = planned
        self._variants: dict[str, Variant] = {}
        self._flags = _Flags(model)
        self._planned_flags = self._flags.text()
        self._tensors = Placement()  # parameters and buffers
        self._states = Placement()  # states of optimizers, by parameter
        self._parts = _Parts()
        self._session = session
        self._owns_session = owns_session or session is None
        self._clean = self._owns_session
        self._step = 0
        self._restored: dict[str, dict[str, Any]] | None = None
        self._measure = False
        self._record = False
        self._peaks: list[int] = []
        self._times: list[list[tuple[str, float, float]]] = []
        self._closed = False

    @property
    def planned(self) -> PlannedModel:
        """The model as it was captured and planned, with its programs."""
        return self._planned

    # -- calls ---------------------------------------------------------------------------------

    def train_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward, backward, gradient synchronisation and optimizer update on one batch.

        Takes what the example call took (another batch size or sequence length is captured once
        and cached). Returns the loss, 0-dim, float64: the mean over microbatches.
        """
        if self.plan.mode is not Mode.TRAIN:
            raise UsageError(
                "this plan is for inference",
                ways_out=("plan with mode='train'",),
            )
        call = contiguous((args, kwargs))
        variant = self._variant(Mode.TRAIN, call)
        replies = self._run(
            "train_step",
            variant,
            call,
            hyperparameters=current_hyperparameters(self.optimizer),
            # copies of the gradients would count as memory of the step
            keep_gradients=self._options.keep_gradients and not self._measure,
        )
        self._tensors.change(variant.needs.changed)
        self._states.change(entry for entry in variant.needs.changed if entry[0] in self._states)
        self._step += 1
        self._tick_mirror()
        loss = next(reply["loss"] for reply in replies if reply["loss"] is not None)
        return torch.tensor(loss, dtype=torch.float64)

    def _tick_mirror(self) -> None:
        """Count the step on the mirror, so that schedulers see steps in their order.

        Without gradients an optimizer's step changes nothing.
        """
        groups = self.optimizer.param_groups
        kept = {p: p.grad for group in groups for p in group["params"] if p.grad is not None}
        for parameter in kept:
            parameter.grad = None
        self.optimizer.step()
        for parameter, gradient in kept.items():
            parameter.grad = gradient

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Inference in eval mode, without gradients: the value that the model returns."""
        call = contiguous((args, kwargs))
        variant = self._variant(Mode.INFER, call)
        replies = self._run("infer", variant, call)
        outputs: dict[str, Tensor] = {}
        for reply in replies:
            outputs.update(reply["outputs"])
        return variant.captured.outputs.unflatten(outputs)

    def train(self, mode: bool = True) -> Self:
        """Whether `train_step` runs dropout and updates BatchNorm statistics."""
        self.model.train(mode)
        return self

    def eval(self) -> Self:
        """As `train(False)`."""
        return self.train(False)

    def _run(self, method: str, variant: Variant, call: Call, **extra: Any) -> list[Any]:
        session = self._started()
        inputs = variant.captured.inputs.bind(*call)
        count = variant.plan.num_microbatches
        shared = {
            "key": variant.key,
            "weights": (1.0 / count,) * count,
            "seed": self._options.seed,
            "step": self._step,
            "measure_memory": self._measure,
            "record": self._record,
            **extra,
        }
        arguments = [
            shared | {"inputs": _input_parts(variant, program, inputs)}
            for program in variant.programs
        ]
        replies = session.call(method, arguments, timeout_seconds=self._limit)
        if self._measure:
            self._peaks = [reply["peak_bytes"] for reply in replies]
            self._measure = False
        self._record = False
        self._times = [reply["times"] for reply in replies]
        return replies

    # -- variants ------------------------------------------------------------------------------

    def _variant(self, mode: Mode, call: Call) -> Variant:
        flags = self._flags.text() if mode is Mode.TRAIN else "eval"
        key = f"{mode.value} {flags} {signature_of(call)}"
        variant = self._variants.get(key)
        if variant is None:
            variant = self._first_variant(mode, call, key) or self._new_variant(mode, call, key)
            self._place(variant)
            self._load(variant)
            self._variants[key] = variant
        else:
            self._place(variant)
        return variant

    def _first_variant(self, mode: Mode, call: Call, key: str) -> Variant | None:
        """The planned variant, if it is for this kind of call."""
        planned = self._planned
        rows = self.plan.batch_size
        if mode is not self.plan.mode or batch_size(*call) != rows:
            return None
        if mode is Mode.TRAIN and self._flags.text() != self._planned_flags:
            return None
        micro = take_rows(call, rows // self.plan.num_microbatches)
        if signature_of(micro) != planned.call_signature:
            return None
        needs = Needs.of(planned.programs)
        return Variant(key, planned.captured, self.plan, planned.programs, needs)

    def _new_variant(self, mode: Mode, call: Call, key: str) -> Variant:
        """Capture for a new kind of call and carry the plan's stages over."""
        rows = batch_size(*call)
        count = self._microbatch_count(rows, mode)
        args, kwargs = take_rows(call, rows // count)
        loss_fn = self._options.loss_fn if mode is Mode.TRAIN else None
        try:
            captured = capture(self.model, args, kwargs, mode=mode, loss_fn=loss_fn, check=False)
        except CaptureError as error:
            raise self._at_another_size(error, rows, count) from error
        stages = transfer(self.plan, self._planned.captured.graph, captured.graph)
        layouts = transfer_layouts(self.plan, self._planned.captured.graph, captured.graph)
        plan = replace(
            self.plan,
            layouts=layouts.values,
            parameter_layouts=layouts.parameters,
            node_layouts=layouts.nodes,
            recomputed=(),
            fingerprint=fingerprint(captured.graph, self.plan.fingerprint.name),
            mode=mode,
            batch_size=rows,
            num_microbatches=count,
            stages=stages,
            schedule=build_schedule(
                self.plan.schedule.name if mode is Mode.TRAIN and self.plan.schedule else "forward",
                num_stages=len(stages),
                num_microbatches=count,
                devices=tuple(stage.device for stage in stages),
            ),
            prediction=None,
            certificate=None,
        )
        clip = self._options.clip_grad_norm if mode is Mode.TRAIN else None
        programs = build_programs(captured, plan, clip, len(self._planned.programs))
        return Variant(key, captured, plan, programs, Needs.of(programs))

    def _at_another_size(self, error: CaptureError, rows: int, count: int) -> CaptureError:
        """The same error, saying so if the microbatches are smaller than the planned ones."""
        planned = self.plan.batch_size // self.plan.num_microbatches
        if rows // count == planned:
            return error
        return CaptureError(
            f"{error.cause}; this call has {rows} rows, run as {count} microbatches of "
            f"{rows // count} where the plan has {planned} rows each",
            where=error.where,
            ways_out=(f"pass batches of a multiple of {planned} rows", *error.ways_out),
        )

    def _microbatch_count(self, rows: int, mode: Mode) -> int:
        """Fewest equal microbatches that are no larger than the planned ones."""
        largest = max(1, self.plan.batch_size // self.plan.num_microbatches)
        return min(count for count in divisors(rows) if rows // count <= largest)

    def _load(self, variant: Variant) -> None:
        self._started().call(
            "load",
            [
                {
                    "key": variant.key,
                    "program": print_program(program),
                    "source": emit_python(program),
                    "constants": {
                        name: variant.captured.tensors[name]
                        for name in _tensors_of(program, ValueKind.CONSTANT)
                    },
                    "compile": self._options.compile,
                    "cuda_graphs": self._options.cuda_graphs,
                }
                for program in variant.programs
            ],
            timeout_seconds=self._limit,
        )

    def _place(self, variant: Variant) -> None:
        """Send every rank what it lacks today's value of: parameters, buffers, states."""
        self._parts.add(variant.programs)
        missing = self._tensors.missing(variant.needs.held)
        if any(missing):
            moved = sorted({n for names in missing for n in names if n in self._tensors})
            source = {**variant.captured.tensors, **self._gather("tensors", moved)}
            parameters = [value.origin for value in _parameters(variant)]
            self._started().call(
                "set_tensors",
                [
                    {
                        "tensors": {
                            name: part_of(source[name], self._parts.held(name, rank))
                            for name in names
                        },
                        "parameters": parameters,
                    }
                    for rank, names in enumerate(missing)
                ],
                timeout_seconds=self._limit,
            )
            self._tensors.add(missing)
        if variant.plan.mode is Mode.TRAIN and any(self._states.missing(variant.needs.trained)):
            self._configure_optimizer(variant)
            self._states.add(variant.needs.trained)

    def _configure_optimizer(self, variant: Variant) -> None:
        state = self._optimizer_state()
        self._restored = None
        self._started().call(
            "configure_optimizer",
            [
                {
                    "spec": self._spec,
                    "parts": updated_parts(program),
                    "offloaded": list(program.offloaded),
                }
                for program in variant.programs
            ],
        )
        if state:
            self._load_states(state)

    def _load_states(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Give every rank the parts of the states of what it updates."""
        ranks = range(self._started().num_ranks)
        parts = [
            {
                name: {
                    key: _state_part(value, self._parts.of(name, updates=True).get(rank))
                    for key, value in entries.items()
                }
                for name, entries in state.items()
            }
            for rank in ranks
        ]
        self._started().call("load_optimizer_state", [{"state": entry} for entry in parts])

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The model's `state_dict()` with today's values, on the CPU; tied names share a tensor."""
        own = self.model.state_dict()
        canonical = _canonical_names(self.model)
        current = self._gather("tensors", self._tensors.names)
        for name, tensor in own.items():
            own[name] = current.get(canonical.get(name, name), tensor)
        return own

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> Any:
        """As `nn.Module.load_state_dict`; ranks get the values before they next read them.

        The model itself takes them too, on top of today's values for what `state` lacks.
        """
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name, tensor in self._gather("tensors", self._tensors.names).items():
                own[name].copy_(tensor)
        self._tensors = Placement()
        return self.model.load_state_dict(state, strict=strict)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the last training step, before clipping, by parameter name.

        Needs `keep_gradients=True`. Parameters without a gradient are missing.
        """
        if not self._options.keep_gradients:
            raise UsageError(
                "gradients are not kept after the optimizer step",
                ways_out=("pass keep_gradients=True to auto_partition",),
            )
        found = self._gather("gradients", self._tensors.names, updates=True)
        return {name: found[name] for name in self._names.values() if name in found}

    def optimizer_state_dict(self) -> dict[str, Any]:
        """What further training depends on besides `state_dict()`.

        Returns:
            `state` by parameter name, `param_groups` with parameter names and today's
            hyperparameters (as `torch.distributed.checkpoint.state_dict` has them), and
            `num_steps`, the training steps taken, from which randomness follows.
        """
        groups = [
            {**options, "params": list(members)}
            for (members, _), options in zip(
                self._spec.groups, current_hyperparameters(self.optimizer), strict=True
            )
        ]
        state = self._optimizer_state()
        return {
            "state": {name: state[name] for name in self._names.values() if name in state},
            "param_groups": groups,
            "num_steps": self._step,
        }

    def load_optimizer_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `optimizer_state_dict`, also from a run under another plan.

        Raises:
            UsageError: the state is of an optimizer with other parameter groups.
        """
        groups = [dict(group) for group in state["param_groups"]]
        members = [tuple(group.pop("params")) for group in groups]
        own = [names for names, _ in self._spec.groups]
        if members != own:
            raise UsageError(
                f"the state has {len(members)} parameter groups of "
                f"{[len(names) for names in members]} parameters, the optimizer {len(own)} of "
                f"{[len(names) for names in own]}, or parameters of other names",
                where="load_optimizer_state_dict",
                ways_out=("make the optimizer with the same parameter groups",),
            )
        for group, options in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(options)
        self._step = int(state["num_steps"])
        by_name = {name: dict(entries) for name, entries in state["state"].items()}
        if self._configured:
            self._load_states(by_name)
        else:
            self._restored = by_name

    @property
    def _configured(self) -> bool:
        """Whether the ranks have optimizers: they get them before the first training step."""
        return bool(self._states)

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        """Optimizer state by parameter name, on the CPU."""
        if self._restored is not None or not self._configured:
            return dict(self._restored or {})
        replies = self._started().call("optimizer_state", timeout_seconds=self._limit)
        found: dict[str, list[tuple[TensorShard | None, dict[str, Any]]]] = {}
        for rank, reply in enumerate(replies):
            for name, entries in tree_map_only(Tensor, Tensor.cpu, reply).items():
                if rank in self._states.ranks(name):
                    shard = self._parts.of(name, updates=True).get(rank)
                    found.setdefault(name, []).append((shard, entries))
        return {name: _joined_states(parts) for name, parts in found.items()}

    def record_times(self) -> None:
        """Record when each instruction of the next step runs (see `instruction_times`)."""
        self._record = True

    def instruction_times(self) -> list[list[tuple[str, float, float]]]:
        """Per rank, (instruction, begin, end) in seconds of the last recorded step."""
        return self._times

    def measure_memory(self) -> None:
        """Measure the peak memory of the next step (see `peak_memory_bytes`); it runs slower."""
        self._measure = True

    def peak_memory_bytes(self) -> list[int]:
        """Peak bytes per rank of the last measured step; empty if none was measured."""
        return list(self._peaks)

    def _gather(self, method: str, names: list[str], *, updates: bool = False) -> dict[str, Tensor]:
        """Named tensors, whole, each part from the lowest rank that has today's value.

        Args:
            updates: the ranks have the parts that they update, not those that they hold.
        """
        if not names:
            return {}
        sources = {
            name: set(first_holders(self._tensors.ranks(name), self._parts.of(name, updates)))
            for name in names
        }
        arguments = [
            {"names": [name for name in names if rank in sources[name]]}
            for rank in range(self._started().num_ranks)
        ]
        replies = self._started().call(method, arguments, timeout_seconds=self._limit)
        is_here = bool(self._started().local_ranks)  # then replies are the rank's own tensors
        found: dict[str, list[tuple[TensorShard | None, Tensor]]] = {}
        for rank, reply in enumerate(replies):
            for name, tensor in reply.items():
                part = tensor.detach().to("cpu", copy=is_here)
                found.setdefault(name, []).append((self._parts.of(name, updates).get(rank), part))
        return {name: joined(parts) for name, parts in found.items()}

    # -- life ----------------------------------------------------------------------------------

    @property
    def _limit(self) -> float:
        """Longest time for a call: the ranks' own waits name their cause before it."""
        return 2 * self._options.timeout_seconds

    def _started(self) -> Session:
        if self._closed:
            raise UsageError("this Parallel is closed", ways_out=("call auto_partition again",))
        if self._session is None:
            self._session = self._start()
        if not self._clean:
            self._clean = True
            self._session.call("reset")
        return self._session

    def _start(self) -> Session:
        if not self.plan.cluster.local:
            raise UsageError(
                f"cluster {self.plan.cluster.name!r} is not this machine: it is planned for, "
                "not run",
                ways_out=("pass a number of local devices", "start the script under torchrun"),
            )
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise UsageError(
                "the model's parameters are on meta: it can be planned, not run",
                ways_out=("give it values: model.to_empty(device='cpu'), then load them",),
            )
        num_ranks = len(self._planned.programs)
        if under_torchrun():
            session: Session = spmd_session(timeout_seconds=self._options.timeout_seconds)
            if session.num_ranks != num_ranks:
                raise UsageError(
                    f"the plan is for {num_ranks} ranks, the job has {session.num_ranks}",
                    ways_out=(f"pass devices={session.num_ranks}", "start as many processes"),
                )
            return session
        return start_workers(
            self.plan.cluster, num_ranks, timeout_seconds=self._options.timeout_seconds
        )

    def save_programs(self, directory: str | Path) -> None:
        """Write the generated Python and instruction lists of every rank, to read."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for program in self._planned.programs:
            (folder / f"rank{program.rank}.py").write_text(emit_python(program))
            (folder / f"rank{program.rank}.program").write_text(print_program(program))

    def explain(self) -> str:
        """The plan in words and pictures."""
        from .explain import explain

        return explain(self.plan, self._planned.captured.graph)

    def close(self) -> None:
        """End the workers that this object started."""
        if not self._closed and self._session is not None and self._owns_session:
            self._session.close()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_workers(
    cluster: Cluster, num_ranks: int, *, timeout_seconds: float, wait: bool = True
) -> LocalSession:
    """Workers on the first devices of a local cluster; see `launch_local`."""
    backends = {cluster.type_of(rank).backend for rank in range(num_ranks)}
    kind = "cuda" if backends == {"cuda"} else "cpu"
    places = [
        torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
        for rank in range(num_ranks)
    ]
    return launch_local(
        num_ranks,
        backend="nccl" if kind == "cuda" else "gloo",
        devices=places,
        timeout_seconds=timeout_seconds,
        wait=wait,
    )


class _Parts:
    """Which parts of parameters and buffers ranks hold and update, by name and rank.

    They are the same in all variants, as all hold parameters as the plan says.
    """

    def __init__(self) -> None:
        self._held: dict[str, dict[int, TensorShard]] = {}
        self._updated: dict[str, dict[int, TensorShard]] = {}

    def add(self, programs: tuple[Program, ...]) -> None:
        for program in programs:
            for name, shard in shards_by_name(program).items():
                self._held.setdefault(name, {})[program.rank] = shard
            for shard in program.updates:
                self._updated.setdefault(shard.name, {})[program.rank] = shard

    def held(self, name: str, rank: int) -> TensorShard | None:
        return self._held.get(name, {}).get(rank)

    def of(self, name: str, updates: bool) -> Mapping[int, TensorShard]:
        """Parts by rank; a rank that is missing has the whole."""
        held = self._held.get(name, {})
        return {**held, **self._updated.get(name, {})} if updates else held


def _joined_states(parts: list[tuple[TensorShard | None, dict[str, Any]]]) -> dict[str, Any]:
    """State of one parameter from the states of its parts: tensors of their shapes are joined,
    everything else (counters) is the same on all ranks."""

    def join(key: str, shard: TensorShard | None, value: Any) -> Any:
        if not isinstance(value, Tensor) or shard is None or value.shape != shard.part.shape:
            return value
        return joined([(other, entries[key]) for other, entries in parts])

    shard, entries = parts[0]
    return {key: join(key, shard, value) for key, value in entries.items()}


def _state_part(value: Any, shard: TensorShard | None) -> Any:
    if not isinstance(value, Tensor) or shard is None or value.shape != shard.whole.shape:
        return value
    return part_of(value, shard).contiguous()


def _input_parts(
    variant: Variant, program: Program, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The user inputs that the rank of `program` reads, as much as it needs of them."""
    shards = shards_by_name(program)
    batch_dims = {
        value.origin: value.batch_dim for value in variant.captured.graph.values_of(ValueKind.INPUT)
    }
    return {
        name: batch_part(inputs[name], shards.get(name), batch_dims[name])
        for name in _tensors_of(program, ValueKind.INPUT)
    }


def _tensors_of(program: Program, *kinds: ValueKind) -> list[str]:
    return sorted(
        {
            value.origin
            for stage in program.stages
            for kind in kinds
            for value in stage.graph.values_of(kind)
        }
    )


def _parameters(variant: Variant) -> Iterator[Any]:
    return iter(variant.captured.graph.values_of(ValueKind.PARAMETER))


class _Flags:
    """What of a model decides what is captured for training: modes, and what is frozen."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = tuple(model.modules())
        self._parameters = tuple(model.parameters())

    def text(self) -> str:
        """Short, equal where the flags are; quick, as each step asks for it."""
        flags = [module.training for module in self._modules]
        flags += [parameter.requires_grad for parameter in self._parameters]
        return hashlib.sha256(bytes(flags)).hexdigest()[:12]


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every parameter and buffer name -> the first name of the same tensor."""
    first: dict[int, str] = {}
    table: dict[str, str] = {}
    pairs = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in pairs:
        table[name] = first.setdefault(id(tensor), name)
    return table
