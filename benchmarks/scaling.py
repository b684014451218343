"""How much two workers gain over one, by plan: measured, predicted by the planner, simulated.

Trains one transformer on local gloo workers of one thread each: on one worker, on two that share
the batch (`data=2`), the tensors (`tensor=2`) or the layers (`pipeline=2`), and under the plan that
`auto_partition` chooses for two. Steps of all plans take turns, so that what else the machine does
hits them alike; medians are compared. Every plan must train to the same losses.
The simulator plays the programs at the planner's seconds of each stage.

The machine needs a free core for each worker: on fewer, the measured speed-up says nothing.
Predictions are those of typical cores, or of a cluster file, as `cutset calibrate` writes one; and
with `--profile blocks` of times of the plan's own blocks.

    python benchmarks/scaling.py [--steps 15] [--cluster cluster.toml] [--profile blocks]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from _transformer import Shape, Transformer, make_batch, token_loss

from cutset.compiler.api import auto_partition, plan_model
from cutset.compiler.parallel import Parallel
from cutset.cost_models import parse_devices, simulate
from cutset.runtime.launcher import launch_local

WORKERS = 2
MESHES: dict[str, tuple[int, str | None]] = {  # title -> devices, pinned mesh
    "one worker": (1, None),
    "data=2": (WORKERS, "data=2"),
    "tensor=2": (WORKERS, "tensor=2"),
    "pipeline=2": (WORKERS, "pipeline=2"),
    "chosen": (WORKERS, None),
}
BASE = "one worker"
LEARNING_RATE = 1e-3
WARM_UP = 2


@dataclass
class Run:
    """A plan at work and the seconds of its steps."""

    parallel: Parallel
    predicted_seconds: float
    simulated_seconds: float
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    options = _options()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    shape = Shape(num_layers=options.layers, width=options.width, length=64)
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        runs = {title: _start(title, shape, options, stack) for title in MESHES}
        _measure(runs, shape, options.steps)
    rows = [_row(title, run, runs[BASE]) for title, run in runs.items()]
    print(_table(rows))
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, load {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end")
    result = {
        "shape": asdict(shape),
        "steps": options.steps,
        "cores": cores,
        "load_before": load,
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {options.json}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=11, help="measured steps of each plan")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--cluster", default=f"cpu:{WORKERS}", help="devices or a cluster file")
    parser.add_argument("--profile", choices=("off", "blocks"), default="off")
    parser.add_argument("--json", type=Path, default=Path("out/scaling.json"))
    return parser.parse_args()


def _start(
    title: str, shape: Shape, options: argparse.Namespace, stack: contextlib.ExitStack
) -> Run:
    """Plan for the devices and mesh of `title`, and start workers, which `stack` will end."""
    devices, mesh = MESHES[title]
    batch = make_batch(shape)
    torch.manual_seed(0)
    model = Transformer(shape)
    whole = parse_devices(options.cluster)
    cluster = replace(whole, devices=whole.devices[:devices])
    planned = plan_model(
        model,
        cluster,
        example_inputs=batch,
        loss_fn=token_loss,
        mesh=mesh,
        profile=options.profile,
    )
    session = launch_local(len(planned.programs), threads_per_rank=1)
    stack.callback(session.close)
    parallel = auto_partition(
        model,
        cluster,
        example_inputs=batch,
        loss_fn=token_loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE),
        plan=planned.plan,
        session=session,
    )
    stack.callback(parallel.close)
    plan = planned.plan
    assert plan.prediction is not None
    simulated = simulate(planned.programs, cluster=plan.cluster, optimizer=plan.optimizer)
    return Run(parallel, plan.prediction.step_seconds, simulated.step_seconds)


def _measure(runs: dict[str, Run], shape: Shape, steps: int) -> None:
    """Train `steps` steps under each plan, in turns, each time in another order."""
    ids, targets = make_batch(shape)
    titles = list(runs)
    for step in range(WARM_UP + steps):
        losses = {}
        first = step % len(titles)
        for title in titles[first:] + titles[:first]:
            begin = time.perf_counter()
            losses[title] = float(runs[title].parallel.train_step(ids, targets))
            if step >= WARM_UP:
                runs[title].seconds.append(time.perf_counter() - begin)
        base = losses[BASE]
        for title, loss in losses.items():
            assert abs(loss - base) < 1e-3 * abs(base), f"step {step}, {title}: {loss}, not {base}"


def _row(title: str, run: Run, base: Run) -> dict[str, object]:
    plan = run.parallel.plan
    median = statistics.median(run.seconds)
    return {
        "plan": title,
        "mesh": str(plan.mesh) or "-",
        "workers": len(run.parallel.planned.programs),
        "zero": plan.zero_level,
        "microbatches": plan.num_microbatches,
        "step_seconds": median,
        "fastest_seconds": min(run.seconds),
        "predicted_seconds": run.predicted_seconds,
        "simulated_seconds": run.simulated_seconds,
        "speedup": statistics.median(base.seconds) / median,
        "predicted_speedup": base.predicted_seconds / run.predicted_seconds,
        "simulated_speedup": base.simulated_seconds / run.simulated_seconds,
    }


def _table(rows: list[dict[str, object]]) -> str:
    lines = [
        f"{'plan':11} {'mesh':11} {'ZeRO':>4} {'microbatches':>12} {'median ms':>9} "
        f"{'fastest':>8} {'predicted':>9} | {'speed-up':>8} {'predicted':>9} {'simulated':>9}"
    ]
    for row in rows:
        lines.append(
            f"{row['plan']:11} {row['mesh']:11} {row['zero']:>4} {row['microbatches']:>12} "
            f"{row['step_seconds'] * 1e3:>9.1f} {row['fastest_seconds'] * 1e3:>8.1f} "
            f"{row['predicted_seconds'] * 1e3:>9.1f} | {row['speedup']:>8.2f} "
            f"{row['predicted_speedup']:>9.2f} {row['simulated_speedup']:>9.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
