"""Collective operators in traced kernels: bound to a communicator, or as Inductor takes them.

The operators (`compiler/ir/collectives.py`) name a mesh axis. Which ranks those are and how they
talk follows from the rank that runs the stage: `StageCollectives` knows both and rewrites the
calls in a kernel's graph. The operators that need no communication become plain ATen ops before
the graph is cut (`expand_local`); their operand stays an operand, so that what depends on what is
the same on every rank (see `docs/decisions/0008-collectives-inside-stages.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.ir.buckets import early_starts, late_ends
from ..compiler.ir.collectives import NAMESPACE
from ..compiler.ir.errors import RuntimeFailure
from ..compiler.ir.graph import Graph
from ..compiler.ir.ops import Category
from . import functional_collectives as functional
from .communicator import Communicator, Pending, Split
from .recompute import mark_like
from .recorder import Recorder

__all__ = ["StageCollectives", "expand_local", "has_collectives", "mark_parameter_gathers"]

_OF_PARAMETER = "cutset_gathers_parameter"

aten = torch.ops.aten
operators = torch.ops.cutset


def has_collectives(graph: Graph) -> bool:
    """Whether a stage meets other ranks while it computes, in forward or in backward."""
    return any(node.op.category is Category.COLLECTIVE for node in graph.nodes)


def mark_parameter_gathers(graph: fx.Graph, parameters: Collection[int]) -> None:
    """Mark the gathers of parameters held in parts, which depend on nothing that is computed.

    Args:
        parameters: positions of the parameters among the placeholders.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    found = {placeholders[position] for position in parameters}
    for node in graph.nodes:
        if node.target in (aten.detach.default, aten.alias.default) and node.args[0] in found:
            found.add(node)
        elif node.target is operators.all_gather.default and node.args[0] in found:
            node.meta[_OF_PARAMETER] = True


def expand_local(graph: fx.Graph) -> None:
    """Replace the collectives that only look at the rank's own tensor."""
    for node in list(graph.nodes):
        if node.target is operators.sum_gradient.default:
            _replace(node, node.args[0])
        elif node.target is operators.as_partial.default:
            x, index = node.args
            with graph.inserting_before(node):
                _replace(node, graph.call_function(aten.zeros_like.default, (x,)) if index else x)
        elif node.target is operators.shard.default:
            x, _, dim, sizes, index = node.args
            begin = sum(sizes[:index])
            with graph.inserting_before(node):
                part = (x, dim, begin, begin + sizes[index])
                view = graph.call_function(aten.slice.Tensor, part)
                mark_like(view, node)
                # a copy, as a view would keep the whole tensor alive
                own = graph.call_function(
                    aten.clone.default, (view,), {"memory_format": torch.contiguous_format}
                )
                _replace(node, own)


def _replace(node: fx.Node, other: fx.Node) -> None:
    if not other.meta:
        other.meta = dict(node.meta)
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


