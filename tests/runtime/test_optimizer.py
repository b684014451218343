"""Each rank's optimizer makes the update of the user's optimizer, by whatever kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cutset.runtime.optimizer import (
    OptimizerSpec,
    RankOptimizer,
)
from cutset.runtime.parts import view_of

STEPS = 20
FUSED = {"aten::_fused_adam_", "aten::_fused_adamw_"}


def parameters(dtype: torch.dtype, *, transposed: bool = False) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in (("matrix", (33, 7)), ("vector", (5,)), ("scalar", ())):
        value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        made[name] = torch.nn.Parameter(value.mT if transposed and value.ndim == 2 else value)
    return made


def train(
    kind: type[torch.optim.Optimizer],
    options: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    *,
    transposed: bool = False,
) -> tuple[float, bool]:
    """Largest distance of the weights from those of the plain optimizer; whether one was fused."""
    ours, theirs = (parameters(dtype, transposed=transposed) for _ in range(2))
    plain = kind([{"params": list(theirs.values()), **options}])
    spec = OptimizerSpec(f"{kind.__module__}:{kind.__qualname__}", ((tuple(ours), options),))
    rank = RankOptimizer(spec, ours)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for step in range(STEPS):
            rank.step(gradients(step, ours), (options,))
    used = {event.key for event in profiler.key_averages()}
    for step in range(STEPS):
        found = gradients(step, theirs)
        for name, parameter in theirs.items():
            parameter.grad = found.get(name)
        plain.step()
    distance = max(float((ours[n] - theirs[n]).detach().abs().max()) for n in ours)
    return distance, bool(used & FUSED)


def gradients(step: int, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Gradients of all sizes; the first one of `vector` comes late."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: 10.0 ** (step % 4) * torch.randn(p.shape, generator=generator).to(p.dtype)
        for name, p in parameters.items()
        if name != "vector" or step >= 3
    }


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"weight_decay": 0.1, "maximize": True}]
)
def test_one_pass_over_memory_makes_the_same_update(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    distance, fused = train(kind, {"lr": 1e-2, **options})
    assert fused
    assert distance < 1e-14


@pytest.mark.parametrize(
    "options",
    [{"foreach": False}, {"foreach": True}, {"fused": False}, {"lr": torch.tensor(1e-2)}],
    ids=["plain", "foreach", "not fused", "tensor"],
)
def test_a_choice_of_the_user_is_kept(options: dict[str, Any]) -> None:
    assert train(torch.optim.AdamW, {"lr": 1e-2, **options}) == (0.0, False)


def test_what_one_pass_would_round_or_read_otherwise_takes_the_plain_kernel() -> None:
    assert train(torch.optim.AdamW, {"lr": 1e-2}, torch.bfloat16) == (0.0, False)
    assert train(torch.optim.AdamW, {"lr": 1e-2}, transposed=True) == (0.0, False)
    assert train(torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9}) == (0.0, False)


class TestParts:
    """A rank that updates a part of what it holds (ZeRO)."""

    @pytest.mark.parametrize("part", [((0, 2), (33, 3)), ((16, 0), (17, 7))])
    def test_the_update_writes_in_place(self, part: tuple[tuple[int, ...], ...]) -> None:
        whole = parameters(torch.float64)["matrix"].detach()
        before = whole.clone()
        view = view_of(whole, *part)
        updated = {"matrix": torch.nn.Parameter(view)}
        spec = OptimizerSpec("torch.optim:AdamW", ((("matrix",), {"lr": 0.1}),))
        gradient = torch.ones(part[1], dtype=torch.float64)
        RankOptimizer(spec, updated).step({"matrix": gradient}, ({"lr": 0.1},))
        assert (view != view_of(before, *part)).all()
        view.copy_(view_of(before, *part))
        assert torch.equal(whole, before)

    @pytest.mark.parametrize("part", [((0, 2), (33, 3)), ((16, 0), (17, 7))])
    def test_a_fused_kernel_that_the_user_chose_updates_the_part_as_the_whole(
        self, part: tuple[tuple[int, ...], ...]
    ) -> None:
        options = {"lr": 0.1, "fused": True}
        spec = OptimizerSpec("torch.optim:AdamW", ((("matrix",), options),))
        held, whole = (parameters(torch.float64)["matrix"] for _ in range(2))
        updated = {"matrix": torch.nn.Parameter(view_of(held.detach(), *part))}
        ours, theirs = RankOptimizer(spec, updated), RankOptimizer(spec, {"matrix": whole})
        for step in range(4):
            gradient = gradients(step, {"matrix": whole})["matrix"]
            ours.step({"matrix": view_of(gradient, *part)}, (options,))
            theirs.step({"matrix": gradient}, (options,))
        assert not torch.equal(held, whole)
        assert torch.equal(view_of(held, *part), view_of(whole, *part))
        assert updated["matrix"].data_ptr() == view_of(held, *part).data_ptr()


class TestOffloading:
    """States and update on another device; here that is the CPU, too."""

    def test_it_changes_no_bit(self) -> None:
        options = {"lr": 1e-2, "weight_decay": 0.1}
        spec = OptimizerSpec("torch.optim:AdamW", ((("matrix", "vector", "scalar"), options),))
        ours, theirs = (parameters(torch.float64) for _ in range(2))
        away = RankOptimizer(spec, ours, torch.device("cpu"), ["matrix", "vector", "elsewhere"])
        here = RankOptimizer(spec, theirs)
        for step in range(6):
            for optimizer, held in ((away, ours), (here, theirs)):
                optimizer.step(gradients(step, held), (options,))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert away.state().keys() == here.state().keys()
        assert torch.equal(away.state()["matrix"]["exp_avg"], here.state()["matrix"]["exp_avg"])
        assert len(away.state_tensors()) == len(here.state()["scalar"])

    def test_weights_that_are_loaded_are_updated(self) -> None:
        spec = OptimizerSpec("torch.optim:SGD", ((("vector",), {"lr": 1.0}),))
        held = {"vector": parameters(torch.float64)["vector"]}
        optimizer = RankOptimizer(spec, held, torch.device("cpu"), ["vector"])
        one = {"vector": torch.ones(5, dtype=torch.float64)}
        optimizer.step(one, ({"lr": 1.0},))
        held["vector"].data.fill_(7.0)
        optimizer.refresh()
        optimizer.step(one, ({"lr": 1.0},))
        assert torch.equal(held["vector"].detach(), torch.full((5,), 6.0, dtype=torch.float64))
