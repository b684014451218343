"""From a model on `meta` to a verified plan: seconds, memory and gap, for models too big to hold.

    python benchmarks/planning.py [--cases 8b,70b] [-o out.json]

Llama-3-8B for 8 devices and Llama-3-70B for 64 (bf16, training, pipeline only), each in a process
of its own. CPU seconds exclude importing torch and building the model on `meta`.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
CASES = {
    "8b": {
        "devices": "h100:8",
        "rows": 64,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70b": {
        "devices": "h100:64",
        "rows": 256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
LIMITS = {"8b": 20.0, "70b": 40.0}
SEQUENCE = 2048


def main() -> int:
    options = _parse()
    if options.one:
        print(json.dumps(_plan(options.one)))
        return 0
    rows = [_in_own_process(name) for name in options.cases.split(",")]
    print(
        f"{'model':6} {'devices':8} {'wall s':>7} {'CPU s':>7} {'limit':>6} {'GiB':>5} {'gap':>8} "
        f"{'stages':>6} {'microbatches':>12}  phases (CPU s)"
    )
    for row in rows:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["phases"].items())
        print(
            f"{row['model']:6} {row['devices']:8} {row['wall_seconds']:7.1f} "
            f"{row['cpu_seconds']:7.1f} {LIMITS[row['model']]:6.0f} {row['peak_gib']:5.2f} "
            f"{row['gap']:8.2%} {row['stages']:6} {row['microbatches']:12}  {phases}"
        )
    if options.output:
        Path(options.output).write_text(json.dumps({"rows": rows}, indent=1))
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
    from transformers import LlamaConfig, LlamaForCausalLM

    from cutset.compiler.api import plan_model

    case = dict(CASES[name])
    devices, rows = case.pop("devices"), case.pop("rows")
    config = LlamaConfig(
        **case,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        use_cache=False,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
        ids = torch.zeros(rows, SEQUENCE, dtype=torch.long)
        labels = torch.zeros(rows, SEQUENCE, dtype=torch.long)
    marks: list[tuple[str, float]] = []
    wall, cpu = time.perf_counter(), time.process_time()
    planned = plan_model(
        model,
        devices,
        example_kwargs={"input_ids": ids, "labels": labels},
        progress=lambda line: marks.append((line, time.process_time())),
    )
    end = time.process_time()
    certificate = planned.plan.certificate
    assert certificate is not None
    return {
        "model": name,
        "devices": devices,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": end - cpu,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "gap": certificate.gap,
        "objective_seconds": certificate.objective,
        "stages": len(planned.plan.stages),
        "microbatches": planned.plan.num_microbatches,
        "phases": _phases(marks, end),
    }


def _phases(marks: list[tuple[str, float]], end: float) -> dict[str, float]:
    """CPU seconds by phase; lines that do not start one are counted to the phase before."""
    phases: dict[str, float] = {}
    current = "start"
    for (line, begin), (_, until) in zip(marks, [*marks[1:], ("", end)], strict=True):
        match = re.match(r"(capture|pass \w+|generate)", line)
        current = match[1] if match else current
        phases[current] = phases.get(current, 0.0) + until - begin
    return phases


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", help="write JSON here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
