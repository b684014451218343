"""Fields of a JSON object taken one by one, with errors that name file and field."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from .ir.errors import UsageError

__all__ = ["Fields", "parse_object", "strict_json"]


def strict_json(text: str) -> Any:
    """What `text` says; NaN, infinities and repeated keys are refused.

    Raises:
        ValueError: it is no such JSON; JSONDecodeError, with the place, if it is no JSON at all.
    """
    return json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse_constant)


def parse_object(text: str, source: str, what: str) -> dict[str, Any]:
    """The JSON object in `text`; NaN, infinities and repeated keys are refused.

    Raises:
        UsageError: no JSON, or not an object.
    """
    ways_out = (f"give a {what} file in JSON, complete",)
    try:
        document = strict_json(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"not a complete JSON document: {error.msg}",
            where=f"{source}: line {error.lineno}, column {error.colno}",
            ways_out=ways_out,
        ) from error
    except (ValueError, RecursionError) as error:
        cause = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise UsageError(cause, where=source, ways_out=ways_out) from error
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise UsageError(
            f"a {what} is a JSON object, this is a {kind}", where=source, ways_out=ways_out
        )
    return document


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {repeated!r} is given twice in one object")
    return table


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


@dataclass(frozen=True, slots=True)
class Fields:
    """One object of a file.

    Args:
        source: name of the file.
        place: where in the file the object stands; empty: it is the whole file.
        table: the object.
        ways_out: what errors advise.
    """

    source: str
    place: str
    table: dict[str, Any]
    ways_out: tuple[str, ...]

    def refuse(self, field: str, cause: str) -> NoReturn:
        """Raise the error that `field` has.

        Raises:
            UsageError: always.
        """
        place = f"{self.place}.{field}" if self.place else field
        raise UsageError(cause, where=f"{self.source}: {place}", ways_out=self.ways_out)

    def only(self, names: Sequence[str]) -> None:
        """Refuse fields that are none of `names`."""
        for name in self.table:
            if name not in names:
                self.refuse(name, f"unknown field {name!r}; known are {', '.join(names)}")

    def _get(self, field: str) -> Any:
        if field not in self.table:
            self.refuse(field, f"{field} is missing")
        return self.table[field]

    def amount(self, field: str, default: float | None = None) -> float:
        """A finite number of at least 0."""
        if default is not None and field not in self.table:
            return default
        value = self._get(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(field, f"{_shown(value)} is not a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number >= 0):
            self.refuse(field, f"{number:g} is not a finite number of at least 0")
        return number

    def amount_or_null(self, field: str) -> float | None:
        """A finite number of at least 0, or null."""
        return None if self._get(field) is None else self.amount(field)

    def integer(self, field: str) -> int:
        """An integer."""
        value = self._get(field)
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(field, f"{_shown(value)} is not an integer")
        return value

    def count(self, field: str, most: int) -> int:
        """An integer from 0 to `most`."""
        value = self.integer(field)
        if not 0 <= value <= most:
            self.refuse(field, f"{value} is not a number from 0 to {most}")
        return value

    def flag(self, field: str, default: bool | None = None) -> bool:
        """A truth value, which some files write as 0 or 1."""
        if default is not None and field not in self.table:
            return default
        value = self._get(field)
        if not isinstance(value, int) or value not in (0, 1):
            self.refuse(field, f"{_shown(value)} is neither true nor false")
        return bool(value)

    def text(self, field: str) -> str:
        """A string that is not empty."""
        value = self._get(field)
        if not isinstance(value, str) or not value:
            self.refuse(field, f"{_shown(value)} is not a text")
        return value

    def items(self, field: str) -> list[Any]:
        """A list."""
        value = self._get(field)
        if not isinstance(value, list):
            self.refuse(field, f"{field} is not a list")
        return value

    def texts(self, field: str, default: Sequence[str]) -> Sequence[str]:
        """A list of strings without repetition."""
        if field not in self.table:
            return default
        values = self.items(field)
        for value in values:
            if not isinstance(value, str):
                self.refuse(field, f"{_shown(value)} is not a text")
        if len(set(values)) < len(values):
            self.refuse(field, "a text is given twice")
        return values

    def objects(self, field: str, name_field: str = "") -> list[Fields]:
        """A list of objects; messages add what they have as `name_field`."""
        found = []
        for number, value in enumerate(self.items(field)):
            place = f"{field}[{number}]"
            if not isinstance(value, dict):
                self.refuse(place, f"{_shown(value)} is not an object")
            name = value.get(name_field)
            if isinstance(name, int | str) and not isinstance(name, bool):
                place += f" ({name_field} {name})"
            found.append(Fields(self.source, place, value, self.ways_out))
        return found

    def inner(self, field: str) -> Fields:
        """An object."""
        value = self._get(field)
        if not isinstance(value, dict):
            self.refuse(field, f"{_shown(value)} is not an object")
        place = f"{self.place}.{field}" if self.place else field
        return Fields(self.source, place, value, self.ways_out)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
