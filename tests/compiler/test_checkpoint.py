"""Checkpoints: saved under one plan, resumed under another, shared with plain torch, refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F
from torch.optim import lr_scheduler

from cutset.compiler.api import plan_model
from cutset.compiler.ir.errors import RuntimeFailure, UsageError
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import Plan
from cutset.compiler.parallel import Parallel
from cutset.runtime.inprocess import InProcessSession
from tests.exactness.harness import spread, with_meshes
from tests.sharding.choices import random_layouts

from .partitioned import Plain, assert_same, batch, chain, partition, partition_chain

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DROPOUT = 0.3
TOLERANCE = 1e-11  # sums over ranks are taken in another order


@functools.cache
def plan_of(kind: str) -> Plan:
    """A plan of the chain."""

    def make(devices: int, **options: Any) -> Any:
        return plan_model(
            chain(DROPOUT),
            devices,
            example_inputs=batch(),
            loss_fn=F.mse_loss,
            num_microbatches=2,
            check=False,
            **options,
        )

    if kind == "pipeline":
        return make(3, num_stages=3).plan
    if kind.startswith("zero"):
        return make(4, mesh="data=2,pipeline=2", zero=int(kind[-1])).plan
    planned = make(2, num_stages=2)
    if kind == "unlike":
        return with_meshes(planned.plan, planned.captured.graph, "data=1/tensor=2")
    mesh = Mesh.parse("data=1,tensor=2")
    return spread(planned.plan, mesh, random_layouts(planned.captured.graph, mesh, 4))


def under(kind: str, model: nn.Module | None = None) -> Parallel:
    """The chain, perhaps on meta, under a plan."""
    plan = plan_of(kind)
    ranks = len(plan.cluster.devices)
    return partition(
        model or chain(DROPOUT),
        stages=ranks,
        plan=plan,
        session=InProcessSession(ranks),
        optimizer=adamw,
    )


def partitioned_into(parallel: Parallel) -> set[tuple[int, ...]]:
    shards = [shard for program in parallel.planned.programs for shard in program.shards]
    return {shard.part.shape for shard in shards if shard.name.startswith("layers")}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True)


def meta_chain() -> nn.Module:
    return chain(DROPOUT).to("meta")


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.StepLR(optimizer, 2, 0.5)


def test_a_run_moves_from_plan_to_plan_by_checkpoints(tmp_path: Path) -> None:
    """Two steps under each plan in turn are twelve steps in one piece, to rounding."""
    plain = Plain(chain(DROPOUT), adamw)
    scheduler = halving(plain.optimizer)
    kinds = ("pipeline", "zero1", "unlike", "tensor", "zero3", "pipeline")
    assert partitioned_into(under("tensor")) and partitioned_into(under("unlike"))
    saved = None
    for position, kind in enumerate(kinds):
        parallel = under(kind, meta_chain() if position else None)
        own = halving(parallel.optimizer)
        if saved is not None:
            parallel.load_checkpoint(tmp_path / str(position - 1))
            own.load_state_dict(saved)
        for seed in range(2):
            inputs = batch(seed=10 * position + seed)
            loss, expected = float(parallel.train_step(*inputs)), plain.step(*inputs)
            assert abs(loss - expected) <= TOLERANCE
            own.step()
            scheduler.step()
        saved = own.state_dict()
        parallel.save_checkpoint(tmp_path / str(position))
        assert_same(parallel.state_dict(), plain.model.state_dict(), TOLERANCE)


@pytest.mark.parametrize("kind", ["pipeline", "zero1", "tensor"])
def test_plain_torch_goes_on(kind: str, tmp_path: Path) -> None:
    parallel = under(kind)
    plain = Plain(chain(DROPOUT), adamw)
    for seed in range(2):
        parallel.train_step(*batch(seed=seed))
        plain.step(*batch(seed=seed))
    parallel.save_checkpoint(tmp_path / "c")
    other = Plain(chain(DROPOUT), adamw)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.zero_()
    state = {
        "model": other.model.state_dict(),
        "optimizer": get_optimizer_state_dict(other.model, other.optimizer),
    }
    dcp.load(state, checkpoint_id=tmp_path / "c", no_dist=True)
    other.model.load_state_dict(state["model"])
    set_optimizer_state_dict(other.model, other.optimizer, state["optimizer"])
    other.steps = 2
    assert other.step(*batch(seed=2)) == pytest.approx(plain.step(*batch(seed=2)), rel=1e-12)
    assert_same(other.model.state_dict(), plain.model.state_dict(), TOLERANCE)


def test_plain_torch_reads_the_nested_dict(tmp_path: Path) -> None:
    parallel = partition_chain()
    parallel.train_step(*batch())
    parallel.save_checkpoint(tmp_path / "c")
    dcp_to_torch_save(tmp_path / "c", tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt")
    assert set(found) == {"model", "optimizer", "cutset"}
    assert_same(dict(sorted(found["model"].items())), dict(sorted(parallel.state_dict().items())))
    assert found["cutset"]["num_steps"] == 1
    own = parallel.optimizer_state_dict()
    assert found["optimizer"]["param_groups"] == own["param_groups"]
    assert set(found["optimizer"]["state"]) == set(own["state"])
    for name, entries in own["state"].items():
        assert_same(
            dict(sorted(found["optimizer"]["state"][name].items())), dict(sorted(entries.items()))
        )


@pytest.mark.parametrize("nested", [True, False])
def test_a_checkpoint_of_plain_torch_is_taken(nested: bool, tmp_path: Path) -> None:
    plain = Plain(chain(DROPOUT), adamw)
    for seed in range(2):
        plain.step(*batch(seed=seed))
    state: dict[str, Any] = plain.model.state_dict()
    if nested:
        state = {
            "model": state,
            "optimizer": get_optimizer_state_dict(plain.model, plain.optimizer),
        }
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    parallel = under("zero1", meta_chain())
    parallel.load_checkpoint(tmp_path / "c")
    assert_same(parallel.state_dict(), plain.model.state_dict())
    if nested:
        plain.steps = 0  # plain torch does not save how far randomness is
        parallel.train_step(*batch())
        plain.step(*batch())
        assert_same(parallel.state_dict(), plain.model.state_dict(), TOLERANCE)


class Odd(nn.Module):
    """Tied weights, running statistics, a buffer that is not saved, a parameter not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight
        self.idle = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.full((6,), 0.5), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids)) * self.scale)


