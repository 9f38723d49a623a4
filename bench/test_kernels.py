"""The fused operations against the same mathematics in PyTorch as people write it, eager and compiled.

Forward, backward and both are timed separately. All contenders get the same inputs, in turn from several
sets, so that no cache holds all large ones. mu and log_var are halves of one tensor, as from an encoder; a
decoder's output is channels last, its target uint8. On a CPU ours is what `bvae.ops` runs there: plain
PyTorch.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from bench.race import clock
from bvae import ops, reference

GPU = torch.cuda.is_available()
PASSES = ("forward", "backward", "both")
HEADLINE_CASE = (144, 128), torch.bfloat16  # shown in the docs
DATASET_SIZE = 162_770  # CelebA's
KL_WEIGHT, MAX_CAPACITY, CAPACITY_ITERS = 0.03, 25.0, 10_000
INPUT_BYTES, MAX_SETS = (256 << 20, 32) if GPU else (64 << 20, 4)

Operation = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An operation and its inputs: `make` returns one set; those that require gradients get them."""

    name: str
    make: Callable[[torch.device], tuple[Tensor, ...]]
    eager: Operation
    ours: Operation
    check: Callable[
        [str, Operation, tuple[Tensor, ...]], None
    ]  # raises if the outputs or gradients are wrong
    moved: tuple[int, int, int]  # bytes that forward, backward and both must move
    headline: str | None  # the case's name in the docs


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]


def _leaves(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t for t in inputs if t.requires_grad)


