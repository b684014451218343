"""A partitioned model as the user drives it: steps, inference, state.

`Parallel` owns a session (local workers or this job's ranks) and, for each kind of call it has
seen (training or inference, input shapes, train/eval flag), a *variant*: the model captured for
that call, the plan's stages carried over to it, programs, all verified. The first variant comes
from `auto_partition`; others are captured when first needed, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..runtime.optimizer import current_hyperparameters, describe_optimizer
from ..runtime.session import Session
from .batch import Call, contiguous
from .checkpoint import Checkpoint, Progress, save_checkpoint
from .codegen.python import emit_python
from .elementwise import check_elementwise, first_part
from .files import unusable, write_whole
from .ir.errors import UsageError
from .ir.graph import Mode, ValueKind
from .ir.program import Program
from .ir.text import print_program
from .ir.trace import TraceEvent
from .parts import batch_part, shards_by_name
from .placement import Needs
from .planned import PlannedModel
from .rank_state import RankState
from .ranks import Ranks
from .variants import Variant, Variants
from .weights import Values, Weights, first_names, refuse_constants_on_meta

__all__ = ["OptimizerFactory", "Parallel", "RunOptions"]

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
    weights: Weights | None = None


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
        self._maker = Variants(
            planned, loss_fn=options.loss_fn, clip_grad_norm=options.clip_grad_norm
        )
        self._ranks = Ranks(
            planned.plan.cluster,
            len(planned.programs),
            options.timeout_seconds,
            session,
            owns_session=owns_session,
        )
        self._values = Values(
            model,
            options.weights,
            seed=options.seed,
            needed=(name for names in Needs.of(planned.programs).held for name in names),
        )
        self._state = RankState(self._ranks, self._spec)
        self._step = 0
        self._measure = False
        self._record = False
        self._peaks: list[int] = []
        self._events: tuple[TraceEvent, ...] = ()
        self._busy: list[float] = []

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
        self._state.changed(variant.needs.changed)
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
        replies = self._ranks.call(method, arguments)
        if self._measure:
            self._peaks = [reply["peak_bytes"] for reply in replies]
            self._measure = False
        if self._record:
            self._events = tuple(event for reply in replies for event in reply["events"])
            self._busy = [reply["busy_seconds"] for reply in replies]
            self._record = False
        return replies

    # -- variants ------------------------------------------------------------------------------

    def _variant(self, mode: Mode, call: Call) -> Variant:
        key = self._maker.key(mode, call)
        variant = self._variants.get(key)
        if variant is None:
            variant = self._maker.make(mode, call)
            self._place(variant)
            self._load(variant)
            self._variants[key] = variant
        else:
            self._place(variant)
        return variant

    def _load(self, variant: Variant) -> None:
        refuse_constants_on_meta(variant.captured)
        self._ranks.call(
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
        )

    def _place(self, variant: Variant) -> None:
        """Send every rank what it lacks today's value of: parameters, buffers, states."""
        self._state.place(variant.programs, variant.needs, variant.captured.tensors, self._values)
        if variant.plan.mode is Mode.TRAIN:
            self._state.configure_optimizer(variant.programs, variant.needs)

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The model's `state_dict()` with today's values, on the CPU; tied names share a tensor."""
        own = self.model.state_dict()
        canonical = first_names(self.model)
        current = self._state.tensors()
        for name in own:
            first = canonical.get(name)
            if first is not None:
                if first not in current:
                    current[first] = self._values.tensor(first)
                own[name] = current[first]
        return own

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> Any:
        """As `nn.Module.load_state_dict`; ranks get the values before they next read them.

        The model itself takes them too, on top of today's values for what `state` lacks. A model
        on meta keeps none: the values stay beside it.
        """
        self._values.keep(self._state.tensors())
        self._state.forget_tensors()
        if any(tensor.is_meta for tensor in self.model.state_dict().values()):
            return self._values.load_state_dict(self.model, state, strict)
        result = self.model.load_state_dict(state, strict=strict)
        self._values.use_model()
        return result

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the last training step, before clipping, by parameter name.

        Needs `keep_gradients=True`. Parameters without a gradient are missing.
        """
        if not self._options.keep_gradients:
            raise UsageError(
                "gradients are not kept after the optimizer step",
                ways_out=("pass keep_gradients=True to auto_partition",),
            )
        found = self._state.gradients()
        return {name: found[name] for name in self._names.values() if name in found}

    def optimizer_state_dict(self) -> dict[str, Any]:
        """What further training depends on besides `state_dict()`.

        Returns:
            `state` by parameter name, `param_groups` with parameter names and today's
            hyperparameters (as `torch.distributed.checkpoint.state_dict` has them), and
            `num_steps`, the training steps taken, from which randomness follows.
        """
        state = self._state.optimizer_state()
        return {
            "state": {name: state[name] for name in self._names.values() if name in state},
            "param_groups": self._param_groups(),
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
        self._state.load_optimizer_state(by_name)

    def save_checkpoint(self, directory: str | PathLike[str]) -> None:
        """Write today's state to a new directory, each rank the parts that it holds.

        Model, optimizer and the steps taken, in the format of `torch.distributed.checkpoint`; see
        `compiler/checkpoint.py`. Under torchrun every rank calls this.

        Raises:
            UsageError: there is something at `directory` already.
            RuntimeFailure: it cannot be written; training can go on.
        """
        self.place()
        progress = None
        if self.plan.mode is Mode.TRAIN:
            progress = Progress(self._param_groups(), self._step)
        save_checkpoint(
            directory,
            model=self.model,
            values=self._values,
            ranks=self._ranks,
            state=self._state,
            spec=self._spec,
            progress=progress,
        )

    def load_checkpoint(self, directory: str | PathLike[str]) -> None:
        """Take the state that `save_checkpoint`, under any plan, or plain torch has written.

        Ranks read the parts that they hold. A checkpoint of a model alone leaves the optimizer as
        it is. Nothing has changed where the checkpoint is refused.

        Raises:
            UsageError: there is no checkpoint, it is damaged, or of another model or optimizer.
        """
        trains = self.plan.mode is Mode.TRAIN
        checkpoint = Checkpoint(directory, self.model, self._spec if trains else None)
        self._state.forget_tensors()
        self._values.use_stored(checkpoint.tensors)
        self.place()
        held = set(self._state.names)
        self._values.keep({n: checkpoint.whole(n) for n in checkpoint.tensors if n not in held})
        if checkpoint.progress is not None:
            self._state.read_optimizer_state(self._planned.programs, checkpoint.state)
            options = checkpoint.progress.param_groups
            for group, saved in zip(self.optimizer.param_groups, options, strict=True):
                group.update(saved)
            self._step = checkpoint.progress.num_steps

    def place(self) -> None:
        """Give the ranks of the plan their values now, instead of with the first call.

        Each reads or is sent its parts, one tensor after the other; for training it gets its
        optimizer.
        """
        planned = self._planned
        needs = Needs.of(planned.programs)
        self._state.place(planned.programs, needs, planned.captured.tensors, self._values)
        if self.plan.mode is Mode.TRAIN:
            self._state.configure_optimizer(planned.programs, needs)

    def _param_groups(self) -> list[dict[str, Any]]:
        """Today's hyperparameters, with names of parameters."""
        return [
            {**options, "params": list(members)}
            for (members, _), options in zip(
                self._spec.groups, current_hyperparameters(self.optimizer), strict=True
            )
        ]

    def record_trace(self) -> None:
        """Record what each rank does in the next step, and when (see `trace`)."""
        self._record = True

    def trace(self) -> tuple[TraceEvent, ...]:
        """What all ranks did in the last recorded step, each by its own clock."""
        return self._events

    def busy_seconds(self) -> list[float]:
        """Per rank, seconds for which it worked in the last recorded step, of computation and of
        messages: on the CPU of its main thread's own time, so that other processes do not count."""
        return self._busy

    def measure_memory(self) -> None:
        """Measure the peak memory of the next step (see `peak_memory_bytes`); it runs slower."""
        self._measure = True

    def peak_memory_bytes(self) -> list[int]:
        """Peak bytes per rank of the last measured step; empty if none was measured."""
        return list(self._peaks)

    # -- life ----------------------------------------------------------------------------------

    def save_programs(self, directory: str | Path) -> None:
        """Write the generated Python and instruction lists of every rank, to read.

        Raises:
            UsageError: a file cannot be written.
        """
        folder = Path(directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unusable(folder, "make", "program", error) from error
        for program in self._planned.programs:
            for suffix, text in (
                ("py", emit_python(program)),
                ("program", print_program(program)),
            ):
                write_whole(folder / f"rank{program.rank}.{suffix}", text, "program")

    def explain(self) -> str:
        """The plan in words and pictures."""
        from .explain import explain

        return explain(self.plan, self._planned.captured.graph, self._planned.programs)

    def close(self) -> None:
        """End the workers that this object started."""
        self._ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
