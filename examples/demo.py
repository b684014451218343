"""`make demo`: a 12-layer GPT-2 cut over four local workers, trained, checked, and asked to write.

Dropout is on and the embedding is tied to the output layer. Everything the partitioned model does
is compared with the same model in plain PyTorch.

    python examples/demo.py
"""

from __future__ import annotations

import copy
import time

import torch
from models import gpt2
from torch import nn

from cutset import auto_partition
from cutset.compiler.measure import MeasuredRun, measure_training
from cutset.compiler.parallel import Parallel
from cutset.compiler.reference import ReferenceRun, relative_errors, train_reference

NUM_WORKERS = 4
NUM_STEPS = 5
NUM_TOKENS = 8


def main() -> None:
    """Plan, train, compare, generate."""
    began = time.perf_counter()
    torch.manual_seed(0)
    model, args, kwargs = gpt2()
    model = model.double()  # errors then show mistakes, not rounding
    pristine = copy.deepcopy(model)
    with auto_partition(
        model,
        NUM_WORKERS,
        example_inputs=args,
        example_kwargs=kwargs,
        keep_gradients=True,
        progress=lambda line: print(f"... {line}"),
    ) as parallel:
        print(f"\n{parallel.explain()}")
        measured = measure_training(
            parallel, args, kwargs, steps=NUM_STEPS, compare=True, progress=print
        )
        reference = train_reference(
            pristine,
            args,
            kwargs,
            num_microbatches=parallel.plan.num_microbatches,
            steps=NUM_STEPS,
        )
        report(parallel, measured, reference)
        generate(parallel, model, kwargs["input_ids"])
    print(f"\ndone in {time.perf_counter() - began:.0f} s")


def report(parallel: Parallel, measured: MeasuredRun, reference: ReferenceRun) -> None:
    """Predicted and measured figures, and the distance from the unpartitioned model."""
    assert parallel.plan.prediction is not None
    predicted = parallel.plan.prediction
    print(f"\nstep time: predicted {predicted.step_seconds:.3f} s, measured", end=" ")
    print(f"{measured.run.step_seconds:.3f} s, unpartitioned {reference.step_seconds:.3f} s")
    for memory, peak in zip(predicted.memory, measured.peak_memory_bytes, strict=True):
        print(
            f"memory of worker {memory.device}: at most {memory.total_bytes / 2**20:.0f} MiB "
            f"predicted, {peak / 2**20:.0f} MiB measured"
        )
    print("largest relative error against the unpartitioned model:")
    for kind, worst in relative_errors(measured.run, reference).items():
        print(f"  {kind:<10} {worst.value:.1e}  ({worst.tensor})")


def generate(parallel: Parallel, model: nn.Module, ids: torch.Tensor) -> None:
    """Write greedily with the workers, and with the trained weights in plain PyTorch."""
    prompt = ids[:2, :8]
    written = greedy(lambda padded: parallel(input_ids=padded).logits, prompt, ids.shape[1])
    model.load_state_dict(parallel.state_dict())
    model.eval()
    with torch.no_grad():
        expected = greedy(lambda padded: model(input_ids=padded).logits, prompt, ids.shape[1])
    same = "the same as" if torch.equal(written, expected) else "NOT the same as"
    print(f"\ngenerated {NUM_TOKENS} tokens for {len(prompt)} prompts, {same} plain PyTorch:")
    for row in written.tolist():
        print(f"  {row[:8]} -> {row[8:]}")


def greedy(logits_of, prompt: torch.Tensor, length: int) -> torch.Tensor:
    """The prompt and the likeliest next tokens.

    Rows are padded to `length` at the right, which causal attention does not see, so that all
    calls have one shape.
    """
    tokens = prompt
    for _ in range(NUM_TOKENS):
        padded = nn.functional.pad(tokens, (0, length - tokens.shape[1]))
        following = logits_of(padded)[:, tokens.shape[1] - 1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens


if __name__ == "__main__":
    main()
