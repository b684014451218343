"""cutset: automatic graph partitioning for PyTorch (`auto_partition(model, devices)`).

Public names are loaded on first use, so `import cutset` is instant and has no side effect:

>>> import cutset
>>> print(cutset.InfeasibleError("91.2 GiB needed, 79.6 available", where="cuda:1"))
91.2 GiB needed, 79.6 available
  at: cuda:1
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compiler.api import auto_partition, compare_strategies, plan_model
    from .compiler.ir.cluster import Cluster
    from .compiler.ir.errors import (
        CaptureError,
        ClusterError,
        CutsetError,
        InfeasibleError,
        PlanFormatError,
        RuntimeFailure,
        UsageError,
        VerificationError,
        WaitTimeout,
        WorkerLost,
    )
    from .compiler.ir.plan import Plan
    from .compiler.parallel import Parallel
    from .compiler.plan_json import load_plan, save_plan
    from .compiler.validate import verify_numerically as verify
    from .compiler.weights import parameters_on_meta

__all__ = [
    "CaptureError",
    "Cluster",
    "ClusterError",
    "CutsetError",
    "InfeasibleError",
    "Parallel",
    "Plan",
    "PlanFormatError",
    "RuntimeFailure",
    "UsageError",
    "VerificationError",
    "WaitTimeout",
    "WorkerLost",
    "__version__",
    "auto_partition",
    "compare_strategies",
    "load_plan",
    "parameters_on_meta",
    "plan_model",
    "save_plan",
    "verify",
]

__version__ = "0.1.0"

# name -> where it is defined, and what it is called there; errors are all in one module
_HOMES = {
    "Cluster": (".compiler.ir.cluster", "Cluster"),
    "Parallel": (".compiler.parallel", "Parallel"),
    "Plan": (".compiler.ir.plan", "Plan"),
    "auto_partition": (".compiler.api", "auto_partition"),
    "compare_strategies": (".compiler.api", "compare_strategies"),
    "load_plan": (".compiler.plan_json", "load_plan"),
    "parameters_on_meta": (".compiler.weights", "parameters_on_meta"),
    "plan_model": (".compiler.api", "plan_model"),
    "save_plan": (".compiler.plan_json", "save_plan"),
    "verify": (".compiler.validate", "verify_numerically"),
}

_root = Path(__file__).absolute().parent
if not (_root / "compiler").is_dir():
    __path__.append(str(_root.parent))  # a checkout: the four folders lie beside this one

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Load a public name from the module that defines it."""
        if name not in __all__:
            raise AttributeError(f"module 'cutset' has no attribute {name!r}")
        home, called = _HOMES.get(name, (".compiler.ir.errors", name))
        return getattr(import_module(home, __name__), called)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