class StageCollectives:
    """The collectives of one stage on one rank.

    Args:
        communicator: prepared for the program.
        axes: ranks along each mesh axis, in the order of their parts.
        stage: for messages.

    `recorder` is told of the collectives of a step that is recorded.
    """

    def __init__(
        self, communicator: Communicator, axes: Mapping[str, tuple[int, ...]], stage: int
    ) -> None:
        self._communicator = communicator
        self._axes = axes
        self._place = f"in stage {stage}"
        self.recorder: Recorder | None = None

    @property
    def is_capturable(self) -> bool:
        """Whether kernels with these collectives can be recorded as CUDA graphs."""
        return all(self._communicator.is_capturable(ranks) for ranks in self._axes.values())

    def bind(self, graph: fx.Graph) -> None:
        """Make the collectives of a kernel call the communicator.

        Gathers of parameters start ahead of their use (`early_starts`), and travel while what is
        before that computes. Sums of gradients of which parts are kept are waited for after others
        have started (`late_ends`), and travel while what comes next computes. All ranks of a group
        start them in the same place, as what they gather and sum is the same there.
        """
        _gather_early(graph, self._parted)
        _sum_late(graph, self._parted)
        bound: dict[Any, Callable[..., Tensor]] = {
            operators.all_reduce.default: self.all_reduce,
            operators.all_gather.default: self.all_gather,
            operators.reduce_scatter.default: self.reduce_scatter,
            operators.all_to_all.default: self.all_to_all,
        }
        for node in graph.nodes:
            if node.target is operators.all_reduce.default and _is_owned(node.args[0], node):
                node.target = self.all_reduce_in_place
            else:
                node.target = bound.get(node.target, node.target)

    def _parted(self, node: fx.Node) -> _Parted:
        is_gather = node.target is operators.all_gather.default
        start: Callable[..., Pending] = (
            self.start_all_gather if is_gather else self.start_reduce_scatter
        )
        return _Parted(start, self.wait_for)

    def wait_for(self, pending: Pending) -> Tensor:
        """The result of a collective that was started."""
        tensor = pending.wait()
        assert tensor is not None
        if self.recorder is not None:
            self.recorder.ended([pending])
        return tensor

    def _started(self, pending: Pending, collective: str, axis: str) -> Pending:
        if self.recorder is not None:
            self.recorder.started_inside(pending, collective, self._ranks(axis))
        return pending

    def _ranks(self, axis: str) -> tuple[int, ...]:
        try:
            return self._axes[axis]
        except KeyError:
            raise RuntimeFailure(
                f"a collective {self._place} is over mesh axis {axis!r}, which the program's "
                "stage does not have"
            ) from None

    def all_reduce(self, x: Tensor, axis: str, reduction: str) -> Tensor:
        own = x.clone(memory_format=torch.contiguous_format)
        return self.all_reduce_in_place(own, axis, reduction)

    def all_reduce_in_place(self, x: Tensor, axis: str, reduction: str) -> Tensor:
        label = f"all_reduce {self._place}"
        ranks = self._ranks(axis)
        pending = self._communicator.start_all_reduce(x, ranks, reduction, label=label)
        self.wait_for(self._started(pending, "all_reduce", axis))
        return x

    def all_gather(
        self, x: Tensor, axis: str, dim: int, sizes: Sequence[int], index: int, partial: bool
    ) -> Tensor:
        return self.wait_for(self.start_all_gather(x, axis, dim, sizes, index, partial))

    def start_all_gather(
        self, x: Tensor, axis: str, dim: int, sizes: Sequence[int], index: int, partial: bool
    ) -> Pending:
        split = Split(dim, tuple(sizes))
        label = f"all_gather {self._place}"
        ranks = self._ranks(axis)
        pending = self._communicator.start_all_gather(x, ranks, split, label=label)
        return self._started(pending, "all_gather", axis)

    def reduce_scatter(
        self, x: Tensor, axis: str, dim: int, sizes: Sequence[int], index: int
    ) -> Tensor:
        return self.wait_for(self.start_reduce_scatter(x, axis, dim, sizes, index))

    def start_reduce_scatter(
        self, x: Tensor, axis: str, dim: int, sizes: Sequence[int], index: int
    ) -> Pending:
        split = Split(dim, tuple(sizes))
        label = f"reduce_scatter {self._place}"
        ranks = self._ranks(axis)
        pending = self._communicator.start_reduce_scatter(x, ranks, split, label=label)
        return self._started(pending, "reduce_scatter", axis)

    def all_to_all(
        self,
        x: Tensor,
        axis: str,
        from_dim: int,
        from_sizes: Sequence[int],
        to_dim: int,
        to_sizes: Sequence[int],
        index: int,
    ) -> Tensor:
        pending = self._communicator.start_all_to_all(
            x,
            self._ranks(axis),
            gathered=Split(from_dim, tuple(from_sizes)),
            split=Split(to_dim, tuple(to_sizes)),
            label=f"all_to_all {self._place}",
        )
        return self.wait_for(self._started(pending, "all_to_all", axis))

    # -- Inductor ------------------------------------------------------------------------------

    def functional(self, module: fx.GraphModule) -> tuple[fx.GraphModule, str]:
        """`module` with torch's functional collectives, which Inductor compiles and overlaps.

        Returns:
            The new module and an empty text, or `module` and why it has no such form.
        """
        graph = fx.Graph()
        graph.output(graph.graph_copy(module.graph, {}))
        names: dict[str, str] = {}  # by axis
        for node in graph.nodes:
            if node.op != "call_function" or not _is_collective(node):
                continue
            ranks = self._ranks(node.args[1])
            name = self._communicator.group_name(ranks)
            if name is None:
                return module, f"ranks {', '.join(map(str, ranks))} have no process group for it"
            if not functional.takes(node):
                return module, f"{node.target} of this dtype has no functional form"
            names[str(node.args[1])] = name

        def parted(node: fx.Node) -> _Parted:
            start = functional.start(node, names[str(node.args[1])])
            return _Parted(start, functional.finish(node), takes_operand=True)

        _gather_early(graph, parted)
        _sum_late(graph, parted)
        for node in graph.nodes:
            if node.op == "call_function" and _is_collective(node):
                # closures, as Dynamo traces through them
                node.target = functional.call(node, names[str(node.args[1])])
        return fx.GraphModule(module, graph), ""


