"""Where stages hold buffers that the step changes."""

from __future__ import annotations

import pytest

from cutset.compiler.codegen.cut import cut_stages
from cutset.compiler.codegen.programs import generate_programs
from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.graph import Graph, Mode, OutputKind, ValueKind
from cutset.compiler.ir.plan import Stage
from cutset.compiler.ir.verify import verify_programs
from tests.codegen.test_programs import plan_of, schedule
from tests.ir.builders import GraphBuilder

STAGES = (Stage(0, (0,), (0,)), Stage(1, (1,), (1, 2)))


def remembering(*, read_late: bool) -> Graph:
    """Node 0 makes the new content of a buffer; node 1 may read the old content."""
    build = GraphBuilder("remembering", Mode.INFER)
    x = build.input("x", (2, 8))
    buffer = build.buffer("last", (2, 8))
    h = build.op("aten.tanh.default", x)
    old = build.op("aten.add.Tensor", h, buffer if read_late else h)
    build.output(build.op("aten.sin.default", old))
    build.output(h, OutputKind.BUFFER, target="last")
    return build.build()


def test_the_stage_that_writes_a_buffer_holds_it_though_no_node_reads_it() -> None:
    first, second = cut_stages(remembering(read_late=False), STAGES)
    assert [v.origin for v in first.graph.values_of(ValueKind.BUFFER)] == ["last"]
    assert second.graph.values_of(ValueKind.BUFFER) == ()


def test_a_changed_buffer_in_two_stages_is_refused() -> None:
    graph = remembering(read_late=True)
    timetable = schedule(["F0.0 F0.1", "F1.0 F1.1"], 2, 2)
    programs = generate_programs(graph, plan_of(graph, STAGES, timetable), plan_hash="hash")
    with pytest.raises(VerificationError, match="stage 0 changes the buffer, but stages .0, 1."):
        verify_programs(programs)
