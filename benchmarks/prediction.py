"""Predicted against measured: seconds of a step and peak memory, over models and plans.

    python benchmarks/prediction.py [--devices 2,4] [--models gpt2,t5] [--plans data=2,pipeline=2]
        [--cluster cluster.toml] [--profile off] [--repeats 8] [--json out/prediction.json]

Each pair of a model and a plan is planned, its programs are simulated, and it trains on workers of
one thread each; medians of warm steps count. Pairs of one model take turns, in two rounds: the
difference between the two is the noise of the machine, which no prediction can be better than.
So that errors of prices are not taken for what the machine does, `busy` compares the time that the
threads which compute had of their processors, waiting and time taken by others apart.
Memory is the peak of every rank in one step, by the allocator's events, against the planner's
bound. Prints a table and writes it as JSON, with a picture beside it.

Costs are those of a cluster file, or of these devices, which are calibrated first. On CPUs each
worker has a core of its own where there are as many again for threads that carry messages.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from _cores import stolen
from _report import Pair, row_of, summary_of, table_of, write
from _runs import VARIANTS, Case, Workers, add_options, by_devices, say
from _turns import run_in_turns
from _workloads import ON_CPU, ON_CUDA

PLANS = {  # by number of devices: for every model, then for some in turn
    1: (("auto",), ()),
    2: (("pipeline=2", "data=2", "tensor=2"), ()),
    4: (
        (),
        (
            ("pipeline=4", "data=2,tensor=2"),
            ("data=2,pipeline=2", "data=4:zero=2"),
            ("pipeline=2,tensor=2", "data=4"),
            ("pipeline=4:schedule=gpipe", "data=4:zero=3"),
        ),
    ),
}


def main() -> int:
    options = _parse()
    began = time.perf_counter()
    pairs: list[Pair] = []
    loads = [os.getloadavg()[0]]
    before = stolen()
    for cases, workers, planners in by_devices(_cases(options), options, options.backend):
        for alike in _groups(cases, options.backend):
            group = [Pair(entry, error=entry.error) for entry in planners.plan(alike)]
            pairs += group
            _measure([pair for pair in group if not pair.error], workers, options)
            rows = [row_of(pair) for pair in pairs if pair.peaks]
            write(options.json, rows, summary_of(rows) if rows else {}, {})
    loads.append(os.getloadavg()[0])
    rows = [row_of(pair) for pair in pairs if not pair.error]
    print(table_of(rows))
    for pair in pairs:
        if pair.error:
            print(f"{pair.title}: {pair.error.splitlines()[0]}")
    summary = summary_of(rows) if rows else {}
    summary |= {"taken by other machines on this host": _taken(before, stolen())}
    summary |= {"cores": len(os.sched_getaffinity(0)), "loads": loads, "profile": options.profile}
    summary["seconds"] = time.perf_counter() - began
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))
    failed = {pair.title: pair.error for pair in pairs if pair.error}
    write(options.json, rows, summary, failed)
    print(f"wrote {options.json} and its picture")
    return 0 if rows else 1


def _taken(before: tuple[float, float], after: tuple[float, float]) -> float:
    """The share of processor time that virtual machines beside this one had of what it wanted."""
    wanted = after[1] - before[1]
    return (after[0] - before[0]) / wanted if wanted else 0.0


def _groups(cases: Sequence[Case], backend: str) -> Iterator[list[Case]]:
    """Those that are planned, and then take turns: of one model on CPUs; on GPUs each alone, as it
    fills them. What is measured for a plan is so measured shortly before its steps."""
    if backend == "cuda":
        yield from ([case] for case in cases)
        return
    for _, group in itertools.groupby(cases, key=lambda case: case.model):
        yield list(group)


def _measure(pairs: Sequence[Pair], workers: Workers, options: argparse.Namespace) -> None:
    """Variants of one plan do not take turns on GPUs either."""
    for group in [pairs] if options.backend == "cpu" else [[pair] for pair in pairs]:
        if group:
            began = time.perf_counter()
            run_in_turns(group, workers, options.repeats)
            say(f"{group[0].title} and so on: ran in {time.perf_counter() - began:.1f} s")


def _cases(options: argparse.Namespace) -> list[Case]:
    cases = []
    for place, model in enumerate(options.models):
        for devices in options.devices:
            plans = options.plans
            if plans is None:
                always, turns = PLANS[devices]
                plans = always + (turns[place % len(turns)] if turns else ())
            cases += [
                Case(model, devices, plan, variant)
                for plan in plans
                for variant in options.variants
            ]
    return cases


def _parse() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--devices", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--models", type=names, help="comma-separated")
    parser.add_argument(
        "--plans",
        type=lambda text: tuple(text.split(";")),
        help="separated by `;`: a mesh or auto, then pinned decisions, as data=4:zero=2",
    )
    parser.add_argument("--repeats", type=int, default=8, help="measured steps of a round")
    parser.add_argument("--variants", type=names, help=", ".join(VARIANTS))
    add_options(parser)
    parser.add_argument("--json", type=Path, default=Path("out/prediction.json"))
    options = parser.parse_args()
    on_cpu = options.backend == "cpu"
    options.devices = options.devices or ([2, 4] if on_cpu else [1])
    options.models = options.models or list(ON_CPU if on_cpu else ON_CUDA)
    options.variants = options.variants or (["plain"] if on_cpu else ["eager", "compiled"])
    if not on_cpu and torch.cuda.device_count() < max(options.devices):
        parser.exit(0, f"this machine has {torch.cuda.device_count()} CUDA devices\n")
    return options


if __name__ == "__main__":
    sys.exit(main())
