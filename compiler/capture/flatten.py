"""The short way from an exported program to functional ATen ops, for programs without mutation.

`run_decompositions({})` traces the whole model once more, which takes as long as exporting it. A
program that changes nothing in place needs less: its regions are inlined, and composite operators
that may alias their input (`to`, `reshape`, `contiguous`, ...) or hide a random one (`dropout`)
are replaced by what they consist of. What an operator consists of is traced once per kind of call,
so the layers of a deep model cost nothing. The result is what `run_decompositions({})` gives.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .regions import region_of

__all__ = ["flatten"]

# Composite operators that change running statistics without saying so in their schema.
_STATEFUL = frozenset("batch_norm instance_norm native_batch_norm cudnn_batch_norm".split())


def flatten(module: fx.GraphModule) -> fx.Graph | None:
    """The graph of `module` as functional ATen ops, or None if that takes functionalisation."""
    builder = _Builder()
    try:
        builder.inline(module, None)
    except _NeedsFunctionalisation:
        return None
    return builder.graph


class _NeedsFunctionalisation(Exception):
    """The program mutates, or runs under autocast."""


class _Builder:
    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.templates: dict[object, fx.Graph] = {}

    def inline(self, module: fx.GraphModule, inputs: list[fx.Node] | None) -> Any:
        """Copy the calls of `module`; `inputs` None: its placeholders and output as well."""
        supply = None if inputs is None else iter(inputs)
        env: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder" and supply is not None:
                env[node] = next(supply)
            elif node.op == "output" and supply is not None:
                return fx.node.map_arg(node.args[0], env.__getitem__)
            elif node.op == "call_function":
                env[node] = self.call(module, node, env)
            elif node.op != "get_attr":
                env[node] = self.graph.node_copy(node, env.__getitem__)
            elif not all(region_of(user) is not None for user in node.users):
                raise _NeedsFunctionalisation
        return None

    def call(self, module: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        region = region_of(node)
        if region is not None:
            if region.autocast:
                raise _NeedsFunctionalisation
            inputs = [env[item] for item in region.inputs]
            body = module.get_submodule(region.submodule)
            assert isinstance(body, fx.GraphModule)
            return self.inline(body, inputs)
        if node.target is operator.getitem:
            key, index = node.args
            assert isinstance(key, fx.Node)
            source = env[key]
            if not isinstance(source, fx.Node):
                return source[index]
        elif not isinstance(node.target, torch._ops.OpOverload) or _mutates(node.target):
            raise _NeedsFunctionalisation
        elif _is_composite(node.target):
            return self.expand(node, env)
        return self.graph.node_copy(node, env.__getitem__)

    def expand(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """Copy what the composite call consists of, with the call's place in the model."""
        kind = (node.target, _signature(node.args), _signature(node.kwargs))
        if kind not in self.templates:
            self.templates[kind] = _trace(node)
        inner: dict[fx.Node, Any] = {}
        supply = iter(node.all_input_nodes)
        for part in self.templates[kind].nodes:
            if part.op == "placeholder":
                inner[part] = env[next(supply)]
            elif part.op == "output":
                return fx.node.map_arg(part.args[0], inner.__getitem__)
            else:
                if isinstance(part.target, torch._ops.OpOverload) and _mutates(part.target):
                    raise _NeedsFunctionalisation
                copy = inner[part] = self.graph.node_copy(part, inner.__getitem__)
                copy.meta = {**node.meta, "val": part.meta["val"]}
        raise AssertionError("a traced graph has an output")


def _mutates(target: torch._ops.OpOverload) -> bool:
    return target._schema.is_mutable or target.overloadpacket.__name__ in _STATEFUL


def _is_composite(target: torch._ops.OpOverload) -> bool:
    """Whether torch would not keep the operator whole in a functional graph."""
    if torch.Tag.maybe_aliasing_or_mutating in target.tags:
        return True
    if not target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return False
    return any(argument.alias_info is not None for argument in target._schema.arguments)


def _trace(node: fx.Node) -> fx.Graph:
    sources = node.all_input_nodes

    def call(*tensors: Tensor) -> Any:
        table = dict(zip(sources, tensors, strict=True))
        args: Any = fx.node.map_arg(node.args, table.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, table.__getitem__)
        if node.target is torch.ops.aten.dropout.default:
            return _dropout(*args)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    values = [source.meta["val"] for source in sources]
    if not all(isinstance(value, Tensor) for value in values):
        raise _NeedsFunctionalisation
    with torch.no_grad():
        return make_fx(call)(*values).graph


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    if not train or p == 0.0:
        return input
    result: tuple[Tensor, Tensor] = torch.ops.aten.native_dropout.default(input, p, train)
    return result[0]


def _signature(item: Any) -> object:
    """A hashable description of arguments: tensors by type and strides, all else by itself."""
    if isinstance(item, fx.Node):
        value = item.meta.get("val")
        if isinstance(value, Tensor):
            return (value.shape, value.stride(), value.dtype, value.device)
        return item
    if isinstance(item, (list, tuple)):
        return tuple(_signature(entry) for entry in item)
    if isinstance(item, dict):
        return tuple((name, _signature(entry)) for name, entry in item.items())
    return (type(item), item)
