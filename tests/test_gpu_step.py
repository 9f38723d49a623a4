"""A captured step is the step: with every loss, data set and switch; what a capture leaves behind, and costs.

The tests marked gpu capture a CUDA graph. On a CPU the same tests run all of a capture but the graph itself,
whose replay is then the step.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from noise_kernels import interpreter_fault
from pictures import write_folder
from test_gpu_kernels import host_and_device
from test_step import GAUSSIAN, Stub, batch, build_step, losses
from test_train import metrics, weights
from test_train import run as train
from torch import Tensor

from bvae.config import TrainingConfig
from bvae.kernels import launch
from bvae.losses import BetaLoss, CapacityLoss
from bvae.model import BetaVAE
from bvae.penalties import Covariance, Discriminator, TotalCorrelation
from bvae.pipelines import faces
from bvae.pipelines.decoder import build as build_decoder
from bvae.pipelines.loader import Loader
from bvae.pipelines.memory_loaders import DeviceLoader, HostLoader
from bvae.pipelines.picture import Picture
from bvae.pipelines.streaming_loader import StreamingLoader
from bvae.train import main
from bvae.training import cuda_graph
from bvae.training.optimizer import build_discriminator_optimizer, build_optimizer
from bvae.training.step import TrainingStep
from bvae.training.validation import validate

CPU = torch.device("cpu")
EPOCHS = 2
SHUFFLED = {"train": True, "flip": True}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> Iterator[torch.device]:
    """Where steps are captured. All algorithms are deterministic: equal runs have equal bits."""
    if request.param == "cpu":
        replay_on_a_cpu(monkeypatch)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch.use_deterministic_algorithms(True)
    yield torch.device(request.param)
    torch.use_deterministic_algorithms(False)


def replay_on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    """Let a CPU capture steps: a graph is the step that made it."""
    for name in ("CUDAGraph", "Stream", "current_stream"):
        patch.setattr(torch.cuda, name, Stub)
    patch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    patch.setattr(torch.cuda, "set_stream", lambda stream: None)
    patch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    real = cuda_graph.capture
    patch.setattr("bvae.training.step.capture", lambda step, state: real(step, state) and step)
    patch.setattr("bvae.training.setup.captures", lambda *_: (True, ""))


def resident(device: torch.device) -> DeviceLoader:
    return DeviceLoader(batch(80, device=device), 8, 1, **SHUFFLED)


def capture_with(step: TrainingStep, data: Loader) -> bool:
    return step.capture(data if isinstance(data, DeviceLoader) else data.head(data.batch_size))


def epoch(step: TrainingStep, data: Loader, number: int) -> None:
    """One epoch of training, as a run does it."""
    step.set_lr_factor(1 / (number + 1))
    if step.gathers:
        data.begin(number)
    for images, _ in data.epoch(number):
        step(None if step.gathers else images)


def state(step: TrainingStep) -> list[Tensor]:
    return [tensor.clone() for tensor in step._state()]


def results(step: TrainingStep, data: Loader) -> tuple[list[float], list[Tensor]]:
    """The losses of a training, and all that it has changed."""
    for number in range(EPOCHS):
        epoch(step, data, number)
    return losses(step, EPOCHS * len(data)), state(step)


def assert_equal(found: tuple[list[float], list[Tensor]], expected: tuple[list[float], list[Tensor]]) -> None:
    assert found[0] == expected[0]
    assert len(found[1]) == len(expected[1])
    for a, b in zip(found[1], expected[1], strict=True):
        assert torch.equal(a, b)


def assert_capture_changes_nothing(
    device: torch.device, data: Loader, make_loss=None, make_penalty=None, **options
) -> None:
    """Train with and without a capture, and compare all bits."""
    plain, captured = (
        build_step(
            device,
            make_loss and make_loss(),
            buffer_steps=EPOCHS * len(data),
            **(make_penalty(device) if make_penalty else {}),
            **options,
        )
        for _ in range(2)
    )
    assert capture_with(captured, data)
    expected = results(plain, data)
    assert len(set(expected[0])) > len(expected[0]) // 2  # it trains
    assert_equal(results(captured, data), expected)


# ---- what can be captured ----------------------------------------------------------------------------------

LOSSES = {
    "B": lambda: CapacityLoss(10.0, 25.0, 10, **GAUSSIAN),
    "H": lambda: BetaLoss(4.0, **GAUSSIAN),
    "H, summed": lambda: BetaLoss(4.0, 1.0, activation="tanh", reduction="sum"),
    "bernoulli": lambda: BetaLoss(1.0, 0.01, likelihood="bernoulli"),
    "B, bernoulli": lambda: CapacityLoss(10.0, 25.0, 10, 0.01, likelihood="bernoulli"),
}


@pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)
def test_every_loss_is_captured(device, make_loss):
    assert_capture_changes_nothing(device, resident(device), make_loss)


def discriminator(device: torch.device) -> dict:
    torch.manual_seed(0)
    penalty = Discriminator(5, 1.0, width=8, layers=2).to(device)
    optimizer = build_discriminator_optimizer(TrainingConfig(), penalty.parameters())
    return {"penalty": penalty, "discriminator_optimizer": optimizer}


PENALTIES = {
    "TC": lambda _: {"penalty": TotalCorrelation(80, 5.0)},
    "Factor": discriminator,
    "DIP-II": lambda _: {"penalty": Covariance(10.0, 10.0, of_samples=True, weight=1.0)},
}


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_grad": 0.1}], ids=str)
@pytest.mark.parametrize("make_penalty", PENALTIES.values(), ids=PENALTIES)
def test_every_penalty_is_captured(device, make_penalty, options):
    loss = LOSSES["H, summed"]
    assert_capture_changes_nothing(device, resident(device), loss, make_penalty, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"accumulate": 4, "clip_grad": 0.1},
        {"dtype": torch.bfloat16},
        {"optimizer": "muon"},
        {"optimizer": "muon", "dtype": torch.float16, "clip_grad": 0.1},
    ],
    ids=str,
)
def test_every_switch_is_captured(device, options):
    assert_capture_changes_nothing(device, resident(device), **options)


def test_data_on_the_host_are_captured(device):
    assert_capture_changes_nothing(device, HostLoader(batch(80), 8, 1, device, **SHUFFLED))


def test_streamed_data_are_captured(device, tmp_path):
    files = sorted(str(path) for path in write_folder(tmp_path, 40).iterdir())
    decoder = build_decoder("torchvision", Picture(None, 32, 3), CPU)
    assert_capture_changes_nothing(device, StreamingLoader(files, decoder, 8, 1, device, **SHUFFLED))


def test_a_resumed_run_is_captured(device, tmp_path, capsys):
    data = faces.write(tmp_path / "faces", n=120, seed=0, progress=False)  # 6 steps per epoch
    options = ("--device", device.type, "--decoder", "torchvision", "--deterministic")
    options = (
        *options,
        "--schedule",
        "exponential",
        "--max-steps",
    )  # the rates of both parts are the whole's
    train(data, tmp_path / "whole", *options, 10)
    train(data, tmp_path / "part", *options, 5)
    assert main(["--resume", str(tmp_path / "part"), "--max-steps", "10", "--device", device.type]) == 0
    said = capsys.readouterr().out
    assert said.count("eager, captured; steps") == 3
    assert "captured; steps 5 to 10" in said
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert metrics(part) == metrics(whole)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(part).items())


@pytest.fixture
def network(device, monkeypatch) -> None:
    """Turn the network's kernels on; on a CPU Triton's interpreter runs them."""
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        if fault := interpreter_fault():
            pytest.skip(fault)
    monkeypatch.setattr(launch, "NETWORK", True)


@pytest.mark.parametrize(
    ("make_loss", "dtype"),
    [
        pytest.param(LOSSES["B"], torch.bfloat16, marks=pytest.mark.slow),  # in the interpreter
        pytest.param(LOSSES["H, summed"], torch.float16, marks=pytest.mark.gpu),
        pytest.param(LOSSES["H"], None, marks=pytest.mark.gpu),
    ],
    ids=["B", "H, summed", "H"],
)
@pytest.mark.usefixtures("network")
def test_the_networks_kernels_are_captured(device, make_loss, dtype):
    data = DeviceLoader(batch(16, device=device), 8, 1, **SHUFFLED)
    assert_capture_changes_nothing(device, data, make_loss, dtype=dtype)


# ---- what a capture leaves behind --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_warming_up_leaves_no_trace(device, dtype):
    """Weights, statistics, counters, scaler: bit for bit what they were; the optimizer's state: zeros."""
    data, options = resident(device), {"dtype": dtype, "buffer_steps": 20, "clip_grad": 1.0}
    plain, captured = build_step(device, **options), build_step(device, **options)
    before = state(plain)
    addresses = [tensor.data_ptr() for tensor in captured._state()]
    generator = torch.get_rng_state()
    assert captured.capture(data)
    assert torch.equal(torch.get_rng_state(), generator)
    kept = {tensor.data_ptr(): tensor for tensor in captured._state()}
    for address, expected in zip(addresses, before, strict=True):
        assert torch.equal(kept.pop(address), expected)
    moments = [m for state in captured.optimizer.state.values() for m in state.values()]
    assert len(kept) == len(moments) > 0
    assert all((tensor == 0).all() for tensor in kept.values())
    assert_equal(results(captured, data), results(plain, data))


