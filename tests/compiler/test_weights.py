"""First values of a model on meta: from files of every kind, from a function, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

from cutset.compiler.ir.errors import UsageError
from cutset.compiler.parallel import Parallel
from cutset.compiler.weights import parameters_on_meta, stored_part
from cutset.runtime.inprocess import InProcessSession
from cutset.runtime.weights import StoredTensor, WeightReader

from .partitioned import Plain, assert_same, batch, chain, partition, train_both
from .test_checkpoint import ODD_BATCH, Odd, meta_chain, odd, partitioned_into, plan_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Write = Callable[[dict[str, Tensor], Path], Path]


def _safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def _halves(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    names = list(state)
    return {n: state[n] for n in names[::2]}, {n: state[n] for n in names[1::2]}


def _sharded(state: dict[str, Tensor], folder: Path, index: str, suffix: str, save: Any) -> Path:
    files = {}
    for number, part in enumerate(_halves(state)):
        name = f"{index.partition('.')[0]}-{number}.{suffix}"
        save(part, folder / name)
        files |= dict.fromkeys(part, name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def _sharded_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    return _sharded(state, folder, "model.safetensors.index.json", "safetensors", save_file)


def _sharded_bin(state: dict[str, Tensor], folder: Path) -> Path:
    return _sharded(state, folder, "pytorch_model.bin.index.json", "bin", torch.save)


def _torch(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


def _nested(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"model": state, "epoch": 3}, folder / "pytorch_model.bin")
    return folder


def _checkpoint(state: dict[str, Tensor], folder: Path) -> Path:
    dcp.save(state, checkpoint_id=folder / "c", no_dist=True)
    return folder / "c"


FORMS: dict[str, Write] = {
    "safetensors": _safetensors,
    "sharded safetensors": _sharded_safetensors,
    "sharded bin": _sharded_bin,
    "torch": _torch,
    "nested": _nested,
    "checkpoint": _checkpoint,
}


def from_weights(weights: Any, model: nn.Module | None = None, kind: str = "tensor") -> Parallel:
    plan = plan_of(kind)
    ranks = len(plan.cluster.devices)
    session = InProcessSession(ranks)
    return partition(
        model or meta_chain(), stages=ranks, plan=plan, session=session, weights=weights
    )


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_read_from_files(form: str, tmp_path: Path) -> None:
    """In float32 there, in float64 in the model."""
    source = chain(0.3).float()
    parallel = from_weights(FORMS[form](source.state_dict(), tmp_path))
    assert partitioned_into(parallel), "the plan splits parameters"
    assert_same(parallel.state_dict(), source.double().state_dict())
    train_both(parallel, Plain(source), [batch()], tolerance=1e-11)


def drawn(name: str, tensor: Tensor) -> Tensor:
    return torch.randn(tensor.shape, dtype=tensor.dtype)


def test_drawn_values_follow_from_name_and_seed_alone() -> None:
    outside = torch.random.get_rng_state()
    runs = [from_weights(drawn, kind=kind) for kind in ("tensor", "pipeline", "zero3")]
    for parallel in runs:
        parallel.train_step(*batch())
    assert torch.equal(torch.random.get_rng_state(), outside)
    for parallel in runs[1:]:
        assert_same(parallel.state_dict(), runs[0].state_dict(), 1e-11)
    assert not torch.equal(*list(runs[0].state_dict().values())[::2][:2])


def test_a_real_model_takes_files_instead(tmp_path: Path) -> None:
    source = chain(0.3)
    with torch.no_grad():
        source.layers[0].weight.zero_()
    parallel = from_weights(_torch(source.state_dict(), tmp_path), chain(0.3), "pipeline")
    assert_same(parallel.state_dict(), source.state_dict())


def test_state_dict_given_to_a_model_on_meta() -> None:
    parallel = partition(meta_chain())
    source = chain(0.3)
    state = source.state_dict()
    assert parallel.load_state_dict(state).missing_keys == []
    with torch.no_grad():
        for tensor in state.values():
            tensor.zero_()  # what was loaded is a copy
    train_both(parallel, Plain(chain(0.3)), [batch()])
    parallel.load_state_dict({"layers.0.bias": torch.ones(6)}, strict=False)
    assert parallel.state_dict()["layers.0.bias"].tolist() == [1.0] * 6
    parallel.train_step(*batch())


# -- tied weights, buffers ---------------------------------------------------------------------


def meta_odd(scale: bool) -> Odd:
    model = Odd().to("meta")
    model.head.weight = model.embed.weight
    if scale:
        model.register_buffer("scale", torch.full((6,), 0.5), persistent=False)
    return model


def test_tied_weights_and_buffers_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = Odd()
    state = plain.state_dict()
    del state["head.weight"]  # as transformers writes tied weights
    path = _safetensors(state, tmp_path)
    parallel = odd(model=meta_odd(scale=True), weights=path)
    other = odd(model=plain)
    assert_same(parallel.state_dict(), plain.state_dict())
    assert float(parallel.train_step(*ODD_BATCH)) == float(other.train_step(*ODD_BATCH))
    assert_same(parallel.state_dict(), other.state_dict())
    assert float(parallel.state_dict()["norm.running_mean"].abs().sum()) > 0


def ones(name: str, tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor, device="cpu")


def test_buffers_without_values_are_refused_or_made(tmp_path: Path) -> None:
    path = _torch(Odd().state_dict(), tmp_path)
    with pytest.raises(UsageError, match="buffers are on meta.*: scale"):
        odd(model=meta_odd(scale=False), weights=path)
    parallel = odd(
        model=meta_odd(scale=False), weights=lambda name, t: torch.ones_like(t, device="cpu")
    )
    parallel.train_step(*ODD_BATCH)


# -- refusals ----------------------------------------------------------------------------------


def _without(state: dict[str, Tensor]) -> None:
    del state["layers.1.bias"]


def _renamed(state: dict[str, Tensor]) -> None:
    state["layers.9.bias"] = torch.ones(6)


def _wider(state: dict[str, Tensor]) -> None:
    state["layers.0.weight"] = torch.ones(6, 7)


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing": (_without, "1 tensors of the model are missing: layers.1.bias"),
    "unexpected": (_renamed, "1 are not the model's: layers.9.bias"),
    "shape": (_wider, r"layers.0.weight is \(6, 7\), the model's \(6, 6\)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_names_and_shapes_are_refused(change: str, tmp_path: Path) -> None:
    state = chain().state_dict()
    edit, message = CHANGES[change]
    edit(state)
    path = _safetensors(state, tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        from_weights(path)
    assert str(path) in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("no weights")
    old = tmp_path / "old.pt"
    torch.save(chain().state_dict(), old, _use_new_zipfile_serialization=False)
    code = tmp_path / "code.pt"
    torch.save({"model": chain()}, code)
    empty = tmp_path / "folder"
    empty.mkdir()
    for path in (text, old, code, empty, tmp_path / "absent.pt"):
        with pytest.raises(UsageError) as caught:
            from_weights(path)
        assert str(path) in str(caught.value)
        assert caught.value.ways_out, path


def test_an_index_that_is_broken_is_refused(tmp_path: Path) -> None:
    folder = _sharded_safetensors(chain().state_dict(), tmp_path)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(UsageError, match="the index names model-1.safetensors, which is missing"):
        from_weights(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UsageError, match="the index cannot be read"):
        from_weights(folder)


@pytest.mark.parametrize(
    "make", [lambda name, t: t, lambda name, t: torch.ones(1), lambda name, t: None]
)
def test_functions_that_make_no_value_are_refused(make: Any) -> None:
    parallel = from_weights(make)
    with pytest.raises(UsageError, match=r"the function made .* for layers\.0\.bias"):
        parallel.train_step(*batch())


def test_a_model_on_meta_without_weights_does_not_run() -> None:
    parallel = partition(meta_chain())
    with pytest.raises(UsageError, match="planned, not run: layers.0.bias") as caught:
        parallel.train_step(*batch())
    assert "weights=PATH" in str(caught.value)


def test_a_file_that_changes_under_the_reader_is_named(tmp_path: Path) -> None:
    path = _torch({"a": torch.ones(3)}, tmp_path)
    stored = StoredTensor("torch", str(path), "b", (3,), torch.float32)
    with pytest.raises(UsageError, match="tensor b cannot be read"):
        WeightReader().read(stored_part(stored, None, torch.float32), torch.device("cpu"))


class Turning(nn.Module):
    """Has a buffer that is computed, a tensor that is no buffer, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, dtype=torch.float64)
        self.second = nn.Linear(6, 6, dtype=torch.float64)
        self.second.weight = self.first.weight
        self.register_buffer("angles", torch.arange(6.0).double().sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.angles)


def test_models_made_with_their_parameters_on_meta(tmp_path: Path) -> None:
    plain = Turning()
    with parameters_on_meta():
        model = Turning()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.first.weight is model.second.weight
    assert torch.equal(model.angles, plain.angles)
    parallel = partition(model, weights=_torch(plain.state_dict(), tmp_path))
    train_both(parallel, Plain(plain), [batch()])
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_tensor_on_meta_that_is_no_buffer_is_refused() -> None:
    model = meta_chain()
    model.factor = torch.ones(6, device="meta", dtype=torch.float64)
    model.layers[0].register_forward_pre_hook(lambda module, args: args[0] * model.factor)
    parallel = partition(model, weights=drawn)
    with pytest.raises(UsageError, match="neither parameters nor buffers: .*factor"):
        parallel.train_step(*batch())
