"""What is not installed must not stop what does not need it: a process without DALI, one without tyro."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_DALI = """
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
sys.modules["nvidia"] = module_from_spec(ModuleSpec("nvidia", None, is_package=True))  # of other wheels
"""
WITHOUT_TYRO = """
import sys
sys.modules.update(dict.fromkeys(["tyro", "docstring_parser"]))
"""
STEP = """
import importlib, tempfile
from pathlib import Path
for name in ("compare", "contenders", "race", "record", "report", "roofline", "test_kernels", "test_loader",
             "test_scaling", "test_step"):
    importlib.import_module(f"bench.{name}")
import bvae.training.optimizer, bvae.losses, bvae.model, bvae.training.step, torch
from bench.contenders import Network, check, ours, pytorch_vae
from bvae.config import TrainingConfig

images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
with tempfile.TemporaryDirectory() as folder:
    step = ours(Network(4, (8, 16), 32), images, Path(folder), TrainingConfig(compile=False))
    step.step()
    print("MSE", step.terms()[0])
"""


def python(code: str) -> str:
    """What it prints; its process sees neither the kernels' interpreter nor a GPU."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pytest_of(*arguments: str) -> str:
    return f"import pytest\nsys.exit(pytest.main({list(arguments)}))"


@pytest.mark.slow
def test_tests_and_benchmarks_skip_dali_alone():
    """Theirs are skipped, and no file fails as it is collected, though there is a package `nvidia`."""
    run = "tests/test_decoders.py", "bench/test_loader.py", "-rs", "-k", "no_dali or flipped_bits or decoding"
    said = python(WITHOUT_DALI + pytest_of(*run))
    assert "2 passed, 3 skipped" in said
    assert said.count("DALI is not installed") == 2  # the third asks for a GPU, or for none, first


def test_a_step_without_tyro():
    said = python(WITHOUT_TYRO + 'sys.modules["typeguard"] = None  # of which pytest makes a plugin' + STEP)
    assert 0 < float(said.split("MSE ")[1]) < 4


@pytest.mark.slow
def test_benchmarks_without_tyro():
    files = "bench/test_kernels.py", "bench/test_scaling.py", "bench/test_training.py"
    which = "(sample and 144 and float32 and both) or latents-10 or training"
    said = python(WITHOUT_TYRO + pytest_of(*files, "--quick", "-rs", "-k", which))
    assert "passed, 1 skipped" in said
    assert "bvae.train, whose command line this runs, needs tyro" in said


def test_a_model_needs_torch_and_little_else():
    names = ["tyro", "yaml", "torchvision", "PIL", "sklearn", "tensorboard", "tqdm"]
    python(f"import sys; sys.modules.update(dict.fromkeys({names})); import bvae.losses, bvae.model")
