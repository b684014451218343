"""Over NCCL a sender waits for its oldest message on the host, without stopping the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from cutset.compiler.ir.errors import WaitTimeout
from cutset.compiler.ir.messages import MAX_SENDS_UNDER_WAY
from cutset.runtime import torch_communicator
from cutset.runtime.torch_communicator import TorchCommunicator


class Sent:
    """A send that is seen to be over when it has been asked so many times."""

    def __init__(self, questions: float) -> None:
        self.questions = questions

    def is_completed(self) -> bool:
        self.questions -= 1
        return self.questions < 0

    def wait(self) -> bool:
        raise AssertionError("this would stop the device's stream")


def sender(
    monkeypatch: pytest.MonkeyPatch, questions: float, timeout_seconds: float = 30.0
) -> tuple[TorchCommunicator, list[Sent]]:
    """Rank 0 with an NCCL link to rank 1, and its sends."""
    sends: list[Sent] = []

    def isend(tensor: torch.Tensor, peer: int, **options: Any) -> Sent:
        sends.append(Sent(questions))
        return sends[-1]

    monkeypatch.setattr(torch_communicator.dist, "isend", isend)
    end = TorchCommunicator(
        0,
        2,
        torch.device("cpu"),
        backend="nccl",
        store=HashStore(),
        timeout_seconds=timeout_seconds,
    )
    monkeypatch.setattr(end, "_links", {(0, 1): object()})
    return end, sends


def test_a_rank_has_so_many_messages_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    end, sends = sender(monkeypatch, questions=40)
    for tag in range(3 * MAX_SENDS_UNDER_WAY):
        end.send(torch.zeros(2), 1, tag, label="h")
        assert sum(one.questions >= 0 for one in sends) <= MAX_SENDS_UNDER_WAY
    assert sum(one.questions >= 0 for one in sends) == MAX_SENDS_UNDER_WAY


def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    end, _ = sender(monkeypatch, questions=float("inf"), timeout_seconds=0.05)
    for tag in range(MAX_SENDS_UNDER_WAY):
        end.send(torch.zeros(2), 1, tag, label="h")
    with pytest.raises(WaitTimeout, match="rank 1 to take h"):
        end.send(torch.zeros(2), 1, 99, label="h")
