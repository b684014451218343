"""Skips are ordinary: a U-Net over three workers, whose long skips go straight to their readers.

python examples/unet_branches.py
"""

from __future__ import annotations

import torch
from models import unet

from cutset import auto_partition
from cutset.compiler.explain import boundaries


def main() -> None:
    """Show what crosses between the stages, then train with BatchNorm in train mode."""
    torch.manual_seed(0)
    made = unet()
    with auto_partition(
        made["model"],
        devices=3,
        example_inputs=made["args"],
        loss_fn=made["loss_fn"],
        num_stages=3,
        num_microbatches=4,
    ) as parallel:
        print(parallel.explain())
        for item in boundaries(parallel.plan, parallel.planned.captured.graph):
            print(f"stage {item.source} -> {item.target}: {', '.join(item.values)}")
        for step in range(3):
            print(f"step {step}: loss {parallel.train_step(*made['args']).item():.4f}")
        running = parallel.state_dict()["down.0.1.running_mean"]
    print(f"BatchNorm statistics after training: {running[:4].tolist()}")


if __name__ == "__main__":
    main()
