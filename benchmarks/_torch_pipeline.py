"""The rival of the pipeline benchmark: `torch.distributed.pipelining` in worker processes.

Stages are cut by hand; each worker holds one, runs torch's own schedule over gloo and steps an
AdamW. Workers obey the driver, so that its clock measures both systems in the same way.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from _transformer import Shape, Transformer, make_batch, make_stage, token_loss
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

__all__ = ["SCHEDULES", "TorchPipeline"]

SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


class TorchPipeline:
    """Worker processes that train one pipeline; use as a context manager."""

    def __init__(
        self, shape: Shape, *, num_stages: int, num_microbatches: int, schedule: str, lr: float
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        meeting = Path(self._folder.name) / "store"
        self._pipes: list[Connection] = []
        self._workers = []
        for stage in range(num_stages):
            mine, theirs = context.Pipe()
            arguments = (theirs, meeting, shape, stage, num_stages, num_microbatches, schedule, lr)
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            theirs.close()
            self._pipes.append(mine)
            self._workers.append(worker)

    def step(self) -> float:
        """One training step on every worker. Returns the mean loss."""
        for pipe in self._pipes:
            pipe.send("step")
        replies = [pipe.recv() for pipe in self._pipes]
        return next(reply for reply in replies if reply is not None)

    def __enter__(self) -> TorchPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join(10)
            worker.kill()
        self._folder.cleanup()


def _work(
    pipe: Connection,
    meeting: Path,
    shape: Shape,
    stage: int,
    num_stages: int,
    num_microbatches: int,
    schedule: str,
    lr: float,
) -> None:
    """Life of one worker: build the stage, then take a step whenever told to."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=stage, world_size=num_stages
    )
    torch.manual_seed(0)
    module = make_stage(Transformer(shape), stage, num_stages)
    pipeline_stage = PipelineStage(module, stage, num_stages, torch.device("cpu"))
    runner = SCHEDULES[schedule](pipeline_stage, num_microbatches, loss_fn=token_loss)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    ids, targets = make_batch(shape)
    try:
        while pipe.recv() == "step":
            losses: list[torch.Tensor] = []
            if num_stages == 1:
                runner.step(ids, target=targets, losses=losses)
            elif stage == 0:
                runner.step(ids)
            elif stage == num_stages - 1:
                runner.step(target=targets, losses=losses)
            else:
                runner.step()
            optimizer.step()
            optimizer.zero_grad()
            pipe.send(float(torch.stack(losses).mean().detach()) if losses else None)
    except EOFError:
        dist.destroy_process_group()
