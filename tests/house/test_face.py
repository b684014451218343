"""The public names of `cutset`, which load on first use."""

from __future__ import annotations

import inspect

import pytest

import cutset
from cutset.compiler.ir import errors


@pytest.mark.parametrize("name", cutset.__all__)
def test_public_names_load(name: str) -> None:
    assert getattr(cutset, name) is not None


def test_every_error_is_public() -> None:
    kinds = {
        name for name, kind in inspect.getmembers(errors, inspect.isclass) if name != "annotations"
    }
    assert kinds <= set(cutset.__all__)


def test_all_is_listed_by_dir() -> None:
    assert set(cutset.__all__) <= set(dir(cutset))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'auto_partitoin'"):
        cutset.auto_partitoin  # noqa: B018
