"""The table of rules as a whole."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter

from cutset.compiler.sharding import rules


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
