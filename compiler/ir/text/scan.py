"""The lexical level of the text form: lines of words, strings, types, names and literals.

Every statement is one line. A *word* (`layers.0.mlp`, `1e-05`) needs no quotes; a string is
written as in JSON, so no character can end its line. Literals carry their Python type: `1` is an
int, `1.0` a float, `true` a bool, `none` None, `f32` a dtype, `(1, 2)` a tuple.
"""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from ..graph import Attribute, Operand
from ..types import DTYPE_NAMES, DTYPES_BY_NAME, TensorType

__all__ = [
    "Line",
    "Scanner",
    "print_literal",
    "print_name",
    "print_text",
    "read_enum",
    "read_strings",
]

_Enum = TypeVar("_Enum", bound=enum.Enum)

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<arrow>->|<-)
    | (?P<type>[a-z]\w*\[[0-9,]*\])
    | (?P<word>[\w.+:/*-]*[\w.+/*-])
    | (?P<mark>[(){},=%@!:\#])
    )""",
    re.VERBOSE | re.ASCII,
)
_WORD = re.compile(r"[\w.+:/*-]*[\w.+/*-]", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)
_INTEGER = re.compile(r"-?[0-9]+", re.ASCII)
_CONSTANTS: dict[str, Attribute] = {"true": True, "false": False, "none": None, "nan": math.nan}


def print_text(text: str) -> str:
    """`text` as a bare word where that is possible, else quoted."""
    return text if _WORD.fullmatch(text) else json.dumps(text)


def print_name(name: str) -> str:
    """The name of a value: `%h`, or `%"any characters"`."""
    return f"%{name}" if _NAME.fullmatch(name) else f"%{json.dumps(name)}"


def print_literal(value: Attribute, name_of: Callable[[Operand], str] | None = None) -> str:
    """Text of an attribute; `name_of` gives the text of an operand.

    Raises:
        TypeError: `value` is of no type that an attribute may have.
    """
    if isinstance(value, tuple):
        items = [print_literal(item, name_of) for item in value]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    if isinstance(value, Operand) and name_of is not None:
        return name_of(value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value) or f"dtype({str(value).removeprefix('torch.')})"
    if isinstance(value, torch.device):
        return f"device({value})"
    if isinstance(value, torch.layout):
        return f"layout({str(value).removeprefix('torch.')})"
    if isinstance(value, torch.memory_format):
        return f"memory({str(value).removeprefix('torch.')})"
    raise TypeError(f"{value!r} of type {type(value).__name__} has no text form")


class Line:
    """The tokens of one line, read from left to right. All methods raise ValueError."""

    def __init__(self, text: str, number: int) -> None:
        self.text = text
        self.number = number
        self._tokens: list[str] = []
        self._next = 0
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.error(f"cannot read {text[position:].strip()!r}")
            self._tokens.append(match[0].lstrip())
            position = match.end()

    def error(self, message: str) -> ValueError:
        return ValueError(f"line {self.number}: {message}, in {self.text.strip()!r}")

    def peek(self, ahead: int = 0) -> str:
        """The next token (or one `ahead` of it), or an empty string at the end."""
        position = self._next + ahead
        return self._tokens[position] if position < len(self._tokens) else ""

    def take(self) -> str:
        token = self.peek()
        if not token:
            raise self.error("the line ends too early")
        self._next += 1
        return token

    def accept(self, token: str) -> bool:
        """Whether `token` comes next; if so it is consumed."""
        found = self.peek() == token
        self._next += found
        return found

    def expect(self, *tokens: str) -> None:
        for token in tokens:
            if not self.accept(token):
                raise self.error(f"expected {token!r}, found {self.peek()!r}")

    def end(self) -> None:
        if self.peek():
            raise self.error(f"unexpected {self.peek()!r}")

    def string(self) -> str:
        """A bare word or a quoted string."""
        token = self.take()
        if token.startswith('"'):
            return str(json.loads(token))
        if not _WORD.fullmatch(token):
            raise self.error(f"expected a word, found {token!r}")
        return token

    def name(self) -> str:
        self.expect("%")
        return self.string()

    def integer(self) -> int:
        token = self.take()
        if not _INTEGER.fullmatch(token):
            raise self.error(f"expected an integer, found {token!r}")
        return int(token)

    def type(self) -> TensorType:
        try:
            return TensorType.parse(self.take())
        except ValueError as error:
            raise self.error(str(error)) from error

    def literal(self, operand: Callable[[str], Operand] | None = None) -> Attribute:
        """Inverse of `print_literal`; `operand` resolves names."""
        if self.accept("("):
            items: list[Attribute] = []
            while not self.accept(")"):
                items.append(self.literal(operand))
                if self.peek() != ")":
                    self.expect(",")
            return tuple(items)
        if self.peek() == "%" and operand is not None:
            return operand(self.name())
        token = self.take()
        if token.startswith('"'):
            return str(json.loads(token))
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        if token in DTYPES_BY_NAME:
            return DTYPES_BY_NAME[token]
        if self.peek() == "(":
            return self._torch_constant(token)
        try:
            return int(token) if _INTEGER.fullmatch(token) else float(token)
        except ValueError as error:
            raise self.error(f"{token!r} is not a literal") from error

    def _torch_constant(self, kind: str) -> Attribute:
        self.expect("(")
        word = self.string()
        self.expect(")")
        if kind == "device":
            try:
                return torch.device(word)
            except RuntimeError as error:
                raise self.error(f"{word!r} is not a device") from error
        found = getattr(torch, word, None)
        if kind == "dtype" and isinstance(found, torch.dtype):
            return found
        if kind == "layout" and isinstance(found, torch.layout):
            return found
        if kind == "memory" and isinstance(found, torch.memory_format):
            return found
        raise self.error(f"{word!r} is not a {kind}")


def read_enum(line: Line, kind: type[_Enum]) -> _Enum:
    """The member of `kind` whose value is the next word."""
    word = line.string()
    try:
        return kind(word)
    except ValueError:
        known = ", ".join(str(item.value) for item in kind)
        raise line.error(f"{word!r} is not one of {known}") from None


def read_strings(line: Line) -> tuple[str, ...]:
    """A tuple of quoted strings."""
    items = line.literal()
    if not isinstance(items, tuple):
        raise line.error("expected a tuple of strings")
    return tuple(item for item in items if isinstance(item, str))


class Scanner:
    """The lines of a text; blank lines and lines that start with `#` are skipped."""

    def __init__(self, text: str) -> None:
        rows = enumerate(text.split("\n"), 1)
        kept = ((number, row) for number, row in rows if row.strip() and row.strip()[0] != "#")
        self._rows = list(kept)
        self._next = 0

    def peek(self) -> str:
        """First token of the next line, or an empty string at the end."""
        if self._next >= len(self._rows):
            return ""
        number, row = self._rows[self._next]
        match = _TOKEN.match(row)
        return match[0].strip() if match else row[:1]

    def raw(self) -> str:
        """The next line as it stands."""
        if self._next >= len(self._rows):
            raise ValueError("the text ends too early")
        self._next += 1
        return self._rows[self._next - 1][1]

    def line(self) -> Line:
        row = self.raw()
        return Line(row, self._rows[self._next - 1][0])

    def end(self) -> None:
        if self._next < len(self._rows):
            raise self.line().error("unexpected line")
