"""The plan that is chosen is never predicted slower than a hand-written strategy that fits."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cutset.compiler.api import compare_strategies
from cutset.compiler.compare import (
    STRATEGIES,
    StrategyFigures,
    compare,
    render_comparison,
    strategies_named,
)
from cutset.compiler.ir.cluster import Cluster, Link, LinkRule
from cutset.compiler.ir.errors import UsageError
from cutset.compiler.ir.graph import Mode
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.planning import Planning
from cutset.cost_models.presets import limit_memory, parse_devices
from cutset.passes.context import PlanOptions
from tests.models.zoo import ZOO

MIB = 1 << 20


def mlp() -> tuple[nn.Module, tuple[object, ...], dict[str, object]]:
    """Wide enough for every strategy to be worth something on some cluster; on meta."""
    with torch.device("meta"):
        layers = [nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024)]
        layers += [nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024)]
        rows = torch.randn(512, 1024)
        return nn.Sequential(*layers), (rows, rows), {}


@functools.cache
def planning_of(name: str) -> Planning:
    """What is planned for, without its cluster; graphs are captured once a model."""
    if name == "mlp":
        model, args, kwargs = mlp()
        loss = F.mse_loss
    else:
        example = ZOO[name]()
        model, args, kwargs, loss = example.model, example.args, example.kwargs, example.loss_fn
    return Planning(
        model=model,
        call=(args, kwargs),
        cluster=parse_devices("cpu:2"),
        mode=Mode.TRAIN,
        loss_fn=loss,
        check=False,
        say=lambda line: None,
    )


def slow_links(devices: int) -> Cluster:
    link = LinkRule(Link(latency_seconds=1e-3, bytes_per_second=1e8))
    return replace(parse_devices(f"h100:{devices}"), links=(link,))


CLUSTERS = {
    "h100:8": parse_devices("h100:8"),
    "cpu:2": parse_devices("cpu:2"),
    "cpu:4": parse_devices("cpu:4"),
    "slow links": slow_links(4),
}
LONG = {("residual_net", "h100:8"), ("residual_net", "cpu:4"), ("gpt2", "cpu:4")}
PAIRS = [
    pytest.param(model, cluster, marks=[pytest.mark.slow] * is_slow)
    for model in ("gpt2", "llama", "mlp", "residual_net")
    for cluster in CLUSTERS
    for is_slow in (model == "llama" or (model, cluster) in LONG,)
]
TIGHT = [
    ("mlp", "h100:8", 200),
    ("mlp", "cpu:4", 200),
    pytest.param("mlp", "slow links", 150, marks=pytest.mark.slow),
]


def compared(model: str, cluster: Cluster) -> dict[str, StrategyFigures]:
    planning = replace(planning_of(model), cluster=cluster)
    options = PlanOptions()
    plan = planning.search(options)[1]
    return {row.name: row for row in compare(planning, plan, options)}


@pytest.mark.parametrize(("model", "cluster"), PAIRS)
def test_no_hand_written_strategy_is_predicted_faster(model: str, cluster: str) -> None:
    check(compared(model, CLUSTERS[cluster]))


@pytest.mark.parametrize(("model", "cluster", "mebibytes"), TIGHT)
def test_nor_where_memory_is_short(model: str, cluster: str, mebibytes: int) -> None:
    rows = compared(model, limit_memory(CLUSTERS[cluster], mebibytes * MIB))
    check(rows)
    assert not rows["ddp"].fits


def check(rows: dict[str, StrategyFigures]) -> None:
    chosen = rows.pop("chosen")
    assert chosen.fits and chosen.step_seconds is not None
    assert set(rows) == set(STRATEGIES)
    for row in rows.values():
        if row.fits:
            assert row.step_seconds is not None
            assert chosen.step_seconds <= row.step_seconds * (1 + 1e-9), row


def test_a_strategy_that_is_not_known_is_named() -> None:
    planning = planning_of("mlp")
    plan = planning.search(PlanOptions())[1]
    with pytest.raises(UsageError, match="no strategy called 'magic'"):
        compare(planning, plan, PlanOptions(), ("magic",))


def test_strategies_are_read_before_anything_is_planned() -> None:
    assert strategies_named(" ddp,tp,") == ("ddp", "tp")
    for text in ("", ",", " , "):
        with pytest.raises(UsageError, match="names no strategy") as caught:
            strategies_named(text)
        assert "ddp, fsdp, tp, pp" in caught.value.ways_out[0]
    with pytest.raises(UsageError, match="no strategy called 'magic'"):
        compare_strategies(nn.Linear(1, 1), "no such cluster", strategies=("ddp", "magic"))


@pytest.mark.parametrize("name", ["llama", "unet"])
def test_a_stage_that_fits_to_the_byte_is_found(name: str) -> None:
    """The additive bound of memory is far above what a single stage needs."""
    cluster = parse_devices("h100:2")
    options = PlanOptions(mesh=Mesh.parse("data=2"), num_microbatches=1, offload="none")
    planning = replace(planning_of(name), cluster=cluster)
    free = planning.search(options)[1]
    assert free.prediction is not None and free.certificate is not None
    need = max(entry.total_bytes for entry in free.prediction.memory)
    short = replace(planning, cluster=limit_memory(cluster, need)).search(options)[1]
    assert short.certificate is not None
    assert short.certificate.objective == free.certificate.objective


def test_the_table_says_what_does_not_fit() -> None:
    rows = (
        StrategyFigures("chosen", "data=2", 1, 4, 0.25, 3 * MIB, 4 * MIB, True),
        StrategyFigures("ddp", "data=2", 0, 4, 0.5, 5 * MIB, 4 * MIB, False),
        StrategyFigures("pp", "pipeline=2", 0, None, None, None, None, False, "one unit"),
    )
    lines = render_comparison(rows).splitlines()
    assert [line.split()[0] for line in lines] == ["strategy", "chosen", "ddp", "pp"]
    assert lines[1].split()[-1] == "yes" and "250 ms" in lines[1] and "3.0 MiB of 4.0" in lines[1]
    assert lines[2].split()[-1] == "no"
    assert lines[3].endswith("one unit")
