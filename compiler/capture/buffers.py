"""Buffers that a forward pass replaces (`self.mean = 0.9 * self.mean + ...`).

Export sees changes in place only and forgets a replacement in silence. So it is made a change in
place: the buffer that was there is put back and takes the new value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ir.errors import CaptureError

__all__ = ["replacements_as_changes"]


@contextlib.contextmanager
def replacements_as_changes(model: nn.Module) -> Iterator[None]:
    """Turn buffers that are replaced inside into buffers that are changed in place.

    Raises:
        CaptureError: a buffer is replaced by a tensor of another shape or element type.
    """
    before = [
        (path, module, name, buffer)
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    yield
    for path, module, name, buffer in before:
        value = module._buffers.get(name)
        if value is buffer or not isinstance(value, Tensor):
            continue
        if (value.shape, value.dtype) != (buffer.shape, buffer.dtype):
            raise CaptureError(
                f"buffer {name} of shape {tuple(buffer.shape)} and type {buffer.dtype} is replaced "
                f"by a tensor of shape {tuple(value.shape)} and type {value.dtype}",
                where=f"module {path or '(the model)'} ({type(module).__name__})",
                ways_out=("keep the buffer's shape and type", "return the tensor instead"),
            )
        module._buffers[name] = buffer
        with torch.no_grad():
            buffer.copy_(value.detach())
