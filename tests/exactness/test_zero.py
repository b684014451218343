"""ZeRO 1, 2 and 3 train exactly, and a rank then holds what its level says."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from cutset.compiler.ir.errors import UsageError
from cutset.compiler.ir.graph import ValueKind
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import OptimizerModel
from cutset.compiler.ir.program import AllGather, AllReduce, ReduceScatter
from cutset.compiler.parallel import Parallel, RunOptions
from cutset.compiler.planned import PlannedModel
from cutset.cost_models.held import held_memory
from cutset.runtime.inprocess import InProcessSession
from tests.exactness.harness import (
    SEED,
    Numerics,
    Subject,
    adamw64,
    sgd32,
    sharded_tolerance_of,
)
from tests.models.exact import ROWS, SHARDED_MODELS
from tests.sharding.choices import Layouts, zero_layouts_of

TOLERANCE = 1e-9  # sums over ranks are taken in another order
# for models that compute norms in float32: AdamW would turn that noise into steps of its size
sgd64 = Numerics(torch.float64, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), 1.0, TOLERANCE)
LEVELS = (1, 2, 3)
MODELS = ("gpt2", "llama", "resnet", "unet")
MESHES = (("data=2", 1), ("data=4", 1), ("data=2,tensor=2", 1), ("data=2", 2), ("data=2", 3))
NORMAL = (("gpt2", "data=2", 2, 2), ("gpt2", "data=2,tensor=2", 1, 1), ("resnet", "data=4", 1, 2))


@functools.cache
def subject(
    name: str, count: int, clip: float | None = None, numerics: Numerics = adamw64
) -> Subject:
    return Subject(SHARDED_MODELS[name], numerics, num_microbatches=count, clip_grad_norm=clip)


def microbatches(mesh: str) -> int:
    """As many as leave each rank of the data axis a row."""
    return min(2, ROWS // Mesh.parse(mesh).axis("data").size)


def layouts(entry: Subject, mesh: str, level: int, *, offloaded: bool = False) -> Layouts:
    return zero_layouts_of(entry.captured.graph, Mesh.parse(mesh), level, offloaded=offloaded)


def planned(entry: Subject, mesh: str, stages: int, level: int) -> PlannedModel:
    return entry.planned(stages, "1f1b", Mesh.parse(mesh), layouts(entry, mesh, level))


def check(
    name: str,
    mesh: str,
    stages: int,
    level: int,
    *,
    clip: float | None = None,
    numerics: Numerics | None = None,
) -> None:
    if numerics is None:
        numerics = sgd64 if name == "llama" else adamw64
    entry = subject(name, microbatches(mesh), clip, numerics)
    axes = Mesh.parse(mesh)
    session = InProcessSession(axes.size * stages)
    chosen = layouts(entry, mesh, level)
    errors = entry.errors(stages, "1f1b", session, axes, chosen)
    limit = max(sharded_tolerance_of(name, numerics), TOLERANCE)
    assert all(error.value <= limit for error in errors.values()), errors


@pytest.mark.parametrize(("name", "mesh", "stages", "level"), NORMAL)
def test_some_train_exactly(name: str, mesh: str, stages: int, level: int) -> None:
    check(name, mesh, stages, level, clip=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("mesh", "stages"), MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_all_train_exactly(name: str, mesh: str, stages: int, level: int) -> None:
    check(name, mesh, stages, level)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MODELS)
def test_all_train_exactly_when_clipped(name: str, level: int) -> None:
    check(name, "data=2,tensor=2", 2, level, clip=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MODELS)
def test_all_train_exactly_in_single_precision(name: str, level: int) -> None:
    check(name, "data=2", 1, level, numerics=sgd32)


class TestPrograms:
    """What levels come to in instructions and bytes; nothing runs."""

    def test_each_level_reduces_in_its_place(self) -> None:
        entry = subject("gpt2", 2)
        kinds = {}
        for level in (0, *LEVELS):
            program = planned(entry, "data=2", 1, level).programs[0]
            found = [type(i) for i in program.instructions]
            kinds[level] = {k for k in (AllReduce, ReduceScatter, AllGather) if k in found}
            assert bool(program.updates) == (level in (1, 2))
            assert bool(program.stages[0].kept) == (level == 2)
        assert kinds == {0: {AllReduce}, 1: {ReduceScatter, AllGather}, 2: {AllGather}, 3: set()}

    @pytest.mark.parametrize("size", [2, 4])
    def test_a_rank_holds_its_share(self, size: int) -> None:
        """All of resnet's parameters have a dim that can be shared."""
        entry = subject("resnet", microbatches(f"data={size}"))
        adamw = OptimizerModel("adamw", 2.0)
        held = [
            held_memory(planned(entry, f"data={size}", 1, level).programs[0], adamw, "cpu")
            for level in (0, *LEVELS)
        ]
        graph = entry.captured.graph
        whole = sum(v.type.num_bytes for v in graph.values_of(ValueKind.PARAMETER))
        rest = held[0].parameters_bytes - whole
        share = sum(
            math.ceil(max(v.type.shape) / size) * v.type.num_bytes // max(v.type.shape)
            for v in graph.values_of(ValueKind.PARAMETER)
        )
        assert share < 1.1 * whole / size
        figures = [(h.parameters_bytes, h.gradients_bytes, h.optimizer_bytes) for h in held]
        assert figures == [
            (whole + rest, whole, 2 * whole),
            (whole + rest, whole, 2 * share),
            (whole + rest, share, 2 * share),
            (share + rest, share, 2 * share),
        ]