def test_a_validation_between_replays_changes_nothing(device):
    data = resident(device)
    unseen = DeviceLoader(batch(20, seed=9, device=device), 8, 1, train=False, flip=False)
    validations, ends = [], []
    for captured, validated in ((False, True), (True, True), (True, False)):
        step = build_step(device, buffer_steps=EPOCHS * len(data))
        if captured:
            assert step.capture(data)
        for number in range(EPOCHS):
            epoch(step, data, number)
            if validated:
                validations.append(validate(step.model, step.loss, unseen, 1, step.dtype))
        ends.append((losses(step, EPOCHS * len(data)), state(step)))
    assert validations[:EPOCHS] == validations[EPOCHS:]
    assert_equal(ends[1], ends[0])
    assert_equal(ends[2], ends[0])


@contextlib.contextmanager
def _too_large(device: torch.device, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that has room for the steps of the warm-up, and none for a graph."""
    real = torch.cuda.graph

    @contextlib.contextmanager
    def graph(*arguments, **options):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            share = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(share / 2)  # what is reserved stays, no more comes
        with real(*arguments, **options):
            yield
            if device.type == "cpu":
                raise torch.OutOfMemoryError("CUDA out of memory")

    with patch.context() as context:
        context.setattr(torch.cuda, "graph", graph)
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0)


def test_no_memory_for_the_graph_leaves_a_step_that_does_not_grow(device, monkeypatch):
    data = HostLoader(batch(640), 64, 1, device, **SHUFFLED)
    plain, step = build_step(device, buffer_steps=20), build_step(device, buffer_steps=20)
    with _too_large(device, monkeypatch):
        assert not capture_with(step, data)
    assert_equal(results(step, data), results(plain, data))
    del plain
    reserved = []
    for number in range(EPOCHS, 20 if device.type == "cuda" else 8):  # 200 steps in all on a GPU
        epoch(step, data, number)
        reserved.append(torch.cuda.memory_reserved())
    assert max(reserved[5:]) - max(reserved[:5]) < 2**22  # bytes; the images of 13 epochs are 25 million


# ---- the network as it is trained: 144 images of 64 x 64, bfloat16, compiled -------------------------------


@functools.cache  # compiled once per session
def full_size(kind: str, network: bool) -> tuple[TrainingStep, DeviceLoader]:
    """A step that is compiled, but not captured; and its data. On a CPU a tiny network, not compiled.

    Args:
        network: whether `launch.NETWORK` is on while it runs.
    """
    if kind == "cpu":
        return build_step(buffer_steps=8), resident(CPU)
    torch.manual_seed(0)
    device = torch.device(kind)
    model = BetaVAE().to(device, memory_format=torch.channels_last)
    images = torch.randint(256, (4 * 144, 64, 64, 3), dtype=torch.uint8).to(device)
    step = TrainingStep(
        model,
        CapacityLoss(10.0, 25.0, 10, **GAUSSIAN).to(device),
        build_optimizer(TrainingConfig(lr=1e-3), model.parameters()),
        seed=3,
        dtype=torch.bfloat16,
        compile=True,
        buffer_steps=8,
    )
    return step, DeviceLoader(images, 144, 1, **SHUFFLED)


@pytest.fixture
def full(device, monkeypatch) -> Iterator[tuple[TrainingStep, DeviceLoader]]:
    """`full_size`, at its first step; with the algorithms that training uses."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    step, data = full_size(device.type, launch.NETWORK)
    with cuda_graph.preserved(step._state):
        yield step, data
        step.release()
    step.restore(0)


def few_steps(step: TrainingStep, data: DeviceLoader, count: int = 8) -> list[float]:
    step.restore(0)
    for number in range(count):
        position = number % len(data)
        if position == 0:
            data.begin(number // len(data))
        step(None if step.gathers else data.batch(torch.tensor(position, device=data.device)))
    return losses(step, count)


@contextlib.contextmanager
def _no_synchronisation(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_full_network_is_captured(full):
    step, data = full
    with cuda_graph.preserved(step._state):
        expected = few_steps(step, data)
    assert step.capture(data)
    assert step.gathers
    assert few_steps(step, data) == pytest.approx(expected, rel=1e-2)
    assert len(set(expected)) == len(expected)


def test_the_compiled_step_never_synchronises(full, device):
    step, data = full
    few_steps(step, data, 1)  # compiles
    for captured in (False, True):
        if captured:
            assert step.capture(data)
        step.restore(0)
        data.begin(0)
        images = data.head(data.batch_size)
        with _no_synchronisation(device):
            for number in range(3):
                step.set_lr_factor(1 / (number + 1))
                step(None if step.gathers else images)
                step.metrics_buffer.send(number + 1)
                while not step.metrics_buffer.receive(wait=False):
                    pass
            data.begin(1)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_replay_is_one_launch_for_the_host(full):
    step, data = full
    assert step.capture(data)
    host, kernels = host_and_device(lambda: step(None))
    assert host.count("cudaGraphLaunch") == 1
    assert len([name for name in host if "LaunchKernel" in name]) <= 2  # torch's, of its generator's state
    ours = [name for name in kernels if name.startswith(("_forward_kernel", "_backward_kernel"))]
    assert len(ours) == 4, ours  # of the sample and of the loss
    assert len(kernels) < 250, sorted(kernels)  # 150 without cuDNN's own casts, transpositions and sums


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.usefixtures("network")
def test_the_full_network_by_its_kernels(full, monkeypatch):
    """The compiler's losses, eager steps equal replays, and a replay launches what it should."""
    step, data = full
    with cuda_graph.preserved(step._state):
        eager = few_steps(step, data)
    assert step.capture(data)
    with cuda_graph.preserved(step._state):
        assert few_steps(step, data) == pytest.approx(eager, rel=1e-2)
    names = Counter(name.split("(")[0] for name in host_and_device(lambda: step(None))[1])
    batch_norm = {"_statistics_kernel": 10, "_apply_kernel": 6, "_reduce_kernel": 10, "_grad_kernel": 7}
    others = {"_forward_kernel": 2, "_sum_kernel": 1, "_backward_kernel": 1}  # the sample, and the last block
    assert {name: names[name] for name in (*batch_norm, *others)} == {**batch_norm, **others}
    monkeypatch.setattr(launch, "NETWORK", False)
    compilers, data = full_size("cuda", False)
    with cuda_graph.preserved(compilers._state):
        assert few_steps(compilers, data) == pytest.approx(eager, rel=1e-2)
    compilers.restore(0)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_the_step_needs_less_than_a_gibibyte(full):
    step, data = full
    few_steps(step, data, 2)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    few_steps(step, data, 2)
    assert torch.cuda.max_memory_allocated() - before < 2**30
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    assert step.capture(data)
    assert torch.cuda.memory_reserved() - before < 2**30
    allocated = torch.cuda.memory_allocated()
    few_steps(step, data)
    assert torch.cuda.memory_allocated() == allocated
