"""The golden fixture itself: it must fail on a difference, and write only when told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import compare_golden


def test_same_text_passes_whatever_newlines_end_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.txt"
    path.write_text("stage 0\nstage 1\n")
    compare_golden(path, "stage 0\nstage 1", update=False)
    compare_golden(path, "stage 0\nstage 1\n\n", update=False)


def test_a_difference_fails_and_shows_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "plan.txt"
    path.write_text("stage 0\nstage 1\n")
    with pytest.raises(pytest.fail.Exception, match=r"-stage 1\n\+stage 2"):
        compare_golden(path, "stage 0\nstage 2", update=False)
    assert path.read_text() == "stage 0\nstage 1\n"


def test_a_missing_file_fails_and_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="--update-golden"):
        compare_golden(tmp_path / "new.txt", "text", update=False)


def test_update_writes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "new.txt"
    compare_golden(path, "text", update=True)
    assert path.read_text() == "text\n"
    compare_golden(path, "text", update=False)
