"""Print followed by parse is the identity, for graphs, programs and plans."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.plan import Plan
from cutset.compiler.ir.program import Program
from cutset.compiler.ir.text import (
    format_ranges,
    parse_graph,
    parse_plan,
    parse_program,
    parse_ranges,
    print_graph,
    print_plan,
    print_program,
)
from tests.ir.builders import GraphBuilder, mlp, residual, tied_embedding
from tests.ir.strategies import graphs, plans, programs

quick = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@quick
@given(graphs())
def test_graph_round_trip(graph: Graph) -> None:
    assert parse_graph(print_graph(graph)) == graph


@quick
@given(programs)
def test_program_round_trip(program: Program) -> None:
    assert parse_program(print_program(program)) == program


@quick
@given(plans)
def test_plan_round_trip(plan: Plan) -> None:
    assert parse_plan(print_plan(plan)) == plan


@quick
@given(st.lists(st.integers(0, 99)))
def test_ranges_round_trip(ids: list[int]) -> None:
    assert parse_ranges(format_ranges(tuple(ids))) == tuple(ids)


@pytest.mark.parametrize("text", ["3-1", "a", "1,,2", "-4", "1-", "0-99999999999", "1 ,2", "²"])
def test_malformed_ranges_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a range of ids"):
        parse_ranges(text)


@pytest.mark.parametrize("make", [mlp, residual, tied_embedding])
def test_built_graphs_round_trip(make: type) -> None:
    graph = make()
    assert parse_graph(str(graph)) == graph


def test_the_text_reads_as_documented() -> None:
    build = GraphBuilder("tiny", Mode.TRAIN)
    hidden = build.input("x", (4, 8))
    weight = build.parameter("layers.0.weight", (8, 8), aliases=("head.weight",))
    place = {"module": "layers.0", "source": "my model.py:7"}
    hidden = build.op("aten.linear.default", hidden, weight, **place)
    hidden = build.op("aten.dropout.default", hidden, 0.1, True, random_draw=2)
    normed, _, _ = build.ops("aten.native_layer_norm.default", hidden, [8], None, None, 1e-5)
    build.loss(build.op("aten.sum.default", normed))
    assert print_graph(build.build()) == (
        "graph tiny train {\n"
        '  %x: f32[4,8] batch=0 = input "args[0]"\n'
        '  %layers_0_weight: f32[8,8] grad aliases=("head.weight",) = parameter layers.0.weight\n'
        "  %linear: f32[4,8] grad = aten.linear.default(%x, %layers_0_weight) module=layers.0 "
        'source="my model.py:7"\n'
        "  %dropout: f32[4,8] grad = aten.dropout.default(%linear, 0.1, true) draw=2\n"
        "  %native_layer_norm_0: f32[4,8] grad, %native_layer_norm_1: f32[4,1] grad, "
        "%native_layer_norm_2: f32[4,1] grad = aten.native_layer_norm.default(%dropout, (8,), "
        "none, none, 1e-05) name=native_layer_norm\n"
        "  %sum: f32[] grad = aten.sum.default(%native_layer_norm_0)\n"
        "  return loss %sum\n"
        "}\n"
    )


def test_special_floats_keep_their_value() -> None:
    build = GraphBuilder()
    x = build.input("x", (2,))
    for number in (math.inf, -math.inf, -0.0, 1e-45, 0.1 + 0.2):
        x = build.op("aten.add.Scalar", x, number)
    build.output(x)
    read = parse_graph(print_graph(build.build()))
    found = [node.args[1] for node in read.nodes]
    assert [repr(number) for number in found] == ["inf", "-inf", "-0.0", "1e-45", repr(0.1 + 0.2)]


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("(%x, %layers_0_weight,", "(%x %layers_0_weight,", "expected ','"),
        ("f32[4,8]", "f99[4,8]", "not a tensor type"),
        ("= parameter", "= parametre", "'parametre' is not one of input, parameter"),
        ("aten.linear.default", "aten.linear", "'aten.linear' is not one of"),
        ("(%x,", "(%y,", "%y is not defined"),
        ("%relu:", "%linear:", "%linear or its id 4 is defined twice"),
        ("mlp infer", "mlp trains", "'trains' is not one of train, infer"),
    ],
)
def test_errors_name_the_line(right: str, wrong: str, message: str) -> None:
    good = print_graph(mlp(1, mode=Mode.INFER))
    assert right in good
    with pytest.raises(ValueError, match=rf"^line \d+: .*{re.escape(message)}"):
        parse_graph(good.replace(right, wrong, 1))


def test_truncated_text_is_refused() -> None:
    text = print_graph(mlp(1))
    with pytest.raises(ValueError, match="the text ends too early"):
        parse_graph(text[: text.rindex("}")])
    with pytest.raises(ValueError, match="unexpected line"):
        parse_graph(text + text)
