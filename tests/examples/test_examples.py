"""Every example runs to its end and says what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
LAST_WORDS = {
    "quickstart.py": "accuracy on the training batch: 100%",
    "unet_branches.py": "BatchNorm statistics after training",
    "demo.py": "the same as plain PyTorch",
}
SLOW = {"demo.py"}


def test_every_example_is_listed() -> None:
    programs = {path.name for path in FOLDER.glob("*.py")} - {"models.py"}
    assert programs == set(LAST_WORDS)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAST_WORDS],
)
def test_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / name], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert LAST_WORDS[name] in done.stdout
    assert "NOT" not in done.stdout
