"""What a test runs: the reference, as on any CPU, or the kernels, on the GPU or in Triton's interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the tests' tensors are small: threads cost more than they bring

# Triton decides at import whether a kernel is compiled or interpreted. Without a GPU the kernels are imported
# for the interpreter; whether a test uses them is decided at call time, by the environment.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import noise_kernels  # noqa: E402, F401

import bvae.ops  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache folder, for the tests and what they start: not the one at home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user")))
        yield


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Run the Triton kernels, on the GPU or in the interpreter, and give the device for the test's tensors.

    Memory that a kernel should fill is NaN beforehand, so that what it leaves out shows.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1, device=device).isnan().all()
    assert bvae.ops.launch.runs_triton(torch.ones(1, device=device))
    yield device
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "kernels"])
def backend(request: pytest.FixtureRequest) -> torch.device:
    """Run the test twice: on the reference, and on the kernels. Gives the device for the test's tensors."""
    return torch.device("cpu") if request.param == "reference" else request.getfixturevalue("kernels")
