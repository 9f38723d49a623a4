"""Installed or not, the project takes no name but its own: `kernels` on PyPI belongs to others."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bvae

ROOT = Path(__file__).resolve().parent.parent


def build(source, kind):
    """A copy of what a package is built from, and its wheel, "wheel" or "editable"."""
    source.mkdir()
    for name in ("bvae", "kernels", "pipelines"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; build_meta.build_{kind}('.')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_the_wheel_holds_nothing_but_bvae(tmp_path):
    wheel = build(tmp_path / "source", "wheel")
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"bvae"}
    assert {
        "bvae/kernels/reparam_kl.py",
        "bvae/kernels/noise.py",
        "bvae/kernels/cpu/layers.cpp",
        *(f"bvae/explorer/{name}" for name in ("page.html", "style.css", "page.js", "decoder.js")),
        "bvae/py.typed",
    } <= set(names)
    assert sorted(name for name in names if name.endswith(".py")) == sorted(
        file if file.startswith("bvae/") else f"bvae/{file}"
        for folder in ("bvae", "kernels", "pipelines")
        for file in (str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py"))
    )
    (about,) = (name for name in names if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(wheel.read(about))
    assert metadata["Version"] == bvae.__version__
    assert f"\nversion: {bvae.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {bvae.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert metadata.get_payload().strip().startswith("# bvae")
    base = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]  # in any order
    assert {re.match(r"\w+", line)[0] for line in base} == {"torch", "triton", "numpy", "safetensors"}


def test_a_clone_is_found_from_its_parent_folder(tmp_path):
    """The folder named bvae there is no package; the installed one must come before it."""
    build(tmp_path / "bvae", "editable").extractall(tmp_path / "site")
    code = (
        "import site; site.addsitedir('site')\n"
        "import bvae, importlib.util\n"
        "parts = 'bvae.kernels.noise', 'bvae.pipelines.cache', 'bvae.train'\n"
        "print(bvae.__file__, *(importlib.util.find_spec(part).origin for part in parts), sep='\\n')\n"
    )
    found = subprocess.run(  # -S: without what is installed beside Python, this project perhaps
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    files = "bvae/__init__.py", "kernels/noise.py", "pipelines/cache.py", "bvae/train.py"
    assert found.stdout.split() == [str(tmp_path / "bvae" / file) for file in files], found.stderr


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
