"""Which models can be captured and trained in two stages, and how exactly.

    python benchmarks/capture_models.py [--models gpt2,t5 | --groups causal,vision] [-o out.json]

For every model of the zoo (tests/models/zoo.py: tiny configurations of transformers and plain
torch) in float64: capture without the self-check, plan two stages, train one step of two
microbatches under the plan, with all ranks in this process, and compare loss and gradients with the
unpartitioned model over the same microbatches and random streams. Prints a table; what fails is
printed with its reason. Exit code 1 if fewer models pass than asked for (`--at-least`).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from cutset.compiler.batch import signature_of, take_rows
from cutset.compiler.capture import Captured, capture
from cutset.compiler.ir.blocks import find_blocks
from cutset.compiler.ir.errors import CutsetError
from cutset.compiler.ir.graph import Mode
from cutset.compiler.ir.plan import OptimizerModel
from cutset.compiler.parallel import Parallel, RunOptions
from cutset.compiler.planned import PlannedModel, build_programs
from cutset.compiler.reference import relative_error, train_reference
from cutset.cost_models import parse_devices
from cutset.passes.context import PlanOptions
from cutset.passes.pipeline import plan_graph
from cutset.runtime.inprocess import InProcessSession
from tests.models.zoo import GROUPS, ROWS, ZOO, Example, with_dtype

SEED = 3
COUNT = 2
TOLERANCE = 1e-10
"""Largest relative error of loss and gradients in float64."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; `reason` is empty for a model that passes."""

    model: str
    group: str
    kind: str
    capture_seconds: float
    nodes: int = 0
    blocks: int = 0
    draws: int = 0
    loss_error: float = float("nan")
    gradient_error: float = float("nan")
    worst: str = ""
    reason: str = ""


def main() -> int:
    options = _parse()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    rows: list[Row] = []
    print(_HEADER, flush=True)
    for group, models in GROUPS.items():
        for name in models:
            if (options.groups and group not in options.groups.split(",")) or (
                options.models and name not in options.models.split(",")
            ):
                continue
            rows.append(_row(name, group))
            print(_line(rows[-1]), flush=True)
    passed = [row for row in rows if not row.reason]
    print(f"{len(passed)} of {len(rows)} models pass")
    if options.output:
        data = {"torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        Path(options.output).write_text(json.dumps(data, indent=1) + "\n")
    return 0 if len(passed) >= options.at_least else 1


def _row(name: str, group: str) -> Row:
    torch.manual_seed(SEED)
    kind, began = name, time.perf_counter()
    try:
        example = with_dtype(ZOO[name](), torch.float64)
        kind = type(example.model).__name__
        began = time.perf_counter()
        args, kwargs = take_rows((example.args, dict(example.kwargs)), ROWS // COUNT)
        captured = capture(
            example.model, args, kwargs, mode=Mode.TRAIN, loss_fn=example.loss_fn, check=False
        )
        seconds = time.perf_counter() - began
        return _trained(name, group, seconds, example, captured)
    except CutsetError as error:
        reason = f"{error.cause} [{error.where}]"
    except Exception as error:  # a table goes on after a model that breaks
        reason = f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())
    return Row(name, group, kind, time.perf_counter() - began, reason=reason)


def _trained(name: str, group: str, seconds: float, example: Example, captured: Captured) -> Row:
    losses, gradients = _two_stage_step(example, captured)
    reference = train_reference(
        example.model,
        example.args,
        example.kwargs,
        loss_fn=example.loss_fn,
        num_microbatches=COUNT,
        seed=SEED,
    )
    worst = relative_error(gradients, reference.gradients)
    loss_error = abs(losses - reference.losses[0]) / max(abs(reference.losses[0]), 1e-30)
    exact = worst.value <= TOLERANCE and loss_error <= TOLERANCE
    return Row(
        model=name,
        group=group,
        kind=type(example.model).__name__,
        capture_seconds=seconds,
        nodes=len(captured.graph.nodes),
        blocks=len(find_blocks(captured.graph)),
        draws=captured.num_draws,
        loss_error=loss_error,
        gradient_error=worst.value,
        worst=worst.tensor,
        reason="" if exact else f"not exact to {TOLERANCE:g}",
    )


def _two_stage_step(example: Example, captured: Captured) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one training step in two stages."""
    call = (example.args, dict(example.kwargs))
    plan = plan_graph(
        captured.graph,
        parse_devices("cpu:2"),
        batch_size=ROWS,
        options=PlanOptions(
            num_stages=2,
            num_microbatches=COUNT,
            schedule="1f1b",
            optimizer=OptimizerModel("sgd", 0.0),
        ),
    )
    assert len(plan.stages) == 2
    planned = PlannedModel(
        model=example.model,
        captured=captured,
        plan=plan,
        programs=build_programs(captured, plan, None),
        call=call,
        loss_fn=example.loss_fn,
        call_signature=signature_of(take_rows(call, ROWS // COUNT)),
        training=True,
    )
    options = RunOptions(
        loss_fn=example.loss_fn,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        seed=SEED,
        keep_gradients=True,
    )
    parallel = Parallel(planned, options, InProcessSession(2))
    loss = parallel.train_step(*example.args, **example.kwargs)
    return float(loss), dict(parallel.gradients())


_HEADER = (
    f"{'model':18} {'class':38} {'capture':>8} {'nodes':>6} {'draws':>5} "
    f"{'loss':>8} {'gradients':>9}  worst tensor or reason"
)


def _line(row: Row) -> str:
    head = f"{row.model:18} {row.kind:38} {row.capture_seconds:7.1f}s "
    if row.nodes:
        head += f"{row.nodes:6} {row.draws:5} {row.loss_error:8.1e} {row.gradient_error:9.1e}  "
    return head + (f"FAILS: {row.reason[:300]}" if row.reason else row.worst)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", help="names, separated by commas")
    parser.add_argument("--groups", help=", ".join(GROUPS))
    parser.add_argument("--at-least", type=int, default=0, help="models that must pass")
    parser.add_argument("-o", "--output", help="write the table as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
