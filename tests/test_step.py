"""The training step: no waiting, parts of a batch, capture's promises, and each layer switched off."""

import contextlib
import itertools
import math
import weakref

import pytest
import torch
import torch._dynamo
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2.functional import resize

from bvae.config import TrainingConfig
from bvae.kernels import launch
from bvae.losses import AnnealedBeta, BetaLoss, CapacityLoss
from bvae.model import BetaVAE
from bvae.pipelines import faces, portrait
from bvae.pipelines.memory_loaders import DeviceLoader
from bvae.training.cuda_graph import CaptureFailed, preserved
from bvae.training.optimizer import build_optimizer
from bvae.training.step import Captured, TrainingStep

CPU = torch.device("cpu")
GAUSSIAN = {"kl_weight": 0.01, "activation": "tanh"}


def build_step(
    device=CPU,
    loss=None,
    *,
    lr=1e-3,
    optimizer="adam",
    dtype=None,
    compile=False,
    buffer_steps=8,
    **options,
) -> TrainingStep:
    torch.manual_seed(0)
    model = BetaVAE(3, 5, (4, 8), 32).to(device, memory_format=torch.channels_last)
    training = TrainingConfig(optimizer=optimizer, lr=lr, muon_lr=10 * lr)
    optimizer = build_optimizer(training, model.parameters())
    loss = (loss or CapacityLoss(10.0, 25.0, 10, **GAUSSIAN)).to(device)
    return TrainingStep(
        model, loss, optimizer, seed=3, dtype=dtype, compile=compile, buffer_steps=buffer_steps, **options
    )


def batch(n=8, seed=0, device=CPU) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator).to(device)


def weights(step: TrainingStep) -> list[Tensor]:
    return [value.clone() for value in step.model.state_dict().values()]


def losses(step: TrainingStep, done: int) -> list[float]:
    step.metrics_buffer.send(done)
    return [row[0] for _, row in step.metrics_buffer.receive(wait=True)]


def still(step: TrainingStep) -> TrainingStep:
    """The same step with BatchNorm in evaluation mode, which lets images be independent, in float64."""
    step.model.double()
    for module in step.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return step


# ---- nothing waits -----------------------------------------------------------------------------------------

READS = {"item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__"}


class NoReads(TorchFunctionMode):
    """Fails where Python asks a tensor for its value."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert getattr(function, "__name__", "") not in READS, f"{function} makes the host wait"
        return function(*args, **(kwargs or {}))


class NoScalars(TorchDispatchMode):
    """Fails where an operation inside torch does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero"), f"{name} makes the host wait"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"clip_grad": 1.0}, {"accumulate": 2}, {"optimizer": "muon"}], ids=str
)
@pytest.mark.parametrize("loss", [CapacityLoss(**GAUSSIAN), BetaLoss(4.0, **GAUSSIAN)])
def test_a_step_reads_nothing_from_the_device(loss, options):
    step = build_step(loss=loss, **options)
    images = batch()
    with NoReads(), NoScalars():
        for number in range(3):
            step.set_lr_factor(1 / (number + 1))
            step(images)


@pytest.mark.parametrize("read", [lambda t: t.item(), float, bool, lambda t: t.cpu(), lambda t: t.nonzero()])
def test_a_read_is_seen(read):
    with pytest.raises(AssertionError, match="makes the host wait"), NoReads(), NoScalars():
        read(torch.ones(()))


@pytest.mark.gpu
def test_a_step_never_synchronises():
    step = build_step(torch.device("cuda"), clip_grad=1.0)
    images = batch(device="cuda")
    data = DeviceLoader(batch(80, device="cuda"), 8, 1, train=True, flip=True)
    data.begin(0)
    step(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3):
            step.set_lr_factor(1 / (number + 1))
            step(images)
            step.metrics_buffer.send(number + 2)
            while not step.metrics_buffer.receive(wait=False):
                pass
        data.begin(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- what a step computes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        CapacityLoss(10.0, 25.0, 10**6, **GAUSSIAN),
        BetaLoss(4.0, **GAUSSIAN),
        AnnealedBeta(4.0, 10, **GAUSSIAN),
    ],
)
def test_parts_of_a_batch_give_the_whole_batchs_update(loss):
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    results = []
    for accumulate in (1, 4):
        loss.load_state_dict(state)
        step = still(build_step(loss=loss, accumulate=accumulate))
        for number in range(4):
            step(batch(seed=number))
        results.append((weights(step), step.metrics_buffer.rows.clone()))
        if isinstance(loss, CapacityLoss | AnnealedBeta):
            assert loss.step == 4
    for one, other in zip(*(r[0] for r in results), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(*(r[1] for r in results))


# ---- compiled ----------------------------------------------------------------------------------------------


class Recorder:
    """A backend for torch.compile that runs a graph as it is, and keeps those of both passes."""

    def __init__(self):
        self.forward, self.backward = [], []

    def __call__(self, module, inputs):
        def keep(graphs):
            return lambda graph, _: graphs.append(graph) or make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=keep(self.forward), bw_compiler=keep(self.backward))(module, inputs)

    def calls(self, graphs: str, target) -> list[torch.fx.Node]:
        return [
            node for graph in getattr(self, graphs) for node in graph.graph.nodes if node.target is target
        ]


