"""What a GPU alone can tell: graph capture and replay, concurrent streams, the number of launches."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bvae import ops
from bvae.losses import CapacityLoss
from bvae.objective import Objective

pytestmark = pytest.mark.gpu


def cuda(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


class Step:
    """A step of latents, a recon and the capacity loss on static tensors, as training captures it."""

    def __init__(self, batch: int = 144, latents: int = 128, seed: int = 0, per_dim: bool = True) -> None:
        self.both = cuda(batch, 2 * latents, seed=seed).requires_grad_()
        recon = cuda(batch, 3, 64, 64, dtype=torch.bfloat16, seed=seed + 1)
        self.recon = recon.to(memory_format=torch.channels_last).requires_grad_()
        self.target = torch.randint(256, (batch, 64, 64, 3), dtype=torch.uint8, device="cuda")
        self.loss = CapacityLoss(activation="tanh", kl_weight=0.03).cuda()
        self.seed = torch.tensor(1265, device="cuda")
        self.per_dim = per_dim

    def __call__(self) -> tuple[Tensor, ...]:
        latents = self.both.chunk(2, 1)
        z, kl, *kl_per_dim = ops.reparam_kl(
            *latents, seed=self.seed, step=self.loss.step, per_dim=self.per_dim
        )
        terms = self.loss(self.recon, self.target, kl)
        grads = torch.autograd.grad(terms.loss + z.square().sum(), (self.both, self.recon))
        return (z, *terms, *kl_per_dim, *grads)


def capture(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


@pytest.mark.parametrize("per_dim", [False, True], ids=["", "per dim"])
@pytest.mark.parametrize(("batch", "latents"), [(144, 128), (2, 65536)], ids=["short rows", "split rows"])
def test_replays_are_the_eager_steps(batch, latents, per_dim):
    captured, eager = Step(batch, latents, per_dim=per_dim), Step(batch, latents, per_dim=per_dim)
    eager.target.copy_(captured.target)
    graph, outputs = capture(captured)
    captured.loss.step.zero_()
    for _ in range(3):
        graph.replay()
        for ours, expected in zip(outputs, eager(), strict=True):
            assert torch.equal(ours, expected)
    assert captured.loss.step.item() == 3


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
def test_steps_on_concurrent_streams_do_not_share_tickets(captured):
    steps = [Step(2, 65536, seed=i) for i in range(4)]
    graphs = [capture(step) for step in steps] if captured else []
    outputs = [outputs for _, outputs in graphs] or [step() for step in steps]
    for step in steps:
        step.loss.step.zero_()
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    for _ in range(50):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if captured:
                    graphs[number][0].replay()
                else:
                    outputs[number] = steps[number]()
    torch.cuda.synchronize()
    for step, found in zip(steps, outputs, strict=True):
        step.loss.step.fill_(49)
        for ours, expected in zip(found, step(), strict=True):
            assert torch.equal(ours, expected)


def test_a_weight_assigned_between_replays_counts():
    step = Step(8, 16)
    step.loss.eval()
    step.loss.step.fill_(10_000)
    graph, outputs = capture(step)
    for gamma in (10.0, 3.0, 0.0):
        step.loss.gamma = gamma
        graph.replay()
        for ours, expected in zip(outputs, step(), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("batch", [7, 14, 15, 28, 29, 144])
def test_a_kld_of_c_is_c(batch):
    kl = torch.full((batch,), 25.0, device="cuda", requires_grad=True)
    images = torch.zeros(batch, 4, device="cuda")
    terms = ops.vae_loss(images, images, kl, step=10_000)
    terms.loss.backward()
    assert (terms.kld.item(), terms.loss.item()) == (25.0, 0.0)
    assert (kl.grad == 0).all()


@pytest.mark.parametrize("shape", [(144, 128), (1, 65536), (144, 4, 64, 64)], ids=str)
def test_equal_inputs_give_equal_bits(shape):
    """However the programs interleave; the interpreter runs them one by one and cannot tell."""
    mu, log_var = cuda(*shape), cuda(*shape, seed=1)
    recon, kl = cuda(144, 3, 64, 64, dtype=torch.bfloat16).requires_grad_(), cuda(144).requires_grad_()
    target = torch.randint(256, recon.shape, dtype=torch.uint8, device="cuda")

    def run() -> list[Tensor]:
        latents = ops.reparam_kl(mu, log_var, seed=1, per_dim=True)
        terms = ops.vae_loss(recon, target, kl, step=7, activation="tanh")
        return [*latents, *terms, *torch.autograd.grad(terms.loss, (recon, kl))]

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


class Block:
    """A BatchNorm and the last block after it, forward and backward, on static tensors of training's size.

    The running statistics are set again at the start, so that equal inputs give equal outputs.
    """

    def __init__(self, seed: int = 0) -> None:
        x = cuda(144, 32, 64, 64, dtype=torch.bfloat16, seed=seed).to(memory_format=torch.channels_last)
        vectors = cuda(4, 32, seed=seed + 1)
        weights = cuda(3, 32, 3, 3, seed=seed + 2) / 16, cuda(3, seed=seed + 3)
        self.leaves = [t.detach().requires_grad_() for t in (x, *vectors, *weights)]
        self.target = torch.randint(256, (144, 64, 64, 3), dtype=torch.uint8, device="cuda")
        self.running = [torch.empty(32, device="cuda") for _ in range(4)]

    def __call__(self) -> list[Tensor]:
        for each in self.running:
            each.fill_(1.0)
        x, *vectors, weight, bias = self.leaves
        a = ops.batch_norm_leaky_relu(x, *vectors[:2], *self.running[:2])
        last = *vectors[2:], weight, bias, self.target, Objective(activation="tanh")
        errors, squares = ops.last_block(a, *last, *self.running[2:])
        return [errors, squares, *torch.autograd.grad(errors.sum(), self.leaves), *self.running]


class FewRows(Block):
    """A BatchNorm of few rows, which takes one launch forward and one backward."""

    def __init__(self, seed: int = 0) -> None:
        x = cuda(144, 512, 2, 2, dtype=torch.bfloat16, seed=seed).to(memory_format=torch.channels_last)
        self.leaves = [t.detach().requires_grad_() for t in (x, *cuda(2, 512, seed=seed + 1))]

    def __call__(self) -> list[Tensor]:
        y = ops.batch_norm_leaky_relu(*self.leaves)
        return [y, *torch.autograd.grad(y.square().sum(), self.leaves)]


@pytest.mark.parametrize("kind", [Block, FewRows])
def test_replays_of_the_networks_kernels_are_the_eager_calls(kind):
    block = kind()
    expected = [t.clone() for t in block()]
    graph, outputs = capture(block)
    for _ in range(20):
        for each in outputs:
            each.fill_(torch.nan)
        graph.replay()
        for ours, eager in zip(outputs, expected, strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.parametrize("kind", [Block, FewRows])
def test_the_networks_kernels_on_concurrent_streams(kind):
    blocks = [kind(seed=10 * i) for i in range(4)]
    expected = [[t.clone() for t in block()] for block in blocks]
    graphs = [capture(block) for block in blocks]
    streams = [torch.cuda.Stream() for _ in blocks]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, outputs), eager in zip(graphs, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(outputs, eager, strict=True))


def host_and_device(function: Callable[[], object]) -> tuple[list[str], list[str]]:
    """What the host calls in `function`, once warm, and the kernels and copies that the device then runs."""
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    names: dict[bool, list[str]] = {False: [], True: []}
    for event in profile.events():
        if not event.is_user_annotation:  # a span around kernels, such as the optimizer's step
            names[event.device_type == torch.autograd.DeviceType.CUDA].append(event.name)
    return names[False], names[True]


def launches(function: Callable[[], object]) -> list[str]:
    """The names of the kernels that `function` launches, once warm."""
    return host_and_device(function)[1]


def test_one_launch_for_the_sample_and_two_for_the_loss():
    step = Step()
    mu, log_var = (x.detach().requires_grad_() for x in step.both.chunk(2, 1))
    assert len(launches(lambda: ops.reparam_kl(mu, log_var, seed=step.seed, step=step.seed))) == 1
    z, kl = ops.reparam_kl(mu, log_var, seed=step.seed, step=step.seed)
    both = torch.ones_like(z), torch.ones_like(kl)
    assert len(launches(lambda: torch.autograd.grad((z, kl), (mu, log_var), both, retain_graph=True))) == 1
    kl = kl.detach().requires_grad_()
    assert (
        len(launches(lambda: step.loss(step.recon, step.target, kl))) <= 2
    )  # the counter's, and the kernel's
    loss, one = step.loss(step.recon, step.target, kl).loss, torch.ones((), device="cuda")
    assert len(launches(lambda: torch.autograd.grad(loss, (step.recon, kl), one, retain_graph=True))) == 1


def test_launches_of_the_networks_kernels():
    names = Counter(name.split("(")[0] for name in launches(Block()))
    ours = {name: names[name] for name in names if name.endswith("_kernel") and name.startswith("_")}
    batch_norm = {"_apply_kernel": 1, "_statistics_kernel": 2, "_reduce_kernel": 2, "_grad_kernel": 2}
    assert ours == {**batch_norm, "_forward_kernel": 1, "_sum_kernel": 1}


def test_compiled_with_cuda_graphs():
    step = Step(8, 16)
    compiled = torch.compile(
        lambda mu, v, n: ops.reparam_kl(mu, v, seed=step.seed, step=n), mode="reduce-overhead"
    )
    mu, log_var = step.both.detach().chunk(2, 1)
    for n in range(4):
        number = torch.tensor(n, device="cuda")
        for ours, expected in zip(
            compiled(mu, log_var, number),
            ops.reparam_kl(mu, log_var, seed=step.seed, step=number),
            strict=True,
        ):
            torch.testing.assert_close(ours, expected)
