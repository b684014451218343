"""Rules of recurrent layers."""

from __future__ import annotations

import pytest

from .checks import Case, check_rule, one_node, randn, strategy_texts


def _case(kind: str, *, dropout: float, batch_first: bool) -> Case:
    """Two layers of four features on six rows of three steps."""
    gates = {"lstm": 4, "gru": 3, "rnn_tanh": 1}[kind]
    shapes = ((4 * gates, 4), (4 * gates, 4), (4 * gates,), (4 * gates,))
    params = [randn(*shape) / (layer + 2) for layer in range(2) for shape in shapes]
    x = randn(6, 3, 4) if batch_first else randn(3, 6, 4)
    state = randn(2, 6, 4)
    hidden = [state, state.sin()] if kind == "lstm" else state
    tail = [True, 2, dropout, True, False, batch_first]
    return one_node(f"aten.{kind}.input", x, hidden, params, *tail)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_rows_of_a_batch(kind: str, dropout: float, batch_first: bool) -> None:
    case = _case(kind, dropout=dropout, batch_first=batch_first)
    (text,) = strategy_texts(case)
    assert text.startswith("S(0),S(1)" if batch_first else "S(1),S(1)")
    check_rule(case)
