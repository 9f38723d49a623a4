"""Installed or not, the project takes no name but its own: `kernels` on PyPI belongs to others."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_holds_nothing_but_bvae(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("bvae", "kernels", "pipelines"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"bvae"}
    assert {"bvae/kernels/reparam_kl.py", "bvae/kernels/noise.py"} <= set(names)


@pytest.mark.parametrize("folder", ["kernels", "pipelines"])
def test_the_folders_shadow_no_package(folder, tmp_path):
    assert not (ROOT / folder / "__init__.py").exists()
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "__init__.py").write_text("origin = 'another distribution'\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    code = f"import {folder}, bvae.kernels.noise; print({folder}.origin)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == "another distribution", result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True], ids=["in the root", "elsewhere"])
def test_transformers_diffusers_and_kernels_import_beside_it(elsewhere, tmp_path):
    for name in ("transformers", "diffusers", "kernels"):
        pytest.importorskip(name)
    code = "import bvae.ops, kernels; from transformers import pipeline; from diffusers import AutoencoderKL"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)} if elsewhere else None
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path if elsewhere else ROOT, env=environment, check=True
    )


def test_importing_the_kernels_touches_no_device():
    code = (
        "import torch\n"
        "def touched(*args): raise AssertionError('a device was asked for')\n"
        "for name in ('_lazy_init', 'is_available', 'device_count', 'current_device'):\n"
        "    setattr(torch.cuda, name, touched)\n"
        "import bvae.losses\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("broken", [False, True], ids=["none", "broken"])
def test_without_triton_the_reference_serves(broken, tmp_path):
    if broken:  # it is there to be found, and fails to import
        (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so: undefined symbol')\n")
    (tmp_path / "run.py").write_text(
        "import sys\n" + ("" if broken else "sys.modules['triton'] = None\n") + "import torch\n"
        "from bvae import losses, ops\n"
        "z, kl = ops.reparam_kl(torch.zeros(2, 3), torch.zeros(2, 3))\n"
        "print(losses.BetaLoss(kl_weight=1.0)(z, z, kl).loss.item())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")], env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == "0.0", result.stderr