class Names(TorchDispatchMode):
    """Keeps the names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def compiled_step(**options) -> tuple[TrainingStep, Recorder]:
    step, recorder = build_step(**options), Recorder()
    torch._dynamo.reset()
    step._objective = torch.compile(step.objective, backend=recorder, fullgraph=True)
    return step, recorder


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"accumulate": 4}], ids=str)
def test_a_compiled_step_is_the_eager_step(options):
    (compiled, recorder), eager = compiled_step(**options), build_step(**options)
    for step in (compiled, eager):
        for number in range(3):
            step(batch(seed=number))
    assert recorder.backward
    torch.testing.assert_close(compiled.metrics_buffer.rows, eager.metrics_buffer.rows, rtol=1e-5, atol=1e-6)
    for one, other in zip(weights(compiled), weights(eager), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert compiled.step == eager.step == compiled.loss.step == 3


def test_leaky_relu_is_in_place_in_eager_mode_alone():
    """In place, autograd saves its result, which BatchNorm's backward pass then reads beside its input."""
    step, recorder = compiled_step()
    step(batch())
    number = sum(isinstance(module, nn.BatchNorm2d) for module in step.model.modules())
    backward = recorder.calls("backward", torch.ops.aten.leaky_relu_backward.default)
    assert [node.args[3] for node in backward] == number * [False]
    with Names() as eager:
        build_step()(batch())
    assert (eager.names.count("leaky_relu_"), eager.names.count("leaky_relu")) == (number, 0)


def test_autocasts_weights_and_their_gradients_are_cast_together():
    """Each by itself is a launch, for autocast casts a gradient where it arises."""
    step, recorder = compiled_step(dtype=torch.bfloat16)
    step(batch())
    matrices = sum(p.dim() > 1 for p in step.model.parameters())
    for graphs in ("forward", "backward"):
        (together,) = recorder.calls(graphs, torch.ops.aten._foreach_mul.Scalar)
        assert len(together.args[0]) == matrices
    assert all(p.grad.dtype == torch.float32 for p in step.model.parameters())


def test_parts_of_a_batch_are_compiled_twice_at_most():
    """For the first image's number 0, and for any."""
    step, recorder = compiled_step(accumulate=4)
    step(batch())
    step(batch())
    assert len(recorder.forward) <= 2


def test_parts_must_be_equal():
    with pytest.raises(ValueError, match="8 images cannot be divided into 3 equal parts"):
        build_step(accumulate=3)(batch())


def test_the_gradient_is_clipped_as_torch_does():
    step = build_step(clip_grad=0.01)
    step(batch())
    norm = nn.utils.get_total_norm([p.grad for p in step.model.parameters()])
    assert norm.item() == pytest.approx(0.01, rel=1e-4)


def test_the_learning_rate_is_read_on_the_device():
    step = build_step(lr=1e-3)
    rate = step.optimizer.param_groups[0]["lr"]
    before = weights(step)[0]
    step.set_lr_factor(0.0)
    step(batch())
    assert torch.equal(weights(step)[0], before)
    assert step.optimizer.param_groups[0]["lr"] is rate


def test_history_gives_each_step_once():
    step = build_step(buffer_steps=3)
    seen = []
    for number in range(1, 8):
        step(batch(seed=number))
        if number % 3 == 0 or number == 7:
            step.metrics_buffer.send(number)
            seen += [s for s, _ in step.metrics_buffer.receive(wait=True)]
            assert step.metrics_buffer.receive(wait=True) == []
    assert seen == list(range(1, 8))


def test_a_loss_that_is_not_finite_is_named_by_its_step():
    step = build_step(buffer_steps=5)
    for number in range(1, 6):
        if number == 3:
            with torch.no_grad():
                step.model.head.bias[0] = math.nan
        step(batch())
    step.metrics_buffer.send(5)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
        step.receive(wait=True)


# ---- capture -----------------------------------------------------------------------------------------------


