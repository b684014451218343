"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.conftest import ROOT, SOURCE_FOLDERS

HOME_FOLDERS = ("work", "root", "opt")
TEXT_SUFFIXES = {"", ".py", ".md", ".toml", ".txt", ".json", ".cfg", ".yml", ".yaml"}


def repository_files() -> list[Path]:
    """Files that are tracked, or would be by adding everything."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / line for line in listing.splitlines() if (ROOT / line).is_file()]


def package_modules() -> list[Path]:
    return [file for top in SOURCE_FOLDERS for file in sorted((ROOT / top).rglob("*.py"))]


def machine_paths(text: str) -> list[str]:
    """Absolute paths of a workplace, and references to folders beside the checkout."""
    absolute = rf"(?<![\w.:}}/])/(?:{'|'.join(HOME_FOLDERS)})/\S+"
    beside = r"(?<![\w/])(?:\.\./)*shared" + r"/\S*"
    return [match[0] for match in re.finditer(f"{absolute}|{beside}", text)]


def test_machine_paths_are_found() -> None:
    folder = "/" + HOME_FOLDERS[0] + "/x.py"
    assert machine_paths(f"see {folder}") == [folder]
    assert machine_paths("see ../shared" + "/NOTES.md") == ["../shared" + "/NOTES.md"]
    assert machine_paths("https://example.org/root/page and docs/work/page") == []


def test_no_file_names_a_path_of_one_machine() -> None:
    found = {
        file.relative_to(ROOT).as_posix(): paths
        for file in repository_files()
        if file.suffix in TEXT_SUFFIXES
        and (paths := machine_paths(file.read_text(encoding="utf-8", errors="replace")))
    }
    assert found == {}


# What only one module may do, and which: everything else goes through it.
RESERVED = {
    "reads the environment": {"os.environ", "os.environb", "os.getenv", "os.getenvb"},
    "unpickles": {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads"},
    "runs text as code": {"eval", "exec"},
}
ALLOWED = {
    "reads the environment": {"runtime/launcher.py"},
    "unpickles": {"runtime/rpc.py"},  # a closed list of value types, from its own child process
    "runs text as code": {"runtime/rank.py"},  # the file that codegen wrote in the same run
}


def reserved_uses(source: str) -> Iterator[str]:
    """What a module's code does of the above."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=str(module), names=names):
                words = {f"{module}.{alias.name}" for alias in names}
            case ast.Attribute(value=ast.Name(id=module), attr=name):
                words = {f"{module}.{name}"}
            case ast.Call(func=ast.Name(id=function)):
                words = {function}
            case _:
                continue
        yield from (use for use, reserved in RESERVED.items() if words & reserved)


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("import os\nos.environ['RANK']", ["reads the environment"]),
        ("from os import environ", ["reads the environment"]),
        ("import pickle\npickle.loads(data)", ["unpickles"]),
        ("from pickle import loads", ["unpickles"]),
        ("class Reader(pickle.Unpickler): pass", ["unpickles"]),
        ("exec(compile(text, name, 'exec'))", ["runs text as code"]),
        ("model.eval()\nre.compile(text)\njson.loads(text)", []),
    ],
)
def test_reserved_uses_are_found(source: str, uses: list[str]) -> None:
    assert list(reserved_uses(source)) == uses


@pytest.mark.parametrize("use", RESERVED)
def test_reserved_uses_stay_where_they_belong(use: str) -> None:
    found = {
        file.relative_to(ROOT).as_posix()
        for file in package_modules()
        if use in reserved_uses(file.read_text(encoding="utf-8"))
    }
    assert found <= ALLOWED[use]


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for file in repository_files():
        if file.suffix == ".md":
            for link in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text(encoding="utf-8")):
                if "://" not in link and not (file.parent / link).exists():
                    broken.append(f"{file.relative_to(ROOT)}: {link}")
    assert broken == []


def requirement_lines(file: str) -> dict[str, Requirement]:
    lines = (ROOT / file).read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(entry.name): entry for entry in parsed}


def test_every_pin_is_exact_and_torch_comes_by_itself() -> None:
    development, torch = (
        requirement_lines(f"requirements-{name}.txt") for name in ("dev", "torch")
    )
    assert set(torch) == {"torch"}
    assert not set(torch) & set(development)
    for entry in (*development.values(), *torch.values()):
        assert [part.operator for part in entry.specifier] == ["=="], entry


def test_pins_satisfy_what_the_package_asks_for() -> None:
    pins = requirement_lines("requirements-dev.txt") | requirement_lines("requirements-torch.txt")
    (dependencies,) = (
        ast.literal_eval(statement.value)
        for statement in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "REQUIRED"
    )
    for wanted in map(Requirement, dependencies):
        (pin,) = pins[canonicalize_name(wanted.name)].specifier
        assert wanted.specifier.contains(pin.version), f"{wanted} is pinned to {pin}"


def test_make_help_lists_every_habit() -> None:
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    habits = ["bench", "check", "clean", "demo", "golden", "help", "test", "test-all"]
    assert set(habits) <= {line.split()[0] for line in text.splitlines()}
