"""Whole models under random and sensible layouts equal the model in one piece."""

from __future__ import annotations

import itertools

import pytest

from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.sharding.localize import localize, localize_each
from cutset.compiler.sharding.sharding import make_sharding
from tests.models.exact import SHARDED_MODELS, sharded_tolerance

from .choices import flowing_layouts, random_layouts
from .whole import check_layouts, whole

MESH = Mesh.parse("data=2,tensor=2")
MORE_MESHES = tuple(
    map(Mesh.parse, ("tensor=2", "tensor=4", "data=2", "tensor=3", "data=2,context=2,tensor=2"))
)
ROUNDING = 1e-10


def check(name: str, mesh: Mesh, seed: int | None) -> None:
    """Under random layouts, or flowing ones if there is no seed."""
    subject = whole(name)
    layouts = (
        flowing_layouts(subject.graph, mesh)
        if seed is None
        else random_layouts(subject.graph, mesh, seed)
    )
    check_layouts(subject, mesh, layouts, sharded_tolerance(name, ROUNDING))


@pytest.mark.parametrize("name", sorted(SHARDED_MODELS))
def test_layouts_are_exact(name: str) -> None:
    """Those that flow, and random ones."""
    check(name, MESH, None)
    check(name, MESH, 0)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MORE_MESHES, ids=str)
@pytest.mark.parametrize("name", sorted(SHARDED_MODELS))
def test_flowing_layouts_are_exact_over_more_meshes(name: str, mesh: Mesh) -> None:
    check(name, mesh, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SHARDED_MODELS))
def test_many_random_layouts_are_exact(name: str) -> None:
    meshes = (MESH, *MORE_MESHES)
    for seed in range(50):
        check(name, meshes[seed % len(meshes)], seed)


@pytest.mark.parametrize("name", sorted(SHARDED_MODELS))
def test_parts_taken_from_other_ranks_are_those_of_the_rank(name: str) -> None:
    """`localize_each` makes anew what differs from rank to rank; `localize` everything."""
    graph = whole(name).graph
    mesh = Mesh.parse("data=2,tensor=3")
    layouts = random_layouts(graph, mesh, 0)
    sharding = make_sharding(graph, mesh, layouts.nodes, layouts.values, layouts.parameters)
    places = list(itertools.product(*(range(axis.size) for axis in mesh.axes)))
    parts = list(localize_each(graph, sharding, places))
    assert parts == [localize(graph, sharding, place) for place in places]
