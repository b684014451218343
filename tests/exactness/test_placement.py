"""Models whose operators lie anywhere give what the model gives: nothing depends on the pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cutset.compiler.api import auto_partition
from cutset.compiler.capture.signature import num_targets
from cutset.compiler.plan_json import plan_from_json, plan_to_json
from cutset.compiler.reference import flatten_outputs, infer_reference, relative_error
from cutset.runtime.inprocess import InProcessSession
from tests.exactness.placed import cpu_type, cpu_workers, placed_by, scattered
from tests.models.exact import EXACT_MODELS
from tests.models.media import MULTIMODAL
from tests.models.nets import Inception

ROUNDING = 1e-12
RANKS = 3
NAMES = ("bert", "t5", "vit", "mamba")


def _double(item: Any) -> Any:
    return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item


def _case(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(3)
    if name == "inception":
        return Inception().double().eval(), (torch.randn(4, 3, 16, 16, dtype=torch.float64),), {}
    if name == "clip":
        example = MULTIMODAL["clip"]()
        kwargs = {key: _double(item) for key, item in example.kwargs.items()}
        return example.model.double().eval(), example.args, kwargs
    made = EXACT_MODELS[name]()
    args = tuple(map(_double, made.args[: len(made.args) - num_targets(made.loss_fn)]))
    kwargs = {key: _double(item) for key, item in made.kwargs.items() if key != "labels"}
    if name == "t5":
        kwargs["decoder_input_ids"] = kwargs["input_ids"]
    return made.model.double().eval(), args, kwargs


@pytest.mark.parametrize("name", ["inception", "clip", *NAMES])
def test_scattered_operators_give_what_the_model_gives(name: str) -> None:
    model, args, kwargs = _case(name)
    cluster = cpu_workers(*(cpu_type("worker"),) * RANKS)
    plan, _ = placed_by(scattered(5), model, args, kwargs, cluster, 2)
    assert len(plan.stages) > 2 * RANKS, "devices run disconnected pieces"
    assert plan_from_json(plan_to_json(plan)) == plan
    with auto_partition(
        model,
        cluster,
        example_inputs=args,
        example_kwargs=kwargs,
        mode="infer",
        plan=plan,
        session=InProcessSession(RANKS),
    ) as parallel:
        ours = flatten_outputs(parallel(*args, **kwargs))
    theirs = infer_reference(model, (args, kwargs), 2)
    assert relative_error(ours, theirs).value <= ROUNDING


@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize("granularity", ["operator", "block"])
def test_plans_of_the_solvers_on_unequal_devices_are_exact(
    objective: str, granularity: str
) -> None:
    model, args, kwargs = _case("clip")
    lacking = ("aten.scaled_dot_product_attention.default", "aten.embedding.default")
    types = (cpu_type("quick", 8e10, unsupported_ops=lacking), cpu_type("slow"), cpu_type("idle"))
    if granularity == "block":
        types = (cpu_type("quick", 8e10), *types[1:])
    with auto_partition(
        model,
        cpu_workers(*types),
        example_inputs=args,
        example_kwargs=kwargs,
        mode="infer",
        objective=objective,
        granularity=granularity,
        num_microbatches=2,
        placement_seconds=3.0,
        session=InProcessSession(RANKS),
        constraints={"vision_model.encoder.layers.0": 2, "visual_projection": 2},
    ) as parallel:
        ours = flatten_outputs(parallel(*args, **kwargs))
        used = {stage.device for stage in parallel.plan.stages}
    theirs = infer_reference(model, (args, kwargs), 2)
    assert relative_error(ours, theirs).value <= ROUNDING
    assert {0, 2} <= used


def test_another_batch_size_runs_the_same_pieces() -> None:
    model, args, _ = _case("inception")
    cluster = cpu_workers(*(cpu_type("worker"),) * RANKS)
    plan, _ = placed_by(scattered(1), model, args, {}, cluster, 4)
    with auto_partition(
        model,
        cluster,
        example_inputs=args,
        mode="infer",
        plan=plan,
        session=InProcessSession(RANKS),
    ) as parallel:
        other = torch.randn(6, 3, 16, 16, dtype=torch.float64)
        ours = flatten_outputs(parallel(other))
    theirs = infer_reference(model, ((other,), {}), 6)
    assert relative_error(ours, theirs).value <= ROUNDING
