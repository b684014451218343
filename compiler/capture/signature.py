"""How a call of the model maps to the graph's inputs, and the graph's outputs to its result.

Decides from the example call: which leaves of (args, kwargs) are tensors and what they are called
(`args[0]`, `kwargs.mask`, `targets[0]`), which are fixed constants, which trailing arguments are
targets of the loss function, which dims hold the batch; and from the model's result, where the loss
is and how user outputs unflatten.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ir.errors import CaptureError, UsageError
from ..ir.types import TensorType

__all__ = [
    "InputSignature",
    "LossFunction",
    "OutputSignature",
    "TensorLeaf",
    "find_loss",
    "num_targets",
]

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class TensorLeaf:
    """A tensor among the leaves of a call. Its origin is its path; see `Value.origin`."""

    origin: str
    type: TensorType
    batch_dim: int | None


@dataclass(frozen=True, slots=True)
class InputSignature:
    """Structure of the example call.

    Args:
        tree: structure of `(args, kwargs, targets)`.
        leaves: in flattening order, a `TensorLeaf` or the constant that the graph was made for.
        num_targets: trailing positional arguments that go to the loss function.
        rows: batch size of the example (dim 0 of the first tensor with a dim); 0 if none has one.
    """

    tree: pytree.TreeSpec
    leaves: tuple[object, ...]
    names: tuple[str, ...]
    num_targets: int
    rows: int

    @staticmethod
    def of(
        args: Sequence[Any], kwargs: Mapping[str, Any], num_targets: int
    ) -> tuple[InputSignature, list[Tensor]]:
        """Signature of a call and its tensors, in the order of `tensor_leaves`.

        Raises:
            UsageError: there are fewer positional arguments than targets.
        """
        if len(args) < num_targets:
            raise UsageError(
                f"the loss function takes {num_targets} targets, but there are {len(args)} "
                "positional example inputs",
                where="example inputs",
                ways_out=("pass targets as the last positional inputs",),
            )
        split = len(args) - num_targets
        call = (tuple(args[:split]), dict(kwargs), tuple(args[split:]))
        found, tree = pytree.tree_flatten_with_path(call)
        tensors = [leaf for _, leaf in found if isinstance(leaf, Tensor)]
        rows = next((int(tensor.shape[0]) for tensor in tensors if tensor.ndim), 0)
        leaves = tuple(
            TensorLeaf(_origin(path), TensorType.of(leaf), _batch_dim(leaf, rows))
            if isinstance(leaf, Tensor)
            else leaf
            for path, leaf in found
        )
        return InputSignature(tree, leaves, tuple(kwargs), num_targets, rows), tensors

    @property
    def tensor_leaves(self) -> tuple[TensorLeaf, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorLeaf))

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a new call by origin. Their shapes are not checked.

        Raises:
            UsageError: the call differs from the example in structure or in a constant.
        """
        split = len(args) - self.num_targets
        missing = [name for name in self.names if name not in kwargs]
        unknown = [name for name in kwargs if name not in self.names]
        if missing or unknown or split < 0:
            raise _mismatch(
                f"keyword inputs missing: {missing or 'none'}, unexpected: {unknown or 'none'}, "
                f"positional inputs: {len(args)}"
            )
        ordered = {name: kwargs[name] for name in self.names}
        leaves, tree = pytree.tree_flatten((tuple(args[:split]), ordered, tuple(args[split:])))
        if tree != self.tree:
            raise _mismatch(f"its structure is {tree}, that of the example {self.tree}")
        bound: dict[str, Tensor] = {}
        for leaf, example in zip(leaves, self.leaves, strict=True):
            if isinstance(example, TensorLeaf):
                if not isinstance(leaf, Tensor):
                    raise _mismatch(f"{example.origin} is {type(leaf).__name__}, not a tensor")
                bound[example.origin] = leaf
            elif leaf is not example and leaf != example:
                raise _mismatch(f"{leaf!r} stands where the example has the constant {example!r}")
        return bound

    def unflatten(
        self, tensors: Sequence[Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
        """`(args, kwargs, targets)` with the example's constants and `tensors`."""
        supply = iter(tensors)
        leaves = [next(supply) if isinstance(leaf, TensorLeaf) else leaf for leaf in self.leaves]
        args, kwargs, targets = pytree.tree_unflatten(leaves, self.tree)
        return args, kwargs, targets


def _mismatch(cause: str) -> UsageError:
    return UsageError(
        f"this call does not fit the example inputs: {cause}",
        where="call",
        ways_out=("call with the structure of the example inputs", "partition for this call too"),
    )


def _origin(path: tuple[Any, ...]) -> str:
    first, second, *rest = path
    area = ("args", "kwargs", "targets")[first.idx]
    step = f".{second.key}" if area == "kwargs" else f"[{second.idx}]"
    return area + step + pytree.keystr(tuple(rest))


def _batch_dim(tensor: Tensor, rows: int) -> int | None:
    return 0 if tensor.ndim and rows and tensor.shape[0] == rows else None


@dataclass(frozen=True, slots=True)
class OutputSignature:
    """Structure of what the model returns.

    Args:
        tree: its structure.
        leaves: in flattening order, a `TensorLeaf` (its origin is the target of the USER output,
            counted among the tensors) or a constant.
        dropped: what could not be returned (objects that hold tensors out of pytree's reach),
            described; None stands in its place.
    """

    tree: pytree.TreeSpec
    leaves: tuple[object, ...]
    dropped: tuple[str, ...] = ()

    @staticmethod
    def of(result: object, rows: int) -> tuple[OutputSignature, list[Tensor]]:
        """Signature of a result and its tensors, in the order of their targets."""
        found, tree = pytree.tree_flatten_with_path(result)
        tensors: list[Tensor] = []
        leaves: list[object] = []
        dropped: list[str] = []
        for path, leaf in found:
            if isinstance(leaf, Tensor):
                if not all(isinstance(size, int) for size in leaf.shape):
                    raise _dynamic_result(pytree.keystr(path), leaf)
                origin = str(len(tensors))
                leaves.append(TensorLeaf(origin, TensorType.of(leaf), _batch_dim(leaf, rows)))
                tensors.append(leaf)
            elif leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype)):
                leaves.append(leaf)
            else:
                leaves.append(None)
                dropped.append(f"result{pytree.keystr(path)} ({type(leaf).__name__})")
        return OutputSignature(tree, tuple(leaves), tuple(dropped)), tensors

    def unflatten(self, tensors: Mapping[str, Tensor]) -> Any:
        """What the model returns, from USER outputs by target."""
        leaves = [
            tensors[leaf.origin] if isinstance(leaf, TensorLeaf) else leaf for leaf in self.leaves
        ]
        return pytree.tree_unflatten(leaves, self.tree)


