"""Recomputation in the steps of a stage's backward: copies of forward steps, before first readers.

It mirrors `runtime/recompute.py`: a copy reads copies of what is recomputed and else what is kept;
weight gradients that read what is recomputed among the input gradients are computed there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from .liveness import Step
from .ops import NodeCost

__all__ = ["insert_copies", "nodes_with_inputs", "weights_with_inputs", "with_reruns"]


def insert_copies(
    backward: Sequence[Step],
    forward: Sequence[Step],
    recomputed: Collection[int],
    new_storage: Callable[[], int],
) -> tuple[list[Step], frozenset[int]]:
    """`backward` with copies of the forward steps of `recomputed` nodes that it depends on.

    Returns:
        The steps, and the storages that copies write.
    """
    if not recomputed:
        return list(backward), frozenset()
    chosen = frozenset(recomputed)
    makers = {
        storage: step for step in forward if step.node in chosen for storage, _ in step.writes
    }
    copies: dict[int, int] = {}
    steps: list[Step] = []
    for step in backward:
        for original in _missing(step, makers, copies):
            copies.update({storage: new_storage() for storage, _ in original.writes})
            steps.append(_renamed(original, copies))
        steps.append(_reading(step, copies))
    return steps, frozenset(copies.values())


def _missing(step: Step, makers: Mapping[int, Step], done: Collection[int]) -> list[Step]:
    """Forward steps to copy before `step`, in their order."""
    found: dict[int, Step] = {}
    stack = list(step.reads)
    while stack:
        storage = stack.pop()
        if storage in makers and storage not in done and makers[storage].node not in found:
            found[makers[storage].node] = makers[storage]
            stack.extend(makers[storage].reads)
    return [found[node] for node in sorted(found)]


def _reading(step: Step, names: Mapping[int, int]) -> Step:
    reads = tuple(names.get(storage, storage) for storage in step.reads)
    return Step(step.node, reads, step.writes, step.temporary_bytes)


def _renamed(step: Step, names: Mapping[int, int]) -> Step:
    writes = tuple((names[storage], size) for storage, size in step.writes)
    return Step(step.node, _reading(step, names).reads, writes, step.temporary_bytes)


def weights_with_inputs(
    steps: Sequence[Step], inputs: set[int], copies: Collection[int]
) -> set[int]:
    """Positions among `steps` of the input gradients and of the weight gradients that join them.

    Args:
        inputs: positions of the steps that input gradients depend on.
    """
    writer = {storage: i for i, step in enumerate(steps) for storage, _ in step.writes}
    inside = set(inputs)
    parts = [
        _part(steps, writer, i, inside)
        for i, step in enumerate(steps)
        if not step.writes and i not in inside
    ]
    joined: set[int] = set()  # nodes one of whose weight gradients has joined
    while True:
        found = []
        for part in parts:
            read = {storage for i in part - inside for storage in steps[i].reads}
            read = {storage for storage in read if writer.get(storage) in inside}
            nodes = {steps[i].node for i in part - inside}
            if not read.isdisjoint(copies) or not nodes.isdisjoint(joined):
                found.append((part, nodes))
        if not found:
            return inside
        for part, nodes in found:
            inside |= part
            joined |= nodes
        parts = [part for part in parts if not part <= inside]


def _part(
    steps: Sequence[Step], writer: Mapping[int, int], last: int, inside: Collection[int]
) -> set[int]:
    """`last` and the steps that it depends on, up to those `inside`."""
    found: set[int] = set()
    stack = [last]
    while stack:
        position = stack.pop()
        if position not in found and position not in inside:
            found.add(position)
            stack.extend(writer[s] for s in steps[position].reads if s in writer)
    return found


def nodes_with_inputs(steps: Sequence[Step], copies: Collection[int]) -> frozenset[int]:
    """Nodes whose weight gradients read copies that not they alone need, so that in a stage which
    returns gradients they are computed with those."""
    writer = {storage: step for step in steps for storage, _ in step.writes}
    readers: dict[int, list[Step]] = {}
    for step in steps if copies else ():
        for storage in step.reads:
            readers.setdefault(storage, []).append(step)
    found = set()
    for last in steps if copies else ():
        if last.writes:
            continue
        part = {id(last)}
        stack = [last]
        while stack:
            for storage in stack.pop().reads:
                made = writer.get(storage)
                if made is None or id(made) in part:
                    continue
                read_by = [reader for other, _ in made.writes for reader in readers.get(other, ())]
                if all(id(reader) in part for reader in read_by):
                    part.add(id(made))
                    stack.append(made)
                elif storage in copies:
                    found.add(last.node)
    return frozenset(found)


def with_reruns(costs: Sequence[NodeCost], rerun: Collection[int]) -> tuple[NodeCost, ...]:
    """`costs` by node, with the forward of the nodes `rerun` in their backward."""
    return tuple(
        replace(cost, backward_input_seconds=cost.backward_input_seconds + cost.forward_seconds)
        if node in rerun
        else cost
        for node, cost in enumerate(costs)
    )
