"""Whether the planner chooses the fastest plan: every family of plans that fits, run and compared.

    python benchmarks/choice.py [--cases gpt2:2,bert:4] [--cluster cluster.toml] [--profile off]
        [--repeats 10] [--json out/choice.json]

A case is a model on some devices. The planner chooses a plan; beside it run the best plans that it
finds on every mesh of so many devices, and with every level of ZeRO where only the batch is shared.
All plans of a case are loaded at once, each on workers of its own, and take turns step by step, in
another order each time: what else the machine does hits them alike. The choice is right if no other
plan's median is more than 3 % less. What was predicted of all these plans goes into the JSON too,
in the form of `prediction.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _report import Pair, row_of, summary_of, table_of
from _runs import Case, Planned, Workers, add_options, by_devices, say
from _turns import run_in_turns
from _workloads import ON_CPU

from cutset.compiler.ir.text import print_program

CHOSEN = "auto"
CASES = "gpt2:2,llama:4,bert:2,t5:4,vit:2,mixtral:4,unet:2,resnet:4"
ENOUGH = 0.03  # slower than the fastest, by so much at most, is right
FAMILIES = {
    2: ("data=2", "tensor=2", "pipeline=2"),
    3: ("tensor=3", "pipeline=3"),
    4: (
        "data=4",
        "tensor=4",
        "pipeline=4",
        "data=2,tensor=2",
        "data=2,pipeline=2",
        "pipeline=2,tensor=2",
    ),
}
ZERO = (0, 1, 2, 3)


def main() -> int:
    options = _parse()
    began = time.perf_counter()
    cases = [
        Case(model, size, plan)
        for model, size in options.cases
        for plan in (CHOSEN, *(options.plans or _plans(size)))
    ]
    results, rows = [], []
    for own, workers, planners in by_devices(cases, options, "cpu"):
        for (model, size), group in itertools.groupby(own, key=_key):
            result, pairs = _compare(planners.plan(list(group)), workers, options)
            say(f"{model} on {size}: {time.perf_counter() - began:.0f} s")
            results.append({"model": model, "devices": size, **result})
            rows += [row_of(pair) for pair in pairs]
            _write(options.json, results, rows)
    print(table_of(rows))
    print("\n".join(f"{name}: {value}" for name, value in summary_of(rows).items()))
    print(_table(results))
    right = sum(result["is_right"] for result in results)
    print(f"right in {right} of {len(results)} cases; {time.perf_counter() - began:.0f} s")
    print(f"wrote {options.json}")
    return 0


def _write(path: Path, results: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """What is known after every case."""
    right = sum(result["is_right"] for result in results)
    found = {"right": right, "cases": results, "summary": summary_of(rows), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def _key(case: Case) -> tuple[str, int]:
    return case.model, case.devices


def _plans(devices: int) -> list[str]:
    plans = []
    for mesh in FAMILIES[devices]:
        levels = ZERO if mesh == f"data={devices}" else ()
        plans += [f"{mesh}:zero={level}" for level in levels] or [mesh]
    return plans


def _compare(
    planned: Sequence[Planned], workers: Workers, options: argparse.Namespace
) -> tuple[dict[str, Any], list[Pair]]:
    """The case's figures, and all its pairs; a plan that was found twice runs once."""
    pairs: dict[str, Pair] = {}
    same: dict[str, str] = {}
    for entry in planned:
        if entry.planned is not None:
            key = "".join(print_program(replace(p, plan_hash="")) for p in entry.planned.programs)
            pairs.setdefault(key, Pair(entry))
            same[entry.case.plan] = key
    run_in_turns(list(pairs.values()), workers, options.repeats)
    medians = {
        name: statistics.median(s for part in pairs[key].rounds for s in part.seconds)
        for name, key in same.items()
        if not pairs[key].error
    }
    others = {name: seconds for name, seconds in medians.items() if name != CHOSEN}
    fastest = min(others, key=others.__getitem__)
    behind = medians[CHOSEN] / medians[fastest] - 1.0
    chosen = pairs[same[CHOSEN]].planned.planned
    assert chosen is not None
    result = {
        "chosen": f"{chosen.plan.mesh or 'one device'}, ZeRO {chosen.plan.zero_level}, "
        f"{chosen.plan.num_microbatches} microbatches",
        "chosen_seconds": medians[CHOSEN],
        "fastest": fastest,
        "fastest_seconds": medians[fastest],
        "behind": behind,
        "is_right": behind <= ENOUGH,
        "medians": medians,
        "without_plan": {e.case.plan: e.error for e in planned if e.planned is None},
    }
    return result, [pair for pair in pairs.values() if not pair.error]


def _table(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'model':9} {'devices':>7} {'chosen':48} {'ms':>8} {'fastest of the others':26} "
        f"{'ms':>8} {'behind':>7}  right"
    ]
    for result in results:
        lines.append(
            f"{result['model']:9} {result['devices']:>7} {result['chosen']:48} "
            f"{result['chosen_seconds'] * 1e3:>8.1f} {result['fastest']:26} "
            f"{result['fastest_seconds'] * 1e3:>8.1f} {result['behind']:>+7.1%}  "
            f"{'yes' if result['is_right'] else 'no'}"
        )
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    def cases(text: str) -> list[tuple[str, int]]:
        pairs = [entry.split(":") for entry in text.split(",")]
        return sorted(((model, int(size)) for model, size in pairs), key=lambda case: case[1])

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", type=cases, default=CASES, help=f"of {', '.join(ON_CPU)}; default: {CASES}"
    )
    parser.add_argument(
        "--plans",
        type=lambda text: text.split(";"),
        help="beside the chosen one, separated by `;` (default: all families)",
    )
    parser.add_argument("--repeats", type=int, default=6, help="measured steps of each half")
    add_options(parser)
    parser.add_argument("--json", type=Path, default=Path("out/choice.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
