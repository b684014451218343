"""Large-neighbourhood search: a few devices are divided anew by CP-SAT while the others stay.

Only the loads of the devices that are taken apart change: what is elsewhere pays for its nets as
before. The most loaded device and one or two others are taken, neighbours by nets first.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from .assignment_model import solve_assignment
from .incumbent import Incumbent
from .load_table import LoadTable
from .problem import PlacementProblem

__all__ = ["improve_few_devices"]

_SECONDS_EACH = 3.0
_MOST_UNITS = 400
_WORTH = 2e-5  # relative; smaller improvements are not asked for


def improve_few_devices(
    problem: PlacementProblem, slot_of: Sequence[int], best: Incumbent, *, share: float
) -> list[int]:
    """Take devices apart again and again until a share of the time is over; the best slots."""
    chooser = random.Random(0)
    slots = list(slot_of)
    failed: set[tuple[int, ...]] = set()
    while not best.done and best.left(share) > 0.1:
        table = LoadTable(problem, slots)
        chosen = _choose(table, chooser, failed)
        if chosen is None:
            break
        better = _divide_anew(table, chosen, min(_SECONDS_EACH, best.left(share)))
        if better is None:
            failed.add(chosen)
            continue
        failed = {old for old in failed if not set(old) & set(chosen)}
        slots = better
        best.offer(problem, slots, "CP-SAT on a few devices")
    return slots


def _choose(
    table: LoadTable, chooser: random.Random, failed: set[tuple[int, ...]]
) -> tuple[int, ...] | None:
    """The most loaded slot with others that were not tried since they changed."""
    worst = max(range(len(table.load)), key=table.load.__getitem__)
    shared: Counter[int] = Counter()
    for on in table.pins_on:
        if worst in on and len(on) > 1:
            shared.update(slot for slot in on if slot != worst)
    others = [slot for slot in range(len(table.load)) if slot != worst]
    for attempt in range(40):
        number = min(1 + (attempt + chooser.randrange(2)) % 3, len(others))
        weights = [1.0 + shared[slot] for slot in others]
        picked = {worst}
        while len(picked) < number + 1:
            picked.add(chooser.choices(others, weights)[0])
        units = sum(slot in picked for slot in table.slot_of)
        chosen = tuple(sorted(picked))
        if chosen not in failed and (units <= _MOST_UNITS or number == 1):
            return chosen
    return None


def _divide_anew(table: LoadTable, chosen: tuple[int, ...], seconds: float) -> list[int] | None:
    """Slots of all units after the chosen ones' units are divided better; None: no better found."""
    problem = table.problem
    units = [unit for unit, slot in enumerate(table.slot_of) if slot in chosen]
    part, open_nets = _part(problem, units, chosen)
    renumbered = sorted(chosen, key=lambda slot: (table.kind[slot], slot))
    limit = max(table.load[slot] for slot in chosen) * (1 - _WORTH)
    answer = solve_assignment(
        part,
        limit,
        precision=_WORTH,
        seconds=seconds,
        minimise=True,
        open_nets=open_nets,
        hint=[renumbered.index(table.slot_of[unit]) for unit in units],
    )
    if answer.slot_of is None:
        return None
    slots = list(table.slot_of)
    for unit, slot in zip(units, answer.slot_of, strict=True):
        slots[unit] = renumbered[slot]
    after = LoadTable(problem, slots)
    return (
        slots if after.legal and max(after.load[s] for s in chosen) < limit / (1 - _WORTH) else None
    )


def _part(
    problem: PlacementProblem, units: list[int], chosen: tuple[int, ...]
) -> tuple[PlacementProblem, frozenset[int]]:
    """The chosen devices and their units as a problem, and its nets that reach outside."""
    new = {unit: number for number, unit in enumerate(units)}
    nets = sorted({net for unit in units for net in problem.nets_of[unit]})
    kinds = sorted({problem.slots[slot] for slot in chosen})
    pins = [tuple(new[u] for u in problem.pins[net] if u in new) for net in nets]
    part = PlacementProblem(
        devices=tuple(tuple(s for s in chosen if problem.slots[s] == k) for k in kinds),
        memory=problem.memory[kinds],
        times=problem.times[units][:, kinds],
        sizes=problem.sizes[units],
        pins=tuple(pins),
        fees=problem.fees[nets][:, kinds].reshape(len(nets), len(kinds)),
        arcs=(),
        flows=(),
        members=tuple((unit,) for unit in units),
    )
    opened = (n for n, net in enumerate(nets) if len(pins[n]) < len(problem.pins[net]))
    return part, frozenset(opened)
