"""Memory and time of giving values to a model that no process can or does hold whole.

    python benchmarks/materialise.py [--mib 256] [--workers 4] [--zero] [-o out.json]

A model on meta is planned for local workers, as a pipeline or with all parameters in parts (ZeRO
3). It gets its values from a function, writes them to a checkpoint, and gets them from that and
from other files. Shown are the growth of the resident size of the driver and of the largest worker
at its peak, next to a worker's share of the model.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from cutset.compiler.api import plan_model
from cutset.compiler.parallel import Parallel, RunOptions
from cutset.compiler.planned import PlannedModel
from cutset.runtime.launcher import launch_local
from cutset.runtime.memory import peak_resident_bytes, reset_peak_resident, resident_bytes
from cutset.runtime.session import Session

WIDTH = 1024
LAYER_MIB = WIDTH * WIDTH * 4 >> 20
LAYERS_A_FILE = 4
ROWS = 256
MIB = 1 << 20


def main() -> int:
    options = _parse()
    depth = options.mib // LAYER_MIB
    planned = plan(depth, options.workers, options.zero)
    rows = []
    print(f"{options.mib} MiB in tensors of {LAYER_MIB} MiB over {options.workers} workers")
    print("what                share MiB driver MiB worker MiB  seconds")
    with tempfile.TemporaryDirectory() as folder:
        for name, weights in sources(depth, Path(folder)).items():
            with launch_local(options.workers) as session:
                parallel = parallel_on(planned, weights, session)
                steps = {f"from {name}": parallel.place}
                if name == "function":
                    target = Path(folder) / "checkpoint"
                    steps["to checkpoint"] = functools.partial(parallel.save_checkpoint, target)
                for title, step in steps.items():
                    rows.append({"what": title, **measure(step, session)})
                    _print(rows[-1])
    if options.output:
        Path(options.output).write_text(json.dumps({"mib": options.mib, "rows": rows}, indent=1))
    return 0


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['what']:18} {row['share_bytes'] / MIB:10.1f} {row['driver_bytes'] / MIB:10.1f} "
        f"{row['worker_bytes'] / MIB:10.1f} {row['seconds']:8.2f}",
        flush=True,
    )


def plan(depth: int, workers: int, zero: bool = False) -> PlannedModel:
    """A model of linears on meta: to infer as a pipeline, or to train with ZeRO 3."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth)))
    inputs = (torch.zeros(ROWS, WIDTH),)
    if zero:
        return plan_model(
            model,
            workers,
            example_inputs=inputs,
            loss_fn=_mean_square,
            num_microbatches=1,
            mesh=f"data={workers}",
            zero=3,
        )
    return plan_model(
        model,
        workers,
        example_inputs=inputs,
        mode="infer",
        num_microbatches=workers,
        num_stages=workers,
        constraints={f"{layer}": layer * workers // depth for layer in range(depth)},
    )


def _mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def sources(depth: int, folder: Path) -> dict[str, Any]:
    """What values come from; the checkpoint is written on the way."""
    return {
        "function": _draw,
        "checkpoint": folder / "checkpoint",
        "safetensors": _sharded(depth, folder / "st", "model", "safetensors", _save_safetensors),
        "torch": _sharded(depth, folder / "pt", "pytorch_model", "bin", torch.save),
    }


def parallel_on(planned: PlannedModel, weights: Any, session: Session) -> Parallel:
    """The model, on these workers."""
    options = RunOptions(loss_fn=_mean_square, optimizer=torch.optim.AdamW, weights=weights)
    return Parallel(planned, options, session)


def measure(step: Callable[[], None], session: Session) -> dict[str, float]:
    """Growth of resident sizes at their peak, while `step` runs."""
    session.call("reset_peak")
    before = session.call("memory")
    own = resident_bytes()
    reset_peak_resident()
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    after = session.call("memory")
    return {
        "share_bytes": max(reply["held_bytes"] for reply in after),
        "driver_bytes": peak_resident_bytes() - own,
        "worker_bytes": max(
            end["peak_resident_bytes"] - begin["resident_bytes"]
            for begin, end in zip(before, after, strict=True)
        ),
        "seconds": seconds,
    }


def _draw(name: str, tensor: Tensor) -> Tensor:
    return torch.randn(tensor.shape)


def _save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, path)


def _sharded(
    depth: int, folder: Path, stem: str, suffix: str, save: Callable[[dict[str, Tensor], Path], Any]
) -> Path:
    """A Hugging Face directory."""
    folder.mkdir()
    table = {}
    for begin in range(0, depth, LAYERS_A_FILE):
        names = [f"{layer}.weight" for layer in range(begin, min(depth, begin + LAYERS_A_FILE))]
        file = f"{stem}-{begin}.{suffix}"
        save({name: torch.randn(WIDTH, WIDTH) for name in names}, folder / file)
        table |= dict.fromkeys(names, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="size of the model")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--zero", action="store_true", help="ZeRO 3 instead of a pipeline")
    parser.add_argument("-o", "--output", help="write JSON here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
