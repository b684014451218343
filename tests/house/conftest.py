"""Copies of the checkout and bare interpreters to install it into.

A *bare* interpreter is a virtual environment that sees the libraries of the one running the tests
but not its `cutset`: path files are not followed from one environment into another.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parents[2]
SOURCE_FOLDERS = ("cutset", "compiler", "passes", "cost_models", "runtime")
BUILD_FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")

MakeBare = Callable[[str], Path]


def package_folders() -> dict[str, str]:
    """`PACKAGE_FOLDERS` as written in setup.py."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == (
            "PACKAGE_FOLDERS"
        ):
            table: dict[str, str] = ast.literal_eval(statement.value)
            return table
    raise AssertionError("setup.py has no PACKAGE_FOLDERS")


def module_names(root: Path) -> list[str]:
    """Every module of cutset by its import name, from the files in the checkout `root`."""
    names = []
    for package, folder in package_folders().items():
        for file in sorted((root / folder).glob("*.py")):
            names.append(package if file.stem == "__init__" else f"{package}.{file.stem}")
    return names


def run(*command: str | Path, cwd: Path, path: str = "") -> str:
    """Output of a command that must succeed; `path` is its PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stderr[-4000:]}"
    return done.stdout


def pip_install(python: Path, *arguments: str | Path, cwd: Path) -> None:
    """Install into `python`'s environment what lies on disk, and nothing it depends on."""
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *arguments, cwd=cwd)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packaging reads."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in SOURCE_FOLDERS:
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for file in BUILD_FILES:
        shutil.copy(ROOT / file, root / file)
    return root


@pytest.fixture(scope="session")
def make_bare(tmp_path_factory: pytest.TempPathFactory) -> MakeBare:
    """`make_bare(name)` is the python of a new bare environment."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        venv.create(folder, with_pip=False, symlinks=True)
        python = folder / "bin" / "python"
        site = sysconfig.get_path("purelib", vars={"base": str(folder)})
        (Path(site) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return python

    return make


@pytest.fixture(scope="session")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the copy."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, cwd=checkout)
    (file,) = folder.glob("cutset-*.whl")
    return file


@pytest.fixture(scope="session")
def wheel_python(wheel: Path, make_bare: MakeBare) -> Path:
    """A bare interpreter into which the wheel is installed."""
    python = make_bare("from-wheel")
    pip_install(python, wheel, cwd=wheel.parent)
    return python
