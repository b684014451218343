"""Optimizers across ranks: any `torch.optim` class, described by name and numbers, never pickled.

The driver calls the user's factory on the model's own parameters. That *mirror* optimizer never
steps; learning-rate schedulers act on its `param_groups`, and each step the groups'
hyperparameters travel to the ranks, which hold the real optimizers of their own parameters.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compiler.ir.errors import UsageError
from .offload import HostCopy

__all__ = [
    "Hyperparameters",
    "OptimizerSpec",
    "RankOptimizer",
    "current_hyperparameters",
    "describe_optimizer",
    "zero_gradients",
]

Hyperparameters = dict[str, Any]

# Their fused kernel on the CPU rounds as the plain one does, to the last bits of float64. (SGD's
# takes the first step of all parameters of a group for one; others have none, or another formula.)
_FUSED_CLASSES = (torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """An optimizer as data: `module:class` and, per group, parameter names and hyperparameters."""

    class_name: str
    groups: tuple[tuple[tuple[str, ...], Hyperparameters], ...]

    def restricted(self, names: Iterable[str]) -> OptimizerSpec:
        """The same groups with only the parameters in `names` (empty groups stay)."""
        wanted = set(names)
        return OptimizerSpec(
            self.class_name,
            tuple(
                (tuple(name for name in members if name in wanted), options)
                for members, options in self.groups
            ),
        )


def describe_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> OptimizerSpec:
    """The spec of a mirror optimizer; `names` maps `id(parameter)` to its name.

    Raises:
        UsageError: its class cannot be imported by name, its step needs a closure, or it holds
            foreign parameters.
    """
    kind = type(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"the factory of the optimizer made a {kind.__name__}",
            where="optimizer",
            ways_out=("return a torch.optim.Optimizer",),
        )
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UsageError(
            f"{kind.__name__} evaluates the loss several times a step, by a closure",
            where="optimizer",
            ways_out=("use an optimizer that updates from one gradient, such as AdamW or SGD",),
        )
    groups = []
    for group in optimizer.param_groups:
        members = []
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise UsageError(
                    f"the optimizer holds a tensor of shape {tuple(parameter.shape)} that is no "
                    "parameter of the model",
                    where=f"optimizer {kind.__name__}",
                    ways_out=("build the optimizer from the parameters the factory is given",),
                )
            members.append(names[id(parameter)])
        groups.append((tuple(members), _options(group)))
    spec = OptimizerSpec(f"{kind.__module__}:{kind.__qualname__}", tuple(groups))
    if _import_class(spec.class_name) is not kind:
        raise UsageError(
            f"optimizer class {spec.class_name} cannot be imported by name on the workers",
            ways_out=("use a class of torch.optim", "move the class to an importable module"),
        )
    _try_to_rebuild(kind, spec.groups[0][1])
    return spec


def _try_to_rebuild(kind: Any, options: Hyperparameters) -> None:
    """Refuse a class that the workers could not make from groups alone."""
    try:
        kind([{"params": [torch.nn.Parameter(torch.zeros(2, 2))], **options}])
    except Exception as error:
        raise UsageError(
            f"{kind.__name__} cannot be made from parameter groups with their hyperparameters: "
            f"{type(error).__name__}: {error}",
            where="optimizer",
            ways_out=("give the arguments of its constructor defaults that groups can override",),
        ) from error


def current_hyperparameters(optimizer: torch.optim.Optimizer) -> tuple[Hyperparameters, ...]:
    """Per group, what a scheduler may have changed since the last step."""
    return tuple(_options(group) for group in optimizer.param_groups)


def _options(group: dict[str, Any]) -> Hyperparameters:
    names = ("params", "param_names")
    return {name: value for name, value in group.items() if name not in names}


def _import_class(name: str) -> Any:
    module, _, qualname = name.partition(":")
    if module == "__main__" or "<locals>" in qualname:
        return None
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _placed(key: str, value: Any, device: torch.device, group: Mapping[str, Any]) -> Any:
    """A copy of a state entry where `torch.optim` keeps it: step counters are on the CPU unless
    kernels count steps themselves."""
    if not isinstance(value, Tensor):
        return value
    on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
    return value.detach().to("cpu" if on_host else device, copy=True)


def _fits_fused(kind: type, parameters: Iterable[Tensor]) -> bool:
    """Whether one pass over memory may update `parameters`: it takes them for dense rows, and in
    16 bits it would round less often than the user's optimizer does."""
    return kind in _FUSED_CLASSES and all(
        parameter.device.type == "cpu"
        and parameter.dtype in (torch.float32, torch.float64)
        and parameter.is_contiguous()
        for parameter in parameters
    )


def _leaves_kernel_open(options: Hyperparameters) -> bool:
    """Whether the user chose no kernel, by name or by what only some can do: a learning rate in a
    tensor is reckoned with in its own precision by one and in float64 by another."""
    choices = (options.get("fused"), options.get("foreach"))
    return all(choice is None for choice in choices) and not (
        options.get("differentiable")
        or options.get("capturable")
        or any(isinstance(value, Tensor) for value in options.values())
    )


