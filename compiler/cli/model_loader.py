"""From `path/to/file.py:factory` or `package.module:factory` to a model and one batch for it.

The factory is called without arguments after `torch.manual_seed(seed)`. It returns
`(model, args)`, `(model, args, kwargs)`, or a dict with `model`, `args` and optionally `kwargs`,
`loss_fn` and `optimizer` (a function from parameters to a `torch.optim.Optimizer`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..capture.signature import num_targets
from ..ir.errors import CutsetError, UsageError

__all__ = [
    "LoadedModel",
    "OptimizerFactory",
    "choose_optimizer",
    "for_inference",
    "load_model",
]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_KEYS = ("model", "args", "kwargs", "loss_fn", "optimizer")
_FORMS = (
    "return (model, args), (model, args, kwargs), or a dict with " + ", ".join(_KEYS),
    "args is a tuple of the model's positional inputs, kwargs a dict",
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a factory returned."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss_fn: Callable[..., torch.Tensor] | None
    optimizer: OptimizerFactory | None

    @property
    def is_meta(self) -> bool:
        """Whether there are tensors without values, so that the model can be planned, not run."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return self.has_meta_inputs or any(tensor.is_meta for tensor in tensors)

    @property
    def has_meta_inputs(self) -> bool:
        """Whether there are inputs without values."""
        inputs = pytree.tree_leaves((self.args, self.kwargs))
        return any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in inputs)


def for_inference(loaded: LoadedModel) -> LoadedModel:
    """`loaded` without loss and targets, which inference does not take."""
    count = len(loaded.args) - num_targets(loaded.loss_fn)
    return replace(loaded, args=loaded.args[:count], loss_fn=None)


def load_model(spec: str, *, seed: int = 0, dtype: str | None = None) -> LoadedModel:
    """Call the factory that `spec` names.

    Args:
        spec: `path/to/file.py:factory` or `package.module:factory`.
        seed: of torch's generator, set before the factory is called.
        dtype: name of a torch dtype, to which the model and its float inputs are converted.

    Raises:
        UsageError: there is no such factory, it fails, or it returns something else.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UsageError(
            f"{spec!r} does not name a model",
            ways_out=("write path/to/file.py:factory or package.module:factory",),
        )
    module = _from_file(Path(place)) if place.endswith(".py") else _from_package(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        known = sorted(
            key
            for key, item in vars(module).items()
            if callable(item) and getattr(item, "__module__", None) == module.__name__
        )
        raise UsageError(
            f"{place} has no function {name!r}",
            ways_out=(f"functions there: {', '.join(known) or 'none'}",),
        )
    torch.manual_seed(seed)
    try:
        made = factory()
    except CutsetError:
        raise
    except Exception as error:
        raise _user_error(f"the factory {name} failed", error) from error
    return _converted(_understood(made, spec), dtype)


def choose_optimizer(
    loaded: LoadedModel, name: str | None = None, lr: float | None = None
) -> OptimizerFactory:
    """The factory of the optimizer that was asked for, by the command line or by the model's.

    Raises:
        UsageError: a learning rate was given for the model's own optimizer.
    """
    if name is None and loaded.optimizer is not None:
        if lr is not None:
            raise UsageError(
                "the factory gives its own optimizer, whose learning rate is its own",
                where="--lr",
                ways_out=("leave --lr out", "add --optimizer to replace it"),
            )
        return loaded.optimizer
    rate = 1e-3 if lr is None else lr
    if name == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate)


def _from_file(path: Path) -> ModuleType:
    """Import a file as `python file.py` would find it: with its folder on the import path."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}", where="model")
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"cutset_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and optimizers of the file look themselves up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _user_error(f"{path} cannot be imported", error) from error
    return module


def _from_package(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _user_error(f"module {name} cannot be imported", error) from error


def _user_error(cause: str, error: Exception) -> UsageError:
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}"
    if isinstance(error, SyntaxError):
        place = f"{error.filename}:{error.lineno}"
    return UsageError(f"{cause}: {type(error).__name__}: {error}", where=place)


def _understood(made: object, spec: str) -> LoadedModel:
    if isinstance(made, (tuple, list)) and len(made) in (2, 3):
        made = dict(zip(_KEYS, made, strict=False))
    if not isinstance(made, Mapping) or "model" not in made:
        raise UsageError(
            f"the factory returned {type(made).__name__}, which is none of the known forms",
            where=spec,
            ways_out=_FORMS,
        )
    unknown = sorted(set(made) - set(_KEYS))
    if unknown:
        raise UsageError(
            f"the factory returned unknown keys: {', '.join(map(str, unknown))}",
            where=spec,
            ways_out=(f"known keys: {', '.join(_KEYS)}",),
        )
    args, kwargs = made.get("args", ()), made.get("kwargs") or {}
    args = (args,) if isinstance(args, torch.Tensor) else args
    if not isinstance(made["model"], nn.Module) or not isinstance(args, (tuple, list)):
        raise _wrong_type(spec, made["model"], args)
    if not isinstance(kwargs, Mapping):
        raise _wrong_type(spec, made["model"], kwargs)
    return LoadedModel(
        made["model"], tuple(args), dict(kwargs), made.get("loss_fn"), made.get("optimizer")
    )


def _wrong_type(spec: str, model: object, inputs: object) -> UsageError:
    return UsageError(
        f"the factory returned a {type(model).__name__} as model and a {type(inputs).__name__} "
        "as inputs",
        where=spec,
        ways_out=_FORMS,
    )


def _converted(loaded: LoadedModel, dtype: str | None) -> LoadedModel:
    if dtype is None:
        return loaded
    wanted = getattr(torch, dtype)

    def convert(leaf: object) -> object:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.to(wanted) if floating and isinstance(leaf, torch.Tensor) else leaf

    args, kwargs = pytree.tree_map(convert, (loaded.args, loaded.kwargs))
    model = loaded.model.to(wanted)
    return LoadedModel(model, args, kwargs, loaded.loss_fn, loaded.optimizer)
