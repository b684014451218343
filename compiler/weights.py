"""Where the first values of parameters and buffers come from.

By default from the model itself. A model on `meta` has none: then from files, which each rank
reads its own parts of, or from a function that makes one tensor at a time. So neither a rank nor
the driver ever has more than its share and one tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..runtime.checkpoint_files import CheckpointFile
from ..runtime.weights import StoredPart, StoredTensor, WeightReader, stored_tensors
from .capture import Captured
from .ir.errors import UsageError
from .ir.graph import ValueKind
from .ir.program import TensorShard

__all__ = [
    "Initializer",
    "Values",
    "Weights",
    "aliases_of",
    "check_names",
    "find_weights",
    "first_names",
    "model_part",
    "named_tensors",
    "parameters_on_meta",
    "refuse_constants_on_meta",
    "stored_part",
]

Initializer = Callable[[str, Tensor], Tensor]
Weights = str | PathLike[str] | Initializer

_SHOWN = 5  # names in a message
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE_FILES = (("model.safetensors", "safetensors"), ("pytorch_model.bin", "torch"))


def aliases_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of every parameter and buffer by the first of them."""
    first: dict[int, str] = {}
    table: dict[str, list[str]] = {}
    for name, tensor in named_tensors(model):
        table.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return {name: tuple(names) for name, names in table.items()}


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Models made inside have their parameters on meta, and buffers with values.

    A parameter goes to meta as soon as its module has it, before anything is written to it.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:  # tied ones stay one object
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor."""
    return {name: first for first, names in aliases_of(model).items() for name in names}


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


class Values:
    """First values of the parameters and buffers of a model, by the first of their names.

    Args:
        weights: a file or directory of weights, or a function from a name and a meta tensor to
            the value, asked for all parameters, and for buffers on meta; None: the model.
        seed: of the function's random numbers, which depend on it and the name alone.
        needed: names that the programs read.

    Raises:
        UsageError: the weights are of another model, or a tensor has no value anywhere.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights | None = None,
        *,
        seed: int = 0,
        needed: Iterable[str] = (),
    ) -> None:
        self._model = dict(named_tensors(model))
        self._kept: dict[str, Tensor] = {}
        self._seed = seed
        self._make: Initializer | None = None
        self._stored: dict[str, StoredTensor] = {}
        if isinstance(weights, str | PathLike):
            aliases = aliases_of(model)
            found = find_weights(Path(weights))
            optional = set(self._model) - set(model.state_dict())
            self._stored = check_names(found, self._model, aliases, optional, str(weights))
        elif weights is not None:
            self._make = weights
        self._parameters = {name for name, _ in model.named_parameters()}
        if weights is not None:
            self.refuse_missing(needed)

    def refuse_missing(self, names: Iterable[str]) -> None:
        """Raise UsageError unless all of `names` have a value."""
        missing = sorted(
            name
            for name in set(names)
            if self._model[name].is_meta
            and not (name in self._kept or name in self._stored or self._make)
        )
        buffers = [name for name in missing if name not in self._parameters]
        if buffers and len(buffers) == len(missing):
            raise UsageError(
                f"buffers are on meta and their values in no file: {_some(buffers)}",
                where="weights",
                ways_out=(
                    "make the model `with cutset.parameters_on_meta():`, which leaves buffers real",
                    "give the model's own buffers values: they may be real in a model on meta",
                    "pass weights=function, called as function(name, meta_tensor)",
                ),
            )
        if missing:
            raise UsageError(
                f"the model's parameters are on meta: it can be planned, not run: {_some(missing)}",
                where="weights",
                ways_out=(
                    "pass weights=PATH (safetensors, torch or a checkpoint) or a function",
                    "call load_checkpoint first",
                    "give it values: model.to_empty(device='cpu'), then load them",
                ),
            )

    def stored(self, name: str) -> StoredTensor | None:
        """Where a rank can read the value by itself."""
        return None if name in self._kept else self._stored.get(name)

    def tensor(self, name: str) -> Tensor:
        """The value, whole."""
        if name in self._kept:
            return self._kept[name]
        own = self._model[name]
        if name in self._stored:
            whole = stored_part(self._stored[name], None, own.dtype)
            return WeightReader().read(whole, torch.device("cpu"))
        if self._make is not None and (own.is_meta or name in self._parameters):
            return self._made(self._make, name, own)
        self.refuse_missing([name])
        return own

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these values from now on: into the model, unless it is on meta."""
        self._make = None
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._stored.pop(name, None)
                if self._model[name].is_meta:
                    self._kept[name] = tensor.detach().clone()
                else:
                    self._kept.pop(name, None)
                    self._model[name].copy_(tensor)

    def use_stored(self, stored: Mapping[str, StoredTensor]) -> None:
        """These lie in files from now on."""
        self._make = None
        self._stored = dict(stored)
        self._kept.clear()

    def use_model(self) -> None:
        """The model has the values from now on."""
        self._make = None
        self._stored.clear()
        self._kept.clear()

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor], strict: bool) -> Any:
        """As `model.load_state_dict` does for a model that is not on meta."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="for .*: copying from a non-meta")
            result = model.load_state_dict(state, strict=strict)
        first = first_names(model)
        self.keep({first[name]: tensor for name, tensor in state.items() if name in first})
        return result

    def _made(self, make: Initializer, name: str, own: Tensor) -> Tensor:
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            value: object = make(name, own.detach().to("meta"))
        if not isinstance(value, Tensor) or value.is_meta or value.shape != own.shape:
            what = (
                f"a tensor of shape {tuple(value.shape)} on {value.device}"
                if isinstance(value, Tensor)
                else f"a {type(value).__name__}"
            )
            raise UsageError(
                f"the function made {what} for {name}, which is {tuple(own.shape)}",
                where="weights",
                ways_out=("return torch.empty(tensor.shape, dtype=tensor.dtype), filled",),
            )
        return value.detach().to(own.dtype)


