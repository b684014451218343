"""Train a randomly initialised Llama on the GPUs of this machine, planned by cutset.

    python benchmarks/gpu_llama.py [--model 1b] [--devices 2] [--plans pipeline=2,tensor=2]
        [--variants eager,compiled] [--hand FILE] [-o out.json]

bf16, fused AdamW: prints seconds a step (median), tokens per second and the peak memory of every
rank, beside what the plan predicts. A plan is a mesh with its level of ZeRO, as `data=2:zero=3`;
`auto` pins nothing. Variant `plain` runs kernels one by one, `eager` as CUDA graphs, `compiled`
through Inductor as well.

`--hand FILE` names a script of hand-written strategies, which is run beside each plan as `torchrun
FILE --strategy S --model M --batch B --mb 1 --seq N [--compile]` and prints a line of JSON with its
seconds a step, `sec`, and `peak_gib`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from cutset.compiler.api import auto_partition
from cutset.compiler.ir.errors import CutsetError

SIZES = {
    "tiny": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
HAND = {
    "pipeline=2": "pp_1f1b",
    "tensor=2": "tp",
    "data=2:zero=0": "ddp",
    "data=2:zero=3": "fsdp",
    "single": "single",
}
VARIANTS = {
    "plain": {"compile": False, "cuda_graphs": False},
    "eager": {"compile": False, "cuda_graphs": True},
    "compiled": {"compile": True, "cuda_graphs": True},
}


class LanguageModel(nn.Module):
    """A causal language model with its loss on labels that are already shifted."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.body(input_ids=ids).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def build(size: str, sequence: int) -> LanguageModel:
    """The model on `meta` in bf16; buffers, which are computed, have their values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SIZES[size], max_position_embeddings=sequence, use_cache=False, tie_word_embeddings=False
    )
    with torch.device("meta"):
        model = LanguageModel(LlamaForCausalLM(config)).bfloat16()
    rotary = model.body.model.rotary_emb
    model.body.model.rotary_emb = type(rotary)(config)
    return model


def initial(name: str, like: Tensor) -> Tensor:
    """The first value of a parameter, made on a GPU, which is faster."""
    if "norm" in name:
        return torch.ones_like(like, device="cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    value = torch.empty(like.shape, dtype=like.dtype, device=device)
    return value.normal_(0.0, 0.02, generator=generator).cpu()


def pinned(plan: str, options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `auto_partition` for a plan by its name."""
    if plan == "auto" or options.devices == 1:
        return {}
    mesh, _, zero = plan.partition(":zero=")
    data = re.search(r"data=(\d+)", mesh)
    count = options.batch // (int(data[1]) if data else 1)
    return {"mesh": mesh, "zero": int(zero) if zero else None, "num_microbatches": count}


def measure(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    options: argparse.Namespace,
    plan: str,
    name: str,
) -> dict[str, Any]:
    """One row of the table."""
    began = time.perf_counter()
    with auto_partition(
        model,
        options.devices,
        example_inputs=batch,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        weights=initial,
        check=False,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
        **pinned(plan, options),
        **VARIANTS[name],
    ) as parallel:
        losses, seconds = [], []
        for _ in range(options.steps + 3):
            start = time.perf_counter()
            losses.append(float(parallel.train_step(*batch)))
            seconds.append(time.perf_counter() - start)
        parallel.measure_memory()
        parallel.train_step(*batch)
        prediction = parallel.plan.prediction
        return {
            "plan": plan,
            "mesh": str(parallel.plan.mesh),
            "zero": parallel.plan.zero_level,
            "microbatches": parallel.plan.num_microbatches,
            "variant": name,
            "step_seconds": statistics.median(seconds[3:]),
            "tokens_per_second": batch[0].numel() / statistics.median(seconds[3:]),
            "predicted_step_seconds": prediction.step_seconds if prediction else None,
            "peak_gib": [peak / 2**30 for peak in parallel.peak_memory_bytes()],
            "bound_gib": [
                entry.bound_bytes / 2**30 for entry in (prediction.memory if prediction else ())
            ],
            "losses": [losses[0], losses[-1]],
            "setup_seconds": time.perf_counter() - began - sum(seconds[3:]),
        }


