"""State the layout problem of a graph over one more mesh axis.

Nodes become choices among their strategies; parameters, buffers and inputs become choices among
ways to hold them. The gradient of a parameter that all its users leave as a term a rank is summed
once a step instead of once a microbatch (`deferred`); what is computed from parameters alone passes
terms on. Conversions and lowerings are those of `compiler/sharding`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ...compiler.ir.cluster import DeviceType
from ...compiler.ir.graph import Node, OutputKind, Value, ValueKind
from ...compiler.ir.mesh import Layout, Placement, Replicate, Shard
from ...compiler.sharding.conversions import conversion_steps
from ...compiler.sharding.strategy import OpStrategy
from ...cost_models.stages import optimizer_seconds
from .facts import GraphFacts
from .pricing import Pricer
from .problem import Choice, Flow, LayoutProblem, Option, Use, with_backward_share
from .statement import Decided, LayoutOptions, LayoutStatement

__all__ = ["StatedProblem", "state_layouts"]


@dataclass(frozen=True, slots=True)
class _State:
    """A layout that a value is made or held in.

    Args:
        deferred: its gradient on the last axis stays a term a rank.
        saves: the backward of what makes it reads it.
    """

    layout: Layout
    deferred: bool = False
    saves: bool = False


@dataclass(frozen=True, slots=True)
class _Form:
    """What a reader wants.

    Args:
        partial: axes on which its gradient is a term a rank that has to be summed.
        passes_terms: it hands terms of a gradient on, on the last axis.
        carries: it returns a gradient at all.
        saves: its backward reads the value.
    """

    layout: Layout
    partial: frozenset[int] = frozenset()
    passes_terms: bool = False
    carries: bool = True
    saves: bool = False


@dataclass(frozen=True, slots=True)
class _Way:
    """One option of a node: strategy over the last axis; see `_State.deferred` for its results."""

    strategy: OpStrategy
    deferred: bool = False


@dataclass(slots=True)
class StatedProblem:
    """A problem and what its choices stand for."""

    statement: LayoutStatement
    problem: LayoutProblem
    nodes: dict[int, int]  # node -> choice
    held: dict[int, int]  # value -> choice
    ways: dict[int, tuple[_Way, ...]]  # choice of nodes -> options
    states: dict[int, tuple[_State, ...]]  # choice of held values -> options

    def decode(self, picks: tuple[int, ...]) -> Decided:
        """What `picks` decide, with the axes before."""
        before = self.statement.decided
        axis = self.statement.axis
        strategies = list(before.strategies)
        held, deferred = dict(before.held), dict(before.deferred)
        for node, choice in self.nodes.items():
            way = self.ways[choice][picks[choice]]
            strategies[node] = (*strategies[node], way.strategy)
            if way.deferred:
                for value in self.statement.graph.nodes[node].outputs:
                    deferred[value] = deferred.get(value, frozenset()) | {axis}
        for value, choice in self.held.items():
            state = self.states[choice][picks[choice]]
            held[value] = state.layout.placements
            if state.deferred:
                deferred[value] = deferred.get(value, frozenset()) | {axis}
        return Decided(tuple(strategies), held, deferred)


@dataclass(slots=True)
class _Work:
    """Tables while a problem is stated."""

    statement: LayoutStatement
    pricer: Pricer
    facts: GraphFacts
    choices: list[Choice] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    nodes: dict[int, int] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    ways: dict[int, tuple[_Way, ...]] = field(default_factory=dict)
    states: dict[int, tuple[_State, ...]] = field(default_factory=dict)
    first_in_backward: set[int] = field(default_factory=set)  # choices, see `GraphFacts`

    def value(self, index: int) -> Value:
        return self.statement.graph.values[index]

    def add(self, choice: Choice) -> int:
        self.choices.append(choice)
        return len(self.choices) - 1


def state_layouts(statement: LayoutStatement, pricer: Pricer) -> StatedProblem:
    """The problem of `statement`; `pricer` is for its graph and mesh.

    Statements that differ in numbers of microbatches, memory, optimizer and what counts of backward
    share all but what it costs to hold tensors.
    """
    key = _frame_key(statement, pricer.facts)
    if key not in pricer.frames:
        pricer.frames[key] = _frame(statement, pricer)
    work: _Work = pricer.frames[key]
    options = statement.options
    problem = LayoutProblem(
        choices=_with_held(work, statement),
        flows=tuple(work.flows),
        num_microbatches=options.num_microbatches,
        memory_bytes=options.memory_bytes,
        in_flight=options.in_flight,
    )
    problem = with_backward_share(problem, options.backward_share, work.first_in_backward)
    return StatedProblem(statement, problem, work.nodes, work.held, work.ways, work.states)


def _with_held(work: _Work, statement: LayoutStatement) -> tuple[Choice, ...]:
    """The choices of `work` with what it costs to hold tensors as `statement` says."""
    choices = list(work.choices)
    firsts = {choice: value for value, choice in reversed(work.held.items())}
    for choice, value in firsts.items():
        options = (
            _held_option(statement, work.pricer, work.value(value), state)
            for state in work.states[choice]
        )
        choices[choice] = replace(choices[choice], options=tuple(options))
    return tuple(choices)


def _frame_key(statement: LayoutStatement, facts: GraphFacts) -> object:
    """What `_frame` depends on beside the pricer; nodes of a class have equal strategies."""
    decided, axis = statement.decided, statement.mesh.axes[-1].name
    return (
        tuple(decided.strategies[members[0]] for members in facts.classes),
        tuple(decided.held.items()),
        tuple(decided.deferred.items()),
        statement.splits_batch,
        tuple((name, held[axis]) for name, held in statement.options.held.items() if axis in held),
    )


def _frame(statement: LayoutStatement, pricer: Pricer) -> _Work:
    """Choices and flows, without what it costs to hold tensors."""
    graph, facts = statement.graph, pricer.facts
    work = _Work(statement, pricer, facts)
    for members in facts.classes:
        _add_nodes(work, members)
    returned = _returned(work)
    groups: dict[object, list[int]] = defaultdict(list)
    for value in graph.values:
        if value.kind is not ValueKind.RESULT and (
            work.facts.read_by[value.id] or value.id in returned
        ):
            groups[_given_key(work, value, returned)].append(value.id)
    for held_members in groups.values():
        _add_held(work, tuple(held_members), returned)
    groups = defaultdict(list)
    for value in graph.values:
        if value.kind is ValueKind.RESULT and (
            work.facts.read_by[value.id] or value.id in returned
        ):
            node = graph.nodes[work.facts.made_by[value.id]]
            place = (work.nodes[node.id], node.outputs.index(value.id))
            groups[place, _users_key(work, value.id, returned)].append(value.id)
    for made_members in groups.values():
        _add_made(work, tuple(made_members), returned)
    return work


# -- nodes -----------------------------------------------------------------------------------------


def _add_nodes(work: _Work, members: tuple[int, ...]) -> None:
    node = work.statement.graph.nodes[members[0]]
    before = work.statement.decided.strategies[node.id]
    ways = [_Way(strategy) for strategy in _strategies(work, node)]
    carried = [value for value in node.outputs if work.value(value).requires_grad]
    if carried and work.facts.weights.issuperset(carried):
        ways.insert(1, _Way(ways[0].strategy, deferred=True))
    options = []
    for way in ways:
        figures = work.pricer.node(node, (*before, way.strategy))
        options.append(
            Option(
                seconds=figures.seconds,
                backward_seconds=figures.backward_seconds,
                saved_bytes=figures.saved_bytes,
                transient_bytes=figures.transient_bytes,
            )
        )
    choice = work.add(Choice(node.name, tuple(options), len(members)))
    work.ways[choice] = tuple(ways)
    work.nodes.update(dict.fromkeys(members, choice))
    if work.facts.first_in_backward.issuperset(members):
        work.first_in_backward.add(choice)


def _strategies(work: _Work, node: Node) -> tuple[OpStrategy, ...]:
    """Strategies that go with the axes before; one a pair of layouts, replication first."""
    statement = work.statement
    table: dict[object, OpStrategy] = {}
    for strategy in work.facts.strategies_of(node, statement.parts):
        if statement.decided.allows(node.id, strategy) and not _splits_rows(work, node, strategy):
            table.setdefault((strategy.inputs, strategy.outputs), strategy)
    return tuple(table.values())


def _splits_rows(work: _Work, node: Node, strategy: OpStrategy) -> bool:
    """Whether an axis that is not for it would split the rows of the batch: microbatches may come
    to have fewer rows than what was captured."""
    statement = work.statement
    if statement.splits_batch or work.facts.rows == 1:
        return False
    pairs = zip((*node.inputs, *node.outputs), (*strategy.inputs, *strategy.outputs), strict=True)
    return any(
        placement == Shard(0)
        and value in work.facts.batched
        and work.value(value).type.shape[0] % work.facts.rows == 0
        for value, placement in pairs
    )


def _form(work: _Work, node: Node, position: int, way: _Way) -> _Form:
    """What `node` wants of its operand at `position`, run as `way` on the last axis."""
    strategies = (*work.statement.decided.strategies[node.id], way.strategy)
    value = node.inputs[position]
    wanted = Layout(tuple(strategy.inputs[position] for strategy in strategies))
    saves = not work.pricer.is_held(value)
    saves = saves and work.pricer.node(node, strategies).saves_inputs[position]
    if not work.value(value).requires_grad:
        return _Form(wanted, carries=False, saves=saves)
    partial = frozenset(
        axis for axis, strategy in enumerate(strategies) if strategy.has_partial_gradient(position)
    )
    carries = any(work.value(index).requires_grad for index in node.outputs)
    deferred = work.statement.decided.deferred.get(value, frozenset())
    return _Form(
        wanted, partial - deferred, way.deferred and value in work.facts.weights, carries, saves
    )


# -- tensors that are given ------------------------------------------------------------------------


def _returned(work: _Work) -> dict[int, _Form]:
    """Values that the graph returns, in the layout in which they are returned."""
    graph, mesh = work.statement.graph, work.statement.mesh
    whole = Layout((Replicate(),) * len(mesh.axes))
    return {
        output.value: _Form(whole, carries=work.value(output.value).requires_grad)
        for output in graph.outputs
    }


def _users_key(work: _Work, value: int, returned: dict[int, _Form]) -> tuple[object, ...]:
    """Equal for values that are used alike, by choices and how often."""
    graph = work.statement.graph
    places = Counter(
        (work.nodes[node], graph.nodes[node].inputs.index(value))
        for node in work.facts.read_by[value]
    )
    return (tuple(sorted(places.items())), returned.get(value))


def _given_key(work: _Work, value: Value, returned: dict[int, _Form]) -> tuple[object, ...]:
    before = work.statement.decided
    return (
        value.kind,
        value.type,
        value.requires_grad,
        value.batch_dim,
        before.held.get(value.id),
        before.deferred.get(value.id),
        _pinned(work, value),
        _users_key(work, value.id, returned),
    )


def _pinned(work: _Work, value: Value) -> Placement | None:
    """The placement that is not left to choose."""
    statement = work.statement
    if value.kind is ValueKind.BOUNDARY:
        return Replicate()
    wanted = statement.options.held.get(value.name, {}).get(statement.mesh.axes[-1].name)
    if wanted is not None:
        return wanted
    if value.kind is ValueKind.BUFFER:
        names = (value.origin, *value.aliases)
        if any(output.target in names for output in statement.graph.outputs_of(OutputKind.BUFFER)):
            return Replicate()
    if statement.splits_batch:
        if value.kind is not ValueKind.INPUT:
            return Replicate()
        rows = value.batch_dim
        if rows is not None and value.type.shape[rows] >= statement.parts:
            return Shard(rows)
        return Replicate()
    return None


def _add_held(work: _Work, members: tuple[int, ...], returned: dict[int, _Form]) -> None:
    value = work.value(members[0])
    statement = work.statement
    before = statement.decided.held.get(value.id, ())
    pinned = _pinned(work, value)
    found: list[Placement] = [Replicate()] if pinned is None else [pinned]
    if pinned is None:
        found.extend(
            placement
            for placement in _wanted_placements(work, value)
            if isinstance(placement, Shard) and placement not in before
        )
    states = [_State(Layout((*before, placement))) for placement in dict.fromkeys(found)]
    if value.id in work.facts.weights and Replicate() in found:
        states.append(_State(Layout((*before, Replicate())), deferred=True))
    choice = work.add(Choice(value.name, (Option(),) * len(states), len(members)))
    work.states[choice] = tuple(states)
    work.held.update(dict.fromkeys(members, choice))
    _add_flow(work, choice, members, tuple(states), returned)


def _wanted_placements(work: _Work, value: Value) -> list[Placement]:
    graph = work.statement.graph
    return [
        way.strategy.inputs[graph.nodes[node].inputs.index(value.id)]
        for node in work.facts.read_by[value.id]
        for way in work.ways[work.nodes[node]]
    ]


def _held_option(statement: LayoutStatement, pricer: Pricer, value: Value, state: _State) -> Option:
    options = statement.options
    size = pricer.local_bytes(value.type, state.layout)
    if value.kind is ValueKind.BOUNDARY:
        return Option()
    if value.kind is ValueKind.INPUT:
        copies = 1.0
        if value.batch_dim is not None:
            copies = options.num_microbatches * options.batch_fraction
        return Option(static_bytes=math.ceil(size * copies))
    if value.kind is not ValueKind.PARAMETER or value.id not in pricer.facts.weights:
        return Option(static_bytes=size)
    axes = set(statement.decided.deferred.get(value.id, ()))
    axes |= {statement.axis} if state.deferred else set()
    summed = sum(
        pricer.network.sum_bytes_seconds(statement.mesh.axes[axis].name, size, options.bucket_bytes)
        for axis in axes
    )
    states = math.ceil(size * options.optimizer.state_bytes_per_parameter_byte)
    update = _update_seconds(options, pricer.device_type, size)
    return Option(
        step_seconds=options.sum_share * summed + update,
        sum_seconds=summed,
        static_bytes=2 * size + states,
    )


def _update_seconds(options: LayoutOptions, device_type: DeviceType, size: int) -> float:
    """Of the update of `size` bytes what grows with bytes: launches are the same however tensors
    lie. Ranks share it or make all of it, whichever takes less."""

    def seconds(num_bytes: float, launches: int) -> float:
        return optimizer_seconds(
            device_type, options.optimizer, parameter_bytes=num_bytes, num_parameters=launches
        )

    if device_type.curves or device_type.op_costs:
        return min(seconds(share * size, 0) for share in (1.0, options.update_share))
    return options.update_share * (seconds(2 * size, 1) - seconds(size, 1))


# -- flows -----------------------------------------------------------------------------------------


def _add_made(work: _Work, members: tuple[int, ...], returned: dict[int, _Form]) -> None:
    value = members[0]
    node = work.statement.graph.nodes[work.facts.made_by[value]]
    position = node.outputs.index(value)
    before = work.statement.decided.strategies[node.id]
    choice = work.nodes[node.id]
    kept = not work.pricer.is_held(value)
    states = []
    for way in work.ways[choice]:
        strategies = (*before, way.strategy)
        layout = Layout(tuple(strategy.outputs[position] for strategy in strategies))
        saves = kept and work.pricer.node(node, strategies).saves_outputs[position]
        states.append(_State(layout, way.deferred, saves))
    _add_flow(work, choice, members, tuple(states), returned)


def _add_flow(
    work: _Work,
    maker: int,
    members: tuple[int, ...],
    made: tuple[_State, ...],
    returned: dict[int, _Form],
) -> None:
    """The flow of `members`, equal values whose maker's options make the states `made`."""
    value = work.value(members[0])
    pricer = work.pricer
    states = tuple(dict.fromkeys(made))
    table: dict[_Form, int] = {}
    uses = _uses(work, value, table)
    if value.id in returned:
        form = table.setdefault(returned[value.id], len(table))
        uses.append(Use(work.add(Choice("returned", (Option(),))), (form,), count=0))
    forms = tuple(table)
    adds = any(use.count and any(forms[form].carries for form in use.forms) for use in uses)
    layouts = [*(state.layout for state in states), *(form.layout for form in forms)]
    kept = _Kept(list(dict.fromkeys(layouts)))
    sums = {layout: pricer.sum_seconds(value, layout) for layout in kept.layouts}
    shared = [replace(form, saves=False) for form in forms]
    pairs = [[_pair_seconds(work, value, state, form, sums) for form in forms] for state in states]
    work.flows.append(
        Flow(
            name=value.name,
            maker=maker,
            states=tuple(states.index(state) for state in made),
            uses=tuple(uses),
            pair_seconds=tuple(tuple(whole for whole, _ in row) for row in pairs),
            pair_backward=tuple(tuple(backward for _, backward in row) for row in pairs),
            conversions=tuple(shared.index(form) for form in shared),
            use_seconds=tuple(sums[form.layout] if form.carries else 0.0 for form in forms),
            made_seconds=tuple(-sums[state.layout] if adds else 0.0 for state in states),
            kept=tuple(tuple(kept.by_user(state, form) for form in forms) for state in states),
            own_kept=tuple(kept.of(state.layout) if state.saves else -1 for state in states),
            tensor_bytes=tuple(pricer.local_bytes(value.type, item) for item in kept.layouts),
            family=work.facts.roots[value.id],
            count=len(members),
        )
    )