def stored_part(stored: StoredTensor, shard: TensorShard | None, dtype: torch.dtype) -> StoredPart:
    """The part of a stored tensor that `shard` describes; all of it for None."""
    if shard is None:
        return StoredPart(stored, (0,) * len(stored.shape), stored.shape, dtype)
    return StoredPart(stored, shard.offset, shard.part.shape, dtype)


def refuse_constants_on_meta(captured: Captured) -> None:
    """Raise UsageError if the graph reads a constant that has no value."""
    constants = [value.origin for value in captured.graph.values_of(ValueKind.CONSTANT)]
    lost = [name for name in constants if captured.tensors[name].is_meta]
    if lost:
        raise UsageError(
            f"the model reads tensors on meta that are neither parameters nor buffers: "
            f"{_some(lost)}",
            where="the model's attributes",
            ways_out=(
                "make it `with cutset.parameters_on_meta():`, which leaves such tensors real",
                "register them as buffers",
            ),
        )


def find_weights(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, of a directory of files with an index, or of a checkpoint.

    Raises:
        UsageError: there is nothing of the kind.
    """
    if path.is_dir():
        return _in_directory(path)
    if path.is_file():
        format = "safetensors" if path.suffix == ".safetensors" else "torch"
        return _of_index(path) if path.suffix == ".json" else stored_tensors(format, path)
    raise UsageError(
        "there is no such file or directory",
        where=str(path),
        ways_out=("name a .safetensors file, a torch.save file, or a directory of weights",),
    )


def _in_directory(path: Path) -> dict[str, StoredTensor]:
    if (path / ".metadata").is_file():
        file = CheckpointFile(str(path))
        file.check_files()
        return model_part(file, path)
    for name in _INDEX_FILES:
        if (path / name).is_file():
            return _of_index(path / name)
    for name, format in _WHOLE_FILES:
        if (path / name).is_file():
            return stored_tensors(format, path / name)
    known = [*_INDEX_FILES, *(name for name, _ in _WHOLE_FILES), ".metadata"]
    raise UsageError(
        "the directory holds no weights",
        where=str(path),
        ways_out=(f"files that are looked for: {', '.join(known)}",),
    )


def model_part(file: CheckpointFile, path: Path) -> dict[str, StoredTensor]:
    """The weights in a checkpoint by their names in the model: what is under `model`, or all of a
    checkpoint of a model alone."""
    found = stored_tensors("checkpoint", path)
    paths = {key: path for key, path in file.paths().items() if key in found}
    nested = {
        ".".join(map(str, path[1:])): found[key]
        for key, path in paths.items()
        if path[0] == "model" and len(path) > 1
    }
    return nested or {".".join(map(str, path)): found[key] for key, path in paths.items()}


def _of_index(path: Path) -> dict[str, StoredTensor]:
    """The tensors that a Hugging Face index lists, each in its file."""
    try:
        table: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(table.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"the index cannot be read: {type(error).__name__}: {error}", where=str(path)
        ) from error
    found: dict[str, StoredTensor] = {}
    for file in files:
        if not (path.parent / file).is_file():
            raise UsageError(f"the index names {file}, which is missing", where=str(path))
        format = "safetensors" if file.endswith(".safetensors") else "torch"
        found |= stored_tensors(format, path.parent / file)
    absent = sorted(set(table) - set(found))
    if absent:
        raise UsageError(f"the files lack tensors of the index: {_some(absent)}", where=str(path))
    return found


def check_names(
    found: Mapping[str, StoredTensor],
    wanted: Mapping[str, Tensor],
    aliases: Mapping[str, tuple[str, ...]],
    optional: Iterable[str],
    where: str,
) -> dict[str, StoredTensor]:
    """What is stored for each parameter and buffer, by the first of its names.

    Args:
        wanted: parameters and buffers by all their names.
        aliases: see `aliases_of`; one of the names suffices.
        optional: names that need not be there.

    Raises:
        UsageError: tensors are missing, unexpected, or of another shape; names them.
    """
    optional = set(optional)
    table: dict[str, StoredTensor] = {}
    missing, shapes = [], []
    for name, names in aliases.items():
        key = next((alias for alias in names if alias in found), None)
        if key is None:
            if not optional.issuperset(names):
                missing.append(name)
        elif found[key].shape != tuple(wanted[name].shape):
            shapes.append(f"{key} is {found[key].shape}, the model's {tuple(wanted[name].shape)}")
        else:
            table[name] = found[key]
    unexpected = sorted(set(found) - set(wanted))
    causes = [
        *([f"{len(missing)} tensors of the model are missing: {_some(missing)}"] * bool(missing)),
        *([f"{len(unexpected)} are not the model's: {_some(unexpected)}"] * bool(unexpected)),
        *([f"{len(shapes)} have another shape: {_some(shapes)}"] * bool(shapes)),
    ]
    if causes:
        raise UsageError(
            f"these are the weights of another model: {'; '.join(causes)}",
            where=where,
            ways_out=(
                "make the model that the weights were saved from",
                "rename or remove tensors in a file of its own",
            ),
        )
    return table


def _some(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
