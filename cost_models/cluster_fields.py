"""Fields of a cluster file taken one by one, with errors that name file, line and remedy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TypeVar

from ..compiler.ir.cluster import HANDLED, PHASES
from ..compiler.ir.errors import ClusterError

__all__ = [
    "BANDWIDTHS",
    "BYTES",
    "FLOPS",
    "KEYS_HELP",
    "RATES",
    "TIMES",
    "Source",
    "as_table",
    "check_keys",
    "number",
    "quantity",
    "quantity_of",
    "typed",
    "whole_bytes",
]

_T = TypeVar("_T")

BYTES: dict[str, float] = {
    **{f"{prefix}B": 1000.0**power for power, prefix in enumerate(("", "K", "M", "G", "T"))},
    **{f"{prefix}iB": 1024.0**power for power, prefix in enumerate(("K", "M", "G", "T"), 1)},
}
BANDWIDTHS = {f"{unit}/s": factor for unit, factor in BYTES.items()}
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
FLOPS = {
    f"{prefix}FLOP": 1000.0**power
    for power, prefix in ((0, ""), (2, "M"), (3, "G"), (4, "T"), (5, "P"))
}
RATES = {f"{unit}/s": factor for unit, factor in FLOPS.items()}

_KEYS: dict[str, tuple[str, ...]] = {
    "cluster": ("name", "local", "types", "devices", "links"),
    "type": (
        "backend",
        "memory",
        "memory_bandwidth",
        "overhead",
        "rates",
        "unsupported_ops",
        "host",
        "threads",
        "cores",
        "instruction",
        "message",
        "memory_bandwidths",
        "matmul_rates",
        "attention_rates",
        "convolution_rates",
        "op_costs",
    ),
    "host": ("latency", "bandwidth", "memory", "memory_bandwidth"),
    "op_cost": PHASES,
    "phase": ("kernels", "rates"),
    "device": ("type", "node", "count"),
    "link": (
        "a",
        "b",
        "same_node",
        "latency",
        "bandwidth",
        "streams",
        "compute_share",
        "progress_share",
        "skew",
        "handling",
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
    ),
    "collective": ("latency", "bandwidth"),
    "handling": HANDLED,
}
KEYS_HELP = {
    **{
        level: f"keys of a {level.replace('_', ' ')}: {', '.join(keys)}"
        for level, keys in _KEYS.items()
    },
    "op_cost": f"phases of a kind of operators: {', '.join(PHASES)}; or an element type (bf16) "
    "with phases of its own",
    "op_costs": "name operators (gelu) or categories of them (norm), each with its phases",
    "rates": "give rates by element type, for example f32",
}
_WORDS: dict[type, str] = {str: "text in quotes", dict: "a table of keys", list: "a list"}
_LINE = re.compile(r"\(at line (\d+), column \d+\)")
_COMMENT = re.compile(r"#[^\n\"']*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Source:
    """Text of a cluster file, to find the line of a mistake in.

    Args:
        name: of the file.
        text: without comments, line by line as in the file.
        start: where in the text the entry begins that is read.
    """

    name: str
    text: str
    start: int = 0

    @classmethod
    def of(cls, name: str, text: str, format: str) -> Source:
        """The source of a file in `format` (`toml` or `json`)."""
        return cls(name, _COMMENT.sub("", text) if format == "toml" else text)

    def entry(self, key: str, index: int) -> Source:
        """The same from the header `[[key]]` of entry `index` on; from `key` on in JSON."""
        position = -1
        for _ in range(index + 1):
            position = self.text.find(f"[[{key}]]", position + 1)
            if position < 0:
                break
        if position < 0:
            position = max(self.text.find(f'"{key}"'), self.start)
        return replace(self, start=position)

    def at_error(self, error: Exception) -> str:
        """`name:line` of what a parser refuses."""
        if isinstance(error, json.JSONDecodeError):
            return f"{self.name}:{error.lineno}"
        found = _LINE.search(str(error))
        if found is None and "end of document" in str(error):
            return f"{self.name}:{self.text.count(chr(10)) + 1}"
        return f"{self.name}:{found[1]}" if found else self.name

    def where(self, *needles: str) -> str:
        """`name:line` of the last of `needles` found, each searched after the one before it."""
        position, is_found = self.start, self.start > 0
        for needle in needles:
            found = self.text.find(needle, position)
            if found >= 0:
                position, is_found = found, True
        if not is_found:
            return self.name
        return f"{self.name}:{self.text.count(chr(10), 0, position) + 1}"


def quantity(
    table: Mapping[str, object],
    key: str,
    units: dict[str, float],
    source: Source,
    place: tuple[str, ...],
    *,
    allow_zero: bool = False,
) -> float:
    """The value of `table[key]`, a string `number unit`, in base units."""
    if key not in table:
        raise ClusterError(
            f"{'.'.join((*place, key))} is missing",
            where=source.where(*place),
            ways_out=(f"add it: {_legal(units)}",),
        )
    return quantity_of(table[key], units, source, (*place, key), allow_zero=allow_zero)


def quantity_of(
    raw: object,
    units: dict[str, float],
    source: Source,
    place: tuple[str, ...],
    *,
    allow_zero: bool = False,
) -> float:
    """The value of `raw`, a string `number unit`, in base units; `place` ends with its key."""
    key = place[-1]
    where = source.where(*place, str(raw))
    match = re.fullmatch(r"\s*([-+]?[0-9.]+(?:[eE][-+]?\d+)?)\s*(\S*)\s*", str(raw))
    if not isinstance(raw, str) or match is None or match[2] not in units:
        raise ClusterError(
            f"{key} = {raw!r} is not a quantity of this kind",
            where=where,
            ways_out=(_legal(units),),
        )
    try:
        value = float(Decimal(match[1]) * Decimal(str(units[match[2]])))
    except (ArithmeticError, ValueError) as error:
        raise ClusterError(
            f"{key} = {raw!r}: {match[1]!r} is not a number",
            where=where,
            ways_out=(_legal(units),),
        ) from error
    if value < 0 or (value == 0 and not allow_zero) or not math.isfinite(value):
        limit = "be positive"
        if value > 0:
            limit = "be finite"
        elif allow_zero:
            limit = "not be negative"
        raise ClusterError(
            f"{key} = {raw!r} must {limit}",
            where=where,
            ways_out=("measure it with `cutset calibrate`, or take a preset's figure",),
        )
    return value


def whole_bytes(
    table: Mapping[str, object], key: str, source: Source, place: tuple[str, ...]
) -> int:
    """The value of `table[key]`, a quantity of at least one byte."""
    found = int(quantity(table, key, BYTES, source, place))
    if found < 1:
        raise ClusterError(
            f"{key} = {table[key]!r} is less than one byte",
            where=source.where(*place, key),
            ways_out=(_legal(BYTES),),
        )
    return found


def _legal(units: dict[str, float]) -> str:
    return f"write a number and one of the units {', '.join(units)}"


def number(
    table: Mapping[str, object],
    key: str,
    source: Source,
    place: tuple[str, ...],
    *,
    below: float = math.inf,
    allow_zero: bool = True,
) -> float:
    """The value of `table[key]`, a number without unit from 0 up to `below`."""
    raw = table.get(key)
    good = isinstance(raw, int | float) and not isinstance(raw, bool) and 0 <= raw < below
    if not good or (raw == 0 and not allow_zero):
        limit = "" if below == math.inf else f" and below {below:g}"
        least = "of at least 0" if allow_zero else "above 0"
        raise ClusterError(
            f"{'.'.join((*place, key))} is missing"
            if raw is None
            else f"{key} = {raw!r} is not a number {least}{limit}",
            where=source.where(*place, *((key,) if raw is not None else ())),
            ways_out=(f"give a number {least}{limit}, without a unit",),
        )
    assert isinstance(raw, int | float)
    return float(raw)


def as_table(body: object, level: str, source: Source, place: tuple[str, ...]) -> dict[str, object]:
    """`body` as a table, that of a `level` at `place`."""
    if not isinstance(body, dict):
        raise ClusterError(
            f"{'.'.join(place)} = {body!r} is not a table of keys",
            where=source.where(*place),
            ways_out=(KEYS_HELP[level],),
        )
    return body


def typed(
    table: Mapping[str, object], key: str, kind: type[_T], source: Source, place: tuple[str, ...]
) -> _T:
    """The value of `table[key]`, which must be there and a `kind`."""
    value = table.get(key)
    if not isinstance(value, kind):
        is_missing = key not in table
        reason = "is missing" if is_missing else f"= {value!r} is not {_WORDS[kind]}"
        verb = "add" if is_missing else "mend"
        raise ClusterError(
            f"{'.'.join((*place, key))} {reason}",
            where=source.where(*place, *(() if is_missing else (key,))),
            ways_out=(f"{verb} {key!r} (docs/cost-models.md shows the format)",),
        )
    return value


def check_keys(
    table: Mapping[str, object], level: str, source: Source, place: tuple[str, ...]
) -> None:
    """Refuse keys of `table` that a `level` does not have."""
    for key in table:
        if key not in _KEYS[level]:
            raise ClusterError(
                f"unknown key {key!r}",
                where=source.where(*place, key),
                ways_out=(KEYS_HELP[level],),
            )