@dataclass(frozen=True, slots=True)
class _Kept:
    """Numbers of the tensors of one value that backward may read: one a layout."""

    layouts: list[Layout]

    def of(self, layout: Layout) -> int:
        return self.layouts.index(layout)

    def by_user(self, state: _State, form: _Form) -> int:
        """A part that is cut out of a whole is a view, which keeps the whole."""
        if not form.saves:
            return -1
        steps = conversion_steps(state.layout, form.layout)
        cut = all(isinstance(old, Replicate) and isinstance(new, Shard) for _, old, new in steps)
        return self.of(state.layout if cut else form.layout)


def _uses(work: _Work, value: Value, forms: dict[_Form, int]) -> list[Use]:
    """Uses of `value` by class; new forms are added to `forms`."""
    graph = work.statement.graph
    equal: dict[tuple[int, int], list[int]] = defaultdict(list)
    for reader in work.facts.read_by[value.id]:
        place = graph.nodes[reader].inputs.index(value.id)
        equal[work.nodes[reader], place].append(reader)
    uses = []
    for (choice, position), nodes in equal.items():
        node = graph.nodes[nodes[0]]
        wanted = (_form(work, node, position, way) for way in work.ways[choice])
        numbers = tuple(forms.setdefault(form, len(forms)) for form in wanted)
        uses.append(Use(choice, numbers, len(nodes)))
    return uses


def _pair_seconds(
    work: _Work, value: Value, state: _State, form: _Form, sums: Mapping[Layout, float]
) -> tuple[float, float]:
    """Of the conversion, and what it changes in adding up gradients: the users of one form add up
    theirs in that form, and the conversion returns one; and of both what backward takes. `sums`: of
    adding one, by layout."""
    axis = work.statement.axis
    partial = form.partial
    if state.deferred:
        if form.carries and axis not in partial and not form.passes_terms:
            return math.inf, 0.0  # a whole gradient cannot be added to terms
        partial -= {axis}
    elif form.passes_terms:
        return math.inf, 0.0
    seconds, backward = work.pricer.conversion(value, state.layout, form.layout, partial)
    if (state.layout == form.layout and not partial) or not form.carries:
        return seconds, backward
    added, left = sums[state.layout], sums[form.layout]
    return seconds + added - left, backward + added - left