def odd(**options: Any) -> Parallel:
    torch.manual_seed(1)
    return partition(
        options.pop("model", None) or Odd(), *ODD_BATCH, loss_fn=F.cross_entropy, **options
    )


ODD_BATCH = torch.arange(8) % 12, torch.arange(8) * 5 % 12


def test_tied_idle_and_running(tmp_path: Path) -> None:
    first = odd()
    first.train_step(*ODD_BATCH)
    with torch.no_grad():
        first.model.idle.fill_(7.0)
    first.save_checkpoint(tmp_path / "c")
    found = first.state_dict()
    second = odd()
    second.load_checkpoint(tmp_path / "c")
    assert_same(second.state_dict(), found)
    whole = second.state_dict()
    assert whole["embed.weight"] is whole["head.weight"]
    assert float(first.train_step(*ODD_BATCH)) == float(second.train_step(*ODD_BATCH))
    assert_same(second.state_dict(), first.state_dict())
    plain = Odd()
    state = {"model": plain.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "c", no_dist=True)
    plain.load_state_dict(state["model"])
    assert_same(plain.state_dict(), found)


def test_saved_before_the_first_step_and_loaded_over_a_trained_run(tmp_path: Path) -> None:
    parallel = partition_chain()
    parallel.save_checkpoint(tmp_path / "c")
    losses = [float(parallel.train_step(*batch(seed=seed))) for seed in range(2)]
    parallel.load_checkpoint(tmp_path / "c")
    assert [float(parallel.train_step(*batch(seed=seed))) for seed in range(2)] == losses


