"""Checkpoints on disk, in the format of `torch.distributed.checkpoint`, part by part.

A checkpoint is a directory: files of ranks, each with the parts it wrote, and `.metadata`, which
tells where the parts of every tensor lie. torch's own writers and readers make and read the files.
Their planning over process groups is left out: who writes and reads what is known already, also
where ranks live in one process. Items are what torch's planners would make of a `DTensor` that is
sharded in the same way, so any user of `torch.distributed.checkpoint` can read the result.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from ..compiler.ir.errors import UsageError

__all__ = [
    "CheckpointFile",
    "SavedPart",
    "WrittenPart",
    "begin",
    "discard",
    "publish",
    "write_parts",
]

# What torch and pickle raise about a `.metadata` that is damaged or is none
_METADATA_ERRORS = (
    OSError,
    EOFError,
    pickle.UnpicklingError,
    AttributeError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class SavedPart:
    """What a rank is to write of a tensor that it holds.

    Args:
        key: name in the checkpoint.
        name: of the parameter or buffer.
        entry: of its optimizer state; None: its value.
        whole: shape of the whole tensor.
        offset: where the part begins.
    """

    key: str
    name: str
    entry: str | None
    whole: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """Where a part of a tensor, or an object, lies in a checkpoint.

    Args:
        key: name in the checkpoint.
        whole: shape of the tensor that it is a part of; None: it is an object.
        offset, shape, dtype: of the part.
        file, file_offset, num_bytes: its place.
    """

    key: str
    whole: tuple[int, ...] | None
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: str
    file_offset: int
    num_bytes: int

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.key, None if self.whole is None else torch.Size(self.offset))


class _Writes(DefaultSavePlanner):
    """Hands the writer what its items stand for."""

    def __init__(self, contents: Mapping[MetadataIndex, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._contents = contents

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._contents[index]


def write_parts(
    directory: str,
    writer_number: int,
    tensors: Iterable[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]],
    objects: Mapping[str, Any] | None = None,
) -> list[WrittenPart]:
    """Write parts of tensors, and objects, to files of writer `writer_number`.

    Args:
        tensors: (key, shape of the whole, offset of the part, part).
        objects: by key; plain data, so that they can be read without running code.
    """
    contents: dict[MetadataIndex, Any] = {}
    wholes: dict[MetadataIndex, tuple[int, ...]] = {}
    items = []
    for key, whole, offset, part in tensors:
        item = _tensor_item(key, whole, offset, part)
        items.append(item)
        contents[item.index], wholes[item.index] = part, whole
    for key, value in (objects or {}).items():
        items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
        contents[items[-1].index] = value
    writer = FileSystemWriter(directory)
    writer.set_up_storage_writer(False)
    plans = [SavePlan([])] * writer_number + [SavePlan(items)]  # files are named by position
    plan = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])[-1]
    pending = writer.write_data(plan, _Writes(contents))
    pending.wait()
    return [
        _written(result, contents[result.index], wholes.get(result.index))
        for result in pending.value()
    ]


def _tensor_item(
    key: str, whole: tuple[int, ...], offset: tuple[int, ...], part: Tensor
) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(offset), part.size())
    data = TensorWriteData(chunk, _properties(part.dtype), torch.Size(whole))
    return WriteItem(MetadataIndex(key, torch.Size(offset)), WriteItemType.SHARD, tensor_data=data)


def _properties(dtype: torch.dtype) -> TensorProperties:
    return TensorProperties(dtype=dtype)


def _written(result: WriteResult, content: Any, whole: tuple[int, ...] | None) -> WrittenPart:
    place: _StorageInfo = result.storage_data
    is_tensor = whole is not None
    return WrittenPart(
        key=result.index.fqn,
        whole=whole,
        offset=tuple(result.index.offset or ()),
        shape=tuple(content.shape) if is_tensor else (),
        dtype=content.dtype if is_tensor else None,
        file=place.relative_path,
        file_offset=place.offset,
        num_bytes=place.length,
    )


def begin(directory: str) -> None:
    """Make the directory that is written to, without what an earlier failure left there."""
    shutil.rmtree(directory, ignore_errors=True)
    Path(directory).mkdir(parents=True)


def discard(directory: str) -> None:
    """Remove what a failed save has written."""
    shutil.rmtree(directory, ignore_errors=True)


def publish(
    directory: str,
    target: str,
    parts: Iterable[WrittenPart],
    paths: Mapping[str, tuple[str | int, ...]],
) -> None:
    """Make the files in `directory` a checkpoint and give it its name.

    Args:
        paths: of every key in the nested dict that readers of the whole get.
    """
    _write_metadata(directory, parts, paths)
    os.rename(directory, target)
    parent = os.open(Path(target).parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _write_metadata(
    directory: str, parts: Iterable[WrittenPart], paths: Mapping[str, tuple[str | int, ...]]
) -> None:
    """Write `.metadata`, which makes the files in `directory` a checkpoint.

    Args:
        paths: of every key in the nested dict that readers of the whole get.
    """
    entries: dict[str, Any] = {}
    results = []
    for part in parts:
        if part.whole is None or part.dtype is None:
            entries[part.key] = BytesStorageMetadata()
        else:
            entry = entries.setdefault(
                part.key,
                TensorStorageMetadata(_properties(part.dtype), torch.Size(part.whole), []),
            )
            chunk = ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.shape))
            entry.chunks.append(chunk)
        place = _StorageInfo(part.file, part.file_offset, part.num_bytes)
        results.append(WriteResult(part.index, part.num_bytes, place))
    writer = FileSystemWriter(directory)
    writer.set_up_storage_writer(True)
    writer.finish(Metadata(entries, planner_data=dict(paths)), [results])


class _Reads(DefaultLoadPlanner):
    """Takes what the reader has read into tensors that are given."""

    def __init__(self, target: Tensor | None = None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._target = target
        self.value: Any = None

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert self._target is not None
        return self._target

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.value = torch.load(value, weights_only=True)


class CheckpointFile:
    """An open checkpoint.

    Raises:
        UsageError: there is none, or it is damaged.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if not (Path(path) / ".metadata").is_file():
            raise UsageError(
                "this directory holds no complete checkpoint: there is no file .metadata, which "
                "a save writes last",
                where=path,
                ways_out=("name a directory that save_checkpoint has written to its end",),
            )
        self._reader = FileSystemReader(path)
        try:
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            self._places: Mapping[MetadataIndex, _StorageInfo] = self._metadata.storage_data
            self._items = dict(self._metadata.state_dict_metadata)
        except _METADATA_ERRORS as error:
            raise self._damaged(f"{type(error).__name__}: {error}", ".metadata") from error

    def _damaged(self, what: str, file: str) -> UsageError:
        return UsageError(
            f"the checkpoint is damaged: {what}",
            where=str(Path(self.path) / file),
            ways_out=("load another checkpoint", "copy this one again, all files of it"),
        )

    def check_files(self) -> None:
        """Refuse a checkpoint in which a file is missing or cut, or a tensor has a hole."""
        ends: dict[str, int] = {}
        for place in self._places.values():
            end = place.offset + place.length
            ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
        for file, end in sorted(ends.items()):
            try:
                size = (Path(self.path) / file).stat().st_size
            except OSError as error:
                raise self._damaged(f"a file is missing: {error.strerror}", file) from error
            if size < end:
                raise self._damaged(f"a file of {end} bytes or more has {size}", file)
        for key, item in self._items.items():
            if isinstance(item, TensorStorageMetadata):
                filled = sum(prod(chunk.sizes) for chunk in item.chunks)
                if filled != prod(item.size):
                    raise self._damaged(
                        f"{key} has {prod(item.size)} elements, {filled} of them were saved",
                        ".metadata",
                    )

    def paths(self) -> dict[str, tuple[str | int, ...]]:
        """Path in a nested dict of every key."""
        given = self._metadata.planner_data or {}
        return {key: tuple(given.get(key, (key,))) for key in self._items}

    def entries(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor by key."""
        return {
            key: (tuple(item.size), item.properties.dtype)
            for key, item in self._items.items()
            if isinstance(item, TensorStorageMetadata)
        }

    def copy(self, key: str, offset: tuple[int, ...], target: Tensor) -> None:
        """Fill `target` with the part of tensor `key` that begins at `offset`."""
        wanted = ChunkStorageMetadata(torch.Size(offset), target.size())
        stored = self._items[key]
        assert isinstance(stored, TensorStorageMetadata)
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        found = sum(prod(item.lengths) for item in items)
        if found != target.numel():
            raise self._damaged(f"of {key}, {found} of {target.numel()} elements were saved", "")
        self._reader.read_data(LoadPlan(items), _Reads(target)).wait()

    def value(self, key: str) -> Any:
        """An object or small tensor, whole."""
        item = self._items[key]
        if isinstance(item, TensorStorageMetadata):
            target = torch.empty(item.size, dtype=item.properties.dtype)
            self.copy(key, (0,) * target.ndim, target)
            return target
        index = MetadataIndex(key)
        nothing = torch.Size((0,))
        read = ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)
        planner = _Reads()
        try:
            self._reader.read_data(LoadPlan([read]), planner).wait()
        except (*_METADATA_ERRORS, RuntimeError) as error:
            raise self._damaged(f"{key}: {type(error).__name__}: {error}", "") from error
        return planner.value
