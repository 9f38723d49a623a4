"""What a test runs: the reference, the kernels in Triton's interpreter, or the kernels on a GPU.

Triton decides at import whether kernels are compiled or interpreted, so one process cannot do both.
`pytest -m gpu` (or `-m "gpu and ..."`) compiles them, and runs the tests marked gpu. Any other run interprets
them and hides the GPU, from the tests and from the processes that they start: it is the same run on every
machine.
"""

import os
import re
from collections.abc import Iterator

import pytest
import torch
from threadpoolctl import threadpool_limits

# The tests' tensors are small: threads cost more than they bring, in NumPy's libraries too.
torch.set_num_threads(1)
LIMITS = threadpool_limits(1)

ON_GPU = pytest.StashKey[bool]()
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def is_for_gpu(expression: str) -> bool:
    """Whether `-m expression` asks for a run of the tests marked gpu."""
    return re.match(r"gpu( and |$)", expression) is not None


def pytest_configure(config: pytest.Config) -> None:
    on_gpu = config.stash[ON_GPU] = is_for_gpu(config.option.markexpr)
    if on_gpu:
        # torch reads it once, at the first product of matrices: for the tests with deterministic algorithms
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # no device has this number, for CUDA and for ROCm
        os.environ["TRITON_INTERPRET"] = "1"  # for the import; whether a test uses them, `kernels` decides
        import interpreter

        interpreter.repair()
    import noise_kernels  # noqa: F401

    import bvae.ops  # noqa: F401

    if not on_gpu:
        del os.environ["TRITON_INTERPRET"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        if not item.config.stash[ON_GPU]:
            pytest.skip("tests marked gpu need a run of their own: pytest -m gpu")
        if not torch.cuda.is_available():
            pytest.exit("pytest -m gpu: torch sees no GPU (see torch.cuda.is_available())", returncode=1)


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache folder, for the tests and what they start: not the one at home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user")))
        yield


def _run_kernels(where: str, patch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Give the device whose tensors go to the kernels.

    Memory that a kernel should fill is NaN beforehand, so that what it leaves out shows. Skips the test where
    the interpreter does not work.
    """
    import noise_kernels

    from bvae.kernels import launch

    device = torch.device("cuda" if where == "cuda" else "cpu")
    if device.type == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
        if fault := noise_kernels.interpreter_fault():
            pytest.skip(fault)
    else:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)  # 10 bits: too few for the tolerances
    patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1, device=device).isnan().all()
        assert launch.runs_triton(torch.ones(1, device=device))
        yield device
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["interpreter", CUDA])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Run the Triton kernels, in the interpreter or on the GPU. Gives the device for the test's tensors."""
    yield from _run_kernels(request.param, monkeypatch)


@pytest.fixture(params=["reference", "interpreter", CUDA])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Run the test on the reference too. Gives the device for the test's tensors."""
    if request.param == "reference":
        yield torch.device("cpu")
    else:
        yield from _run_kernels(request.param, monkeypatch)


@pytest.fixture
def few_rooms(monkeypatch: pytest.MonkeyPatch) -> int:
    """Rooms of few values per factor, with noise for weights, because drawing them takes seconds."""
    from bvae.pipelines import rooms

    noise = torch.randint(256, (24, 64, 64, 3), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(rooms, "all_weights", lambda: (noise / 3).to(torch.uint8))
    for name, value in {"SIZES": (2, 2, 2, 3, 4, 2), "GEOMETRIES": 24, "COUNT": 192}.items():
        monkeypatch.setattr(rooms, name, value)
    return 192