def _run(operation: Operation, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs, and the gradients of their sum with respect to the leaves."""
    outputs = operation(*inputs)
    total = torch.stack([output.float().sum() for output in outputs]).sum()
    return *outputs, *torch.autograd.grad(total, _leaves(inputs))


def _close(name: str, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for a, e in zip(actual, expected, strict=True):
        scale = e.abs().max().item()
        error = (a.float() - e.float()).abs().max().item()
        assert error <= tolerance * scale, (
            f"{name} is off by {error:.2g} where the reference reaches {scale:.2g}"
        )


# Sampling: z and the KL


def _eager_sample(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = mu.float(), log_var.float()
    z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    kl = 0.5 * (mean * mean + torch.exp(log_variance) - 1 - log_variance)
    return z.to(mu.dtype), kl.flatten(1).sum(1)


def _our_sample(mu: Tensor, log_var: Tensor) -> tuple[Tensor, ...]:
    if not GPU:  # torch's noise, as the other contenders
        return ops.reparam_kl(mu, log_var)
    return ops.reparam_kl(mu, log_var, seed=_counter(1265, mu.device), step=_counter(1, mu.device))


@cache
def _counter(value: int, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)


def _check_sample(name: str, operation: Operation, inputs: tuple[Tensor, ...]) -> None:
    """With the noise computed from z, the reference has the same z, KL and gradients; the noise is normal."""
    actual = _run(operation, inputs)
    mu, log_var = (t.detach().float().requires_grad_() for t in inputs)
    eps = ((actual[0].float() - mu) * torch.exp(-0.5 * log_var)).detach()
    assert abs(eps.mean().item()) < 0.05, f"the mean of {name}'s noise is {eps.mean().item():.2g}"
    assert abs(eps.std().item() - 1) < 0.05, f"the deviation of {name}'s noise is {eps.std().item():.2g}"
    expected = _run(lambda m, v: reference.reparam_kl(m, v, eps)[:2], (mu, log_var))
    _close(name, actual, expected, inputs[0].dtype)


def _sample_case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    batch, channels, *rest = shape

    def make(device: torch.device) -> tuple[Tensor, ...]:
        both = 0.5 * torch.randn(batch, 2 * channels, *rest, device=device)
        mu, log_var = both.to(dtype).chunk(2, dim=1)
        return mu.detach().requires_grad_(), log_var.detach().requires_grad_()

    n, size = math.prod(shape), dtype.itemsize
    # mu, log_var to z and KL; with z's gradient to theirs
    moved = 3 * n * size + 4 * batch, 5 * n * size + 4 * batch, 8 * n * size + 8 * batch
    label = f"sample {' x '.join(map(str, shape))}, {_short(dtype)}"
    headline = f"Sample and KL, {label.removeprefix('sample ')}" if (shape, dtype) == HEADLINE_CASE else None
    return Case(label, make, _eager_sample, _our_sample, _check_sample, moved, headline)


# The loss: a decoder's raw output, its uint8 target and the KL


def _eager_b(recon: Tensor, kl: Tensor, target: Tensor, step: Tensor) -> tuple[Tensor]:
    mse = F.mse_loss(torch.tanh(recon.float()), reference.scale_pixels(target))
    capacity = reference.capacity_at(step, MAX_CAPACITY, CAPACITY_ITERS)
    return (mse + KL_WEIGHT * (kl.mean() - capacity).abs(),)


def _eager_bernoulli(recon: Tensor, kl: Tensor, target: Tensor, step: Tensor) -> tuple[Tensor]:
    pixels = reference.scale_pixels(target, 0.0)
    return (F.binary_cross_entropy_with_logits(recon.float(), pixels) + KL_WEIGHT * kl.mean(),)


def _reference_loss(
    recon: Tensor, target: Tensor, kl: Tensor, *, step: Tensor | None = None, **options: Any
) -> reference.LossTerms:
    return reference.vae_loss(recon, target, kl, reference.Objective(**options), step=step)


def _loss(function: Callable[..., Any], options: dict[str, Any]) -> Operation:
    def operation(recon: Tensor, kl: Tensor, target: Tensor, step: Tensor) -> tuple[Tensor]:
        b = {"step": step, "max_capacity": MAX_CAPACITY, "capacity_iters": CAPACITY_ITERS}
        schedule = b if options["activation"] else {}
        return (function(recon, target, kl, kl_weight=KL_WEIGHT, **schedule, **options).loss,)

    return operation


def _loss_case(label: str, shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Case:
    batch, channels, *size = shape

    def make(device: torch.device) -> tuple[Tensor, ...]:
        recon = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
        target = torch.randint(256, (batch, *size, channels), dtype=torch.uint8, device=device)
        kl = 20 + torch.rand(batch, device=device)
        leaves = recon.requires_grad_(), kl.requires_grad_()
        return *leaves, target.permute(0, 3, 1, 2), torch.tensor(3000, device=device)

    n = math.prod(shape)
    # forward reads recon and target; backward reads both again and writes recon's gradient; both: one pass
    forward, backward = n * (dtype.itemsize + 1), n * (2 * dtype.itemsize + 1)
    name = f"{label} {' x '.join(map(str, shape))}, {_short(dtype)}"
    eager = _eager_b if options["activation"] else _eager_bernoulli
    specified, ours = _loss(_reference_loss, options), _loss(ops.vae_loss, options)

    def check(name: str, operation: Operation, inputs: tuple[Tensor, ...]) -> None:
        recon, kl = (t.detach().float().requires_grad_() for t in _leaves(inputs))
        _close(name, _run(operation, inputs), _run(specified, (recon, kl, *inputs[2:])), dtype)

    is_headline = dtype == HEADLINE_CASE[1] and batch == HEADLINE_CASE[0][0]
    headline = name.replace("loss", "Loss", 1) if is_headline else None
    return Case(name, make, eager, ours, check, (forward, backward, backward), headline)


# The total correlation. Arithmetic bounds it, with 3 B^2 D exponentials: the bytes only show that none of the
# contenders needs to move a [B, B, D] tensor.


def _eager_correlation(z: Tensor, mu: Tensor, log_var: Tensor) -> tuple[Tensor]:
    z, mu, log_var = z.float(), mu.float(), log_var.float()
    own, other = reference.log_importance_weights(len(z), DATASET_SIZE, "stratified")
    weight = torch.where(torch.eye(len(z), dtype=torch.bool, device=z.device), own, other)
    distance = (z[:, None] - mu).square() * torch.exp(-log_var)
    density = -0.5 * (distance + log_var + math.log(2 * math.pi))
    joint = torch.logsumexp(weight + density.sum(2), 1)
    return ((joint - torch.logsumexp(weight[..., None] + density, 1).sum(1)).mean(),)


def _correlation_case(shape: tuple[int, int], dtype: torch.dtype) -> Case:
    batch, latents = shape

    def make(device: torch.device) -> tuple[Tensor, ...]:
        mu, log_var = torch.randn(batch, 2 * latents, device=device).chunk(2, 1)
        z = mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)
        return tuple(t.to(dtype).requires_grad_() for t in (z, mu, log_var))

    def ours(z: Tensor, mu: Tensor, log_var: Tensor) -> tuple[Tensor]:
        return (ops.total_correlation(z, mu, log_var, DATASET_SIZE),)

    def check(name: str, operation: Operation, inputs: tuple[Tensor, ...]) -> None:
        exact = tuple(t.detach().double().requires_grad_() for t in inputs)
        _close(name, _run(operation, inputs), _run(ours, exact), dtype)

    n, size = batch * latents, dtype.itemsize
    # Forward reads three tensors and stores the marginals; each launch backward reads these; three gradients.
    forward = n * (3 * size + 4) + 12 * batch
    backward = 2 * (n * (3 * size + 4) + 12 * batch) + 3 * n * size
    name = f"total correlation {batch} x {latents}, {_short(dtype)}"
    return Case(name, make, _eager_correlation, ours, check, (forward, backward, forward + backward), None)


GAUSSIAN = {"likelihood": "gaussian", "activation": "tanh"}  # with the capacity objective
BERNOULLI = {"likelihood": "bernoulli", "activation": None}
FLOATS = (torch.float32, torch.bfloat16)
if GPU:
    LATENTS = ((144, 128), (1024, 128), (8192, 128), (65536, 128), (16, 4, 64, 64))
    IMAGES = ((144, 3, 64, 64), (1024, 3, 64, 64))
    CORRELATED = ((144, 10), (144, 128), (1024, 128))  # 1024 x 128 in float32: 537 MB of densities
else:
    LATENTS = ((144, 128), (16, 4, 64, 64))
    IMAGES = ((144, 3, 64, 64),)
    CORRELATED = ((144, 10),)
CASES = [
    *itertools.starmap(_sample_case, itertools.product(LATENTS, FLOATS)),
    *itertools.starmap(_correlation_case, itertools.product(CORRELATED, FLOATS)),
    *(_loss_case("loss B", *shape, **GAUSSIAN) for shape in itertools.product(IMAGES, FLOATS)),
    *(_loss_case("loss Bernoulli", *shape, **BERNOULLI) for shape in itertools.product(IMAGES, FLOATS[1:])),
]


@pytest.fixture(autouse=True)
def kept_graphs() -> Iterator[None]:
    """A backward pass that is timed twice needs the buffers that the first pass would free."""
    with torch._functorch.config.patch(donated_buffer=False):
        yield


@lru_cache(maxsize=1)
def _operations(case: Case) -> dict[str, Operation]:
    """The contenders; compiled once for the three passes."""
    torch._dynamo.reset()  # the number of compilations of a function is limited
    operations = {"eager": case.eager, "compiled": torch.compile(case.eager, dynamic=False)}
    return {**operations, "ours": case.ours}


@lru_cache(maxsize=1)
def _check(case: Case, device: torch.device) -> dict[str, float]:
    """Compare every contender with the reference; return the seconds of each one's first call."""
    first_calls = {}
    for name, operation in _operations(case).items():
        inputs = case.make(device)
        first_calls[name] = clock(lambda o=operation, i=inputs: _run(o, i), device)
        case.check(name, operation, inputs)
    return first_calls


def _pass(which: str, operation: Operation, sets: list[tuple[Tensor, ...]]) -> Callable[[], object]:
    """The pass that is timed; each call uses the next set of inputs."""
    if which == "forward":
        turns = itertools.cycle(sets)
        return lambda: operation(*next(turns))
    outputs = [operation(*inputs) for inputs in sets]
    grads = [[torch.randn_like(output) for output in each] for each in outputs]
    leaves = [_leaves(inputs) for inputs in sets]
    if which == "backward":
        saved = itertools.cycle(zip(outputs, leaves, grads, strict=True))
        return lambda: torch.autograd.grad(*next(saved), retain_graph=True)
    whole = itertools.cycle(zip(sets, leaves, grads, strict=True))

    def both() -> object:
        inputs, by, grad = next(whole)
        return torch.autograd.grad(operation(*inputs), by, grad)

    return both


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel(case: Case, which: str, device: torch.device, race: Callable[..., Any]) -> None:
    def prepare() -> dict[str, Callable[[], object]]:
        first = case.make(device)
        n_sets = max(1, min(MAX_SETS, INPUT_BYTES // sum(t.nbytes for t in first)))
        sets = [first, *(case.make(device) for _ in range(n_sets - 1))]
        return {name: _pass(which, o, sets) for name, o in _operations(case).items()}

    race(
        "kernels",
        f"{case.name}, {which}",
        gate=lambda: _check(case, device),
        prepare=prepare,
        bytes=case.moved[PASSES.index(which)],
        headline=case.headline if which == "both" else None,
    )
