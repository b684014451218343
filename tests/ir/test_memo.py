from __future__ import annotations

import gc
import weakref

from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.memo import once_per_object
from tests.ir.builders import mlp


def test_a_question_is_answered_once_for_each_object_and_arguments() -> None:
    asked: list[tuple[int, int]] = []

    @once_per_object
    def count(graph: Graph, times: int = 1) -> int:
        asked.append((id(graph), times))
        return times * len(graph.nodes)

    first, second = mlp(), mlp()
    assert first == second and first is not second
    for _ in range(2):
        assert count(first) == count(second) == len(first.nodes)
        assert count(first, times=3) == 3 * len(first.nodes)
    assert asked == [(id(first), 1), (id(second), 1), (id(first), 3)]


def test_answers_go_with_their_object() -> None:
    class Answer:
        pass

    @once_per_object
    def answer(graph: Graph) -> Answer:
        return Answer()

    graph = mlp()
    alive = weakref.ref(answer(graph))
    assert alive() is not None
    del graph
    gc.collect()
    assert alive() is None