def _dynamic_result(path: str, tensor: Tensor) -> CaptureError:
    return CaptureError(
        f"the shape of a result depends on data: {tuple(tensor.shape)}",
        where=f"result{path}",
        ways_out=("replace boolean indexing, nonzero and .item() sizes by masks or torch.where",),
    )


def num_targets(loss_fn: LossFunction | None) -> int:
    """How many trailing example inputs are targets: required positional arguments beyond one.

    Raises:
        UsageError: the loss function holds parameters that would be trained.
    """
    if loss_fn is None:
        return 0
    call: Callable[..., Any] = loss_fn
    if isinstance(loss_fn, nn.Module):
        call = loss_fn.forward
        if any(parameter.requires_grad for parameter in loss_fn.parameters()):
            raise UsageError(
                f"the loss function {type(loss_fn).__name__} has parameters of its own",
                where="loss_fn",
                ways_out=("make it a submodule of the model, and let the model return the loss",),
            )
    required = [
        parameter
        for parameter in inspect.signature(call).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return max(len(required) - 1, 0)


def find_loss(result: object) -> Tensor:
    """The loss in what a model returns: itself, `.loss`, `["loss"]`, or the first of a tuple.

    Raises:
        CaptureError: there is no scalar float tensor in any of these places.
    """
    candidates = [result, getattr(result, "loss", None)]
    if isinstance(result, Mapping):
        candidates.append(result.get("loss"))
    if isinstance(result, (tuple, list)) and result:
        candidates.append(result[0])
    for candidate in candidates:
        if isinstance(candidate, Tensor) and candidate.ndim == 0 and candidate.is_floating_point():
            return candidate
    raise CaptureError(
        f"the model returns {_describe(result)}, in which there is no loss to train on",
        where="the model's result",
        ways_out=(
            "pass loss_fn, called as loss_fn(output) or loss_fn(output, *targets)",
            "return a scalar loss, an object with .loss, a dict with 'loss', or (loss, ...)",
            "pass what makes the model compute its loss, e.g. labels=...",
        ),
    )


def _describe(result: object) -> str:
    if isinstance(result, Tensor):
        return f"a tensor of type {TensorType.of(result)}"
    return f"a {type(result).__name__}"
