"""Places equally many operators on every device, in program order: what is to be beaten."""

from __future__ import annotations

import itertools

from ..compiler.ir.errors import InfeasibleError
from ..compiler.ir.plan import Plan
from ..cost_models.placement import device_loads, violations
from .context import Context
from .place import place_by_hand
from .placement.from_graph import state_workload

__all__ = ["equal_split"]

_MOST_TO_PERMUTE = 6


def equal_split(plan: Plan, context: Context) -> Plan | None:
    """The operators of `plan` in as many consecutive parts as there are devices, equal in number;
    None: every order of the devices breaks a constraint, or the best needs too much memory.

    Parts are on the devices in the order whose busiest device has least to do; of more than six
    devices, in that of the cluster.
    """
    statement = state_workload(
        context.graph,
        plan.cluster,
        rows=plan.batch_size // plan.num_microbatches,
        granularity=context.options.granularity,
        pins=context.options.device_pins,
        measured=context.options.measured,
    )
    parts, number = len(statement.devices), len(statement.units)
    devices = tuple(range(parts))
    orders = itertools.permutations(devices) if parts <= _MOST_TO_PERMUTE else [devices]
    placements = [tuple(order[i * parts // number] for i in range(number)) for order in orders]
    work = statement.workload
    legal = [placement for placement in placements if not violations(work, placement)]
    if not legal:
        return None
    best = min(legal, key=lambda found: max(load.total for load in device_loads(work, found)))
    try:
        return place_by_hand(plan, context, best, "equal numbers of operators")
    except InfeasibleError:
        return None
