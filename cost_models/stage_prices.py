"""What the actions of every rank's stages cost, priced once for ranks alike."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

from ..compiler.ir.cluster import Cluster, DeviceType
from ..compiler.ir.program import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Program,
    StageProgram,
)
from .collectives import Network
from .exchanges import ActionCost, StageCosts, stage_costs
from .memory_curve import types_of
from .stages import StageSeconds, part_shares

__all__ = ["Computation", "StagePrices"]

Computation = Forward | Backward | BackwardInput | BackwardWeight


class StagePrices:
    """Costs of the actions of the stages of `programs` on the devices of `cluster`.

    Args:
        measured: by stage, seconds that replace the predicted ones.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        cluster: Cluster,
        measured: Mapping[int, StageSeconds],
    ) -> None:
        self.stages: dict[tuple[int, int], StageProgram] = {}  # by (rank, stage)
        self._cluster = cluster
        self._costs: dict[tuple[int, int], StageCosts] = {}
        self._shares: dict[tuple[int, int], tuple[float, ...]] = {}  # parts of weight gradients
        self._meets: dict[int, StageCosts] = {}  # by stage, of the first rank
        self._parts: dict[int, tuple[float, ...]] = {}  # likewise, shares of parts
        self._alike: dict[Hashable, tuple[StageProgram, StageCosts, tuple[float, ...]]] = {}
        for program in programs:
            for stage in program.stages:
                key = program.rank, stage.index
                self.stages[key] = stage
                self._costs[key], self._shares[key] = self._priced(
                    stage, cluster.type_of(program.rank), measured.get(stage.index)
                )

    def _priced(
        self, stage: StageProgram, device_type: DeviceType, measured: StageSeconds | None
    ) -> tuple[StageCosts, tuple[float, ...]]:
        """Costs and shares of parts; ranks with tensors and links alike are priced once. Shares are
        those of the stage's first rank, as ranks have to meet equally often in each part."""
        network = Network(self._cluster, stage.axes)
        links = tuple(network.ring(axis) for axis, _ in stage.axes)
        key = stage.index, device_type.name, links, types_of(stage)
        if key not in self._alike:
            costs = stage_costs(stage, device_type, network, measured, self._meets.get(stage.index))
            self._meets.setdefault(stage.index, costs)
            shares = self._parts.setdefault(stage.index, part_shares(stage, device_type, network))
            self._alike[key] = stage, costs, shares
        first, costs, shares = self._alike[key]
        pairs = zip(first.axes, stage.axes, strict=True)
        return costs.among({old: new for (_, old), (_, new) in pairs}), shares

    def of(self, rank: int, action: Computation) -> Iterator[ActionCost]:
        """Of `action` on `rank`: input gradients and weight gradients each."""
        costs = self._costs[rank, action.stage]
        if isinstance(action, Forward):
            yield costs.forward
        if isinstance(action, Backward | BackwardInput):
            yield costs.backward_input
        if isinstance(action, Backward | BackwardWeight):
            weight, shares = costs.backward_weight, self._shares[rank, action.stage]
            part = action.part if isinstance(action, BackwardWeight) else None
            yield weight if part is None else weight.scaled(shares[part])
