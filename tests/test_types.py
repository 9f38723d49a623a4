"""Everything that is installed has types, and mypy reads it under the names that people know the files by."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bvae", "kernels", "pipelines")


@pytest.mark.slow
def test_an_error_in_any_folder_is_reported(tmp_path):
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    planted = []
    for file in ("bvae/errors.py", "kernels/noise.py", "pipelines/folder.py"):
        text = (tmp_path / file).read_text() + "\nfrom bvae.kernels.launch import power_of_two\n"
        (tmp_path / file).write_text(text + "planted: str = power_of_two(1)\n")
        planted.append(f"{file}:{len(text.splitlines()) + 1}: error: Incompatible types in assignment")
    if (ROOT / "build/mypy").is_dir():  # the cache of `make lint`, without which mypy reads all of torch
        shutil.copytree(ROOT / "build/mypy", tmp_path / "build/mypy")
    command = ["make", "types", "--old-file", ".venv/installed", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 3, done.stdout + done.stderr
    for start in planted:
        assert any(line.startswith(start) for line in errors), done.stdout


def test_the_kernels_functions_have_types_unless_triton_compiles_them():
    """mypy is lenient there. A fake has the types of its op, which stands above it."""
    untyped = []
    for file in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if "triton.jit" in decorators or "register_fake" in decorators:
                continue
            given = ast.walk(node.args)
            names = [a.arg for a in given if isinstance(a, ast.arg) and a.annotation is None]
            if node.returns is None or set(names) - {"self"}:
                untyped.append(f"{file.name}:{node.lineno}: {node.name}")
    assert untyped == []
