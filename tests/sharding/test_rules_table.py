"""The table of rules as a whole."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter

import pytest
import torch

from cutset.compiler.sharding import rules

from .checks import one_node, randn


def test_every_operator_has_its_rule_in_one_place() -> None:
    count: Counter[str] = Counter()
    for module in pkgutil.iter_modules(rules.__path__):
        loaded = importlib.import_module(f"{rules.__name__}.{module.name}")
        for name in loaded.__all__:
            table = getattr(loaded, name)
            if isinstance(table, dict):
                count.update(list(table))
    assert not [packet for packet, places in count.items() if places > 1]
    assert set(count) == set(rules.RULES), "a table is not part of RULES"


@pytest.mark.parametrize("packet", rules.RULES)
def test_rules_are_for_operators_that_torch_has(packet: str) -> None:
    assert isinstance(getattr(torch.ops.aten, packet), torch._ops.OpOverloadPacket)


def test_an_operator_without_a_rule_is_replicated() -> None:
    case = one_node("aten.logdet.default", randn(4, 4))
    assert rules.rule_of(case.node) is None
    assert [str(item) for item in rules.strategies_of(case.graph, case.node, 2)] == ["R -> R"]


def test_one_rank_has_nothing_to_split() -> None:
    case = one_node("aten.mm.default", randn(4, 4), randn(4, 4))
    assert len(rules.strategies_of(case.graph, case.node, 1)) == 1
