"""One pass of every kernel, forward and backward, for compute-sanitizer: `python -m bench.every_kernel`.

The sizes fill some blocks only partly, and some layouts need strides. A CPU runs the reference.
"""

import itertools
import os
import sys

# A separate allocation per tensor, to detect writes past its end. The variable is read at CUDA's first use.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from bvae import ops
from bvae.objective import Objective

LATENTS = ((144, 128), (3, 41), (2, 4, 9, 7), (2, 5000))
IMAGES = ((144, 3, 64, 64), (5, 1, 33, 31))
FEATURES = ((3, 41, 5, 7), (3, 41, 50, 31))
BLOCKS = ((3, 32, 64, 64), (2, 17, 31, 33))
DTYPES = (torch.float32, torch.bfloat16)
LIKELIHOODS = ("gaussian", "laplace", "logistic", "bernoulli")


def sample(shape: tuple[int, ...], dtype: torch.dtype, per_dim: bool, device: torch.device) -> None:
    batch, channels, *rest = shape
    both = torch.randn(batch, 2 * channels, *rest, device=device).to(dtype).requires_grad_()
    outputs = ops.reparam_kl(*both.chunk(2, 1), seed=1265, step=3, per_dim=per_dim)
    sum(output.float().sum() for output in outputs).backward()
    ops.gaussian_kl(*both.chunk(2, 1)).sum().backward()


def correlation(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    batch, latents = shape
    both = torch.randn(batch, 2 * latents, device=device).to(dtype).requires_grad_()
    mu, log_var = both.chunk(2, 1)
    ops.total_correlation(mu + torch.randn_like(mu), mu, log_var, 1000).backward()


def loss(shape: tuple[int, ...], dtype: torch.dtype, likelihood: str, device: torch.device) -> None:
    batch, channels, *size = shape
    recon = torch.randn(shape, device=device).to(dtype).requires_grad_()
    pixels = torch.randint(256, (batch, *size, channels), dtype=torch.uint8, device=device)
    target = pixels.permute(0, 3, 1, 2)
    kl = torch.rand(batch, device=device).requires_grad_()
    activation = None if likelihood == "bernoulli" else "tanh"
    step = torch.tensor(3, device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        for capacity in ({}, {"step": step, "max_capacity": 25.0, "capacity_iters": 100}):
            options = {"kl_weight": 0.03, "likelihood": likelihood, "activation": activation, **capacity}
            ops.vae_loss(recon.contiguous(memory_format=layout), target, kl, **options).loss.backward()
            each = ops.vae_loss(
                recon.contiguous(memory_format=layout), target, kl, reduction="none", **options
            )
            each.loss.sum().backward()


def norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(shape, device=device).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.ones(2, shape[1], device=device, requires_grad=True).unbind()
    ops.batch_norm_leaky_relu(x, weight, bias).float().sum().backward()


def block(shape: tuple[int, ...], likelihood: str, device: torch.device) -> None:
    batch, channels, *size = shape
    x = torch.randn(shape, device=device).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    norm_weight, norm_bias = torch.ones(2, channels, device=device, requires_grad=True).unbind()
    weight, bias = (torch.randn(s, device=device, requires_grad=True) for s in ((3, channels, 3, 3), (3,)))
    target = torch.randint(256, (batch, *size, 3), dtype=torch.uint8, device=device)
    objective = Objective(likelihood=likelihood, activation=None if likelihood == "bernoulli" else "tanh")
    ops.last_block(x, norm_weight, norm_bias, weight, bias, target, objective)[0].sum().backward()


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for shape, dtype, per_dim in itertools.product(LATENTS, DTYPES, (False, True)):
        sample(shape, dtype, per_dim, device)
    for shape, dtype in itertools.product(((144, 128), (34, 10), (5, 41), (7, 512)), DTYPES):
        correlation(shape, dtype, device)
    for shape, dtype, likelihood in itertools.product(IMAGES, DTYPES, LIKELIHOODS):
        loss(shape, dtype, likelihood, device)
    for shape, dtype in itertools.product(FEATURES, DTYPES):
        norm(shape, dtype, device)
    for shape, likelihood in itertools.product(BLOCKS, LIKELIHOODS):
        block(shape, likelihood, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"every kernel ran on the {device.type}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
