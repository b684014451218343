from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cutset.compiler.ir.errors import CutsetError, VerificationError, WaitTimeout
from cutset.compiler.ir.graph import Mode
from cutset.compiler.ir.program import AllReduce, Instruction, Program, Recv, Register, Send
from cutset.compiler.ir.types import TensorType
from cutset.runtime.communicator import PeerLost
from cutset.runtime.contract import Contract, agree
from cutset.runtime.local_communicator import LocalNetwork

HIDDEN = TensorType((2, 4), torch.float32)
TIED = AllReduce(("wte.weight",), (0, 1))


def program(rank: int, *instructions: Instruction, plan_hash: str = "abc") -> Program:
    return Program(
        rank=rank,
        num_ranks=2,
        mode=Mode.TRAIN,
        num_microbatches=1,
        stages=(),
        stage_ranks=(0, 1),
        instructions=instructions,
        plan_hash=plan_hash,
        memory_limit_bytes=0,
    )


SEND = Send(Register("h", 0), 1, 5, HIDDEN)
RECV = Recv(Register("h", 0), 0, 5, HIDDEN)


def contradiction(first: Program, second: Program) -> str:
    """What `agree` says about the programs of ranks 0 and 1, whichever of them asks."""
    one, two = (Contract.of(item, "cpu") for item in (first, second))
    with pytest.raises(VerificationError) as caught:
        agree(one, [two])
    with pytest.raises(VerificationError):
        agree(two, [one])
    return caught.value.cause


class TestContract:
    def test_matching_programs_agree(self) -> None:
        agree(
            Contract.of(program(0, SEND, TIED), "cpu"), [Contract.of(program(1, RECV, TIED), "cpu")]
        )

    def test_plan(self) -> None:
        cause = contradiction(program(0, SEND), program(1, RECV, plan_hash="xyz"))
        assert cause == "rank 0 runs plan abc, rank 1 runs plan xyz"

    @pytest.mark.parametrize(
        ("received", "words"),
        [
            ({"type": TensorType((2, 5), torch.float32)}, "expects %h@0 f32[2,5] (tag 5)"),
            ({"type": TensorType((2, 4), torch.bfloat16)}, "expects %h@0 bf16[2,4] (tag 5)"),
            ({"register": Register("h", 1)}, "expects %h@1 f32[2,4] (tag 5)"),
            ({"tag": 6}, "expects nothing (tag 5)"),
        ],
    )
    def test_messages(self, received: dict[str, object], words: str) -> None:
        changed = dataclasses.replace(RECV, **received)  # type: ignore[arg-type]
        cause = contradiction(program(0, SEND), program(1, changed))
        assert cause.startswith("rank 0 sends %h@0 f32[2,4] to rank 1")
        assert words in cause

    def test_message_that_nobody_sends(self) -> None:
        cause = contradiction(program(0), program(1, RECV))
        assert cause == "rank 0 sends nothing to rank 1, which expects %h@0 f32[2,4] (tag 5)"

    def test_tag_used_twice(self) -> None:
        twice = dataclasses.replace(SEND, register=Register("x", 0))
        assert "tag 5 is used by %h@0 and %x@0" in contradiction(
            program(0, SEND, twice), program(1, RECV)
        )

    def test_order_of_collectives(self) -> None:
        other = AllReduce(("ln.weight",), (0, 1))
        assert "number 0" in contradiction(program(0, TIED, other), program(1, other, TIED))
        assert "missing" in contradiction(program(0, TIED), program(1))

    def test_collectives_of_others_do_not_matter(self) -> None:
        elsewhere = AllReduce(("x",), (0, 2))
        agree(Contract.of(program(0, elsewhere), "cpu"), [Contract.of(program(1), "cpu")])


