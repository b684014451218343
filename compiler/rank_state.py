"""Parameters, buffers and optimizer states as the ranks of a session have them.

Ranks hold whole tensors or rectangular parts of them. What is here knows who has today's value of
what, brings values to where they are needed next, and collects them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..runtime.optimizer import OptimizerSpec
from .ir.program import Program, TensorShard
from .parts import first_holders, joined, part_of, shards_by_name
from .placement import Needs, Placement
from .ranks import Ranks

__all__ = ["RankState", "States"]

States = dict[str, dict[str, Any]]
"""State of an optimizer: by parameter name, by key."""


class RankState:
    """See the module docstring.

    Args:
        spec: of the optimizer.
    """

    def __init__(self, ranks: Ranks, spec: OptimizerSpec) -> None:
        self._ranks = ranks
        self._spec = spec
        self._tensors = Placement()  # parameters and buffers
        self._states = Placement()  # states of optimizers, by parameter
        self._parts = _Parts()
        self._restored: States | None = None

    # -- to the ranks --------------------------------------------------------------------------

    def place(
        self,
        programs: Sequence[Program],
        needs: Needs,
        source: Mapping[str, Tensor],
        parameters: list[str],
    ) -> None:
        """Send every rank what its program reads and it lacks today's value of.

        Args:
            source: values of what no rank has today's value of.
            parameters: names of the parameters among what is needed.
        """
        self._parts.add(programs)
        missing = self._tensors.missing(needs.held)
        if not any(missing):
            return
        moved = sorted({n for names in missing for n in names if n in self._tensors})
        values = {**source, **self._gather("tensors", moved)}
        self._ranks.call(
            "set_tensors",
            [
                {
                    "tensors": {
                        name: part_of(values[name], self._parts.held(name, rank)) for name in names
                    },
                    "parameters": parameters,
                }
                for rank, names in enumerate(missing)
            ],
        )
        self._tensors.add(missing)

    def forget_tensors(self) -> None:
        """Values of parameters and buffers elsewhere have changed: ranks have none of today's."""
        self._tensors = Placement()

    def configure_optimizer(self, needs: Needs) -> None:
        """Give every rank the optimizer of what it trains, if one lacks it."""
        if not any(self._states.missing(needs.trained)):
            return
        state = self.optimizer_state()
        self._restored = None
        self._ranks.call("configure_optimizer", {"spec": self._spec})
        if state:
            self._load_states(state)
        self._states.add(needs.trained)

    def changed(self, changed: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """A training step gave these new values, on these ranks only."""
        changed = list(changed)
        self._tensors.change(changed)
        self._states.change(entry for entry in changed if entry[0] in self._states)

    def load_optimizer_state(self, state: States) -> None:
        """Ranks take this state now, or when they get their optimizers."""
        if self._is_configured:
            self._load_states(state)
        else:
            self._restored = state

    def _load_states(self, state: States) -> None:
        """Give every rank the parts of the states of what it updates."""
        ranks = range(self._ranks.num_ranks)
        parts = [
            {
                name: {
                    key: _state_part(value, self._parts.of(name, updates=True).get(rank))
                    for key, value in entries.items()
                }
                for name, entries in state.items()
            }
            for rank in ranks
        ]
        self._ranks.call("load_optimizer_state", [{"state": entry} for entry in parts])

    @property
    def _is_configured(self) -> bool:
        """Whether the ranks have optimizers: they get them before the first training step."""
        return bool(self._states)

    # -- from the ranks ------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Today's values of all that ranks hold, whole, on the CPU."""
        return self._gather("tensors", self._tensors.names)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients that the ranks have kept, whole, on the CPU."""
        return self._gather("gradients", self._tensors.names, updates=True)

    def optimizer_state(self) -> States:
        """Optimizer state by parameter name, on the CPU."""
        if self._restored is not None or not self._is_configured:
            return dict(self._restored or {})
        replies = self._ranks.call("optimizer_state")
        found: dict[str, list[tuple[TensorShard | None, dict[str, Any]]]] = {}
        for rank, reply in enumerate(replies):
            for name, entries in tree_map_only(Tensor, Tensor.cpu, reply).items():
                if rank in self._states.ranks(name):
                    shard = self._parts.of(name, updates=True).get(rank)
                    found.setdefault(name, []).append((shard, entries))
        return {name: _joined_states(parts) for name, parts in found.items()}

    def _gather(self, method: str, names: list[str], *, updates: bool = False) -> dict[str, Tensor]:
        """Named tensors, whole, each part from the lowest rank that has today's value.

        Args:
            updates: the ranks have the parts that they update, not those that they hold.
        """
        if not names:
            return {}
        sources = {
            name: set(first_holders(self._tensors.ranks(name), self._parts.of(name, updates)))
            for name in names
        }
        arguments = [
            {"names": [name for name in names if rank in sources[name]]}
            for rank in range(self._ranks.num_ranks)
        ]
        replies = self._ranks.call(method, arguments)
        is_here = bool(self._ranks.session.local_ranks)  # then replies are the rank's own tensors
        found: dict[str, list[tuple[TensorShard | None, Tensor]]] = {}
        for rank, reply in enumerate(replies):
            for name, tensor in reply.items():
                part = tensor.detach().to("cpu", copy=is_here)
                found.setdefault(name, []).append((self._parts.of(name, updates).get(rank), part))
        return {name: joined(parts) for name, parts in found.items()}


class _Parts:
    """Which parts of parameters and buffers ranks hold and update, by name and rank.

    They are the same in all variants, as all hold parameters as the plan says.
    """

    def __init__(self) -> None:
        self._held: dict[str, dict[int, TensorShard]] = {}
        self._updated: dict[str, dict[int, TensorShard]] = {}

    def add(self, programs: Iterable[Program]) -> None:
        for program in programs:
            for name, shard in shards_by_name(program).items():
                self._held.setdefault(name, {})[program.rank] = shard
            for shard in (*program.shards, *program.updates):
                self._updated.setdefault(shard.name, {})[program.rank] = shard

    def held(self, name: str, rank: int) -> TensorShard | None:
        return self._held.get(name, {}).get(rank)

    def of(self, name: str, updates: bool) -> Mapping[int, TensorShard]:
        """Parts by rank; a rank that is missing has the whole."""
        return (self._updated if updates else self._held).get(name, {})


def _joined_states(parts: list[tuple[TensorShard | None, dict[str, Any]]]) -> dict[str, Any]:
    """State of one parameter from the states of its parts: tensors of their shapes are joined,
    everything else (counters) is the same on all ranks."""

    def join(key: str, shard: TensorShard | None, value: Any) -> Any:
        is_part = isinstance(value, Tensor) and shard is not None
        if not is_part or tuple(value.shape) != shard.part.shape:
            return value
        return joined([(other, entries[key]) for other, entries in parts])

    shard, entries = parts[0]
    return {key: join(key, shard, value) for key, value in entries.items()}


def _state_part(value: Any, shard: TensorShard | None) -> Any:
    is_whole = isinstance(value, Tensor) and shard is not None
    if not is_whole or tuple(value.shape) != shard.whole.shape:
        return value
    return part_of(value, shard).contiguous()
