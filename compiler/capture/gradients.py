"""What would change gradients in silence: found during capture and handled or refused by name.

* `torch.no_grad()` regions: see `regions.py`.
* Own `autograd.Function`s: see `functions.py`.
* Hooks on tensors, parameters and modules are dropped: they are seen while the model runs
  (`Watch`), or found on the module tree (`refuse_hooks`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ir.errors import CaptureError
from .locate import called_by_capture, current_place

__all__ = ["Watch", "refuse_hooks"]


_READ_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class Watch(TorchFunctionMode):
    """Refuses, while a model runs, calls whose effect on gradients a graph would not have.

    `x.data`, which export does not get through, is traced as `x.detach()`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._refused: dict[object, tuple[str, str]] = {
            Tensor.register_hook: ("a gradient hook", "register_hook"),
            Tensor.register_post_accumulate_grad_hook: (
                "a gradient hook",
                "register_post_accumulate_grad_hook",
            ),
            Tensor.backward: ("a backward pass of its own", "backward"),
            torch.autograd.grad: ("a gradient inside the forward pass", "autograd.grad"),
            torch.autograd.backward: ("a backward pass of its own", "autograd.backward"),
        }

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func == _READ_DATA:
            return args[0].detach()
        refused = self._refused.get(func)
        if refused is not None and torch.is_grad_enabled() and not called_by_capture(__file__):
            what, name = refused
            raise CaptureError(
                f"the model's forward pass uses {what} ({name}), which the graph would lose",
                where=current_place(self._model),
                ways_out=(
                    "scale or clip activations instead of their gradients: h = h * s + "
                    "(h - h * s).detach() has h's value and s times its gradient",
                    "remove the hook; gradients can be clipped by the optimizer step",
                ),
            )
        return func(*args, **(kwargs or {}))


def refuse_hooks(model: nn.Module) -> None:
    """Refuse backward hooks on modules and gradient hooks on parameters.

    Raises:
        CaptureError: names the first module or parameter that has one.
    """
    for path, module in model.named_modules():
        for table in ("_backward_hooks", "_backward_pre_hooks"):
            hooks = getattr(module, table, None)
            if hooks:
                raise _hook_error(
                    f"module {path or '(the model)'} ({type(module).__name__})", hooks
                )
    for name, parameter in model.named_parameters():
        for table in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            hooks = getattr(parameter, table, None)
            if hooks:
                raise _hook_error(f"parameter {name}", hooks)


def _hook_error(place: str, hooks: dict[int, Any]) -> CaptureError:
    names = ", ".join(getattr(hook, "__name__", type(hook).__name__) for hook in hooks.values())
    return CaptureError(
        f"a backward hook is registered ({names}), which the graph would lose",
        where=place,
        ways_out=("remove the hook before partitioning",),
    )
