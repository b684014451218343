"""Optimizer states in the memory of the host (ZeRO-Offload; Ren et al., 2021).

The gradient of what an accelerator's rank updates goes to pinned host memory, the update is made
there, beside the states, and the new weights go back. The device then holds neither states nor the
optimizer's temporaries, for two transfers of the updated part a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HostCopy"]


class HostCopy:
    """A parameter's copy on the host, for an optimizer to update.

    Args:
        source: the parameter on the device, a view of what the rank holds of it, perhaps.
        host: where the copy lies.
    """

    def __init__(self, source: Tensor, host: torch.device) -> None:
        self._source = source.detach()
        self._device = source.device
        self.parameter = torch.nn.Parameter(self._staging(host), requires_grad=True)
        self._gradient = self._staging(host)
        self.is_stale = True  # the device has other weights

    def _staging(self, host: torch.device) -> Tensor:
        # pinned: only then does a transfer run beside others
        pinned = self._device.type == "cuda" and host.type == "cpu"
        shape, dtype = self._source.shape, self._source.dtype
        return torch.empty(shape, dtype=dtype, device=host, pin_memory=pinned)

    def fetched(self, gradient: Tensor) -> Tensor:
        """The gradient on the host, once `await_fetched` has returned, with today's weights."""
        self._gradient.copy_(gradient, non_blocking=True)
        if self.is_stale:
            self.parameter.data.copy_(self._source, non_blocking=True)
            self.is_stale = False
        return self._gradient

    def await_fetched(self) -> None:
        """Wait for transfers from the device."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def write_back(self) -> None:
        """Give the device the new weights."""
        self._source.copy_(self.parameter.detach(), non_blocking=True)
