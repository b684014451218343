"""Regions of a traced program that run without gradients or under autocast.

Export keeps `torch.no_grad()` as a call of `wrap_with_set_grad_enabled` on a submodule, and
decomposition inlines it without its effect: the loss stays exact and gradients go wrong. So before
that, `detach_no_grad_regions` detaches what leaves such a region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..ir.errors import CaptureError
from .locate import last_user_line

__all__ = ["Region", "detach_no_grad_regions", "region_of"]


@dataclass(frozen=True, slots=True)
class Region:
    """A call of a submodule that holds the body of a region.

    Args:
        submodule: its name within the calling module.
        inputs: arguments of the call, one for each placeholder of the submodule.
        grad_enabled: the gradient mode it sets; None: it leaves the caller's.
        autocast: whether it turns autocast on.
    """

    submodule: str
    inputs: tuple[fx.Node, ...]
    grad_enabled: bool | None = None
    autocast: bool = False


def region_of(node: fx.Node) -> Region | None:
    """The region that `node` calls, if it does."""
    kind = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if kind == "wrap_with_set_grad_enabled":
        enabled, body, *inputs = node.args
        region = Region(_name(body), _nodes(inputs), grad_enabled=bool(enabled))
    elif kind == "wrap_with_autocast":
        _, _, enabled, _, body, *inputs = node.args
        region = Region(_name(body), _nodes(inputs), autocast=bool(enabled))
    else:
        return None
    return region


def _name(body: object) -> str:
    assert isinstance(body, fx.Node) and body.op == "get_attr"
    return str(body.target)


def _nodes(inputs: Sequence[object]) -> tuple[fx.Node, ...]:
    return tuple(item for item in inputs if isinstance(item, fx.Node))


def detach_no_grad_regions(module: fx.GraphModule, own: frozenset[str]) -> None:
    """Insert `detach` where values leave regions without gradients, in place, recursively.

    Ordinary nodes of such a region have no gradient; what a nested region with gradients computes
    inside it has one, if its own inputs have. So a value is detached where an ordinary node of a
    region without gradients hands it to the region's output or to a nested region.

    Args:
        own: names of the placeholders of `module` that may be changed so: buffers, and parameters,
            whose change is refused later on.

    Raises:
        CaptureError: a region without gradients, or a write through `detach`, changes another
            value in place, whose gradient then ignores the change.
    """
    _detach(module, own, grad_enabled=True)


def _detach(module: fx.GraphModule, own: frozenset[str], *, grad_enabled: bool) -> None:
    for node in list(module.graph.nodes):
        region = region_of(node)
        if region is None:
            continue
        body = module.get_submodule(region.submodule)
        assert isinstance(body, fx.GraphModule)
        names = [item.name for item in body.graph.nodes if item.op == "placeholder"]
        passed = zip(names, region.inputs, strict=True)
        inner = frozenset(name for name, source in passed if source.name in own)
        mode = grad_enabled if region.grad_enabled is None else region.grad_enabled
        _detach(body, inner, grad_enabled=mode)
    _refuse_changes(module, own, grad_enabled)
    if not grad_enabled:
        _detach_exits(module)
        module.recompile()


def _detach_exits(module: fx.GraphModule) -> None:
    nodes = list(module.graph.nodes)
    exits = {node for node in nodes if node.op == "output" or region_of(node) is not None}
    for node in nodes:
        if not (_is_plain_float(node) and any(user in exits for user in node.users)):
            continue
        with module.graph.inserting_after(node):
            detached = module.graph.call_function(torch.ops.aten.detach.default, (node,))
        detached.meta = dict(node.meta)
        for user in [user for user in node.users if user in exits]:
            user.replace_input_with(node, detached)


def _is_plain_float(node: fx.Node) -> bool:
    """A float tensor that an ordinary call computes here, not a result of a nested region."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor):
        return False
    source = node
    while getattr(source.target, "__name__", "") == "getitem":
        (source, _) = source.args  # type: ignore[assignment]
    return region_of(source) is None and (value.is_floating_point() or value.is_complex())


def _refuse_changes(module: fx.GraphModule, own: frozenset[str], grad_enabled: bool) -> None:
    """Refuse changes in place that autograd does not see, of values that it follows."""
    for node in module.graph.nodes:
        target = node.target
        if not (isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable):
            continue
        base, detached = _base(node.args[0])
        value = base.meta.get("val") if base is not None else None
        if base is None or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        given = base.op == "placeholder"
        if base.name not in own and (detached or (given and not grad_enabled)):
            raise CaptureError(
                f"a value is changed in place ({target}) under torch.no_grad(), or through .data "
                "or detach(): its gradient would have to ignore the change",
                where=last_user_line(node.meta.get("stack_trace")) or "the model",
                ways_out=("write x = x + (changed - x).detach() in place of the change",),
            )


def _base(item: object) -> tuple[fx.Node | None, bool]:
    """What a tensor is a view of, and whether a `detach` lies between."""
    detached = False
    while isinstance(item, fx.Node) and isinstance(item.target, torch._ops.OpOverload):
        arguments = item.target._schema.arguments
        if not arguments or arguments[0].alias_info is None:
            break
        detached |= item.target is torch.ops.aten.detach.default
        item = item.args[0]
    return (item if isinstance(item, fx.Node) else None), detached
