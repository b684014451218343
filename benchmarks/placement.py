"""Operator placement: value, bound, gap, seconds and memory of methods on many graphs, as a table.

    python benchmarks/placement.py                                  # small generated graphs
    python benchmarks/placement.py FOLDER FILE.json --methods auto,greedy --objectives latency
    python benchmarks/placement.py --scale                          # 1,000 to 20,000 operators

A graph is a workload file, a folder of them, or FAMILY:OPERATORSxDEVICES, made by a generator:
series-parallel, layered, transformer, inception; or FILE.json@LAYERSxDEVICES, a public file of
operators with one of its layers repeated (`_repeat.py`). Each run has a process of its own and
starts from nothing; seconds are those of the search, peak memory that of the process.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parents[1]
SMALL = ("transformer:60x4", "inception:80x4", "series-parallel:60x3", "layered:60x3")
SCALE = {  # graph: seconds
    f"{family}:{size}x{devices}": limit
    for size, devices, limit in ((1000, 16, 10), (5000, 32, 30), (20000, 64, 120))
    for family in ("series-parallel", "layered")
}
METHODS = ("auto", "exact", "greedy", "interval-dp", "local-search", "balanced-cut")
SLACK = 120  # seconds beyond the limit after which a run counts as hung


@dataclass(frozen=True)
class Run:
    """One method on one graph."""

    graph: str
    method: str
    objective: str
    contiguous: bool
    seconds: float


def main() -> int:
    options = _parse()
    if options.one:
        print(json.dumps(_place(Run(**json.loads(options.one)))))
        return 0
    header = f"{'graph':34} {'objective':10} {'pieces':6} {'method':12} {'value':>11} {'bound':>11}"
    print(f"{header} {'gap':>8} {'seconds':>8} {'CPU s':>7} {'MiB':>6}")
    rows = []
    for run in _runs(options):
        row = _in_own_process(run)
        rows.append(row)
        print(_line(row), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


def _runs(options: argparse.Namespace) -> Iterator[Run]:
    limits = dict(SCALE) if options.scale else {}
    for graph in _graphs(options.graphs) or list(limits or SMALL):
        for objective in options.objectives.split(","):
            for pieces in options.pieces.split(","):
                for method in options.methods.split(","):
                    contiguous = pieces == "one"
                    if method == "balanced-cut" and contiguous:
                        continue
                    seconds = limits.get(graph, options.time_limit)
                    yield Run(graph, method, objective, contiguous, seconds)


def _graphs(names: list[str]) -> list[str]:
    found = []
    for name in names:
        if Path(name).is_dir():
            found += sorted(map(str, Path(name).rglob("*.json")))
        else:
            found.append(name)
    return found


def _in_own_process(run: Run) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps(run.__dict__)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=run.seconds + SLACK)
    except subprocess.TimeoutExpired:
        return {**run.__dict__, "error": f"not back {SLACK} s after its time limit"}
    if done.returncode:
        return {**run.__dict__, "error": (done.stderr.strip() or "no message").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def _place(run: Run) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    from _graphs import generate
    from _repeat import with_layers

    from cutset.compiler.ir.errors import CutsetError
    from cutset.compiler.workload_json import WorkloadFile, load_workload, workload_from_json
    from cutset.passes.placement.methods import place

    made = re.fullmatch(r"([a-z-]+):(\d+)x(\d+)", run.graph)
    deeper = re.fullmatch(r"(.+\.json)@(\d+)x(\d+)", run.graph)
    if deeper:
        document = json.loads(Path(deeper[1]).read_text(encoding="utf-8"))
        document = with_layers(document, int(deeper[2]), int(deeper[3]))
        file = workload_from_json(json.dumps(document), source=run.graph)
    elif made:
        file = WorkloadFile(run.graph, generate(made[1], int(made[2]), int(made[3])), public=False)
    else:
        file = load_workload(run.graph)
    begin, cpu = time.perf_counter(), time.process_time()
    try:
        result = place(
            file.view(run.objective),
            objective=run.objective,
            contiguous=run.contiguous,
            method=run.method,
            time_limit=run.seconds,
            gap=1e-4,
        )
    except CutsetError as error:
        return {**run.__dict__, "error": error.cause}
    return {
        **run.__dict__,
        "operators": len(file.workload.operators),
        "value": result.value,
        "lower_bound": result.lower_bound,
        "gap": result.gap,
        "search_seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "found_by": result.method,
    }


def _line(row: dict[str, Any]) -> str:
    name = row["graph"] if ":" in row["graph"] else "/".join(Path(row["graph"]).parts[-2:])
    pieces = "one" if row["contiguous"] else "many"
    start = f"{name:34} {row['objective']:10} {pieces:6} {row['method']:12}"
    if "error" in row:
        return f"{start} {row['error']}"
    return (
        f"{start} {row['value']:11.5g} {row['lower_bound']:11.5g} {row['gap']:8.2%} "
        f"{row['search_seconds']:8.1f} {row['cpu_seconds']:7.1f} {row['peak_mib']:6.0f}"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graphs", nargs="*", metavar="GRAPH", help="see above")
    parser.add_argument("--methods", default="auto,greedy,interval-dp,local-search,balanced-cut")
    parser.add_argument("--objectives", default="throughput,latency")
    parser.add_argument("--pieces", default="one,many", help="one a device, many, or both")
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds a run")
    parser.add_argument("--scale", action="store_true", help="large graphs, with their own limits")
    parser.add_argument("--json", type=Path, help="write JSON here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for choice in ("methods", "objectives", "pieces"):
        known = {
            "methods": METHODS,
            "objectives": ("throughput", "latency"),
            "pieces": ("one", "many"),
        }[choice]
        for word in getattr(options, choice).split(","):
            if word not in known:
                parser.error(f"--{choice}: {word!r} is none of {', '.join(known)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
