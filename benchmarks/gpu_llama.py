"""Train a randomly initialised Llama on the GPUs of this machine, planned by cutset.

    python benchmarks/gpu_llama.py [--model 1b] [--devices 2] [--variants eager] [-o out.json]

bf16, fused AdamW, one row a microbatch: prints seconds a step (median), tokens per second and the
peak memory of every rank, beside what the plan predicts. `graphs off` runs kernels one by one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from cutset.compiler.api import auto_partition

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
    """The model on the CPU in bf16, from a fixed seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SIZES[size], max_position_embeddings=sequence, use_cache=False, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    return LanguageModel(LlamaForCausalLM(config)).bfloat16()


def measure(model: nn.Module, batch: tuple[Tensor, Tensor], options: argparse.Namespace, name: str):
    """One row of the table."""
    began = time.perf_counter()
    with auto_partition(
        model,
        options.devices,
        example_inputs=batch,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        num_microbatches=options.batch,
        num_stages=options.devices,
        check=False,
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
            "variant": name,
            "step_seconds": statistics.median(seconds[3:]),
            "tokens_per_second": batch[0].numel() / statistics.median(seconds[3:]),
            "predicted_step_seconds": prediction.step_seconds if prediction else None,
            "peak_gib": [peak / 2**30 for peak in parallel.peak_memory_bytes()],
            "bound_gib": [m.total_bytes / 2**30 for m in prediction.memory] if prediction else [],
            "losses": [losses[0], losses[-1]],
            "setup_seconds": time.perf_counter() - began - sum(seconds[3:]),
        }


def main() -> int:
    options = _parse()
    model = build(options.model, options.sequence)
    generator = torch.Generator().manual_seed(1)
    vocabulary = SIZES[options.model]["vocab_size"]
    ids = torch.randint(vocabulary, (options.batch, options.sequence), generator=generator)
    rows = []
    for name in options.variants.split(","):
        rows.append(measure(model, (ids, ids.roll(-1, 1)), options, name))
        print(json.dumps(rows[-1]), flush=True)
    print(f"{'variant':10} {'s/step':>8} {'predicted':>9} {'tokens/s':>9}  peak GiB a rank (bound)")
    for row in rows:
        memory = ", ".join(
            f"{peak:.1f} ({bound:.1f})"
            for peak, bound in zip(row["peak_gib"], row["bound_gib"], strict=True)
        )
        print(
            f"{row['variant']:10} {row['step_seconds']:8.4f} "
            f"{row['predicted_step_seconds']:9.4f} {row['tokens_per_second']:9.0f}  {memory}"
        )
    if options.output:
        Path(options.output).write_text(json.dumps({"rows": rows}, indent=1))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="1b")
    parser.add_argument("--devices", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--batch", type=int, default=16, help="rows; one a microbatch")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--variants", default="plain,eager,compiled", help=", ".join(VARIANTS))
    parser.add_argument("-o", "--output", help="write JSON here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(0, "this benchmark needs a CUDA device; none is here\n")
    return options


if __name__ == "__main__":
    sys.exit(main())
