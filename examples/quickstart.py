"""The shortest use: one call partitions a model over two local workers, which then train it.

python examples/quickstart.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from cutset import auto_partition


def main() -> None:
    """Train a small classifier with a learning-rate schedule, then load it into plain PyTorch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    x = torch.randn(32, 32)
    y = x[:, :4].argmax(dim=1)
    with auto_partition(
        model,
        devices=2,
        example_inputs=(x, y),
        loss_fn=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        num_stages=2,
    ) as parallel:
        print(parallel.explain())
        scheduler = torch.optim.lr_scheduler.StepLR(parallel.optimizer, step_size=5, gamma=0.5)
        for step in range(10):
            loss = parallel.train_step(x, y)
            scheduler.step()
            print(f"step {step}: loss {loss.item():.4f}")
        predicted = parallel(x).argmax(dim=1)
        model.load_state_dict(parallel.state_dict())
    print(f"accuracy on the training batch: {(predicted == y).double().mean():.0%}")
    assert torch.equal(model.eval()(x).argmax(dim=1), predicted)


if __name__ == "__main__":
    main()
