"""Names of values: Python identifiers, unique, and of tied tensors the one that stands for all."""

from __future__ import annotations

import builtins
import keyword
import re

from torch import Tensor, nn

__all__ = ["Names", "canonical_names", "identifier"]

# Names that generated code uses for other things.
_TAKEN = frozenset({"aten", "device", "key", "rng", "torch", *keyword.kwlist, *dir(builtins)})


class Names:
    """Hands out unique names that generated code can use for variables."""

    def __init__(self) -> None:
        self._taken = set(_TAKEN)

    def take(self, name: str) -> str:
        """`name`, or if it is taken `name_1`, `name_2`, ..."""
        candidate, number = name, 0
        while candidate in self._taken:
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        return candidate


def identifier(text: str) -> str:
    """`text` with everything that cannot stand in an identifier replaced: `args[0]` -> `args_0`."""
    name = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "value"
    return f"_{name}" if name[0].isdigit() else name


def canonical_names(model: nn.Module) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Every name of a parameter or buffer -> the first name of the same tensor, and its others."""
    groups: dict[int, list[str]] = {}
    tensors: list[tuple[str, Tensor]] = list(model.named_parameters(remove_duplicate=False))
    tensors += model.named_buffers(remove_duplicate=False)
    for name, tensor in tensors:
        groups.setdefault(id(tensor), []).append(name)
    return {name: (names[0], tuple(names[1:])) for names in groups.values() for name in names}
