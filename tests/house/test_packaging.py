"""The folders import as one package however they are installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.house.conftest import (
    ROOT,
    SOURCE_FOLDERS,
    MakeBare,
    module_names,
    package_folders,
    pip_install,
    run,
)

DATA_SUFFIXES = {".json", ".toml", ".typed"}


def import_all(python: Path, *, cwd: Path) -> Path:
    """Import every module of cutset in a new process; the folder `compiler` was loaded from."""
    script = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; "
    script += "import cutset.compiler as part; print(part.__file__)"
    output = run(python, "-c", script, *module_names(ROOT), cwd=cwd)
    return Path(output.strip().splitlines()[-1]).parent


def test_setup_lists_every_package() -> None:
    folders = {
        file.parent.relative_to(ROOT).as_posix()
        for top in SOURCE_FOLDERS
        for file in (ROOT / top).rglob("*.py")
    }
    assert folders == set(package_folders().values())
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_package_names_follow_folders() -> None:
    for package, folder in package_folders().items():
        expected = "cutset" if folder == "cutset" else f"cutset.{folder.replace('/', '.')}"
        assert package == expected


def test_wheel_holds_every_source_and_data_file(wheel: Path) -> None:
    expected = set()
    for top in SOURCE_FOLDERS:
        prefix = "" if top == "cutset" else "cutset/"
        for file in (ROOT / top).rglob("*"):
            if file.suffix in DATA_SUFFIXES | {".py"}:
                expected.add(prefix + file.relative_to(ROOT).as_posix())
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_a_bare_interpreter_has_no_cutset(make_bare: MakeBare, tmp_path: Path) -> None:
    command = [str(make_bare("bare")), "-I", "-c", "import networkx, cutset"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "No module named 'cutset'" in done.stderr


def test_wheel(wheel_python: Path, tmp_path: Path) -> None:
    assert wheel_python.parent.parent in import_all(wheel_python, cwd=tmp_path).parents
    script = run(wheel_python.parent / "cutset", "--help", cwd=tmp_path)
    module = run(wheel_python, "-m", "cutset", "--help", cwd=tmp_path)
    assert "plan" in script
    assert "plan" in module


def test_editable_install(checkout: Path, make_bare: MakeBare, tmp_path: Path) -> None:
    python = make_bare("editable")
    pip_install(python, "--editable", checkout, cwd=tmp_path)
    assert import_all(python, cwd=tmp_path) == checkout / "compiler"
    assert "plan" in run(python, "-m", "cutset", "--help", cwd=tmp_path)


def test_uninstalled_checkout(checkout: Path, make_bare: MakeBare) -> None:
    assert import_all(make_bare("uninstalled"), cwd=checkout) == checkout / "compiler"


def test_spawned_worker(wheel_python: Path, tmp_path: Path) -> None:
    assert "usage" in run(wheel_python, "-m", "cutset.runtime.worker", "--help", cwd=tmp_path)


def test_torchrun_module(wheel_python: Path, tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(
        "import torch, torch.distributed as dist, cutset\n"
        "from cutset.compiler.ir.types import TensorType\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.tensor([dist.get_rank() + 1])\n"
        "dist.all_reduce(total)\n"
        "said = f'{TensorType.of(total)} {int(total)} {cutset.__version__}'\n"
        "open(f'{dist.get_rank()}.txt', 'w').write(said)\n"
        "dist.destroy_process_group()\n"
    )
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "probe")
    run(wheel_python, *command, cwd=tmp_path)
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text().startswith("i64[1] 3 ")


def test_importing_the_package_loads_no_library(tmp_path: Path) -> None:
    script = "import sys, cutset; print([n for n in ('torch', 'ortools') if n in sys.modules])"
    assert run(sys.executable, "-c", script, cwd=tmp_path, path=str(ROOT)).strip() == "[]"


def test_solver_is_loaded_only_to_solve(tmp_path: Path) -> None:
    script = "import sys, cutset.compiler.api; print('ortools' in sys.modules)"
    assert run(sys.executable, "-c", script, cwd=tmp_path, path=str(ROOT)).strip() == "False"
