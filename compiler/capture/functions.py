"""A model's own `autograd.Function`s, as ATen operators with the gradients that they define.

Tracing runs straight through a function's forward, and its backward is lost. Here both are kept.
With x the inputs, y = f(x) the outputs and b the function's backward, a linear map from the
gradients of y to those of x, the trace gets

    y = f(x).detach() + (s - s.detach()),    s = b^T x,

which has the value of f, and the gradient of s: (b^T)^T = b. The transpose b^T x is what autograd
computes as the vector-Jacobian product of b, evaluated at a gradient of NaNs: nothing of a linear
map depends on the point, so a NaN that is left in the graph shows a backward that is not linear
(one that clips, say), which is refused by name.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function

from ..ir.errors import CaptureError

__all__ = ["as_operators", "python_functions", "refuse_functions", "refuse_nonlinear"]


def python_functions(tensors: Iterable[Tensor]) -> tuple[type, ...]:
    """Classes of the `autograd.Function`s in the autograd graph behind `tensors`."""
    found: dict[type, None] = {}
    seen: set[object] = set()
    stack = [tensor.grad_fn for tensor in tensors]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)  # set on nodes that Python defined
        if function is not None:
            found[function] = None
        stack.extend(parent for parent, _ in node.next_functions)
    return tuple(sorted(found, key=_full_name))


def _full_name(function: type) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def refuse_functions(functions: tuple[type, ...]) -> CaptureError:
    """The error for functions that cannot be kept."""
    first = functions[0]
    names = ", ".join(function.__name__ for function in functions)
    if first.__module__.startswith("torch.utils.checkpoint"):
        return CaptureError(
            "reentrant activation checkpointing is used, whose backward the graph would lose",
            where=_full_name(first),
            ways_out=("pass use_reentrant=False to torch.utils.checkpoint.checkpoint",),
        )
    if first.__module__.startswith("torch._library"):
        return CaptureError(
            f"the model calls an operator that is not torch's own ({first.__name__}), which the "
            "processes that run its stages do not load",
            where=_full_name(first),
            ways_out=(
                "choose an implementation in plain torch (experts of transformers: "
                'config._experts_implementation = "batched_mm")',
            ),
        )
    return CaptureError(
        f"the model uses its own autograd.Function {names}, whose backward the graph would lose",
        where=_full_name(first),
        ways_out=(
            "call it as Class.apply(...) where it is used, on tensors, with a backward that is "
            "linear in the gradient",
            "write the same gradient with detach: g(x) + (f(x) - g(x)).detach() has the value of f "
            "and the gradient of g; a straight-through estimator is x + (f(x) - x).detach()",
        ),
    )


@contextlib.contextmanager
def as_operators(functions: tuple[type, ...]) -> Iterator[None]:
    """While a model is traced, `Class.apply` of these classes computes the above.

    `apply` is shadowed on the classes themselves, as nothing that torch offers sees the call; it is
    put back on exit.
    """
    with contextlib.ExitStack() as undo:
        for function in functions:
            undo.callback(_restore, function, function.__dict__.get("apply"))
            function.apply = classmethod(_apply)  # type: ignore[attr-defined]
        yield


def _restore(function: type, own: object) -> None:
    if own is None:
        del function.apply  # type: ignore[attr-defined]
    else:
        function.apply = own  # type: ignore[attr-defined]


class _Context:
    """What a function's forward leaves for its backward; the functions set further attributes."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.constant_outputs: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.constant_outputs = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Gradients are always tensors here."""

    def mark_dirty(self, *tensors: Tensor) -> None:
        raise CaptureError(
            "an autograd.Function of the model changes its input in place (mark_dirty)",
            ways_out=("return a new tensor from the function",),
        )


def _apply(function: Any, *args: Any) -> Any:
    wanted = tuple(isinstance(item, Tensor) and item.requires_grad for item in args)
    context = _Context(wanted)
    with torch.no_grad():
        # What the context keeps of the inputs must carry no gradient: b is a constant map.
        held = [item.detach() if isinstance(item, Tensor) else item for item in args]
        result = _forward(function, context, held)
    if not (torch.is_grad_enabled() and any(wanted)):
        return result
    outputs = list(result) if isinstance(result, tuple) else [result]
    places = [
        place
        for place, output in enumerate(outputs)
        if isinstance(output, Tensor)
        and output.is_floating_point()
        and not any(output is constant for constant in context.constant_outputs)
    ]
    inputs = [item if need else None for item, need in zip(args, wanted, strict=True)]
    terms = _transposed_backward(function, context, outputs, places, inputs)
    for place, term in zip(places, terms, strict=True):
        value = outputs[place].detach()
        outputs[place] = value if term is None else value + (term - term.detach())
    return tuple(outputs) if isinstance(result, tuple) else outputs[0]


def _forward(function: Any, context: _Context, args: list[Any]) -> Any:
    if function.setup_context is Function.setup_context:
        return function.forward(context, *args)
    result = function.forward(*args)
    function.setup_context(context, tuple(args), result)
    return result


def _transposed_backward(
    function: Any,
    context: _Context,
    outputs: list[Any],
    places: list[int],
    inputs: list[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """b^T x by output; None for an output that no gradient comes from."""
    with torch.enable_grad():
        points = [torch.full_like(outputs[place], math.nan).requires_grad_() for place in places]
        given: list[Any] = [
            torch.zeros_like(item) if isinstance(item, Tensor) else None for item in outputs
        ]
        for place, point in zip(places, points, strict=True):
            given[place] = point
        found = function.backward(context, *given)
        found = found if isinstance(found, tuple) else (found,)
        pairs = [
            (gradient.sum_to_size(item.shape), item)
            for gradient, item in zip(found, inputs, strict=False)
            if item is not None and isinstance(gradient, Tensor) and gradient.requires_grad
        ]
        if not pairs:
            return (None,) * len(points)
        return torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            points,
            [item for _, item in pairs],
            create_graph=True,
            allow_unused=True,
        )


def refuse_nonlinear(graph: fx.Graph, functions: tuple[type, ...]) -> None:
    """Refuse `functions` if a live node of `graph` depends on the gradients of NaNs.

    Raises:
        CaptureError: names the functions.
    """
    alive: set[fx.Node] = set()
    stack = [node for node in graph.nodes if node.op == "output"]
    while stack:
        node = stack.pop()
        if node not in alive:
            alive.add(node)
            stack.extend(node.all_input_nodes)
    for node in alive:
        if node.target is torch.ops.aten.full_like.default and math.isnan(_number(node.args[1])):
            names = ", ".join(function.__name__ for function in functions)
            raise CaptureError(
                f"the backward of an own autograd.Function ({names}) is not linear in the gradient",
                where=_full_name(functions[0]),
                ways_out=("clip or transform gradients in the optimizer step instead",),
            )


def _number(item: object) -> float:
    return float(item) if isinstance(item, (int, float)) else 0.0
