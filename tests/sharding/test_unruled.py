"""An operator that could not be split is named, with its module and line."""

from __future__ import annotations

from cutset.compiler.ir.graph import Mode
from cutset.compiler.ir.mesh import Layout, Mesh, Shard
from cutset.compiler.ir.plan import NodeLayout, ValueLayout
from cutset.compiler.sharding.rules import RULES
from cutset.compiler.sharding.sharding import make_sharding
from cutset.compiler.sharding.unruled import unruled_warnings
from tests.ir.builders import GraphBuilder


def test_only_what_put_parts_together_is_named() -> None:
    assert "linalg_qr" not in RULES
    build = GraphBuilder("model", Mode.INFER)
    x = build.input("x", (8, 8))
    h = build.op("aten.relu.default", x, module="first")
    q, _ = build.ops("aten.linalg_qr.default", h, module="basis")
    again, _ = build.ops("aten.linalg_qr.default", h, module="basis.again")
    build.ops("aten.linalg_qr.default", q, module="whole")
    build.output(again)
    graph = build.build()
    rows = Layout((Shard(0),))
    sharding = make_sharding(
        graph,
        Mesh.parse("data=2"),
        (NodeLayout((0,), (rows,), (rows,)),),
        (ValueLayout("x", rows),),
    )
    (warning,) = unruled_warnings(graph, sharding)
    assert warning.startswith("aten.linalg_qr.default has no sharding rule")
    assert "axis data" in warning and "relu put together from [S(0)]" in warning
    assert "module basis at " in warning and warning.endswith("and 1 more like it")


def test_nothing_is_said_where_nothing_is_split() -> None:
    build = GraphBuilder("model", Mode.INFER)
    q, _ = build.ops("aten.linalg_qr.default", build.input("x", (8, 8)))
    build.output(q)
    assert (
        unruled_warnings(build.build(), make_sharding(build.build(), Mesh.parse("a=2"), ())) == ()
    )