def test_warming_up_leaves_no_trace():
    """As a capture does it: steps inside `preserved`, then the run; and the run alone."""
    warmed, plain = build_step(), build_step()
    addresses = [t.data_ptr() for t in warmed._state()]
    with preserved(warmed._state):
        for number in range(11):
            warmed(batch(seed=100 + number))
    assert addresses == [t.data_ptr() for t in warmed._state()][: len(addresses)]
    for number in range(6):
        warmed(batch(seed=number))
        plain(batch(seed=number))
    assert losses(warmed, 6) == losses(plain, 6)
    for one, other in zip(weights(warmed), weights(plain), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_gathered_batch_is_the_epochs(flip, world_size):
    images = batch(50)
    for rank, epoch in itertools.product(range(world_size), (0, 5)):
        data = DeviceLoader(images, 4, 7, train=True, flip=flip, rank=rank, world_size=world_size)
        data.begin(3)  # another epoch before: its addresses are used again
        data.begin(epoch)
        for position, (expected, _) in enumerate(data.epoch(epoch)):
            assert torch.equal(data.batch(torch.tensor(position)), expected)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (batch(6), r"of shape \[8, 32, 32, 3\], these have \[6, 32, 32, 3\]"),
        (batch().float(), "of dtype torch.uint8, these have torch.float32"),
    ],
    ids=["shape", "dtype"],
)
def test_other_images_than_the_captured_are_named(images, text):
    step = build_step()
    step.captured = Captured(lambda: None, batch())
    with pytest.raises(ValueError, match=text):
        step(images)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("source", "compile"), [("resident", True), ("resident", False), ("given", False)], ids=str
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_captured_run_is_the_uncaptured_run(source, dtype, compile):
    device = torch.device("cuda")
    data = DeviceLoader(batch(80, device=device), 8, 1, train=True, flip=True)
    curves = []
    for captured in (False, True):
        step = build_step(device, dtype=dtype, compile=compile, buffer_steps=30, clip_grad=10.0)
        if captured:
            assert step.capture(data if source == "resident" else data.head(8))
        for epoch in range(3):
            step.set_lr_factor(1 / (epoch + 1))
            data.begin(epoch)
            for images, _ in data.epoch(epoch):
                step(None if step.gathers else images)
        curves.append(losses(step, 30))
    assert len(curves[0]) == 30
    assert curves[1] == pytest.approx(curves[0], rel=1e-3 if dtype is None else 2e-2)


class Stub:
    """Stands for the streams and the graph of a machine that has none."""

    def wait_stream(self, other): ...

    def replay(self): ...


def test_what_is_preserved_holds_no_graph():
    """An AccumulateGrad node that outlives a warm-up step belongs to the wrong stream in a capture."""
    weight = torch.nn.Parameter(torch.ones(2))

    def node():
        return weight.view_as(weight).grad_fn.next_functions[0][0]

    with preserved(lambda: [weight]):
        node().metadata["seen"] = True
        assert "seen" not in node().metadata  # a new one


@pytest.fixture
def captured_on_a_cpu(monkeypatch):
    """What `capture` makes of an error that ends the capture."""

    def capture_until(step: TrainingStep, error: BaseException | None) -> bool:
        @contextlib.contextmanager
        def graph(*_, **__):
            yield
            if error:
                raise error

        for name in ("CUDAGraph", "Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, Stub)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        return step.capture(batch())

    return capture_until


def masked(text: str) -> RuntimeError:
    """The error of a capture's end, raised while the shortage of memory was on its way."""
    error = RuntimeError(text)
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        masked("CUDA error: operation failed due to a previous error during capture"),
    ],
    ids=["allocator", "driver", "masked"],
)
def test_any_shortage_of_memory_leaves_the_step_as_it_was(captured_on_a_cpu, error):
    step, plain = build_step(), build_step()
    assert not captured_on_a_cpu(step, error)
    for each in (step, plain):
        each(batch())
    assert losses(step, 1) == losses(plain, 1)


def test_another_failure_of_a_capture_is_seen(captured_on_a_cpu):
    with pytest.raises(CaptureFailed, match=r"\(operation not permitted.*\): --no-capture trains without"):
        captured_on_a_cpu(build_step(), RuntimeError("operation not permitted when stream is capturing"))


def test_a_released_graph_dies_and_leaves_a_step_that_works(captured_on_a_cpu):
    step = build_step()
    assert captured_on_a_cpu(step, None)
    graph = weakref.ref(step.captured.replay.__self__)
    step.release()
    assert graph() is None
    step(batch())
    assert math.isfinite(losses(step, 1)[0])


@pytest.mark.gpu
def test_no_memory_for_the_graph_leaves_the_step_as_it_was(monkeypatch):
    device = torch.device("cuda")
    step, plain = build_step(device), build_step(device)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "graph", full)
    assert not step.capture(batch(device=device))
    for each in (step, plain):
        each(batch(device=device))
    assert losses(step, 1) == losses(plain, 1)


# ---- precision and switches --------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_ends_where_float32_does():
    small = portrait.render(faces.sample_factors(256)).permute(0, 3, 1, 2)[:, :, 35:183, 15:163]
    images = resize(small, [32, 32], antialias=True).permute(0, 2, 3, 1)
    ends = []
    for dtype in (None, torch.bfloat16):
        step = build_step(loss=BetaLoss(**GAUSSIAN), dtype=dtype, lr=5e-3, buffer_steps=300)
        for number in range(300):
            step(images[32 * (number % 8) :][:32])
        ends.append(sum(losses(step, 300)[-50:]))
        assert all(t.dtype == torch.float32 for t in step._state() if t.is_floating_point())
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


def test_without_the_kernels_the_reference_runs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launch.runs_triton(torch.ones(2)) or not launch.AVAILABLE
    monkeypatch.setattr(launch, "ENABLED", False)
    assert not launch.runs_triton(torch.ones(2))
