"""The layout problem: what layouts are chosen from, and what a choice costs.

A `Choice` is a group of equal nodes (or of equal parameters) which all take the same `Option`. A
`Flow` is a value, or a group of equal ones, from the choice that makes it to those that use it.
Options of the maker put the value into one of several *states* (layouts); options of users want it
in one of several *forms* (layout, and how its gradient comes back). A conversion from state to form
is paid once a value, however many want that form.

    seconds = sum_c n_c t_c(o_c)
            + sum_f n_f (sum_u k_u a_f(w_u) + sum_{w wanted} p_f(m, w) + b_f(m))

with o the options picked, m the state that the maker's option makes, w_u the form that use u wants,
n and k numbers of equal ones, p the conversion, a and b what adding up gradients costs. Bytes are
those of one device.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

__all__ = [
    "Choice",
    "Figures",
    "Flow",
    "LayoutProblem",
    "Option",
    "Use",
    "figures",
    "flow_seconds",
    "with_backward_share",
]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a node or to hold a tensor.

    Args:
        seconds: of forward and backward of one microbatch.
        backward_seconds: of backward alone.
        step_seconds: once a step: sum of gradients as far as it counts, update.
        sum_seconds: once a step: sum of gradients.
        static_bytes: held throughout.
        saved_bytes: kept from forward to backward beside operands and results.
        transient_bytes: live while it runs.
    """

    seconds: float = 0.0
    backward_seconds: float = 0.0
    step_seconds: float = 0.0
    sum_seconds: float = 0.0
    static_bytes: int = 0
    saved_bytes: int = 0
    transient_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """`count` equal nodes or held tensors that take one option."""

    name: str
    options: tuple[Option, ...]
    count: int = 1


@dataclass(frozen=True, slots=True)
class Use:
    """What one choice wants of a flow, by its options.

    Args:
        choice: its index.
        forms: index of the form wanted.
        count: how many equal nodes read one value.
    """

    choice: int
    forms: tuple[int, ...]
    count: int = 1


@dataclass(frozen=True, slots=True)
class Flow:
    """A value and its users.

    Args:
        states: by option of the maker, index of the state made.
        pair_seconds: [state][form], of the conversion; infinite where there is none.
        pair_backward: [state][form], of that, what backward takes.
        conversions: by form; forms of one number share their conversions.
        use_seconds: by form, what each use adds; all in backward.
        made_seconds: by state; all in backward.
        kept: [state][form], number of the tensor that the backward of the user reads, -1 if none.
        own_kept: by state, likewise for the backward of the maker.
        tensor_bytes: by those numbers.
        family: flows of one family share storage (views of each other).
    """

    name: str
    maker: int
    states: tuple[int, ...]
    uses: tuple[Use, ...]
    pair_seconds: tuple[tuple[float, ...], ...]
    pair_backward: tuple[tuple[float, ...], ...]
    conversions: tuple[int, ...]
    use_seconds: tuple[float, ...]
    made_seconds: tuple[float, ...]
    kept: tuple[tuple[int, ...], ...]
    own_kept: tuple[int, ...]
    tensor_bytes: tuple[int, ...]
    family: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class LayoutProblem:
    """See the module docstring.

    Args:
        num_microbatches: of a step, over which `step_seconds` are spread.
        memory_bytes: limit of static + in_flight * saved + transient bytes; None: none.
        in_flight: microbatches whose saved tensors are alive at once.
        seconds_per_byte: price of static and saved bytes in the objective: with a limit the lean
            choices are hard to find, at a price they are as easy as the fast ones.
    """

    choices: tuple[Choice, ...]
    flows: tuple[Flow, ...]
    num_microbatches: float = 1
    memory_bytes: int | None = None
    in_flight: float = 1.0
    seconds_per_byte: float = 0.0

    @property
    def counts_bytes(self) -> bool:
        return self.memory_bytes is not None or self.seconds_per_byte > 0.0

    def weight(self, option: Option) -> float:
        """Seconds of an option in the objective."""
        return option.seconds + option.step_seconds / self.num_microbatches


