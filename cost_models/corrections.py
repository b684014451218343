"""Prices that were measured: factors on what the roofline predicts, op by op.

    seconds = factor x roofline,   factor = measured / roofline

A factor is looked up by phase (forward, gradients of activations, gradients of weights) and by the
signature of the operator, and where that was not measured it is

1. that of the same operator with the nearest local types (by the sizes of all dims, in powers of
   two; other attributes, marks and dtypes count as far),
2. the geometric mean over its category,
3. one.

Planners bound by prices at other sizes, so `least` gives factors that no price is below.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..compiler.ir.corrections import (
    GRADIENT,
    LARGEST_FACTOR,
    PHASES,
    WEIGHT,
    Correction,
    Corrections,
    Signature,
)
from ..compiler.ir.graph import Graph, Node, Value
from ..compiler.ir.memo import once_per_object
from ..compiler.ir.ops import Category, op_named
from ..compiler.ir.text import print_attributes
from ..compiler.ir.types import TensorType, dtype_name

__all__ = ["FactorTable", "Share", "factors_of", "fit_corrections", "least", "signature_of"]

_UNLIKE = 8.0  # powers of two that other attributes, marks or dtypes are worth
_FAR = 1e6  # other numbers of dims
# what these are passed beside tensors is told by their results
_SHAPED = (Category.VIEW, Category.FACTORY)
Factors = tuple[float, float, float]


def signature_of(
    graph: Graph,
    node: Node,
    *,
    batch_fraction: float = 1.0,
    batched: frozenset[int] = frozenset(),
    weights: frozenset[int] = frozenset(),
) -> Signature:
    """The signature of `node` at `batch_fraction` times the rows of its graph.

    Args:
        batched: values that grow with the batch; dim 0 is taken to be what grows.
        weights: values whose gradients are weight gradients.
    """

    def typed(value: Value) -> str:
        scale = batch_fraction if value.id in batched else 1.0
        return str(_scaled(value.type, scale))

    def marked(value: Value) -> str:
        if not value.requires_grad:
            return typed(value)
        return typed(value) + GRADIENT + (WEIGHT if value.id in weights else "")

    attributes = "" if node.op.category in _SHAPED else print_attributes(node)
    if node.random_draw is not None:
        attributes += " random"
    return Signature(
        node.op.name,
        attributes,
        tuple(marked(graph.values[value]) for value in node.inputs),
        tuple(typed(graph.values[value]) for value in node.outputs),
    )


def _scaled(type: TensorType, scale: float) -> TensorType:
    if scale == 1.0 or not type.shape:
        return type
    return TensorType((max(1, round(type.shape[0] * scale)), *type.shape[1:]), type.dtype)


# -- look-up ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class FactorTable:
    """The corrections of one device type, ready to be asked; see the module docstring."""

    exact: Mapping[Signature, Correction]
    by_op: Mapping[str, tuple[Correction, ...]]
    by_category: Mapping[Category, Factors]
    _known: dict[Signature, Factors] = field(default_factory=dict)

    @staticmethod
    def of(entries: Iterable[Correction]) -> FactorTable:
        """The table of `entries`."""
        by_op: dict[str, list[Correction]] = {}
        by_category: dict[Category, list[Correction]] = {}
        exact = {entry.signature: entry for entry in entries}
        for signature, entry in exact.items():
            by_op.setdefault(signature.op, []).append(entry)
            by_category.setdefault(op_named(signature.op).category, []).append(entry)
        return FactorTable(
            exact,
            {name: tuple(found) for name, found in by_op.items()},
            {category: _typical(found) for category, found in by_category.items()},
        )

    def factors(self, signature: Signature) -> Factors:
        """Of forward, input and weight gradients."""
        if signature not in self._known:
            first, second, third = (self._factor(signature, phase) for phase in PHASES)
            self._known[signature] = first, second, third
        return self._known[signature]

    def _factor(self, signature: Signature, phase: str) -> float:
        entry = self.exact.get(signature)
        own: float | None = getattr(entry, phase) if entry is not None else None
        if own is not None:
            return own
        others = [
            item for item in self.by_op.get(signature.op, ()) if getattr(item, phase) is not None
        ]
        if others:
            nearest = min(
                others, key=lambda item: (_distance(signature, item.signature), str(item))
            )
            found: float = getattr(nearest, phase)
            return found
        typical = self.by_category.get(op_named(signature.op).category, (1.0, 1.0, 1.0))
        return typical[PHASES.index(phase)]


def factors_of(corrections: Corrections) -> FactorTable:
    """The table of `corrections`, made once."""
    return _table(corrections)


@once_per_object
def _table(corrections: Corrections) -> FactorTable:
    return FactorTable.of(corrections.entries)


def _typical(entries: Iterable[Correction]) -> Factors:
    """Geometric means, by phase; one where nothing was measured."""
    means = []
    for phase in PHASES:
        logs = [math.log(f) for e in entries if (f := getattr(e, phase)) is not None]
        means.append(math.exp(math.fsum(logs) / len(logs)) if logs else 1.0)
    first, second, third = means
    return first, second, third


@functools.lru_cache(maxsize=4096)
def _types(signature: Signature) -> tuple[TensorType, ...]:
    return signature.types()


def _distance(one: Signature, other: Signature) -> float:
    distance = 0.0 if one.attributes == other.attributes else _UNLIKE
    marks = [[text.partition("]")[2] for text in item.operands] for item in (one, other)]
    distance += 0.0 if marks[0] == marks[1] else _UNLIKE
    ours, theirs = _types(one), _types(other)
    if [dtype_name(t.dtype) for t in ours] != [dtype_name(t.dtype) for t in theirs]:
        distance += _UNLIKE
    if [len(type.shape) for type in ours] != [len(type.shape) for type in theirs]:
        sizes = (sum(type.num_bytes for type in types) for types in (ours, theirs))
        return distance + _FAR + abs(math.log2(max(1, next(sizes)) / max(1, next(sizes))))
    pairs = (
        (max(1, a), max(1, b))
        for mine, other_type in zip(ours, theirs, strict=True)
        for a, b in zip(mine.shape, other_type.shape, strict=True)
    )
    return distance + sum(abs(math.log2(a / b)) for a, b in pairs)


@once_per_object
def least(corrections: Corrections) -> Corrections:
    """Corrections under which every price is at most what it is under `corrections`: of each
    operator that was measured, the least factor of any."""
    table = factors_of(corrections)
    entries = []
    for found in table.by_op.values():
        bounds = []
        for phase in PHASES:
            factors = [f for e in found if (f := getattr(e, phase)) is not None]
            bounds.append(min(factors) if factors else None)
        entries += [Correction(entry.signature, *bounds) for entry in found]
    return Corrections(tuple(entries))


# -- fit -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """What one operator is predicted to take of something that was measured as a whole.

    Args:
        predicted: seconds by phase, by the rates alone.
        ratios: measured over predicted seconds of the whole, by phase; None: not known.
        weight: how often the whole occurs.
    """

    signature: Signature
    predicted: Factors
    ratios: tuple[float | None, float | None, float | None]
    weight: float = 1.0


def fit_corrections(shares: Iterable[Share]) -> Corrections | None:
    """Factors for all signatures: means of the ratios, weighted by seconds; None without any."""
    sums: dict[Signature, list[list[float]]] = {}
    for share in shares:
        totals = sums.setdefault(share.signature, [[0.0, 0.0] for _ in PHASES])
        for total, seconds, ratio in zip(totals, share.predicted, share.ratios, strict=True):
            if ratio is not None and seconds > 0.0:
                total[0] += share.weight * seconds * ratio
                total[1] += share.weight * seconds
    entries = []
    for signature, totals in sums.items():
        factors = [_rounded(above / below) if below else None for above, below in totals]
        if any(factor is not None for factor in factors):
            entries.append(Correction(signature, *factors))
    entries.sort(key=str)
    return Corrections(tuple(entries)) if entries else None


def _rounded(factor: float) -> float:
    bounded = min(max(factor, 1.0 / LARGEST_FACTOR), LARGEST_FACTOR)
    return float(f"{bounded:.4g}")
