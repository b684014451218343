"""Rules of attention and embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cutset.compiler.ir.graph import Operand
from cutset.compiler.ir.mesh import Mesh, Replicate
from cutset.compiler.sharding.rules import strategies_of

from .checks import Case, check_rule, check_strategy, one_node, randn, strategy_texts

SDPA = "aten.scaled_dot_product_attention.default"


def attention(*, queries: int = 5, heads: int = 4, groups: int = 4, **kwargs: Any) -> Case:
    q = randn(3, heads, queries, 2)
    k, v = randn(3, groups, 7, 2), 1.0 + randn(3, groups, 7, 2)
    mask = kwargs.pop("attn_mask", None)
    if groups != heads:
        kwargs["enable_gqa"] = True
    return one_node(SDPA, q, k, v, mask, **kwargs)


def test_attention() -> None:
    case = attention(scale=0.5)
    assert strategy_texts(case) == [
        "S(0),S(0),S(0) -> S(0)",
        "S(1),S(1),S(1) -> S(1)",
        "S(2),R,R -> S(2)",
    ]
    check_rule(case)


def test_causal_attention_keeps_its_rows_together() -> None:
    case = attention(is_causal=True)
    assert strategy_texts(case) == ["S(0),S(0),S(0) -> S(0)", "S(1),S(1),S(1) -> S(1)"]
    check_rule(case)


def test_grouped_queries_split_whole_groups() -> None:
    case = attention(heads=8, groups=4)
    assert "S(1),S(1),S(1) -> S(1)" in strategy_texts(case, 2)
    assert "S(1),S(1),S(1) -> S(1)" in strategy_texts(case, 4)
    assert not any(text.endswith("S(1)") for text in strategy_texts(case, 3))
    assert not any(text.endswith("S(1)") for text in strategy_texts(case, 8))
    check_rule(case, parts=(2, 3, 4))


def test_heads_of_keys_that_do_not_divide_are_not_split_with_those_of_queries() -> None:
    case = attention(heads=10, groups=5)
    assert not any(text.endswith("S(1)") for text in strategy_texts(case, 2))
    assert "S(1),S(1),S(1) -> S(1)" in strategy_texts(case, 5)
    check_rule(case, parts=(5,), pairs=False)


def test_one_head_of_keys_serves_all_ranks() -> None:
    case = attention(heads=6, groups=1)
    assert "S(1),R,R -> S(1)" in strategy_texts(case)
    check_rule(case)


@pytest.mark.parametrize(
    "shape", [(5, 7), (3, 1, 5, 7), (1, 1, 5, 7), (3, 4, 5, 7), (1, 4, 1, 7), (3, 1, 1, 7)]
)
@pytest.mark.parametrize("boolean", [False, True])
def test_masks(shape: tuple[int, ...], boolean: bool) -> None:
    mask = randn(*shape)
    check_rule(attention(attn_mask=mask > -0.5 if boolean else mask))


def test_a_mask_is_split_where_it_is_not_broadcast() -> None:
    mask = randn(3, 1, 5, 7)
    assert strategy_texts(attention(attn_mask=mask)) == [
        "S(0),S(0),S(0),S(0) -> S(0)",
        "S(1),S(1),S(1),R -> S(1)",
        "S(2),R,R,S(2) -> S(2)",
    ]


def test_attention_of_a_tensor_with_itself() -> None:
    x = randn(3, 4, 5, 2)
    case = one_node(SDPA, x, x, x)
    assert strategy_texts(case) == ["S(0) -> S(0)", "S(1) -> S(1)"]
    check_rule(case)


@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"heads": 8, "groups": 2}])
def test_dropout_of_a_part_is_that_of_the_whole(kwargs: dict[str, Any]) -> None:
    case = attention(dropout_p=0.4, **kwargs)
    assert case.node.random_draw is not None
    check_rule(case)


def test_dropout_on_masked_scores() -> None:
    check_rule(attention(dropout_p=0.4, attn_mask=randn(3, 1, 5, 7)), parts=(2,))


# -- embedding -------------------------------------------------------------------------------------

IDS = torch.tensor([[0, 6, 3, 3], [5, 1, 6, 2], [2, 4, 0, 6]])


@pytest.mark.parametrize("padding", [-1, 0, 2, 6])
def test_embedding(padding: int) -> None:
    case = one_node("aten.embedding.default", randn(7, 4), IDS, padding)
    assert strategy_texts(case) == [
        "R,S(0) -> S(0)",
        "R,S(1) -> S(1)",
        "S(1),R -> S(2)",
        "S(0),R -> P(sum)",
    ]
    check_rule(case, parts=(2, 3, 4))


def test_embedding_of_one_id() -> None:
    check_rule(one_node("aten.embedding.default", randn(7, 4), torch.tensor(5)))


def test_embeddings_with_gradients_that_depend_on_all_ids_are_not_split() -> None:
    counted = one_node("aten.embedding.default", randn(7, 4), IDS, -1, True)
    assert strategy_texts(counted) == []


def test_a_table_that_is_split_is_looked_up_with_ids_in_range() -> None:
    case = one_node("aten.embedding.default", randn(7, 4), IDS)
    (rows,) = [s for s in strategies_of(case.graph, case.node, 7) if str(s) == "S(0),R -> P(sum)"]
    check_strategy(case, (rows,), Mesh.parse("tensor=7"))
    assert rows.inputs[1] == Replicate() and case.node.args[1] == Operand(1)