@dataclass(frozen=True, slots=True)
class Figures:
    """What a choice of options costs; `seconds` of one microbatch, without the step's, of them
    `backward_seconds` of backward."""

    seconds: float
    backward_seconds: float
    step_seconds: float
    sum_seconds: float
    static_bytes: int
    saved_bytes: int
    transient_bytes: int

    def objective(self, problem: LayoutProblem) -> float:
        held = self.static_bytes + problem.in_flight * self.saved_bytes
        seconds = self.seconds + self.step_seconds / problem.num_microbatches
        return seconds + problem.seconds_per_byte * held

    def need_bytes(self, problem: LayoutProblem) -> int:
        saved = math.ceil(problem.in_flight * self.saved_bytes)
        return self.static_bytes + saved + self.transient_bytes

    def is_legal(self, problem: LayoutProblem) -> bool:
        """Whether all conversions exist and the memory suffices."""
        fits = problem.memory_bytes is None or self.need_bytes(problem) <= problem.memory_bytes
        return fits and math.isfinite(self.seconds)


def with_backward_share(
    problem: LayoutProblem, share: float, whole: Collection[int] = ()
) -> LayoutProblem:
    """`problem` with `share` of the seconds of backward, and all of the others; with all of those
    of choices `whole` and of the values that these make."""
    if share == 1.0:
        return problem
    return replace(
        problem,
        choices=tuple(
            choice if index in whole else _option_shares(choice, share)
            for index, choice in enumerate(problem.choices)
        ),
        flows=tuple(
            flow if flow.maker in whole else _flow_share(flow, share) for flow in problem.flows
        ),
    )


def _option_shares(choice: Choice, share: float) -> Choice:
    if not any(option.backward_seconds for option in choice.options):
        return choice
    options = (
        replace(
            option,
            seconds=option.seconds - (1.0 - share) * option.backward_seconds,
            backward_seconds=share * option.backward_seconds,
        )
        for option in choice.options
    )
    return replace(choice, options=tuple(options))


def _flow_share(flow: Flow, share: float) -> Flow:
    pairs = (
        tuple(whole - (1.0 - share) * part for whole, part in zip(*rows, strict=True))
        for rows in zip(flow.pair_seconds, flow.pair_backward, strict=True)
    )
    return replace(
        flow,
        pair_seconds=tuple(pairs),
        pair_backward=tuple(tuple(share * item for item in row) for row in flow.pair_backward),
        use_seconds=tuple(share * item for item in flow.use_seconds),
        made_seconds=tuple(share * item for item in flow.made_seconds),
    )


def figures(problem: LayoutProblem, picks: Sequence[int]) -> Figures:
    """Figures of the plan in which choice i takes option `picks[i]`."""
    taken = [
        (choice.count, choice.options[pick])
        for choice, pick in zip(problem.choices, picks, strict=True)
    ]
    seconds = sum(count * option.seconds for count, option in taken)
    backward = sum(count * option.backward_seconds for count, option in taken)
    saved = sum(count * option.saved_bytes for count, option in taken)
    families: dict[int, int] = {}
    for flow in problem.flows:
        seconds += flow.count * flow_seconds(flow, picks)
        backward += flow.count * _adjoint_seconds(flow, picks)
        kept = flow.count * _saved_bytes(flow, picks)
        families[flow.family] = max(families.get(flow.family, 0), kept)
    saved += sum(families.values())
    return Figures(
        seconds=seconds,
        backward_seconds=backward,
        step_seconds=sum(count * option.step_seconds for count, option in taken),
        sum_seconds=sum(count * option.sum_seconds for count, option in taken),
        static_bytes=sum(count * option.static_bytes for count, option in taken),
        saved_bytes=saved,
        transient_bytes=max((option.transient_bytes for _, option in taken), default=0),
    )


def flow_seconds(flow: Flow, picks: Sequence[int]) -> float:
    """Of one of `flow`: conversions and sums of gradients."""
    return _with_conversions(flow, picks, flow.pair_seconds)


def _adjoint_seconds(flow: Flow, picks: Sequence[int]) -> float:
    """Of that, what backward takes."""
    return _with_conversions(flow, picks, flow.pair_backward)


def _with_conversions(flow: Flow, picks: Sequence[int], pairs: Sequence[Sequence[float]]) -> float:
    state = flow.states[picks[flow.maker]]
    wanted = [(use.forms[picks[use.choice]], use.count) for use in flow.uses]
    conversions = {flow.conversions[form]: pairs[state][form] for form, _ in wanted}
    added = sum(count * flow.use_seconds[form] for form, count in wanted)
    return sum(conversions.values()) + added + flow.made_seconds[state]


def _saved_bytes(flow: Flow, picks: Sequence[int]) -> int:
    """Each tensor that some backward reads is kept once."""
    state = flow.states[picks[flow.maker]]
    kept = {flow.kept[state][use.forms[picks[use.choice]]] for use in flow.uses}
    return sum(flow.tensor_bytes[number] for number in {*kept, flow.own_kept[state]} if number >= 0)
