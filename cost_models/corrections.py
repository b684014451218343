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

__all__ = [
    "FactorTable",
    "Share",
    "factors_of",
    "fit_corrections",
    "least",
    "least_of_gradients",
    "signature_of",
]

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
        return _text(value.type, batch_fraction if value.id in batched else 1.0)

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


@functools.lru_cache(maxsize=65536)
def _text(type: TensorType, scale: float) -> str:
    """`type` with `scale` times the rows, in words."""
    if scale == 1.0 or not type.shape:
        return str(type)
    return str(TensorType((max(1, round(type.shape[0] * scale)), *type.shape[1:]), type.dtype))


# -- look-up ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class FactorTable:
    """The corrections of one device type, ready to be asked; see the module docstring."""

    by_op: Mapping[str, tuple[Correction, ...]]
    by_category: Mapping[Category, Factors]
    _known: dict[Signature, Factors] = field(default_factory=dict)
    _looks: dict[str, tuple[_Look, ...]] = field(default_factory=dict)

    @staticmethod
    def of(entries: Iterable[Correction]) -> FactorTable:
        """The table of `entries`."""
        by_op: dict[str, list[Correction]] = {}
        by_category: dict[Category, list[Correction]] = {}
        distinct = {entry.signature: entry for entry in sorted(entries, key=str)}
        for signature, entry in distinct.items():
            by_op.setdefault(signature.op, []).append(entry)
            by_category.setdefault(op_named(signature.op).category, []).append(entry)
        return FactorTable(
            {name: tuple(found) for name, found in by_op.items()},
            {category: _typical(found) for category, found in by_category.items()},
        )

    def factors(self, signature: Signature) -> Factors:
        """Of forward, input and weight gradients."""
        if signature not in self._known:
            self._known[signature] = self._factors(signature)
        return self._known[signature]

    def _factors(self, signature: Signature) -> Factors:
        entries = self.by_op.get(signature.op, ())
        typical = self.by_category.get(op_named(signature.op).category, (1.0, 1.0, 1.0))
        if not entries:
            return typical
        if signature.op not in self._looks:
            self._looks[signature.op] = tuple(_Look.of(entry.signature) for entry in entries)
        own = _Look.of(signature)
        distances = [
            -1.0 if entry.signature == signature else own.distance(look)
            for entry, look in zip(entries, self._looks[signature.op], strict=True)
        ]
        # of those at one distance the first by text
        nearest = [entries[i] for i in sorted(range(len(entries)), key=distances.__getitem__)]
        first, second, third = (
            next((f for e in nearest if (f := getattr(e, phase)) is not None), other)
            for phase, other in zip(PHASES, typical, strict=True)
        )
        return first, second, third


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


@dataclass(frozen=True, slots=True)
class _Look:
    """What the distance of two signatures is told from."""

    attributes: str
    marks: tuple[str, ...]
    dtypes: tuple[str, ...]
    dims: tuple[int, ...]
    logs: tuple[float, ...]  # of the sizes of all dims, base two
    num_bytes: int

    @staticmethod
    def of(signature: Signature) -> _Look:
        types = signature.types()
        return _Look(
            signature.attributes,
            tuple(text.partition("]")[2] for text in signature.operands),
            tuple(dtype_name(type.dtype) for type in types),
            tuple(len(type.shape) for type in types),
            tuple(math.log2(max(1, size)) for type in types for size in type.shape),
            sum(type.num_bytes for type in types),
        )

    def distance(self, other: _Look) -> float:
        unlike = (
            (self.attributes != other.attributes)
            + (self.marks != other.marks)
            + (self.dtypes != other.dtypes)
        )
        if self.dims != other.dims:
            sizes = max(1, self.num_bytes), max(1, other.num_bytes)
            return _UNLIKE * unlike + _FAR + abs(math.log2(sizes[0] / sizes[1]))
        pairs = zip(self.logs, other.logs, strict=True)
        return _UNLIKE * unlike + sum(abs(ours - theirs) for ours, theirs in pairs)


@once_per_object
def least_of_gradients(corrections: Corrections) -> float:
    """A factor that gradients of no operator have less of, at most one."""
    factors = [f for e in corrections.entries for f in (e.backward_input, e.backward_weight)]
    return min([1.0, *(factor for factor in factors if factor is not None)])


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