def hand(options: argparse.Namespace, strategy: str, compiled: bool) -> dict[str, Any]:
    """What a hand-written strategy measures of itself."""
    launch = ["torchrun", f"--nproc-per-node={options.devices}", "--standalone", options.hand]
    flags = {"strategy": strategy, "model": options.model, "batch": options.batch, "mb": 1}
    flags |= {"seq": options.sequence, "steps": options.steps}
    arguments = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    if compiled:
        arguments.append("--compile")
    found = {"strategy": strategy, "compile": compiled}
    try:
        done = subprocess.run(
            [*launch, *arguments], capture_output=True, text=True, timeout=200, check=False
        )
    except subprocess.TimeoutExpired:
        return found | {"error": "took over 200 s"}
    lines = [text for text in done.stdout.splitlines() if text.startswith("{")]
    return json.loads(lines[-1]) if lines else found | {"error": done.stderr[-2000:]}


def line(row: dict[str, Any], by_hand: dict[tuple[str | None, bool], dict[str, Any]]) -> str:
    """A row as a line of the table."""
    begin = f"{row['plan']:13} {row['variant']:9}"
    if "error" in row:
        return f"{begin} {row['error'].splitlines()[0]}"
    other = by_hand.get((HAND.get(row["plan"]), row["variant"] == "compiled"), {}).get("sec")
    memory = ", ".join(
        f"{peak:.1f} ({bound:.1f})"
        for peak, bound in zip(row["peak_gib"], row["bound_gib"], strict=True)
    )
    return (
        f"{begin} {row['step_seconds']:8.4f} {row['predicted_step_seconds']:9.4f} "
        f"{other or '':8} {row['tokens_per_second']:9.0f}  {memory}"
    )


def main() -> int:
    options = _parse()
    model = build(options.model, options.sequence)
    generator = torch.Generator().manual_seed(1)
    vocabulary = SIZES[options.model]["vocab_size"]
    ids = torch.randint(vocabulary, (options.batch, options.sequence), generator=generator)
    rows, by_hand = [], {}
    for plan in options.plans.split(","):
        for name in options.variants.split(","):
            try:
                rows.append(measure(model, (ids, ids.roll(-1, 1)), options, plan, name))
            except CutsetError as error:  # the other plans are still worth measuring
                rows.append({"plan": plan, "variant": name, "error": str(error)})
            print(json.dumps(rows[-1]), flush=True)
            key = HAND.get(plan), name == "compiled"
            if options.hand and key[0] and key not in by_hand:
                by_hand[key] = hand(options, *key)
                print(json.dumps(by_hand[key]), flush=True)
    print(
        f"{'plan':13} {'variant':9} {'s/step':>8} {'predicted':>9} {'by hand':>8} {'tokens/s':>9}  "
        "peak GiB a rank (bound)"
    )
    for row in rows:
        print(line(row, by_hand))
    if options.output:
        Path(options.output).write_text(
            json.dumps({"rows": rows, "by_hand": list(by_hand.values())}, indent=1)
        )
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="1b")
    parser.add_argument("--devices", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--plans", help="default: the four by hand, and auto")
    parser.add_argument("--batch", type=int, default=16, help="rows; one a microbatch and replica")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--variants", default="plain,eager,compiled", help=", ".join(VARIANTS))
    parser.add_argument("--hand", help="script of hand-written strategies, run beside each plan")
    parser.add_argument("-o", "--output", help="write JSON here")
    options = parser.parse_args()
    if options.plans is None:
        several = "pipeline=2,tensor=2,data=2:zero=0,data=2:zero=3,auto"
        options.plans = "single" if options.devices == 1 else several
    if not torch.cuda.is_available():
        parser.exit(0, "this benchmark needs a CUDA device; none is here\n")
    return options


if __name__ == "__main__":
    sys.exit(main())
