"""Corrections as text, and as parts of keys."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cutset.compiler.ir.corrections import Correction, Corrections, Signature
from tests.exactness.placed import cpu_type

ENTRY = Correction(
    Signature("aten.mm.default", "(%0, %1)", ("f32[8,4]^", "f32[4,2]^w"), ("f32[8,2]",)),
    1.25,
    0.5,
    None,
)


def test_an_entry_is_one_line_that_parses_back() -> None:
    text = "aten.mm.default | (%0, %1) | f32[8,4]^ f32[4,2]^w | f32[8,2] | 1.25 0.5 -"
    assert str(ENTRY) == text
    assert Correction.parse(text) == ENTRY


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1.25", "0"),
        ("1.25", "-1"),
        ("1.25", "nan"),
        ("1.25", "inf"),
        ("1.25", "1e9"),
        ("1.25", "1.25004"),  # more digits than text keeps: it would not be the same twice
        ("8,4]^ ", "8,4]^  "),
        ("1.25 ", ""),
        (" | (%0, %1)", ""),
        ("f32[8,4]", "f32[8,x]"),
    ],
)
def test_nonsense_is_refused(old: str, new: str) -> None:
    with pytest.raises(ValueError):
        Correction.parse(str(ENTRY).replace(old, new))


def test_device_types_are_told_apart_by_what_was_measured() -> None:
    plain = cpu_type("worker")
    same = [replace(plain, corrections=Corrections((ENTRY,))) for _ in range(2)]
    other = replace(plain, corrections=Corrections((replace(ENTRY, forward=2.0),)))
    assert same[0] == same[1] and hash(same[0]) == hash(same[1])
    assert len({plain, *same, other}) == 3