def test_offloaded_states_train_exactly() -> None:
    """The host is the CPU, as the device is, but copies are made as if it were not."""
    entry = subject("resnet", 2)
    axes = Mesh.parse("data=2")
    held = []
    for offloaded in (False, True):
        session = InProcessSession(axes.size, host=torch.device("cpu"))
        chosen = layouts(entry, "data=2", 1, offloaded=offloaded)
        errors = entry.errors(1, "1f1b", session, axes, chosen)
        assert all(error.value <= TOLERANCE for error in errors.values()), errors
        held.append([rank.memory()["held_bytes"] for rank in session.ranks])
    program = planned(entry, "data=2", 1, 1).programs[0]
    states = held_memory(program, OptimizerModel("adamw", 2.0), "cpu").optimizer_bytes
    assert held[0][0] - held[1][0] == states + 4 * len(program.trained())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("level", LEVELS)
def test_offloaded_states_train_exactly_on_a_gpu(level: int) -> None:
    entry = Subject(SHARDED_MODELS["gpt2"], adamw64, device="cuda")
    axes, place = Mesh.parse("data=2"), torch.device("cuda", 0)
    session = InProcessSession(axes.size, place)
    chosen = layouts(entry, "data=2", level, offloaded=True)
    errors = entry.errors(1, "1f1b", session, axes, chosen)
    assert all(error.value <= TOLERANCE for error in errors.values()), errors
    for rank in session.ranks:
        states = rank.optimizer_state().values()
        assert {entry["exp_avg"].device.type for entry in states} == {"cpu"}
        assert {tensor.device.type for tensor in rank._held_tensors()} == {"cuda"}


def test_an_optimizer_that_needs_whole_parameters_is_refused() -> None:
    entry = subject("resnet", 2)
    options = RunOptions(loss_fn=entry.loss_fn, optimizer=torch.optim.Adafactor)
    with pytest.raises(UsageError, match="Adafactor cannot train .* parts of it"):
        Parallel(planned(entry, "data=2", 1, 1), options, InProcessSession(2))
    Parallel(planned(entry, "data=2", 1, 0), options, InProcessSession(2))


def parallel(entry: Subject, mesh: str, stages: int, level: int) -> Parallel:
    options = RunOptions(
        loss_fn=entry.loss_fn,
        optimizer=entry.numerics.optimizer,
        seed=SEED,
        clip_grad_norm=entry.clip,
    )
    session = InProcessSession(Mesh.parse(mesh).size * stages)
    return Parallel(planned(entry, mesh, stages, level), options, session)


def train(run: Parallel, entry: Subject, steps: int) -> None:
    for _ in range(steps):
        run.train_step(*entry.args, **entry.kwargs)


def test_a_rank_holds_what_is_predicted_and_goes_on_at_another_level() -> None:
    """Two steps at each level, from the state of the level before, equal eight in one piece."""
    entry = Subject(SHARDED_MODELS["unet"], adamw64)  # its own, as loading changes the model
    adamw = OptimizerModel("adamw", 2.0)
    whole = parallel(entry, "data=2", 1, 0)
    train(whole, entry, 2 * len(LEVELS))
    weights, states = None, None
    for level in LEVELS:
        run = parallel(entry, "data=2", 1, level)
        if weights is not None and states is not None:
            run.load_state_dict(weights)
            run.load_optimizer_state_dict(states)
        train(run, entry, 2)
        weights, states = run.state_dict(), run.optimizer_state_dict()
        session = run._ranks.session
        assert isinstance(session, InProcessSession)
        for program, rank in zip(run.planned.programs, session.ranks, strict=True):
            steps = 4 * len(program.trained())  # a counter each, that predictions leave out
            predicted = held_memory(program, adamw, "cpu").total_bytes
            assert abs(rank.memory()["held_bytes"] - predicted) <= steps
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(weights[name], tensor, rtol=1e-9, atol=1e-12), name
    for name, entries in whole.optimizer_state_dict()["state"].items():
        for key, value in entries.items():
            found = states["state"][name][key]
            assert found.shape == value.shape
            assert torch.allclose(found, value, rtol=1e-8, atol=1e-12), (name, key)
