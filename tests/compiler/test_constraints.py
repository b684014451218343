"""What the user pins is held, or refused with the reason and what would be legal."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from cutset.compiler.api import plan_model
from cutset.compiler.constraints import layout_pins, stage_pins, together_groups
from cutset.compiler.ir.errors import UsageError
from cutset.compiler.ir.mesh import Replicate, Shard
from cutset.compiler.ir.plan import Plan
from cutset.passes.context import LayoutPin


def test_stages_and_layouts_are_told_apart() -> None:
    constraints = {"a": 1, "b.*": "tensor=S(1)", "c": "tensor=R"}
    assert stage_pins(constraints) == (("a", 1),)
    assert layout_pins(constraints) == (
        LayoutPin("b.*", "tensor", Shard(1)),
        LayoutPin("c", "tensor", Replicate()),
    )
    assert stage_pins(None) == layout_pins(None) == together_groups(None) == ()


@pytest.mark.parametrize("value", ["S(1)", "tensor", "tensor=P(sum)", "=R", "tensor=S(0),R", 1.5])
def test_what_is_neither_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="neither a stage nor a layout") as caught:
        layout_pins({"a": value})  # type: ignore[dict-item]
    assert "'a'" in caught.value.where


@pytest.mark.parametrize("group", ["ab", ("a",), (1, 2)])
def test_a_group_has_several_patterns(group: object) -> None:
    with pytest.raises(UsageError, match="no group of modules"):
        together_groups([group])  # type: ignore[list-item]


class Blocks(nn.Module):
    """Four equal blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512)) for _ in "abcd")
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.blocks(x).square().mean()
        return found


@functools.cache
def model() -> Blocks:
    with torch.device("meta"):
        return Blocks()


def planned(**options: object) -> Plan:
    rows = torch.empty(64, 512, device="meta")
    devices = options.pop("devices", "h100:4")
    return plan_model(model(), devices, example_inputs=(rows,), **options).plan  # type: ignore[arg-type]


def held(plan: Plan, module: str) -> str:
    name = f"p_{module.replace('.', '_')}_weight"
    return next((str(x.held) for x in plan.parameter_layouts if x.value == name), "replicated")


def test_pinned_layouts_are_held() -> None:
    pins = {"blocks.*.0.weight": "tensor=S(1)", "blocks.*.2.weight": "tensor=S(0)"}
    plan = planned(mesh="tensor=4", constraints=pins)
    assert {held(plan, f"blocks.{i}.0") for i in range(4)} == {"[S(1)]"}
    assert {held(plan, f"blocks.{i}.2") for i in range(4)} == {"[S(0)]"}
    whole = planned(mesh="tensor=4", constraints={"blocks": "tensor=R"})
    assert {held(whole, f"blocks.{i}.{j}") for i in range(4) for j in (0, 2)} == {"replicated"}


def test_an_open_search_takes_a_mesh_on_which_the_pin_is_possible() -> None:
    plan = planned(constraints={"blocks.1.0.weight": "tensor=S(0)"})
    assert plan.mesh.axis("tensor").size > 1
    assert held(plan, "blocks.1.0").startswith("[") and "S(0)" in held(plan, "blocks.1.0")


def test_stages_may_be_pinned_under_a_pinned_mesh() -> None:
    plan = planned(mesh="pipeline=2,tensor=2", constraints={"blocks.0": 0, "blocks.1": 1})
    assert str(plan.mesh) == "pipeline=2,tensor=2"
    assert [stage.devices for stage in plan.stages] == [(0, 1), (2, 3)]
    rest = planned(
        mesh="pipeline=2,tensor=2",
        constraints={"blocks.2": 0, "blocks.3": 1, "blocks.*.2.weight": "tensor=S(1)"},
    )
    assert len(rest.stages[0].nodes) > len(plan.stages[0].nodes)
    assert "S(1)" in held(rest, "blocks.3.2")


def test_what_belongs_together_is_in_one_stage() -> None:
    def homes(plan: Plan) -> set[int]:
        """Stages of the first and the last of the three blocks' nodes."""
        whole = plan_model(model(), "h100:4", example_inputs=(torch.empty(64, 512, device="meta"),))
        nodes = [
            node.id
            for node in whole.captured.graph.nodes
            if node.module_path.startswith(("blocks.0", "blocks.2"))
        ]
        return {stage.index for stage in plan.stages for node in nodes if node in stage.nodes}

    free = planned(num_stages=4)
    bound = planned(num_stages=3, together=[("blocks.0", "blocks.2")])
    assert len(homes(free)) > 1
    assert len(homes(bound)) == 1


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"mesh": "tensor=4", "constraints": {"no.such": "tensor=R"}}, "matches no parameter"),
        ({"mesh": "data=4", "constraints": {"blocks": "tensor=S(0)"}}, "mesh data=4 has none"),
        ({"mesh": "data=4", "constraints": {"blocks": "data=S(0)"}}, "not over 'data'"),
        ({"num_stages": 2, "constraints": {"blocks": "tensor=S(0)"}}, "no mesh is searched"),
        ({"devices": "h100:1", "constraints": {"blocks": "tensor=S(0)"}}, "no mesh is searched"),
        (
            {
                "mesh": "tensor=4",
                "constraints": {"blocks.0": "tensor=S(0)", "blocks.0.0.weight": "tensor=S(1)"},
            },
            r"also pinned to tensor=S\(0\)",
        ),
        (
            {"mesh": "tensor=4", "constraints": {"blocks.0.0.bias": "tensor=S(1)"}},
            r"no reader of blocks.0.0.bias .* takes it as S\(1\) over 4 ranks\n(.|\n)*legal: ",
        ),
        ({"num_stages": 2, "together": [("blocks.0", "nothing")]}, "'nothing' matches no module"),
        (
            {
                "constraints": {"blocks.0": 0, "blocks.3": 1},
                "together": [("blocks.0", "blocks.3")],
            },
            "on two stages, 0 and 1",
        ),
    ],
)
def test_conflicts_are_named(options: dict[str, object], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        planned(**options)
