"""A linear VAE ends where probabilistic PCA says (Tipping & Bishop 1999; Lucas et al. 2019).

With x ~ N(0, S), the decoder W z, variance v of a pixel and the KL's weight beta, the objective is beta times
that of the noise beta v. Its least value has a closed form in the eigenvalues of S: latents whose eigenvalue
is below beta v switch off.
"""

import math

import pytest
import torch
from torch import nn

from bvae import BetaLoss, reparam_kl

VARIANCE = 0.5  # with it a squared error is in nats
EIGENVALUES = torch.tensor([20.0, 9.0, 4.0, 1.5, 0.3, 0.2], dtype=torch.float64)
LATENTS = 5


def least_loss(eigenvalues: torch.Tensor, beta: float) -> float:
    """Nats per image."""
    noise = beta * VARIANCE
    kept = eigenvalues[:LATENTS][eigenvalues[:LATENTS] > noise]
    inside = (kept / noise).log().sum() + len(kept)
    return (beta / 2 * (inside + (eigenvalues.sum() - kept.sum()) / noise)).item()


def test_the_closed_form():
    """By hand: one eigenvalue of e v stays with beta 1; another of v / 2 is below the noise."""
    eigenvalues = torch.tensor([math.e * VARIANCE, VARIANCE / 2], dtype=torch.float64)
    assert least_loss(eigenvalues, 1.0) == pytest.approx(0.5 * (1 + 1 + 0.5))


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "active"), [(1.0, 4), (4.0, 3), (16.0, 2)])
def test_a_linear_vae_reaches_it(beta, active):
    torch.manual_seed(0)
    size = len(EIGENVALUES)
    rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    x = torch.randn(1024, size, dtype=torch.float64)
    x = x @ (rotation * EIGENVALUES.sqrt()).T
    x = x - x.mean(0)
    eigenvalues = torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0)

    encoder = nn.Linear(size, LATENTS, bias=False, dtype=torch.float64)
    decoder = nn.Linear(LATENTS, size, bias=False, dtype=torch.float64)
    log_var = nn.Parameter(torch.full((LATENTS,), -2.0, dtype=torch.float64))
    objective = BetaLoss(kl_weight=beta, reduction="sum")
    parameters = [*encoder.parameters(), *decoder.parameters(), log_var]
    optimizer = torch.optim.Adam(parameters, 0.03)
    steps = 5000
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 2)
    for _ in range(steps):
        z, kl = reparam_kl(encoder(x), log_var.expand(len(x), -1))
        loss = objective(decoder(z), x, kl).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    with torch.no_grad():  # the expectation over z, without noise
        mu, weight = encoder(x), decoder.weight
        error = (x - decoder(mu)).square().sum(1).mean() + (log_var.exp() * weight.square().sum(0)).sum()
        kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).mean(0)
        found = (error + beta * kl.sum()).item()
    assert found == pytest.approx(least_loss(eigenvalues, beta), rel=1e-3)
    assert (kl > 0.01).sum() == active
