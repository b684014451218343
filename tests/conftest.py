"""What all tests share: golden files, property tests that are the same on every run, and which
tests run in one process where several run them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

GOLDEN_FOLDER = Path(__file__).parent / "golden"

settings.register_profile(
    "cutset",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("cutset")

Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite tests/golden/ with what the tests now produce",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --update-golden, run the tests that have golden files and no others."""
    if not config.getoption("--update-golden"):
        return
    by_use: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        by_use["golden" in getattr(item, "fixturenames", ())].append(item)
    items[:] = by_use[True]
    config.hook.pytest_deselected(items=by_use[False])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n, hand out whole files, whose tests share what they have captured; all files of
    tests/distributed to one process, whose pool of workers they share."""
    from xdist.scheduler import LoadFileScheduling

    class ByPool(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            folder = "tests/distributed/"
            return folder if file.startswith(folder) else file

    return ByPool(config, log)


@pytest.fixture
def golden(pytestconfig: pytest.Config) -> Golden:
    """`golden(name, text)` fails unless `text` is the content of tests/golden/`name`."""
    update = bool(pytestconfig.getoption("--update-golden"))

    def compare(name: str, text: str) -> None:
        compare_golden(GOLDEN_FOLDER / name, text, update=update)

    return compare


def compare_golden(path: Path, text: str, *, update: bool) -> None:
    """Compare `text` with the file, or write the file when `update` is set.

    Text is compared with exactly one newline at its end.
    """
    text = text.rstrip("\n") + "\n"
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    if not path.is_file():
        pytest.fail(f"{path} does not exist; make it with --update-golden and review it")
    expected = path.read_text(encoding="utf-8")
    if text != expected:
        diff = difflib.unified_diff(
            expected.splitlines(), text.splitlines(), f"golden/{path.name}", "now", lineterm=""
        )
        pytest.fail("\n".join(["differs from the golden file:", *diff]), pytrace=False)
