"""Operators of real models placed on unequal devices: exact, as busy as predicted, and faster.

    python benchmarks/placement_models.py [--models inception,clip] [--threads 4,2,1]
        [--devices cuda:1+cpu:1] [--dtype float64] [--json out/placement_models.json]

Inception v3 and a CLIP of transformers, both with random values, stream microbatches through CPU
workers with so many threads each, or through other devices of this machine.
Operators and messages are measured on every type of device, then placed for throughput. The plan is
run in turns with the best contiguous split into equal numbers of operators: the model's operators
in program order, as many in each part, parts on devices in the best order by the same figures.

`load` is what the busiest device does for one microbatch, in ms: its own working time, in which
waiting and other processes do not count. `rows/s` are of the fastest step of each, by the wall
clock, which other load on the machine slows; `busy` is the share of it for which the busiest device
of our plan worked. `bound/peak` is the least ratio of predicted memory of
a device to what it took.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from _inception import InceptionV3  # noqa: E402
from torch import nn  # noqa: E402

from cutset.compiler.api import auto_partition  # noqa: E402
from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule  # noqa: E402
from cutset.compiler.ir.fingerprint import fingerprint  # noqa: E402
from cutset.compiler.ir.graph import Mode  # noqa: E402
from cutset.compiler.ir.plan import Objective, Plan  # noqa: E402
from cutset.compiler.ir.trace import Lane  # noqa: E402
from cutset.compiler.planning import Planning  # noqa: E402
from cutset.compiler.profile_database import ProfileDatabase  # noqa: E402
from cutset.compiler.reference import flatten_outputs, infer_reference, relative_error  # noqa: E402
from cutset.cost_models import parse_devices  # noqa: E402
from cutset.passes.context import Context, PlanOptions  # noqa: E402
from cutset.passes.equal_split import equal_split  # noqa: E402

WITHIN = 0.15
SPEEDUP = 1.15
TOLERANCES = {"float32": 1e-5, "float64": 1e-10}
Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def _inception(rows: int) -> Made:
    return InceptionV3().eval(), (torch.randn(rows, 3, 171, 171),), {}


def _clip(rows: int) -> Made:
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    vision = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "image_size": 160,
        "patch_size": 16,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=256))
    ids = torch.randint(3, 4096, (rows, 64))
    images = torch.randn(rows, 3, 160, 160)
    return model.eval(), (), {"input_ids": ids, "pixel_values": images}


MODELS: dict[str, Callable[[int], Made]] = {"inception": _inception, "clip": _clip}


@dataclass(frozen=True)
class Run:
    """What one plan did.

    Args:
        busy: working seconds of every device for a microbatch, the least of all steps.
        seconds: of its steps.
        pieces: seconds of every piece by the wall clock, the medians of the last step.
    """

    busy: tuple[float, ...]
    seconds: tuple[float, ...]
    pieces: tuple[float, ...]


def main() -> int:
    options = _parse()
    cluster = (
        parse_devices(options.devices) if options.devices else _workers(options.threads.split(","))
    )
    rows = [_case(name, cluster, options) for name in options.models.split(",")]
    _print(rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0 if all(row["exact"] for row in rows) else 1


def _workers(threads: list[str]) -> Cluster:
    """CPU workers; their rates do not count, as operators are measured."""
    kinds = {
        text: DeviceType(
            name=f"cpu-{text}-threads",
            backend="cpu",
            memory_bytes=4 << 30,
            memory_bytes_per_second=1e10,
            flops_per_second=(("f32", 1e10),),
            threads=int(text),
        )
        for text in threads
    }
    devices = tuple(Device(i, kinds[text].name, "host") for i, text in enumerate(threads))
    link = LinkRule(Link(1e-4, 2e9))
    return Cluster(f"threads {','.join(threads)}", tuple(kinds.values()), devices, (link,), True)


def _case(name: str, cluster: Cluster, options: argparse.Namespace) -> dict[str, Any]:
    count = options.microbatches
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model, args, kwargs = MODELS[name](count * options.rows)
    model = model.to(dtype)
    args = tuple(_cast(item, dtype) for item in args)
    kwargs = {key: _cast(item, dtype) for key, item in kwargs.items()}
    planning = Planning(model, (args, kwargs), cluster, Mode.INFER, None, False, _say)
    captured = planning.captured(count)
    graph = captured.graph
    _say(f"{name}: place {len(graph.nodes)} nodes")
    pinned = PlanOptions(
        objective=Objective.THROUGHPUT,
        num_microbatches=count,
        placement_seconds=options.time_limit,
    )
    with tempfile.TemporaryDirectory() as nothing_known:
        database = ProfileDatabase(Path(nothing_known))
        placed, measured = planning.placed_by_measuring(captured, pinned, database)
    context = Context(graph, replace(pinned, measured=measured))
    placed = replace(placed, fingerprint=fingerprint(graph, type(model).__name__))
    equal = equal_split(placed, context)
    assert equal is not None, "devices do not differ in memory or operators"
    call = {"example_inputs": args, "example_kwargs": kwargs, "mode": "infer", "check": False}
    with (
        auto_partition(model, cluster, plan=placed, **call) as ours,
        auto_partition(model, cluster, plan=equal, **call) as theirs,
    ):
        outputs = flatten_outputs(ours(*args, **kwargs))
        theirs(*args, **kwargs)
        _say(f"{name}: {options.steps} steps of each in turns")
        runs = _in_turns((ours, theirs), args, kwargs, options.steps)
        ours.measure_memory()
        ours(*args, **kwargs)
        peaks = ours.peak_memory_bytes()
    error = relative_error(outputs, infer_reference(model, (args, kwargs), count))
    row = _row(name, (placed, equal), runs, error.value, len(graph.nodes), options.dtype)
    whole = {kind: sum(seconds) for kind, seconds in measured.nodes.items()}
    return row | _memory(placed, peaks) | {"whole_model": whole, "rows": options.rows}


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _predicted(plan: Plan) -> float:
    assert plan.prediction is not None
    return max(load.total_seconds for load in plan.prediction.loads)


def _in_turns(
    parallels: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any], steps: int
) -> list[Run]:
    busy: list[list[list[float]]] = [[] for _ in parallels]
    seconds: list[list[float]] = [[] for _ in parallels]
    for _ in range(steps):
        for index, parallel in enumerate(parallels):
            parallel.record_trace()
            begin = time.perf_counter()
            parallel(*args, **kwargs)
            seconds[index].append(time.perf_counter() - begin)
            count = parallel.plan.num_microbatches
            busy[index].append([work / count for work in parallel.busy_seconds()])
    return [
        Run(tuple(map(min, zip(*rows, strict=True))), tuple(own), _piece_seconds(parallel))
        for rows, own, parallel in zip(busy, seconds, parallels, strict=True)
    ]


def _piece_seconds(parallel: Any) -> tuple[float, ...]:
    """Of every stage of the plan, from the trace of the last step."""
    found: dict[int, list[float]] = defaultdict(list)
    for event in parallel.trace():
        if event.lane is Lane.COMPUTE:
            stage = int(event.name.removeprefix("F ").partition(".")[0])
            found[stage].append(event.end_seconds - event.begin_seconds)
    return tuple(statistics.median(found[index]) for index in sorted(found))


def _row(
    name: str, plans: tuple[Plan, Plan], runs: list[Run], error: float, nodes: int, dtype: str
) -> dict[str, Any]:
    placed, equal = plans
    assert placed.prediction is not None and placed.certificate is not None
    loads = [load.total_seconds for load in placed.prediction.loads]
    busiest = max(range(len(loads)), key=loads.__getitem__)
    measured = max(runs[0].busy)
    rates = [plan.batch_size / min(run.seconds) for plan, run in zip(plans, runs, strict=True)]
    return {
        "model": name,
        "cluster": placed.cluster.name,
        "nodes": nodes,
        "pieces": len(placed.stages),
        "equal_pieces": len(equal.stages),
        "gap": placed.certificate.gap,
        "solver_seconds": placed.certificate.solver_seconds,
        "max_relative_error": error,
        "exact": error < TOLERANCES[dtype],
        "predicted_loads": loads,
        "measured_loads": list(runs[0].busy),
        "busiest_predicted": loads[busiest],
        "busiest_measured": measured,
        "off": measured / loads[busiest] - 1.0,
        "within": abs(measured / loads[busiest] - 1.0) <= WITHIN,
        "equal_busiest_predicted": _predicted(equal),
        "equal_busiest_measured": max(runs[1].busy),
        "load_ratio": max(runs[1].busy) / measured,
        "rows_per_second": rates[0],
        "equal_rows_per_second": rates[1],
        "speedup": rates[0] / rates[1],
        "fast_enough": rates[0] / rates[1] >= SPEEDUP,
        **_course(placed, runs[0], ""),
        **_course(equal, runs[1], "equal_"),
    }


def _course(plan: Plan, run: Run, prefix: str) -> dict[str, Any]:
    """What became of a plan, piece by piece, to see where a prediction fails."""
    assert plan.prediction is not None
    loads = plan.prediction.loads
    predicted = plan.prediction.stage_forward_seconds
    found = {
        "busiest_share": max(run.busy) * plan.num_microbatches / min(run.seconds),
        "step_seconds": list(run.seconds),
        "predicted_step_seconds": plan.prediction.step_seconds,
        "predicted_compute": [load.compute_seconds for load in loads],
        "predicted_communication": [load.communication_seconds for load in loads],
        "busy": list(run.busy),
        "piece_devices": [stage.device for stage in plan.stages],
        "piece_nodes": [len(stage.nodes) for stage in plan.stages],
        "piece_predicted": list(predicted),
        "piece_measured": list(run.pieces),
    }
    return {f"{prefix}{key}": value for key, value in found.items()}


def _memory(plan: Plan, peaks: list[int]) -> dict[str, Any]:
    """Bound of memory and measured peak, where the bound is closest."""
    assert plan.prediction is not None
    needs = {need.device: need.bound_bytes for need in plan.prediction.memory}
    pairs = [(needs[rank], peak) for rank, peak in enumerate(peaks) if rank in needs]
    return {
        "memory_bounds": [bound for bound, _ in pairs],
        "memory_peaks": [peak for _, peak in pairs],
        "bound_over_peak": min(bound / peak for bound, peak in pairs),
    }


_COLUMNS: tuple[tuple[str, str, Callable[[dict[str, Any]], object]], ...] = (
    ("model", "10", lambda row: row["model"]),
    ("nodes", "5", lambda row: row["nodes"]),
    ("pieces", "6", lambda row: row["pieces"]),
    ("gap", "6.1%", lambda row: row["gap"]),
    ("error", "8.1e", lambda row: row["max_relative_error"]),
    ("load", "7.2f", lambda row: 1e3 * row["busiest_predicted"]),
    ("measured", "8.2f", lambda row: 1e3 * row["busiest_measured"]),
    ("off", "6.1%", lambda row: row["off"]),
    ("equal", "7.2f", lambda row: 1e3 * row["equal_busiest_predicted"]),
    ("measured", "8.2f", lambda row: 1e3 * row["equal_busiest_measured"]),
    ("ratio", "5.2f", lambda row: row["load_ratio"]),
    ("rows/s", "6.2f", lambda row: row["rows_per_second"]),
    ("equal", "6.2f", lambda row: row["equal_rows_per_second"]),
    ("speedup", "7.2f", lambda row: row["speedup"]),
    ("busy", "5.0%", lambda row: row["busiest_share"]),
    ("bound/peak", "10.2f", lambda row: row["bound_over_peak"]),
)


def _print(rows: list[dict[str, Any]]) -> None:
    widths = [int(re.match(r"\d+", form)[0]) for _, form, _ in _COLUMNS]
    heads = [f"{name:>{width}}" for (name, _, _), width in zip(_COLUMNS, widths, strict=True)]
    print(" ".join(heads))
    for row in rows:
        print(" ".join(format(value(row), form) for _, form, value in _COLUMNS))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _threads() -> str:
    """Three workers, as unequal as the cores of this machine allow, with one to spare."""
    cores = os.cpu_count() or 1
    return "4,2,1" if cores >= 8 else "2,1,1" if cores >= 5 else "1,1,1"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument(
        "--threads",
        default=_threads(),
        help="of each CPU worker (default: unequal, if cores allow)",
    )
    parser.add_argument("--devices", help="e.g. cuda:1+cpu:1 or a cluster file, instead of workers")
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="float32")
    parser.add_argument("--microbatches", type=int, default=24)
    parser.add_argument("--rows", type=int, default=1, help="of a microbatch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--time-limit", type=float, default=20.0, help="seconds for placing")
    parser.add_argument("--json", type=Path, default=Path("out/placement_models.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
