"""How ranks talk to each other: the interface, and what they agree on before the first step.

A `Communicator` belongs to one rank. `send`, `recv` and the methods called `start_*` never block;
they return a `Pending`. Implementations: `torch_communicator.TorchCommunicator` (gloo and NCCL) and
`local_communicator.LocalNetwork` (several ranks in one process).

`prepare` is called once per program, before its first step, by all ranks in the same order. As
gloo never complains (a wrong size, dtype or order corrupts in silence), ranks exchange a
`Contract` there (`runtime/contract.py`), the list of what each is going to send, receive and do
together with others, and refuse to run when two contracts contradict each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..compiler.ir.errors import RuntimeFailure
from ..compiler.ir.program import Program
from ..compiler.ir.types import TensorType

__all__ = ["Communicator", "PeerLost", "Pending", "Split"]


class PeerLost(RuntimeFailure):
    """The connection to another rank broke, most often because that rank failed first."""


class Pending(Protocol):
    """A communication under way."""

    def done(self) -> bool:
        """Whether `wait` would return at once. Backends that cannot tell say False until waited."""
        ...

    def wait(self, timeout_seconds: float | None = None) -> torch.Tensor | None:
        """Wait until complete; may be called again.

        Returns:
            The tensor received or reduced; None for a send. On CUDA it is ready on the current
            stream.

        Raises:
            WaitTimeout: not complete within `timeout_seconds` (None: the communicator's limit).
            PeerLost: the other rank's process is gone.
        """
        ...


@dataclass(frozen=True, slots=True)
class Split:
    """How ranks share a tensor dim: the i-th of them has `sizes[i]` elements of it."""

    dim: int
    sizes: tuple[int, ...]

    @property
    def is_even(self) -> bool:
        return len(set(self.sizes)) == 1

    def parts(self, whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of all parts."""
        return tuple(whole.split(self.sizes, self.dim))

    def shape(self, shape: Sequence[int], size: int) -> tuple[int, ...]:
        """`shape` with `size` elements in the dim."""
        return (*shape[: self.dim], size, *shape[self.dim + 1 :])

    def check(self, tensor: torch.Tensor, size: int, label: str) -> None:
        """Raises RuntimeFailure unless `tensor` has `size` elements in the dim."""
        if not self.dim < tensor.ndim or tensor.shape[self.dim] != size:
            shape = tuple(tensor.shape)
            raise RuntimeFailure(f"{label}: dim {self.dim} of {shape} is not {size} long")


class Communicator(Protocol):
    """One rank's connection to the others. `label` says what travels, for error messages.

    The ranks of a collective are given in the order of their parts; all of them name them alike.
    """

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def prepare(self, program: Program) -> None:
        """Agree with all ranks on `program` and make the connections that it needs.

        Raises:
            VerificationError: plan, shapes, dtypes, tags or collectives differ between ranks.
        """
        ...

    def send(self, tensor: torch.Tensor, peer: int, tag: int, *, label: str) -> Pending:
        """Start sending; `tensor` must not change until the result is complete."""
        ...

    def recv(self, type: TensorType, peer: int, tag: int, *, label: str) -> Pending:
        """Post the receive of the message that `peer` sends with `tag`."""
        ...

    def start_all_reduce(
        self, tensor: torch.Tensor, ranks: Sequence[int], reduction: str, *, label: str
    ) -> Pending:
        """Start reducing `tensor` in place over `ranks` (`sum`, `avg`, `max` or `min`)."""
        ...

    def all_reduce(
        self, tensor: torch.Tensor, ranks: Sequence[int], reduction: str, *, label: str
    ) -> torch.Tensor:
        """Reduce `tensor` in place over `ranks` and return it."""
        ...

    def start_all_gather(
        self, tensor: torch.Tensor, ranks: Sequence[int], split: Split, *, label: str
    ) -> Pending:
        """Start joining the parts of all `ranks`; the result is the whole, contiguous."""
        ...

    def start_reduce_scatter(
        self, tensor: torch.Tensor, ranks: Sequence[int], split: Split, *, label: str
    ) -> Pending:
        """Start summing `tensor` over `ranks`; the result is this rank's part, contiguous."""
        ...

    def start_all_to_all(
        self,
        tensor: torch.Tensor,
        ranks: Sequence[int],
        *,
        gathered: Split,
        split: Split,
        label: str,
    ) -> Pending:
        """Start changing which dim is shared: from that of `gathered` to that of `split`.

        The result, contiguous, is whole in the dim of `gathered` and this rank's part in `split`'s.
        """
        ...

    def broadcast(
        self, tensor: torch.Tensor, source: int, ranks: Sequence[int], *, label: str
    ) -> torch.Tensor:
        """Overwrite `tensor` on all `ranks` by that of rank `source` and return it."""
        ...

    def barrier(self, *, label: str) -> None:
        """Wait until all ranks are here."""
        ...

    def is_capturable(self, ranks: Sequence[int]) -> bool:
        """Whether collectives over `ranks` can be recorded in a CUDA graph."""
        ...

    def group_name(self, ranks: Sequence[int]) -> str | None:
        """Name of the process group of `ranks` for torch's functional collectives, whose members
        stand in the order of `ranks`; None: there is none that takes this rank's tensors."""
        ...
