"""What documents list is what there is."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.house.conftest import ROOT, SOURCE_FOLDERS

ELSEWHERE = "cost_models"  # whose own page names its modules
_DOCUMENTS = ROOT / "docs"


def modules(folder: Path) -> Counter[str]:
    """Names of the modules in `folder` itself."""
    return Counter(file.stem for file in folder.glob("*.py") if file.stem != "__init__")


def listed(text: str) -> dict[str, Counter[str]]:
    """By folder, the modules that the last part of the page on architecture names."""
    found: dict[str, Counter[str]] = {}
    for part in re.split(r"^(?=\*\*`)", text, flags=re.MULTILINE)[1:]:
        folder = part.split("`")[1].rstrip("/")
        for line in part.splitlines():
            inner = re.search(r"\(`(\w+)/`\)", line)
            names = re.findall(r"`(\w+)`", line)
            home = f"{folder}/{inner[1]}" if inner else folder
            found.setdefault(home, Counter()).update(names)
    return found


def test_lists_are_read() -> None:
    text = "\n\n".join(
        [
            "before `x`",
            "**`a/`**: `one`.",
            "**`a/b/`**",
            "| c | `two` |\n| d (`c/`) | `three`, `two` |",
        ]
    )
    assert listed(text) == {
        "a": Counter(["one"]),
        "a/b": Counter(["two"]),
        "a/b/c": Counter(["three", "two"]),
    }


def test_architecture_names_every_module_once() -> None:
    text = (_DOCUMENTS / "architecture.md").read_text(encoding="utf-8")
    found = listed(text[text.index("## Every module") :])
    there = {
        folder.relative_to(ROOT).as_posix(): names
        for top in SOURCE_FOLDERS
        for folder in (ROOT / top, *sorted((ROOT / top).rglob("*/")))
        if (names := modules(folder)) and top != ELSEWHERE
    }
    assert {home: names for home, names in found.items() if home != ELSEWHERE and names} == there


def test_cost_models_are_all_on_their_page() -> None:
    text = (_DOCUMENTS / "cost-models.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)\.py`", text))
    assert set(modules(ROOT / ELSEWHERE)) <= named


@pytest.mark.parametrize(
    "page", sorted((_DOCUMENTS / "decisions").glob("[0-9]*.md")), ids=lambda page: page.stem
)
def test_decisions_are_listed_by_number_and_title(page: Path) -> None:
    title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    number, said = title.split(". ", 1)
    assert number.isdigit() and page.name.startswith(f"{int(number):04}-")
    listing = (page.parent / "README.md").read_text(encoding="utf-8")
    assert f"{number}. [{said}]({page.name})" in listing.splitlines()
