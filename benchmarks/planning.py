"""From a model on `meta` to a verified plan: seconds, memory and gap, for models too big to hold.

    python benchmarks/planning.py [--cases 8b,8b-mesh8] [--json out/planning.json]

Llama-3 in bf16, training, each case in a process of its own. `8b` and `70b` are cut into pipeline
stages only, one a device; `8b-mesh8` shards inside one stage; `8b-64` searches every mesh of 64
devices with its layouts. CPU seconds exclude importing torch and building the model on `meta`; they
exceed wall seconds where a solver uses threads. Variables are those of the largest integer program
over layouts.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).absolute().parents[1]
LLAMA = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


@dataclass(frozen=True)
class Case:
    """A model, the devices it is planned for, its global batch, what is pinned, and the most CPU
    seconds that planning may take."""

    model: str
    devices: str
    rows: int
    tokens: int
    pinned: dict[str, Any]
    limit: float


CASES = {
    "8b": Case("8b", "h100:8", 64, 2048, {"num_stages": 8}, 20.0),
    "70b": Case("70b", "h100:64", 256, 2048, {"num_stages": 64}, 40.0),
    "8b-mesh8": Case("8b", "h100:8", 16, 8192, {"mesh": "tensor=8"}, 12.0),
    "8b-64": Case("8b", "h100:64", 16, 8192, {}, 20.0),
}
PHASES = {  # by the pass or line that starts it; what is not named here follows the stages
    "capture": "capture",
    "pass mesh": "mesh and layouts",
    "generate": "codegen and verify",
}
STAGES = "stages"


def main() -> int:
    options = _parse()
    if options.one:
        print(json.dumps(_plan(options.one)))
        return 0
    rows = [_in_own_process(name) for name in options.cases.split(",")]
    print(
        f"{'case':9} {'devices':8} {'wall s':>7} {'CPU s':>7} {'limit':>6} {'GiB':>5} {'gap':>8} "
        f"{'variables':>9} {'mesh':24} {'microbatches':>12}  phases (CPU s)"
    )
    for row in rows:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["phases"].items())
        print(
            f"{row['case']:9} {row['devices']:8} {row['wall_seconds']:7.1f} "
            f"{row['cpu_seconds']:7.1f} {row['limit_cpu_seconds']:6.0f} {row['peak_gib']:5.2f} "
            f"{row['gap']:8.2%} {row['layout_variables']:9} {row['mesh']:24} "
            f"{row['microbatches']:12}  {phases}"
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


def _in_own_process(name: str) -> dict:
    command = [sys.executable, "-W", "ignore", __file__, "--one", name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if result.returncode:
        sys.exit(f"{name}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def _plan(name: str) -> dict:
    sys.path.insert(0, str(ROOT))
    import torch

    from cutset.compiler.api import plan_model
    from cutset.passes.layouts import choose

    case = CASES[name]
    model = _llama(case.model)
    ids, labels = (
        torch.zeros(case.rows, case.tokens, dtype=torch.long, device="meta") for _ in range(2)
    )
    sizes = _record_variables(choose)
    marks: list[tuple[str, float]] = []
    wall, cpu = time.perf_counter(), time.process_time()
    planned = plan_model(
        model,
        case.devices,
        example_kwargs={"input_ids": ids, "labels": labels},
        progress=lambda line: marks.append((line, time.process_time())),
        **case.pinned,
    )
    end = time.process_time()
    plan = planned.plan
    assert plan.certificate is not None
    return {
        "case": name,
        "devices": case.devices,
        "limit_cpu_seconds": case.limit,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": end - cpu,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "gap": plan.certificate.gap,
        "objective_seconds": plan.certificate.objective,
        "layout_programs": len(sizes),
        "layout_variables": max(sizes, default=0),
        "mesh": str(plan.mesh),
        "zero": plan.zero_level,
        "stages": len(plan.stages),
        "microbatches": plan.num_microbatches,
        "phases": _phases(marks, end),
    }


def _llama(size: str) -> Any:
    """The model on `meta`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **LLAMA[size],
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        use_cache=False,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).bfloat16()


def _record_variables(choose: ModuleType) -> list[int]:
    """A list that grows by the size of each integer program over layouts, as they are solved."""
    sizes: list[int] = []
    plain = choose.solve

    def recorded(*args: Any) -> Any:
        solved = plain(*args)
        if solved is not None:
            sizes.append(solved.statistics.num_variables)
        return solved

    choose.solve = recorded  # type: ignore[attr-defined]
    return sizes


def _phases(marks: list[tuple[str, float]], end: float) -> dict[str, float]:
    """CPU seconds by phase; lines that do not start one are counted to the phase before."""
    phases: dict[str, float] = {}
    current = "capture"
    for (line, begin), (_, until) in zip(marks, [*marks[1:], ("", end)], strict=True):
        match = re.match(r"(capture|pass \w+|generate)", line)
        current = PHASES.get(match[1], STAGES) if match else current
        phases[current] = phases.get(current, 0.0) + until - begin
    return phases


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write JSON here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