class TestInTurns:
    """Ranks of one thread, as the verifier runs them."""

    def test_message(self) -> None:
        network = LocalNetwork(2)
        left, right = network.communicator(0), network.communicator(1)
        pending = right.recv(HIDDEN, 0, 5, label="h")
        assert not pending.done()
        tensor = torch.randn(2, 4)
        original = tensor.clone()
        sent = left.send(tensor, 1, 5, label="h")
        assert sent.done()
        tensor.zero_()  # the message is a copy
        assert pending.done()
        assert torch.equal(pending.wait(), original)
        assert torch.equal(pending.wait(), original)

    def test_tags_keep_messages_apart_and_order_is_kept_within_one(self) -> None:
        network = LocalNetwork(2)
        left, right = network.communicator(0), network.communicator(1)
        for value, tag in ((1.0, 5), (2.0, 6), (3.0, 5)):
            left.send(torch.full((2, 4), value), 1, tag, label="h")
        received = [right.recv(HIDDEN, 0, tag, label="h").wait()[0, 0] for tag in (6, 5, 5)]
        assert received == [2.0, 1.0, 3.0]
        assert network.undelivered() == ()

    def test_undelivered_messages_show(self) -> None:
        network = LocalNetwork(2)
        network.communicator(0).send(torch.ones(1), 1, 5, label="h")
        assert network.undelivered() == ((0, 1, 5),)

    def test_wrong_type_is_refused(self) -> None:
        network = LocalNetwork(2)
        network.communicator(0).send(torch.ones(2, 5), 1, 5, label="h")
        with pytest.raises(VerificationError, match=r"received f32\[2,5\] for value %h \(f32\[2,4"):
            network.communicator(1).recv(HIDDEN, 0, 5, label="value %h").wait()

    def test_reduction_is_in_place_and_in_the_order_of_ranks(self) -> None:
        network = LocalNetwork(3)
        ends = [network.communicator(rank) for rank in range(3)]
        tensors = [torch.tensor([value]) for value in (1e8, 1.0, -1e8)]
        pendings = [
            end.start_all_reduce(tensor, (2, 1, 0), "sum", label="g")
            for end, tensor in reversed(list(zip(ends, tensors, strict=True)))
        ]
        assert all(pending.done() for pending in pendings)
        for pending in pendings:
            pending.wait()
        expected = (torch.tensor(1e8) + 1.0) - 1e8
        assert [tensor.item() for tensor in tensors] == [expected] * 3
        assert network.collectives == {}

    def test_incomplete_reduction_is_not_done(self) -> None:
        end = LocalNetwork(2).communicator(0)
        pending = end.start_all_reduce(torch.ones(1), (0, 1), "sum", label="gradient of wte")
        assert not pending.done()
        with pytest.raises(WaitTimeout, match="0 s for gradient of wte over ranks 0, 1 on rank 0"):
            pending.wait(0.0)

    def test_different_collectives_at_the_same_place(self) -> None:
        network = LocalNetwork(2)
        network.communicator(0).start_all_reduce(torch.ones(1), (0, 1), "sum", label="a")
        with pytest.raises(VerificationError, match="rank 1 does"):
            network.communicator(1).start_all_reduce(torch.ones(2), (0, 1), "sum", label="a")

    def test_wait_names_what_was_waited_for(self) -> None:
        pending = LocalNetwork(2).communicator(1).recv(HIDDEN, 0, 5, label="value %h")
        with pytest.raises(WaitTimeout) as caught:
            pending.wait(0.01)
        expected = "waited 0.01 s for value %h (f32[2,4], tag 5) from rank 0 on rank 1"
        assert caught.value.cause == expected

    def test_contradicting_programs_are_refused(self) -> None:
        network = LocalNetwork(2)
        network.communicator(0).prepare(program(0, SEND))
        with pytest.raises(VerificationError, match="rank 1"):
            network.communicator(1).prepare(program(1))

    def test_next_program_is_another_agreement(self) -> None:
        network = LocalNetwork(2)
        ends = [network.communicator(rank) for rank in range(2)]
        for plan_hash in ("first", "second"):
            ends[0].prepare(program(0, SEND, plan_hash=plan_hash))
            ends[1].prepare(program(1, RECV, plan_hash=plan_hash))


class TestInThreads:
    def test_blocking_collectives(self) -> None:
        network = LocalNetwork(3)

        def body(rank: int) -> tuple[float, float, float]:
            end = network.communicator(rank)
            mean = torch.tensor([float(rank)])
            end.all_reduce(mean, range(3), "avg", label="mean")
            pair = torch.tensor([float(rank)])
            if rank != 1:
                end.all_reduce(pair, (0, 2), "max", label="pair")
            end.barrier(label="middle")
            start = end.broadcast(torch.tensor([float(rank)]), 2, range(3), label="start")
            return mean.item(), pair.item(), start.item()

        with ThreadPoolExecutor(3) as threads:
            results = list(threads.map(body, range(3)))
        assert results == [(1.0, 2.0, 2.0), (1.0, 1.0, 2.0), (1.0, 2.0, 2.0)]

    def test_ranks_that_wait_for_each_other(self) -> None:
        network = LocalNetwork(2)
        network.start_threads(2)

        def body(rank: int) -> str:
            try:
                network.communicator(rank).recv(HIDDEN, 1 - rank, 5, label="value %h").wait()
            except CutsetError as error:
                return f"{type(error).__name__}: {error.cause}"
            finally:
                network.end_thread("")
            return ""

        with ThreadPoolExecutor(2) as threads:
            causes = sorted(threads.map(body, range(2)))
        assert causes[0].startswith("PeerLost: no rank can go on, which value %h")
        assert causes[1].startswith("VerificationError: no rank can go on; they wait for value %h")

    def test_rank_that_ends_early(self) -> None:
        """Who waits for it hears of it, and not after the time-out."""
        network = LocalNetwork(2)
        network.start_threads(2)
        pending = network.communicator(0).recv(HIDDEN, 1, 5, label="value %h")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(pending.wait)
            network.end_thread("rank 1 failed")
            with pytest.raises(PeerLost, match="rank 1 failed, which value %h"):
                waiting.result()
