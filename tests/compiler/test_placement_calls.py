"""What a call that places operators is refused for, or warned of, before anything runs."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from cutset.compiler.api import plan_model
from cutset.compiler.ir.errors import UsageError
from tests.exactness.placed import cpu_type, cpu_workers

ARGS = (torch.randn(8, 8),)


def net() -> nn.Module:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))


def test_ranks_of_a_job_are_given_a_plan_that_was_searched_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = {"example_inputs": ARGS, "mode": "infer", "objective": "throughput"}
    plan = plan_model(net(), 2, num_microbatches=2, placement_seconds=2.0, **call).plan
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="the ranks of this job would find different plans"):
        plan_model(net(), 2, **call)
    again = plan_model(net(), 2, plan=plan, **call)
    assert again.plan == plan
    assert len(again.programs) == 2


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"objective": "speed"}, "unknown objective 'speed'"),
        ({"objective": "latency", "mode": "train"}, "places operators for inference"),
        ({"objective": "latency", "placement_seconds": 0.0}, "placement_seconds = 0.0"),
        ({"objective": "latency", "constraints": {"9": 0}}, "matches no module"),
        ({"objective": "latency", "constraints": {"*.weight": "tensor=R"}}, "layouts is not for"),
        ({"objective": "latency", "profile": "guess"}, "profile = 'guess' is unknown"),
        ({"objective": "latency", "profile": "ops"}, "its devices cannot be measured"),
        ({"objective": "latency", "profile": "blocks"}, "its devices cannot be measured"),
        ({"profile": "blocks"}, "its devices cannot be measured"),
        ({"profile": "blocks", "profile_seconds": -1.0}, "profile_seconds = -1.0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], cause: str) -> None:
    elsewhere = replace(cpu_workers(cpu_type("a"), cpu_type("b")), local=False)
    chosen = {"mode": "infer", "example_inputs": ARGS} | options
    with pytest.raises(UsageError, match=cause):
        plan_model(net(), elsewhere, **chosen)  # type: ignore[arg-type]


def test_more_threads_than_cores_are_warned_of() -> None:
    many = (os.cpu_count() or 1) + 1
    plans = [
        plan_model(
            net(),
            cpu_workers(cpu_type("worker", threads=threads)),
            example_inputs=ARGS,
            mode="infer",
            objective="latency",
            placement_seconds=2.0,
        ).plan
        for threads in (1, many)
    ]
    assert plans[0].warnings == ()
    assert f"workers have {many} threads on {many - 1} cores" in plans[1].warnings[0]
