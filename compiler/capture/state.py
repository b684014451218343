"""Keep a model as it was while it is traced or checked.

A forward pass may set attributes of modules (a cache, a counter). Under tracing these would be left
as fake tensors, and what the trace did would count as a call. So attributes are put back; those
that got a tensor are reported, since a partitioned run does not set them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["all_on_meta", "numbers_kept", "same_contents", "unchanged"]

_TABLES = ("_parameters", "_buffers", "_modules")
META = torch.device("meta")


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[list[str]]:
    """Put back attributes of all modules, and which tensors are their buffers and parameters.

    Yields a list that holds, afterwards, the attributes that were set to tensors meanwhile.
    """
    before = [(path, module, dict(module.__dict__)) for path, module in model.named_modules()]
    tables = [{name: dict(module.__dict__[name]) for name in _TABLES} for _, module, _ in before]
    found: list[str] = []
    try:
        yield found
    finally:
        for (path, module, attributes), contents in zip(before, tables, strict=True):
            prefix = f"{path}." if path else ""
            found.extend(prefix + name for name in _new_tensors(module, attributes))
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, entries in contents.items():
                table = module.__dict__[name]
                table.clear()
                table.update(entries)


def _new_tensors(module: nn.Module, before: dict[str, object]) -> Iterator[str]:
    for name, value in module.__dict__.items():
        if name in _TABLES or value is before.get(name) or _lists_parameters(before.get(name)):
            continue
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            yield name


def _lists_parameters(value: object) -> bool:
    """Recurrent layers keep such a list, which follows their parameters."""
    leaves = pytree.tree_leaves(value)
    return bool(leaves) and all(isinstance(leaf, nn.Parameter) for leaf in leaves)


@contextlib.contextmanager
def same_contents(model: nn.Module) -> Iterator[None]:
    """`unchanged`, and the contents of buffers as well."""
    contents = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with unchanged(model):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(contents[name])


@contextlib.contextmanager
def all_on_meta(model: nn.Module) -> Iterator[None]:
    """Buffers and parameters of a model that is on meta in part, all on meta inside."""
    twins: dict[int, Tensor] = {}

    def twin(tensor: Tensor) -> Tensor:
        if id(tensor) not in twins:
            value = tensor.detach().to("meta")
            trained = tensor.requires_grad
            is_parameter = isinstance(tensor, nn.Parameter)
            twins[id(tensor)] = nn.Parameter(value, trained) if is_parameter else value
        return twins[id(tensor)]

    tables = [
        table
        for module in model.modules()
        for table in (module.__dict__["_parameters"], module.__dict__["_buffers"])
    ]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and not tensor.is_meta:
                    table[name] = twin(tensor)
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.update(entries)


class numbers_kept(TorchFunctionMode):
    """Has `torch.tensor(numbers, device="meta")` make a tensor on the CPU first.

    It becomes a constant of the traced program, which on meta would have lost its numbers.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not torch.tensor or torch.device(kwargs.get("device") or "cpu") != META:
            return function(*args, **kwargs)
        return function(*args, **{**kwargs, "device": "cpu"}).to(META)
