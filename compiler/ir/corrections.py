"""What was measured on a device type, as factors on the times that its rates predict.

An operator is known by a *signature*: its name, its attributes, and the local types of its operands
and results. Where only blocks of operators were measured, the operators of a block share its
factor. How an operator that was not measured is corrected is decided in
`cost_models/corrections.py`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from .memo import once_per_object
from .types import TensorType

__all__ = [
    "GRADIENT",
    "LARGEST_FACTOR",
    "PHASES",
    "WEIGHT",
    "Correction",
    "Corrections",
    "Signature",
]

GRADIENT, WEIGHT = "^", "w"

PHASES = ("forward", "backward_input", "backward_weight")
"""What of an operator takes time: results, gradients of activations, gradients of parameters."""

LARGEST_FACTOR = 1e4
_SEPARATOR = " | "
_ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Signature:
    """What tells apart calls that take different times.

    Args:
        op: name of the operator.
        attributes: what is passed beside tensors.
        operands: a type each, as `f32[8,64]`, marked `^` if it wants a gradient and `w` if that is
            one of weights.
        results: likewise, without marks.
    """

    op: str
    attributes: str
    operands: tuple[str, ...]
    results: tuple[str, ...]

    def types(self) -> tuple[TensorType, ...]:
        """Of operands and results. Raises ValueError if they are none."""
        texts = [text.rstrip(GRADIENT + WEIGHT) for text in self.operands]
        return tuple(map(TensorType.parse, (*texts, *self.results)))


@dataclass(frozen=True, slots=True)
class Correction:
    """Measured over predicted seconds of one signature; None: of that phase nothing is predicted.

    Factors have four digits, so that text holds them exactly.
    """

    signature: Signature
    forward: float | None
    backward_input: float | None
    backward_weight: float | None

    def __str__(self) -> str:
        """One line, as `aten.mul.Tensor | (...) | f32[8]^ f32[8] | f32[8] | 1.2 0.9 -`."""
        own = self.signature
        factors = (getattr(self, phase) for phase in PHASES)
        return _SEPARATOR.join(
            [
                own.op,
                own.attributes,
                " ".join(own.operands),
                " ".join(own.results),
                " ".join(_ABSENT if factor is None else f"{factor:.4g}" for factor in factors),
            ]
        )

    @staticmethod
    def parse(text: str) -> Correction:
        """Inverse of `str`. Raises ValueError."""
        parts = text.split(_SEPARATOR)
        if len(parts) != 5:
            raise ValueError(f"not a correction: {text!r}")
        op, attributes, operands, results, factors = parts
        numbers = [None if item == _ABSENT else _factor(item) for item in factors.split()]
        if len(numbers) != len(PHASES):
            raise ValueError(f"a correction has {len(PHASES)} factors: {text!r}")
        signature = Signature(op, attributes, tuple(operands.split()), tuple(results.split()))
        signature.types()
        found = Correction(signature, *numbers)
        if str(found) != text:
            raise ValueError(f"not as a correction is written: {text!r}, but {str(found)!r}")
        return found


def _factor(text: str) -> float:
    number = float(text)
    if not 0.0 < number <= LARGEST_FACTOR or not math.isfinite(number):
        raise ValueError(f"not a factor: {text!r} (above 0, at most {LARGEST_FACTOR:g})")
    return number


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Corrections:
    """All of one device type, ordered by text; one entry a signature."""

    entries: tuple[Correction, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the entries."""
        return _digest(self)

    def __hash__(self) -> int:
        """By digest: device types are keys of tables that are asked often."""
        return hash(self.digest)


@once_per_object
def _digest(corrections: Corrections) -> str:
    text = "\n".join(map(str, corrections.entries))
    return hashlib.sha256(text.encode()).hexdigest()
