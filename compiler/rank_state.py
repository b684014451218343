"""Parameters, buffers and optimizer states as the ranks of a session have them.

Ranks hold whole tensors or rectangular parts of them. What is here knows who has today's value of
what, brings values to where they are needed next, and collects them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from ..runtime.optimizer import OptimizerSpec
from ..runtime.parts import updated_parts
from ..runtime.weights import StoredTensor
from .ir.program import Program, TensorShard
from .parts import first_holders, joined, part_of, shards_by_name
from .placement import Needs, Placement
from .ranks import Ranks
from .weights import Values, stored_part

__all__ = ["RankState", "States"]

_SENT_BYTES = 4 << 20  # of tensors in one message

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
        self, programs: Sequence[Program], needs: Needs, model: Mapping[str, Tensor], values: Values
    ) -> None:
        """Give every rank what its program reads and it lacks today's value of.

        Args:
            model: parameters and buffers as they were captured, perhaps on meta.
            values: of what no rank has today's value of.
        """
        self._parts.add(programs)
        missing = self._tensors.missing(needs.held)
        names = sorted({name for names in missing for name in names})
        if not names:
            return
        stored = {
            name: item
            for name in names
            if name not in self._tensors and (item := values.stored(name)) is not None
        }
        sent = [name for name in names if name not in stored]
        values.refuse_missing(name for name in sent if name not in self._tensors)
        parameters = sorted({name for name in names if isinstance(model[name], Parameter)})
        if stored:
            self._read(stored, missing, model, parameters)
        for group in _bounded(sent, model):
            moved = self._gather("tensors", [name for name in group if name in self._tensors])
            whole = {n: moved[n] if n in moved else values.tensor(n) for n in group}
            self._send(whole, missing, parameters)
        self._tensors.add(missing)

    def _send(
        self, whole: Mapping[str, Tensor], missing: list[list[str]], parameters: list[str]
    ) -> None:
        """Send ranks what they miss of these tensors."""
        is_here = bool(self._ranks.session.local_ranks)
        self._ranks.call(
            "set_tensors",
            [
                {
                    "tensors": {
                        name: part_of(whole[name], self._parts.held(name, rank))
                        for name in names
                        if name in whole
                    },
                    "parameters": parameters,
                    "shared": is_here,
                }
                for rank, names in enumerate(missing)
            ],
        )

    def _read(
        self,
        stored: Mapping[str, StoredTensor],
        missing: list[list[str]],
        model: Mapping[str, Tensor],
        parameters: list[str],
    ) -> None:
        """Have ranks read what they miss of these tensors."""
        self._ranks.call(
            "read_tensors",
            [
                {
                    "parts": {
                        name: stored_part(
                            stored[name], self._parts.held(name, rank), model[name].dtype
                        )
                        for name in names
                        if name in stored
                    },
                    "parameters": parameters,
                }
                for rank, names in enumerate(missing)
            ],
        )

    def forget_tensors(self) -> None:
        """Values of parameters and buffers elsewhere have changed: ranks have none of today's."""
        self._tensors = Placement()

    def configure_optimizer(self, programs: Sequence[Program], needs: Needs) -> None:
        """Give every rank the optimizer of what it trains, if one lacks it."""
        if not any(self._states.missing(needs.trained)):
            return
        state = self.optimizer_state()
        self._restored = None
        self._make_optimizers(programs)
        if state:
            self._load_states(state)
        self._states.add(needs.trained)

    def _make_optimizers(self, programs: Sequence[Program]) -> None:
        self._ranks.call(
            "configure_optimizer",
            [
                {
                    "spec": self._spec,
                    "parts": updated_parts(program),
                    "offloaded": list(program.offloaded),
                }
                for program in programs
            ],
        )

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

    def read_optimizer_state(
        self, programs: Sequence[Program], state: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Have ranks read the parts of the states of what they update, into new optimizers.

        Args:
            state: stored tensors, or plain data.
        """
        self._restored = None
        self._make_optimizers(programs)

        def part(name: str, value: Any, rank: int) -> Any:
            if not isinstance(value, StoredTensor):
                return value
            shard = self._parts.of(name, updates=True).get(rank)
            is_whole = shard is None or value.shape != shard.whole.shape
            return stored_part(value, None if is_whole else shard, value.dtype)

        self._ranks.call(
            "read_optimizer_state",
            [
                {
                    "state": {
                        name: {key: part(name, value, rank) for key, value in entries.items()}
                        for name, entries in state.items()
                        if rank in self._states.ranks(name)
                    }
                }
                for rank in range(self._ranks.num_ranks)
            ],
        )

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

    # -- where things are ----------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Parameters and buffers that a rank has today's value of."""
        return self._tensors.names

    @property
    def trained_names(self) -> list[str]:
        """Parameters that a rank has the optimizer of."""
        return self._states.names

    def holders(self, name: str, *, states: bool = False) -> dict[int, TensorShard | None]:
        """Ranks whose parts together are today's value, or its optimizer state, once."""
        ranks = (self._states if states else self._tensors).ranks(name)
        parts = self._parts.of(name, updates=states)
        return {rank: parts.get(rank) for rank in first_holders(ranks, parts)}

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


def _bounded(names: Iterable[str], tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Runs of `names`, each of few bytes or of one tensor."""
    group: list[str] = []
    num_bytes = 0
    for name in names:
        if group and num_bytes + tensors[name].nbytes > _SENT_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append(name)
        num_bytes += tensors[name].nbytes
    if group:
        yield group


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
            for shard in program.updates:
                self._updated.setdefault(shard.name, {})[program.rank] = shard

    def held(self, name: str, rank: int) -> TensorShard | None:
        return self._held.get(name, {}).get(rank)

    def of(self, name: str, updates: bool) -> Mapping[int, TensorShard]:
        """Parts by rank; a rank that is missing has the whole."""
        held = self._held.get(name, {})
        return {**held, **self._updated.get(name, {})} if updates else held


def _joined_states(parts: list[tuple[TensorShard | None, dict[str, Any]]]) -> dict[str, Any]:
    """State of one parameter from the states of its parts: tensors of their shapes are joined,
    everything else (counters) is the same on all ranks."""

    def join(key: str, shard: TensorShard | None, value: Any) -> Any:
        if shard is None or not isinstance(value, Tensor) or value.shape != shard.part.shape:
            return value
        return joined([(other, entries[key]) for other, entries in parts])

    shard, entries = parts[0]
    return {key: join(key, shard, value) for key, value in entries.items()}


def _state_part(value: Any, shard: TensorShard | None) -> Any:
    if shard is None or not isinstance(value, Tensor) or value.shape != shard.whole.shape:
        return value
    return part_of(value, shard).contiguous()