def test_states_given_before_the_first_step_are_saved(tmp_path: Path) -> None:
    first, plain = partition_chain(), Plain(chain())
    first.train_step(*batch())
    plain.step(*batch())
    second = partition_chain(stages=3)
    second.load_state_dict(first.state_dict())
    second.load_optimizer_state_dict(first.optimizer_state_dict())
    second.save_checkpoint(tmp_path / "c")
    third = partition_chain()
    third.load_checkpoint(tmp_path / "c")
    third.train_step(*batch(seed=1))
    plain.step(*batch(seed=1))
    assert_same(third.state_dict(), plain.model.state_dict())


def test_each_rank_writes_its_own_parts_once(tmp_path: Path) -> None:
    parallel = under("zero1")
    parallel.train_step(*batch())
    parallel.save_checkpoint(tmp_path / "c")
    metadata = dcp.FileSystemReader(tmp_path / "c").read_metadata()
    files: dict[str, set[str]] = {}
    for index, place in metadata.storage_data.items():
        files.setdefault(index.fqn, set()).add(place.relative_path)
    assert len(files["optimizer.state.layers.0.weight.exp_avg"]) == 2  # halves, of two ranks
    assert len(files["model.layers.0.weight"]) == 1
    assert len({file for found in files.values() for file in found}) == 4


# -- refusals ----------------------------------------------------------------------------------


@functools.cache
def trained() -> Parallel:
    parallel = partition_chain()
    parallel.train_step(*batch())
    return parallel


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trained().save_checkpoint(tmp_path / "c")
    return tmp_path / "c"


def test_nothing_is_overwritten(saved: Path) -> None:
    with pytest.raises(UsageError, match="not overwritten") as caught:
        trained().save_checkpoint(saved)
    assert str(saved) in str(caught.value)


def test_a_failed_save_leaves_nothing_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "write_data", full)
        with pytest.raises(RuntimeFailure, match="No space left") as caught:
            trained().save_checkpoint(tmp_path / "c")
    assert "rank 0" in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "finish", full)
        with pytest.raises(RuntimeFailure, match="No space left"):
            trained().save_checkpoint(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    trained().save_checkpoint(tmp_path / "c")  # the ranks are as they were
    partition_chain().load_checkpoint(tmp_path / "c")


def _cut(folder: Path) -> None:
    file = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])


def _remove(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no metadata": (lambda folder: (folder / ".metadata").unlink(), "no complete checkpoint"),
    "other metadata": (lambda folder: (folder / ".metadata").write_bytes(b"x" * 9), "damaged"),
    "empty metadata": (lambda folder: (folder / ".metadata").write_bytes(b""), "damaged"),
    "cut": (_cut, "bytes or more has"),
    "a file less": (_remove, "a file is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_changes_nothing(kind: str, saved: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(saved)
    before = trained().state_dict()
    with pytest.raises(UsageError, match=message) as caught:
        trained().load_checkpoint(saved)
    assert str(saved) in str(caught.value)
    assert caught.value.ways_out
    assert_same(trained().state_dict(), before)


def test_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(UsageError, match="another model: 7 tensors of the model are missing"):
        odd().load_checkpoint(saved)
    wider = partition(nn.Sequential(nn.Linear(6, 6).double(), nn.Linear(6, 6).double()))
    with pytest.raises(UsageError, match="layers.0.weight"):
        wider.load_checkpoint(saved)


def test_another_optimizer_is_refused(saved: Path) -> None:
    with pytest.raises(UsageError, match="AdamW, this one is torch.optim.sgd:SGD"):
        partition_chain(optimizer=lambda p: torch.optim.SGD(p, 0.1)).load_checkpoint(saved)

    def two_groups(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        return torch.optim.AdamW([{"params": [first]}, {"params": rest}])

    with pytest.raises(UsageError, match="parameter groups"):
        partition_chain(optimizer=two_groups).load_checkpoint(saved)
