"""What ranks are predicted to take is never less than they do, and not much more."""

from __future__ import annotations

import pytest

from tests.distributed.conftest import WorkerPool
from tests.exactness.harness import Subject, adamw64, sgd32
from tests.exactness.memory import MemoryCase, measure
from tests.models.exact import SHARDED_MODELS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gpt2", "pipeline=2"),
        ("gpt2", "data=2+zero1"),
        ("gpt2", "data=2,pipeline=2+zero2"),
        ("resnet", "data=4+zero3"),
        ("vit", "tensor=2"),
        ("t5", "data=2,tensor=2"),
    ],
)
def test_no_rank_takes_more_than_its_bound(pool: WorkerPool, name: str, text: str) -> None:
    case = MemoryCase.parse(text)
    subject = Subject(SHARDED_MODELS[name], sgd32, num_microbatches=case.num_microbatches)
    for rank in measure(subject, case, "1f1b", pool.session(case.mesh.size)):
        assert rank.peak_bytes <= rank.bound_bytes <= 1.3 * rank.peak_bytes, rank


def test_buckets_of_gradients_take_little_beside_them(pool: WorkerPool) -> None:
    """Under ZeRO-1 a rank saves half of the states, a sixth of its memory here, and buckets do not
    take that again, though the least ones are large for so small a model."""
    case = MemoryCase.parse("data=2+zero1")
    subject = Subject(SHARDED_MODELS["resnet"], adamw64, num_microbatches=2)
    plain, shared = (
        measure(subject, MemoryCase(case.mesh, level), "1f1b", pool.session(2)) for level in (0, 1)
    )
    for whole, rank in zip(plain, shared, strict=True):
        assert rank.peak_bytes < 0.95 * whole.peak_bytes
