"""Proves that values and gradients are summed over the ranks of an axis where, and only where, each
rank has but a term or a part of them.

Along one axis a value is the same on all ranks or it is each rank's own (a part, or a term of a
sum); which of the two follows from the stage graphs of the ranks: what is read in parts is own,
collectives change it, any other operator on an own operand makes its results own. So is what is
called with other arguments on another rank.

Backward, the gradient of a value that is the same on all ranks is *whole* on each (coming from the
loss, or out of a sum), or a *term* on each (coming out of an operator that works on own operands).
Terms and whole gradients must never meet; a `sum_gradient` takes terms, everything that hands a
gradient to collectives whole ones; and exactly the parameters whose gradients are terms are summed
after backward. (The types of values are those of JAX's shard_map that tell varying from invariant
values; Mesh-TensorFlow and GSPMD leave the question to their lowering.)
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..graph import Graph, Mode, Node, OutputKind, Value, ValueKind
from ..ops import Category
from ..program import AllReduce, Program, StageProgram
from .report import check, fail_node, node_place

__all__ = ["verify_sums"]


class _Ranks(enum.Enum):
    """How a value on the ranks of an axis relates to that on others."""

    SAME = "the same on all ranks"
    OWN = "each rank's own"
    MADE = "made from scalars alone"  # perhaps a part: of `ones`, nothing tells


class _Gradient(enum.Enum):
    WHOLE = "whole"
    TERM = "a term"


_LIKE = frozenset(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty rand_like "
    "randn_like randint_like".split()
)
"""Of their operand they read type and shape alone."""


def verify_sums(programs: tuple[Program, ...]) -> None:
    """Check every column along every axis of its stages. Raises VerificationError."""
    held = {(p.rank, stage.index): stage for p in programs for stage in p.stages}
    if not programs[0].stage_ranks:
        alike: dict[tuple[int, str], int] = {}
        for program in programs:
            for stage in program.stages:
                for axis, ranks in stage.axes:
                    if ranks[0] == program.rank:
                        _verify_alone(programs, held, stage, axis, alike)
        _verify_copies(programs, alike)
        return
    for program in programs:
        copied = sorted(_copies(program))
        told = f"terms of {copied} are taken for copies, which ranks of one mesh never have"
        check(not copied, told, f"program {program.rank}")
    for stage_ranks in dict.fromkeys(p.stage_ranks for p in programs if p.stages):
        first = held[stage_ranks[0], 0]
        for axis, ranks in first.axes:
            if ranks[0] == stage_ranks[0]:  # the first along the axis stands for all of them
                _verify_column(programs, held, stage_ranks, axis)


_FIXED = ("op", "inputs", "outputs", "random_draw")
"""Of nodes, what is the same on all ranks."""

_Stages = dict[tuple[int, int], StageProgram]


def _verify_column(
    programs: tuple[Program, ...], held: _Stages, stage_ranks: tuple[int, ...], axis: str
) -> None:
    lines = []
    made: dict[str, _Ranks] = {}
    for index, rank in enumerate(stage_ranks):
        line = _line(programs, held, held[rank, index], axis)
        line.run_forward(made)
        lines.append(line)
    if programs[0].mode is not Mode.TRAIN:
        return
    wanted: dict[str, set[_Gradient]] = {}
    for line in reversed(lines):
        line.run_backward(wanted)
        _verify_terms(programs[line.ranks[0]], line)


def _line(programs: tuple[Program, ...], held: _Stages, stage: StageProgram, axis: str) -> _Line:
    ranks = dict(stage.axes)[axis]
    return _Line(
        axis=axis,
        ranks=ranks,
        graphs=tuple(held[member, stage.index].graph for member in ranks),
        offsets=tuple(_offsets(programs[member]) for member in ranks),
    )


def _verify_alone(
    programs: tuple[Program, ...],
    held: _Stages,
    stage: StageProgram,
    axis: str,
    alike: dict[tuple[int, str], int],
) -> None:
    """One stage over its own mesh: values cross its bounds in the parts that its ranks have of
    them, never as terms, and so do gradients.

    Args:
        alike: by rank and parameter, how many ranks of the stage have the same gradient; updated.
    """
    line = _line(programs, held, stage, axis)
    places: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for rank in line.ranks:
        for shard in held[rank, stage.index].boundaries:
            places[shard.name].add(shard.offset)
    crossing = {n: _Ranks.SAME if len(found) == 1 else _Ranks.OWN for n, found in places.items()}
    made = dict(crossing)
    line.run_forward(made)
    for name, _ in stage.consumers:
        terms = crossing[name] is _Ranks.SAME and made[name] is _Ranks.OWN
        here = f"boundary %{name} of stage {stage.index} along axis {axis}"
        check(not terms, "it leaves as terms of a sum, or as parts that are taken for copies", here)
    if programs[0].mode is not Mode.TRAIN:
        return
    gradients = {name: {_Gradient.WHOLE} for name, _ in stage.consumers}
    line.run_backward(gradients)
    for name, _ in stage.producers:
        terms = crossing[name] is _Ranks.SAME and _Gradient.TERM in gradients.get(name, ())
        here = f"gradient of %{name} in stage {stage.index} along axis {axis}"
        check(not terms, "each rank has but a term of it where it leaves the stage", here)
    _verify_terms(programs[line.ranks[0]], line)
    for value in line.graphs[0].values_of(ValueKind.PARAMETER):
        if line.gradient_of.get(value.id) == {_Gradient.WHOLE}:
            for rank in line.ranks:
                key = rank, value.origin
                alike[key] = alike.get(key, 1) * len(line.ranks)


def _copies(program: Program) -> dict[str, int]:
    """By parameter, how many ranks have the same term of its gradient, where sums say so."""
    return {
        target: item.copies[item.ranks.index(program.rank)]
        for item in program.instructions
        if isinstance(item, AllReduce) and item.copies
        for target in item.targets
    }


def _verify_copies(programs: tuple[Program, ...], alike: dict[tuple[int, str], int]) -> None:
    """Sums divide terms by the number of ranks that have them."""
    for program in programs:
        for name, count in _copies(program).items():
            found = alike.get((program.rank, name), 1)
            told = f"a sum takes the gradient for one of {count} alike, there are {found}"
            check(count == found, told, f"parameter {name!r} on rank {program.rank}")


def _offsets(program: Program) -> dict[str, tuple[int, ...]]:
    return {shard.name: shard.offset for shard in program.shards}


def _verify_terms(program: Program, line: _Line) -> None:
    """The gradients of parameters that are terms along the axis are summed, others are not."""
    terms = dict(program.gradient_terms)
    for value in line.graphs[0].values_of(ValueKind.PARAMETER):
        if not value.requires_grad or line.ranks_of[value.id] is _Ranks.OWN:
            continue
        here = f"gradient of {value.origin!r} along axis {line.axis} on rank {program.rank}"
        summed = set(terms.get(value.origin, (program.rank,)))
        for kind in line.gradient_of.get(value.id, ()):
            if kind is _Gradient.TERM:
                missing = sorted(set(line.ranks) - summed)
                check(not missing, f"ranks {missing} have terms of it that are not summed", here)
            elif value.origin not in _copies(program):
                others = sorted(set(line.ranks) & summed - {program.rank})
                check(not others, f"it is whole on ranks {others}, and yet summed over them", here)


@dataclass(slots=True)
class _Line:
    """The graphs of one stage on the ranks along one axis, looked at on the first of them."""

    axis: str
    ranks: tuple[int, ...]
    graphs: tuple[Graph, ...]
    offsets: tuple[dict[str, tuple[int, ...]], ...]
    ranks_of: dict[int, _Ranks] = field(default_factory=dict)
    gradient_of: dict[int, set[_Gradient]] = field(default_factory=dict)

    # -- forward -------------------------------------------------------------------------------

    def run_forward(self, boundaries: dict[str, _Ranks]) -> None:
        """Fill `ranks_of`; boundary values are looked up by name, and entered."""
        graph = self.graphs[0]
        here = f"graph {graph.name} along axis {self.axis}"
        for other in {id(other): other for other in self.graphs[1:]}.values():
            self._check_alike(other)
        held_apart = set()  # buffers
        for value in graph.values:
            if value.kind is ValueKind.BOUNDARY:
                self.ranks_of[value.id] = boundaries[value.name]
            elif value.kind is not ValueKind.RESULT:
                places = {offsets.get(value.origin) for offsets in self.offsets}
                self.ranks_of[value.id] = _Ranks.SAME if len(places) == 1 else _Ranks.OWN
                if value.kind is ValueKind.BUFFER and len(places) > 1:
                    held_apart.add(value.origin)
        for node in graph.nodes:
            found = self._result(node)
            for index in node.outputs:
                self.ranks_of[index] = found
        for output in graph.outputs:
            found = self.ranks_of[output.value]
            name = graph.values[output.value].name
            if output.kind is OutputKind.BOUNDARY:
                boundaries[output.target] = found
            else:
                told = f"output {name} is {found.value}"
                is_held = output.kind is OutputKind.BUFFER and output.target in held_apart
                check(is_held or found is not _Ranks.OWN, told, here)

    def _check_alike(self, other: Graph) -> None:
        """Graphs of two ranks differ in the arguments of operators and in shapes alone."""
        graph = self.graphs[0]
        counts = sorted({len(graph.nodes), len(other.nodes)})
        here = f"graph {graph.name} along axis {self.axis}"
        check(len(counts) == 1, f"ranks {self.ranks} run so many nodes: {counts}", here)
        for mine, theirs in zip(graph.nodes, other.nodes, strict=True):
            if any(getattr(mine, name) != getattr(theirs, name) for name in _FIXED):
                self._fail(mine, f"another rank runs {node_place(other, theirs)}")
        ends = [[(v.kind, v.origin, v.requires_grad) for v in g.values] for g in (graph, other)]
        alike = ends[0] == ends[1] and graph.outputs == other.outputs
        check(alike, "ranks read, return or differentiate other values", here)

    def _result(self, node: Node) -> _Ranks:
        read = [self.ranks_of[index] for index in node.inputs]
        if self._meets(node):
            own = node.op.packet in ("shard", "reduce_scatter", "all_to_all")
            adds = node.op.packet in ("all_reduce", "reduce_scatter")
            if adds and read[0] is _Ranks.SAME and node.args[2] not in ("max", "min"):
                self._fail(node, "it adds up what is the same on all ranks")
            return _Ranks.OWN if own else _Ranks.SAME
        if node.op.packet in _LIKE:
            read = []
        if node.op.packet == "type_as":
            read = read[:1]
        if _Ranks.OWN in read or self._differs(node):
            return _Ranks.OWN
        return _Ranks.SAME if _Ranks.SAME in read else _Ranks.MADE

    def _meets(self, node: Node) -> bool:
        is_collective = node.op.category is Category.COLLECTIVE
        return is_collective and node.op.packet != "as_partial" and node.args[1] == self.axis

    def _differs(self, node: Node) -> bool:
        """Whether ranks call the operator with other arguments or have results of other shapes."""
        mine = self._call(self.graphs[0], node)
        return any(self._call(graph, graph.nodes[node.id]) != mine for graph in self.graphs[1:])

    def _call(self, graph: Graph, node: Node) -> object:
        return node.args, node.kwargs, [graph.values[index].type for index in node.outputs]

    # -- backward ------------------------------------------------------------------------------

    def run_backward(self, boundaries: dict[str, set[_Gradient]]) -> None:
        """Fill `gradient_of`; those of boundary values are looked up by name, and entered."""
        graph = self.graphs[0]
        for output in graph.outputs:
            value = graph.values[output.value]
            if output.kind is OutputKind.LOSS:
                self._add(value, _Gradient.WHOLE)
            elif output.kind is OutputKind.BOUNDARY:
                for kind in boundaries.get(output.target, ()):
                    self._add(value, kind)
        for node in reversed(graph.nodes):
            for value, kind in self._gradients(node):
                self._add(value, kind)
        for value in graph.values:
            if value.id in self.gradient_of:
                self._check_one_kind(value)
                if value.kind is ValueKind.BOUNDARY:
                    found = boundaries.setdefault(value.name, set())
                    found |= self.gradient_of[value.id]

    def _add(self, value: Value, kind: _Gradient) -> None:
        if value.requires_grad:
            self.gradient_of.setdefault(value.id, set()).add(kind)

    def _gradients(self, node: Node) -> Iterator[tuple[Value, _Gradient]]:
        """What backward of `node` gives to its operands."""
        values = self.graphs[0].values
        kinds = {kind for index in node.outputs for kind in self.gradient_of.get(index, ())}
        if not kinds:
            return
        own = any(self.ranks_of[index] is _Ranks.OWN for index in node.outputs)
        if not own:
            self._check_collective(node, kinds)
        if self._meets(node):
            whole = node.op.packet in ("shard", "sum_gradient")
            kinds = {_Gradient.WHOLE if whole else _Gradient.TERM}
        elif own:
            is_split = node.op.packet == "as_partial" and self._differs(node)
            kinds = {_Gradient.WHOLE if is_split else _Gradient.TERM}
        for index in node.inputs:
            for kind in kinds:
                yield values[index], kind

    def _check_collective(self, node: Node, kinds: set[_Gradient]) -> None:
        """The gradient that a collective gets for a result that is the same on all ranks."""
        if not self._meets(node) or (node.op.packet == "all_reduce" and node.args[2] != "sum"):
            return
        takes_terms = node.op.packet == "sum_gradient" or (
            node.op.packet == "all_gather" and bool(node.args[5])
        )
        wanted = _Gradient.TERM if takes_terms else _Gradient.WHOLE
        if kinds != {wanted}:
            found = " and ".join(sorted(kind.value for kind in kinds))
            self._fail(node, f"it takes a gradient that is {wanted.value}, this one is {found}")

    def _check_one_kind(self, value: Value) -> None:
        is_same = self.ranks_of[value.id] is _Ranks.SAME
        check(
            not is_same or len(self.gradient_of[value.id]) == 1,
            "terms of its gradient meet whole gradients, which all ranks have",
            f"value %{value.name} along axis {self.axis} on rank {self.ranks[0]}",
        )

    def _fail(self, node: Node, cause: str) -> None:
        fail_node(self.graphs[0], node, f"along axis {self.axis}, {cause}")
