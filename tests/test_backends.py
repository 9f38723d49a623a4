"""Which kernels a run of the tests has, and whether it sees a GPU: see conftest.py."""

import subprocess
import sys

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from bvae.kernels import capacity_loss, noise, reparam_kl, tile

KERNELS = [
    *(reparam_kl._forward_kernel, reparam_kl._backward_kernel, noise.four_normals, tile.last_to_arrive),
    *(capacity_loss._forward_kernel, capacity_loss._backward_kernel),
]


def test_without_the_tests_marked_gpu_no_gpu_is_seen():
    assert all(isinstance(kernel, InterpretedFunction) for kernel in KERNELS)
    assert torch.cuda.device_count() == 0
    code = "import torch; assert torch.cuda.device_count() == 0"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_the_tests_marked_gpu_have_compiled_kernels():
    assert all(isinstance(kernel, JITFunction) for kernel in KERNELS)
    assert torch.cuda.is_available()


@pytest.mark.parametrize(
    ("expression", "compiled"),
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("not gpu", False),
        ("not slow and not gpu", False),
        ("slow", False),
        ("gpu or slow", False),
        ("", False),
    ],
)
def test_only_a_run_of_the_tests_marked_gpu_compiles(expression, compiled, pytestconfig):
    conftest = pytestconfig.pluginmanager.get_plugin(str(pytestconfig.rootpath / "tests" / "conftest.py"))
    assert conftest.is_for_gpu(expression) == compiled
