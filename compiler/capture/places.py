"""Where a traced node comes from, and the errors for nodes that have no place in the graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from ..ir.errors import CaptureError
from ..ir.types import DTYPE_NAMES, TensorType
from .export import MODEL_PREFIX
from .locate import last_user_line

__all__ = ["module_path", "mutation_error", "place", "refusal", "source_line", "static_type"]


def source_line(node: fx.Node) -> str:
    """`file.py:123` of the user's line that issued the call, or empty."""
    return last_user_line(node.meta.get("stack_trace"))


def static_type(node: fx.Node, tensor: Tensor) -> TensorType:
    """Type of a result. Raises CaptureError if it depends on data or is not supported."""
    if not all(isinstance(size, int) for size in tensor.shape):
        raise refusal(
            node,
            f"its shape {tuple(tensor.shape)} depends on data",
            "replace boolean indexing, nonzero and .item() sizes by masks or torch.where",
        )
    if tensor.dtype not in DTYPE_NAMES:
        raise refusal(node, f"its element type {tensor.dtype} is not supported")
    return TensorType.of(tensor)


def place(node: fx.Node) -> str:
    """Node, module and source line, for messages."""
    line = source_line(node)
    path = module_path(node) or "(the model)"
    return f"node {node.name} of module {path}" + (f", {line}" if line else "")


def refusal(node: fx.Node, cause: str, *ways_out: str) -> CaptureError:
    """The error for a node that the IR cannot express, for the reason `cause`."""
    return CaptureError(
        f"{node.target} has no place in the graph: {cause}",
        where=place(node),
        ways_out=ways_out or ("write this part of the model with other operators",),
    )


def mutation_error(node: fx.Node, spec: Any) -> CaptureError:
    """The error for a model that writes to what `spec` (an output of the program) names."""
    what = {"USER_INPUT_MUTATION": "input", "PARAMETER_MUTATION": "parameter"}
    kind = what.get(spec.kind.name, spec.kind.name.lower().replace("_", " "))
    return CaptureError(
        f"the model changes its {kind} {_own_name(spec.target)} in place",
        where=place(node),
        ways_out=("change a copy: x = x.clone()", "keep what changes in a buffer"),
    )


def _own_name(target: object) -> str:
    return str(target).removeprefix(f"{MODEL_PREFIX}.")


def module_path(node: fx.Node) -> str:
    """Path of the innermost module, without the wrapper; a second call's mark `@1` is dropped."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    if path != MODEL_PREFIX and not path.startswith(f"{MODEL_PREFIX}."):
        return ""
    return ".".join(part.partition("@")[0] for part in path.split(".")[1:])