@dataclass(frozen=True, slots=True)
class _Parted:
    """A collective in two calls: `start` with its arguments, `wait` with what that returned, and
    if it `takes_operand` with the arguments again."""

    start: Callable[..., Any]
    wait: Callable[..., Tensor]
    takes_operand: bool = False

    def wait_in(self, graph: fx.Graph, started: fx.Node, arguments: tuple[Any, ...]) -> fx.Node:
        rest = arguments if self.takes_operand else ()
        return graph.call_function(self.wait, (started, *rest))


def _gather_early(graph: fx.Graph, parted: Callable[[fx.Node], _Parted]) -> None:
    """Start gathers of parameters ahead of their use (see `early_starts`)."""
    gathers = [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and node.meta.get(_OF_PARAMETER)
        and node.args[0].op == "placeholder"
    ]
    begin = next(node for node in graph.nodes if node.op != "placeholder")
    waits: list[fx.Node] = []
    last: dict[int, fx.Node] = {}  # by how many are waited for before, what started last
    starts = early_starts([node.meta["val"].nbytes for node in gathers])
    for gather, waited in zip(gathers, starts, strict=True):
        halves = parted(gather)
        before = last.get(waited, waits[waited - 1] if waited else None)
        with graph.inserting_after(before) if before else graph.inserting_before(begin):
            started = graph.call_function(halves.start, gather.args)
        with graph.inserting_before(gather):
            waits.append(halves.wait_in(graph, started, gather.args))
        last[waited] = started
        gather.replace_all_uses_with(waits[-1])
        graph.erase_node(gather)


def _sum_late(graph: fx.Graph, parted: Callable[[fx.Node], _Parted]) -> None:
    """Wait for sums of gradients after others have started (see `late_ends`)."""
    sums = [node for node in graph.nodes if _is_kept_part(node)]
    ends = late_ends([node.args[0].meta["val"].nbytes for node in sums])
    starts: list[fx.Node] = []
    for node in sums:
        with graph.inserting_before(node):
            starts.append(graph.call_function(parted(node).start, node.args))
    places = [*starts, *(node for node in graph.nodes if node.op == "output")]
    for node, started, end in zip(sums, starts, ends, strict=True):
        (addition,) = node.users
        with graph.inserting_before(places[end]):
            done = parted(node).wait_in(graph, started, node.args)
        done.append(addition)
        node.replace_all_uses_with(done)
        graph.erase_node(node)


def _is_collective(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE


def _is_kept_part(node: fx.Node) -> bool:
    """Whether `node` sums a gradient over ranks, and nothing is done with this rank's part but to
    add it to its buffer."""
    if node.target is not operators.reduce_scatter.default or len(node.users) != 1:
        return False
    (addition,) = node.users
    return addition.target is aten.add_.Tensor and addition.args[1] is node


_NEW = frozenset(
    [aten.mm.default, aten.bmm.default, aten.addmm.default, aten.add.Tensor, aten.sub.Tensor]
    + [aten.mul.Tensor, aten.div.Tensor, aten.sum.dim_IntList, aten.sum.default, aten.amax.default]
)
_VIEWS = frozenset([aten.reshape.default, aten.t.default, aten.permute.default])


def _is_owned(source: Any, user: fx.Node) -> bool:
    """Whether `source` is new memory that nothing but `user` reads."""
    while set(source.users) == {user} and source.target in _VIEWS:
        source, user = source.args[0], source
    return set(source.users) == {user} and source.target in _NEW