@contextlib.contextmanager
def _in_one_piece(groups: Iterable[Mapping[str, Any]]) -> Iterator[None]:
    """Parameters that fused kernels update, and their gradients, without strides meanwhile: these
    kernels refuse a part of a matrix, or take its elements for neighbours (on the CPU)."""
    views: list[tuple[torch.nn.Parameter, Tensor]] = []
    for group in groups:
        for parameter in group["params"] if group.get("fused") else ():
            if parameter.grad is None:
                continue
            if not parameter.is_contiguous():
                views.append((parameter, parameter.data))
                parameter.data = parameter.data.contiguous()
            parameter.grad = parameter.grad.contiguous()
    try:
        yield
    finally:
        for parameter, view in views:
            view.copy_(parameter.data)
            parameter.data = view


class RankOptimizer:
    """The real optimizer of the parameters that one rank updates.

    Args:
        spec: of the whole model's optimizer.
        parameters: by name; views of parts are updated in place.
        host: where the states of offloaded parameters lie and their update is made; None: with the
            parameters.
        offloaded: names of those; ones that are not here are ignored.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        parameters: Mapping[str, torch.nn.Parameter],
        host: torch.device | None = None,
        offloaded: Iterable[str] = (),
    ) -> None:
        kind = _import_class(spec.class_name)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise UsageError(f"{spec.class_name} is no torch.optim.Optimizer")
        local = spec.restricted(parameters)
        self._kept = [i for i, (members, _) in enumerate(local.groups) if members]
        self._host_copies: dict[str, HostCopy] = {}
        if host is not None:
            here = (name for name in offloaded if name in parameters)
            self._host_copies = {name: HostCopy(parameters[name], host) for name in here}
        self._parameters = {
            **parameters,
            **{name: copy.parameter for name, copy in self._host_copies.items()},
        }
        self._optimizer: torch.optim.Optimizer | None = None
        if self._kept:
            groups = [
                {
                    "params": [self._parameters[name] for name in local.groups[i][0]],
                    **local.groups[i][1],
                }
                for i in self._kept
            ]
            make: Callable[..., torch.optim.Optimizer] = kind
            self._optimizer = make(groups)
            self._fits_fused = [_fits_fused(kind, group["params"]) for group in groups]

    def step(
        self, gradients: Mapping[str, Tensor], hyperparameters: tuple[Hyperparameters, ...]
    ) -> None:
        """Update the parameters that have a gradient (others keep `grad` None, as in torch)."""
        if self._optimizer is None:
            return
        groups = zip(self._kept, self._optimizer.param_groups, self._fits_fused, strict=True)
        for index, group, fits_fused in groups:
            group.update(hyperparameters[index])
            if fits_fused and _leaves_kernel_open(hyperparameters[index]):
                group["fused"] = True
        for name, parameter in self._parameters.items():
            gradient = gradients.get(name)
            if gradient is not None and name in self._host_copies:
                gradient = self._host_copies[name].fetched(gradient)
            parameter.grad = gradient
        for copy in self._host_copies.values():
            copy.await_fetched()
        with _in_one_piece(self._optimizer.param_groups):
            self._optimizer.step()
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and name in self._host_copies:
                self._host_copies[name].write_back()
            parameter.grad = None

    def refresh(self) -> None:
        """The parameters may have other values than the last step gave them."""
        for copy in self._host_copies.values():
            copy.is_stale = True

    def state(self) -> dict[str, dict[str, Any]]:
        """Optimizer state by parameter name."""
        if self._optimizer is None:
            return {}
        states = self._optimizer.state
        return {
            name: dict(states[parameter])
            for name, parameter in self._parameters.items()
            if parameter in states
        }

    def load_state(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Inverse of `state`; parameters that are not held here are ignored."""
        if self._optimizer is None:
            return
        groups = {
            id(parameter): group
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        }
        for name, parameter in self._parameters.items():
            if name in state and id(parameter) in groups:
                self._optimizer.state[parameter] = {
                    key: _placed(key, value, parameter.device, groups[id(parameter)])
                    for key, value in state[name].items()
                }

    def state_tensors(self) -> list[Tensor]:
        """Tensors of the states that lie with the parameters."""
        return [
            value
            for name, entries in self.state().items()
            if name not in self._host_copies
            for value in entries.values()
            if isinstance(value, Tensor)
        ]

    def state_bytes(self) -> int:
        """Bytes of these tensors."""
        return sum(value.numel() * value.element_size() for value in self.state_tensors())


def zero_gradients(gradients: Iterable[Tensor]) -> None:
    """Fill all with zeros, in one launch where that is possible."""
    tensors = list(gradients)
    if tensors:
        torch._foreach_zero_(tensors)
