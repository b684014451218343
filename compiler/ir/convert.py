"""Dataclasses to JSON values and back, driven by the fields' types.

A dataclass becomes an object with one key per field, a tuple an array, an enum its value, a float
that JSON cannot write the string `inf`, `-inf` or `nan`. A union of dataclasses is told apart by a
key `kind`, the class's name. Types with a better JSON form than that (`Mesh` as `data=2,tensor=4`)
are given a `Codec`.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["Codec", "Converter", "JsonValue"]

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]
_T = TypeVar("_T")
_NOT_FINITE = ("inf", "-inf", "nan")


@dataclass(frozen=True, slots=True)
class Codec:
    """How one type is written as a string and read from it (`read` raises ValueError)."""

    write: Callable[[Any], str]
    read: Callable[[str], Any]


@functools.cache
def _field_types(kind: type) -> tuple[tuple[str, Any], ...]:
    hints = typing.get_type_hints(kind)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(kind))


def _options(kind: Any) -> tuple[Any, ...]:
    """Members of a union type, or nothing."""
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else ()


@dataclass(frozen=True, slots=True)
class Converter:
    """Writes and reads values; `codecs` is keyed by field type (`Mesh`, `tuple[int, ...]`)."""

    codecs: Mapping[Any, Codec]

    def to_json(self, value: Any, kind: Any) -> JsonValue:
        """`value`, which is of type `kind`, as a JSON value."""
        if kind in self.codecs:
            return self.codecs[kind].write(value)
        if options := _options(kind):
            return self._union_to_json(value, options)
        if typing.get_origin(kind) is tuple:
            return [
                self.to_json(item, entry)
                for item, entry in zip(value, _entries(kind, len(value)), strict=True)
            ]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            return {
                name: self.to_json(getattr(value, name), entry)
                for name, entry in _field_types(kind)
            }
        if isinstance(value, enum.Enum):
            return self.to_json(value.value, type(value.value))
        if kind is float:
            text = repr(float(value))
            return text if text in _NOT_FINITE else float(value)
        assert kind in (str, int, bool, type(None)), f"{kind} has no JSON form"
        return typing.cast(JsonValue, kind(value) if kind is not type(None) else None)

    def _union_to_json(self, value: Any, options: tuple[Any, ...]) -> JsonValue:
        if value is None and type(None) in options:
            return None
        kind = type(value)
        data = self.to_json(value, kind)
        several = sum(option is not type(None) for option in options) > 1
        if several and isinstance(data, dict):
            return {"kind": kind.__name__, **data}
        return data

    def from_json(self, data: JsonValue, kind: type[_T], path: str = "") -> _T:
        """Inverse of `to_json`.

        Raises:
            ValueError: `data` is not of the form that `kind` has; the message starts with the
                place inside the document, e.g. `stages[2].device`.
        """
        return typing.cast(_T, self._read(data, kind, path))

    def _read(self, data: JsonValue, kind: Any, path: str) -> Any:
        if kind in self.codecs:
            try:
                return self.codecs[kind].read(_expect(data, str, path))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        if options := _options(kind):
            return self._read_union(data, options, path)
        if typing.get_origin(kind) is tuple:
            items = _expect(data, list, path)
            entries = _entries(kind, len(items))
            if len(entries) != len(items):
                raise ValueError(f"{path}: expected {len(entries)} items, found {len(items)}")
            return tuple(
                self._read(item, entry, f"{path}[{position}]")
                for position, (item, entry) in enumerate(zip(items, entries, strict=True))
            )
        if dataclasses.is_dataclass(kind):
            return self._read_fields(_expect(data, dict, path), kind, path)
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            known = [item.value for item in kind]
            if data not in known:
                raise ValueError(f"{path}: {data!r} is not one of {', '.join(map(str, known))}")
            return kind(data)
        if kind is float:
            if isinstance(data, str) and data in _NOT_FINITE:
                return float(data)
            return float(_expect(data, (int, float), path))
        return _expect(data, kind, path)

    def _read_fields(self, data: dict[str, JsonValue], kind: Any, path: str) -> Any:
        fields = dict(_field_types(kind))
        for name in (*fields, *data):
            place = f"{path}.{name}".lstrip(".")
            if name not in data:
                raise ValueError(f"{place}: the field is missing")
            if name not in fields:
                raise ValueError(f"{place}: there is no such field")
        return kind(
            **{
                name: self._read(data[name], entry, f"{path}.{name}".lstrip("."))
                for name, entry in fields.items()
            }
        )

    def _read_union(self, data: JsonValue, options: tuple[Any, ...], path: str) -> Any:
        if data is None and type(None) in options:
            return None
        wanted = [option for option in options if option is not type(None)]
        if isinstance(data, dict) and len(wanted) > 1:
            rest = dict(data)
            name = rest.pop("kind", None)
            for option in wanted:
                if option.__name__ == name:
                    return self._read(rest, option, path)
            raise ValueError(f"{path}.kind: {name!r} is not a known kind")
        for option in wanted:
            try:
                return self._read(data, option, path)
            except ValueError:
                if option is wanted[-1]:
                    raise
        raise AssertionError("a union has options")


def _entries(kind: Any, length: int) -> tuple[Any, ...]:
    """Types of the items of a tuple type."""
    arguments = typing.get_args(kind)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return (arguments[0],) * length
    return arguments


def _expect(data: JsonValue, kind: type | tuple[type, ...], path: str) -> Any:
    right = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    if not right:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(entry.__name__ for entry in kinds)
        raise ValueError(f"{path}: expected {names}, found {type(data).__name__}")
    return data
