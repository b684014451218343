"""Save and load what a partitioned model has learnt, whatever plan it runs under.

A checkpoint is one of `torch.distributed.checkpoint`, of the nested dict

    model       the model's `state_dict()`
    optimizer   as `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` has it:
                `state` by parameter name, `param_groups` with parameter names
    cutset      num_steps, from which randomness follows, and the class of the optimizer

in which each part of a tensor is written by the first rank that holds it. Names and shapes are
those of the model, so another plan, another number of devices or plain torch can read it. A save
writes to a directory beside the wanted one, which gets its name when all is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..runtime.checkpoint_files import CheckpointFile, SavedPart, WrittenPart
from ..runtime.optimizer import OptimizerSpec
from ..runtime.weights import StoredTensor, stored_tensors
from .ir.errors import RuntimeFailure, UsageError
from .ir.program import TensorShard
from .rank_state import RankState, States
from .ranks import Ranks
from .weights import Values, aliases_of, check_names, first_names, model_part, named_tensors

__all__ = ["Checkpoint", "Progress", "refuse_existing", "save_checkpoint"]

_Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """What of training lies with the driver: see `Parallel.optimizer_state_dict`."""

    param_groups: list[dict[str, Any]]
    num_steps: int


@dataclass(slots=True)
class _Contents:
    """What a checkpoint is to hold.

    Args:
        parts: by rank, what it writes of its own.
        others: whole tensors that no rank holds, by key.
        objects: plain data by key.
        paths: where each key lies in the nested dict.
        same: key -> other keys of the same tensor.
    """

    parts: dict[int, list[SavedPart]] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, _Path] = field(default_factory=dict)
    same: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add_path(self, *path: str | int) -> str:
        """The key of what lies at `path`."""
        key = ".".join(map(str, path))
        self.paths[key] = path
        return key

    def add_plain(self, value: Any, *path: str | int) -> None:
        """A small tensor, or data."""
        key = self.add_path(*path)
        if isinstance(value, Tensor):
            self.others[key] = value
        else:
            self.objects[key] = value

    def add_parts(
        self,
        key: str,
        name: str,
        entry: str | None,
        shape: tuple[int, ...],
        holders: Mapping[int, TensorShard | None],
    ) -> None:
        """A tensor of this shape, from the ranks that hold it."""
        for rank, shard in holders.items():
            offset = (0,) * len(shape) if shard is None else shard.offset
            part = SavedPart(key, name, entry, shape, offset)
            self.parts.setdefault(rank, []).append(part)


def save_checkpoint(
    directory: str | PathLike[str],
    *,
    model: nn.Module,
    values: Values,
    ranks: Ranks,
    state: RankState,
    spec: OptimizerSpec,
    progress: Progress | None,
) -> None:
    """Write a checkpoint.

    Args:
        values: of what no rank holds.
        progress: None: of a model that is not trained.

    Raises:
        UsageError: there is something at `directory` already.
        RuntimeFailure: it cannot be written; training can go on.
    """
    target = Path(directory).absolute()
    refuse_existing(target)
    temporary = str(target.with_name(f".{target.name}.incomplete"))
    _refuse_failures(ranks, ranks.call("begin_checkpoint", {"directory": temporary}), temporary)
    contents = _Contents()
    _add_model(contents, model, values, state)
    if progress is not None:
        types = ranks.call("optimizer_state_types")
        _add_optimizer(contents, state, types, spec, progress)
    replies = ranks.call(
        "write_checkpoint",
        [
            {
                "directory": temporary,
                "parts": contents.parts.get(rank, []),
                "others": {} if rank else contents.others,
                "objects": {} if rank else contents.objects,
            }
            for rank in range(ranks.num_ranks)
        ],
    )
    _refuse_failures(ranks, replies, temporary)
    written = [part for reply in replies for part in _under_all_names(reply, contents.same)]
    arguments = {
        "directory": temporary,
        "target": str(target),
        "parts": written,
        "paths": contents.paths,
    }
    _refuse_failures(ranks, ranks.call("publish_checkpoint", arguments), temporary)


def refuse_existing(target: Path) -> None:
    """Raise UsageError if a checkpoint cannot get this name: there is something, or its folder can
    neither be written to nor be made."""
    folder = next(entry for entry in target.absolute().parents if entry.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(
            f"a checkpoint cannot be made in {folder}: "
            + ("it takes no files" if folder.is_dir() else "it is not a folder"),
            where=str(target),
            ways_out=("name another directory", "check the path and its permissions"),
        )
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(
            "there is something already, which is not overwritten",
            where=str(target),
            ways_out=("name another directory, e.g. one per step", "remove it before"),
        )


def _refuse_failures(ranks: Ranks, replies: list[Any], temporary: str) -> None:
    """Raise what a rank could not write."""
    for rank, reply in enumerate(replies):
        if isinstance(reply, str):
            ranks.call("discard_checkpoint", {"directory": temporary})
            raise RuntimeFailure(
                f"the checkpoint cannot be written: {reply}",
                where=f"rank {rank}, {temporary}",
                ways_out=("free space, or name another directory, and save again",),
            )


def _under_all_names(
    parts: list[WrittenPart], same: Mapping[str, tuple[str, ...]]
) -> Iterator[WrittenPart]:
    """The parts, and those of tied tensors again under their other names: the same bytes."""
    for part in parts:
        yield part
        for key in same.get(part.key, ()):
            yield replace(part, key=key)


def _add_model(contents: _Contents, model: nn.Module, values: Values, state: RankState) -> None:
    names = model.state_dict()
    held = set(state.names)
    for first, aliases in aliases_of(model).items():
        saved = [name for name in aliases if name in names]
        if not saved:
            continue
        keys = [contents.add_path("model", name) for name in saved]
        contents.same[keys[0]] = tuple(keys[1:])
        if first in held:
            shape = tuple(names[saved[0]].shape)
            contents.add_parts(keys[0], first, None, shape, state.holders(first))
        else:
            contents.others[keys[0]] = values.tensor(first)


def _add_optimizer(
    contents: _Contents,
    state: RankState,
    types: list[States],
    spec: OptimizerSpec,
    progress: Progress,
) -> None:
    for name in state.trained_names:
        holders = state.holders(name, states=True)
        rank, shard = next(iter(holders.items()))
        for entry, value in types[rank].get(name, {}).items():
            path = ("optimizer", "state", name, entry)
            if not isinstance(value, Tensor):
                contents.add_plain(value, *path)
            elif shard is not None and tuple(value.shape) == shard.part.shape:
                key = contents.add_path(*path)
                contents.add_parts(key, name, entry, shard.whole.shape, holders)
            else:  # a counter, the same on all ranks, or the whole
                key = contents.add_path(*path)
                contents.add_parts(key, name, entry, tuple(value.shape), {rank: None})
    for position, group in enumerate(progress.param_groups):
        for option, value in group.items():
            contents.add_plain(value, "optimizer", "param_groups", position, option)
    contents.add_plain(progress.num_steps, "cutset", "num_steps")
    contents.add_plain(spec.class_name, "cutset", "optimizer")


class Checkpoint:
    """An open checkpoint, found to be of this model.

    `tensors` is what is stored of each parameter and buffer, by the first of its names; `state` the
    optimizer's state (stored tensors and plain data) and `progress` its rest, None if the
    checkpoint is of a model alone.

    Raises:
        UsageError: there is no checkpoint, it is damaged, or of another model or optimizer.
    """

    def __init__(
        self, directory: str | PathLike[str], model: nn.Module, spec: OptimizerSpec | None
    ) -> None:
        path = Path(directory).absolute()
        self._where = str(path)
        self._file = CheckpointFile(str(path))
        self._file.check_files()
        aliases = aliases_of(model)
        wanted = dict(named_tensors(model))
        optional = set(wanted) - set(model.state_dict())
        self.tensors = check_names(
            model_part(self._file, path), wanted, aliases, optional, self._where
        )
        self.state: States = {}
        self.progress: Progress | None = None
        if spec is not None:
            first = first_names(model)
            self._read_progress(spec, first)
            self._find_state(stored_tensors("checkpoint", path), first)

    def whole(self, name: str) -> Tensor:
        """The value of a parameter or buffer."""
        value = self._file.value(self.tensors[name].key)
        assert isinstance(value, Tensor)
        return value

    def _read_progress(self, spec: OptimizerSpec, first: Mapping[str, str]) -> None:
        groups: dict[int, dict[str, Any]] = {}
        own: dict[str, Any] = {}
        for key, path in self._file.paths().items():
            match path:
                case ("optimizer", "param_groups", int(position), str(option)):
                    groups.setdefault(position, {})[option] = self._file.value(key)
                case ("cutset", str(option)):
                    own[option] = self._file.value(key)
        if not groups:
            return
        kind = own.get("optimizer", spec.class_name)
        if kind != spec.class_name:
            raise self._other_optimizer(f"of {kind}, this one is {spec.class_name}")
        found = [
            tuple(first.get(name, name) for name in groups[position].pop("params", ()))
            for position in sorted(groups)
        ]
        wanted = [members for members, _ in spec.groups]
        if [set(members) for members in found] != [set(members) for members in wanted]:
            raise self._other_optimizer(
                f"has parameter groups of {[len(m) for m in found]} parameters, this one of "
                f"{[len(m) for m in wanted]}, or parameters of other names"
            )
        options = [groups[position] for position in sorted(groups)]
        self.progress = Progress(options, int(own.get("num_steps", 0)))

    def _other_optimizer(self, how: str) -> UsageError:
        return UsageError(
            f"the checkpoint's optimizer {how}",
            where=self._where,
            ways_out=(
                "make the optimizer as it was made when the checkpoint was saved",
                "pass the checkpoint as weights=..., which takes the model and no optimizer",
            ),
        )

    def _find_state(self, stored: Mapping[str, StoredTensor], first: Mapping[str, str]) -> None:
        for key, path in self._file.paths().items():
            match path:
                case ("optimizer", "state", str(name), str(entry)):
                    value = stored[key] if key in stored else self._file.value(key)
                    self.state.setdefault(first.get(name, name), {})[entry] = value
