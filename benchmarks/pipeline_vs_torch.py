"""Step time of one pipeline through cutset and through `torch.distributed.pipelining`.

Both train the same transformer with the same cut, schedule, microbatches and optimizer, over gloo,
each worker on one thread. Steps of the two alternate, so that what else the machine does hits
both; medians are compared. The *ideal* is the length of the schedule at the stage times that
cutset's workers measured in those steps, with no time for communication; the distance to
it is given without and with the optimizer's update, which every step ends with.

    python benchmarks/pipeline_vs_torch.py --stages 2 4 --steps 20
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from _torch_pipeline import SCHEDULES, TorchPipeline
from _transformer import Shape, Transformer, cut_points, make_batch, token_loss

from cutset.compiler.api import auto_partition
from cutset.compiler.ir.trace import Lane
from cutset.compiler.module_names import modules_of_stages
from cutset.compiler.parallel import Parallel
from cutset.compiler.timeline import ideal_seconds
from cutset.runtime.launcher import launch_local

LEARNING_RATE = 1e-3
WARM_UP = 3


def main() -> None:
    options = _options()
    shape = Shape(
        num_layers=options.layers,
        width=options.width,
        length=options.length,
        batch_size=options.batch,
    )
    rows = [_compare(shape, stages, options) for stages in options.stages]
    print(_table(rows))
    result = {"shape": asdict(shape), "schedule": options.schedule, "rows": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {options.json}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--schedule", choices=sorted(SCHEDULES), default="1f1b")
    parser.add_argument("--steps", type=int, default=25, help="measured steps of each system")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, default=Path("out/pipeline_vs_torch.json"))
    return parser.parse_args()


def _compare(shape: Shape, num_stages: int, options: argparse.Namespace) -> dict[str, object]:
    """One row: both systems with `num_stages` stages."""
    ids, targets = make_batch(shape)
    torch.manual_seed(0)
    model = Transformer(shape)
    cuts = cut_points(shape.num_layers, num_stages)
    with (
        TorchPipeline(
            shape,
            num_stages=num_stages,
            num_microbatches=options.microbatches,
            schedule=options.schedule,
            lr=LEARNING_RATE,
        ) as rival,
        auto_partition(
            model,
            num_stages,
            example_inputs=(ids, targets),
            loss_fn=token_loss,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE),
            num_stages=num_stages,
            num_microbatches=options.microbatches,
            schedule=options.schedule,
            constraints=_pins(cuts),
            session=launch_local(num_stages, threads_per_rank=1),
        ) as parallel,
    ):
        _check_cut(parallel, cuts)
        samples: dict[tuple[str, int], list[float]] = {}

        def recorded_step() -> float:
            parallel.record_trace()
            loss = float(parallel.train_step(ids, targets))
            _collect(parallel, samples)
            return loss

        ours, theirs = _interleave(recorded_step, rival.step, options.steps)
    assert parallel.plan.schedule is not None
    forward, backward, shares = _stage_seconds(samples, num_stages)
    ideal = ideal_seconds(parallel.plan.schedule, forward, backward, shares)
    update = statistics.median(samples["OptimizerStep", 0])
    return {
        "stages": num_stages,
        "microbatches": options.microbatches,
        "cutset_seconds": statistics.median(ours),
        "torch_seconds": statistics.median(theirs),
        "ratio": statistics.median(ours) / statistics.median(theirs),
        "ideal_seconds": ideal,
        "distance_to_ideal": statistics.median(ours) / ideal - 1.0,
        "optimizer_seconds": update,
        "distance_with_optimizer": statistics.median(ours) / (ideal + update) - 1.0,
        "stage_forward_seconds": forward,
        "stage_backward_seconds": backward,
        "cores": len(os.sched_getaffinity(0)),
    }


def _pins(cuts: Sequence[int]) -> dict[str, int]:
    """Constraints that put every block, and both ends, where the hand-cut stages have them."""
    last = len(cuts) - 2
    blocks = {
        f"blocks.{block}": stage
        for stage in range(last + 1)
        for block in range(cuts[stage], cuts[stage + 1])
    }
    return {"embed": 0, **blocks, "norm": last, "head": last}


def _check_cut(parallel: Parallel, cuts: Sequence[int]) -> None:
    graph = parallel.planned.captured.graph
    modules = modules_of_stages(graph, parallel.plan.stages)
    for stage, names in enumerate(modules):
        wanted = f"blocks.{cuts[stage]}-{cuts[stage + 1] - 1}"
        single = f"blocks.{cuts[stage]}"
        assert wanted in names or (single in names and cuts[stage] + 1 == cuts[stage + 1]), names


def _interleave(
    ours: Callable[[], float], theirs: Callable[[], float], steps: int
) -> tuple[list[float], list[float]]:
    """Seconds of `steps` steps of each, taken in turns; checks that they train alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(WARM_UP + steps):
        order = (0, 1) if step % 2 == 0 else (1, 0)
        losses = [0.0, 0.0]
        for system in order:
            begin = time.perf_counter()
            losses[system] = (ours, theirs)[system]()
            if step >= WARM_UP:
                times[system].append(time.perf_counter() - begin)
        assert abs(losses[0] - losses[1]) < 1e-2 * abs(losses[1]), f"step {step}: losses {losses}"
    return times


def _collect(parallel: Parallel, samples: dict[tuple[str, int], list[float]]) -> None:
    """Add the times of the last step's computations, by kind and stage."""
    for event in parallel.trace():
        match = re.match(r"([FBIW]) (\d+)\.|OptimizerStep", event.name)
        if match and event.lane is Lane.COMPUTE:
            key = match[1] or match[0], int(match[2] or 0)
            samples.setdefault(key, []).append(event.end_seconds - event.begin_seconds)


def _stage_seconds(
    samples: dict[tuple[str, int], list[float]], num_stages: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Median forward and backward seconds of a microbatch by stage, and the share of backward
    that computes input gradients."""
    median = {key: statistics.median(seconds) for key, seconds in samples.items()}

    def of(kind: str) -> list[float]:
        return [median.get((kind, stage), 0.0) for stage in range(num_stages)]

    inputs, whole = of("I"), of("B")
    backward = [sum(parts) for parts in zip(inputs, of("W"), whole, strict=True)]
    shares = [part / total for part, total in zip(inputs, backward, strict=True)]
    return tuple(of("F")), tuple(backward), tuple(shares)


def _table(rows: list[dict[str, object]]) -> str:
    lines = [
        "stages  microbatches  cutset ms  torch ms  cutset/torch  ideal ms  distance to ideal  "
        "with optimizer",
    ]
    for row in rows:
        note = "  (stages share cores)" if row["stages"] > row["cores"] else ""  # type: ignore[operator]
        lines.append(
            f"{row['stages']:>6}  {row['microbatches']:>12}  {row['cutset_seconds'] * 1e3:>9.1f}  "
            f"{row['torch_seconds'] * 1e3:>8.1f}  {row['ratio']:>12.3f}  "
            f"{row['ideal_seconds'] * 1e3:>8.1f}  {row['distance_to_ideal']:>17.1%}  "
            f"{row['distance_with_optimizer']:>14.1%}{note}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
