"""The snippets of docs/drop-in.md run, and their gradients are those of the code they replace."""

import pytest
import torch
import torch.nn.functional as F
from documents import snippet
from torch import Tensor, nn

from bvae.kernels import noise


def short(code: str) -> str:
    """Code of at most ten lines: what a drop-in may take."""
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    return code


def next_noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The noise that the next call without a seed draws; torch's generator is put back."""
    state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    (torch.set_rng_state if device.type == "cpu" else torch.cuda.set_rng_state)(state)
    return noise.normal(shape, seed)


class BetaVAE(nn.Module):
    """PyTorch-VAE's attributes and its objective 'B', by their formulas, around one layer for a network."""

    def __init__(self, latent_dim: int, gamma: float, max_capacity: int, Capacity_max_iter: int) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 2 * latent_dim)
        self.gamma = gamma
        self.C_max = torch.Tensor([max_capacity])
        self.C_stop_iter = Capacity_max_iter
        self.num_iter = 0

    def forward(self, x: Tensor) -> list[Tensor]:
        mu, log_var = self.layer(x.flatten(1)).chunk(2, 1)
        return [torch.tanh(x * mu.mean()), x, mu, log_var]

    def loss_function(self, *args: Tensor, **kwargs: float) -> dict[str, Tensor]:
        recons, x, mu, log_var = args
        self.num_iter += 1
        reconstruction = F.mse_loss(recons, x)
        kld = torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1))
        capacity = torch.clamp(self.C_max.to(x) / self.C_stop_iter * self.num_iter, 0, self.C_max.item())
        loss = reconstruction + self.gamma * kwargs["M_N"] * (kld - capacity).abs()
        return {"loss": loss.squeeze(), "Reconstruction_Loss": reconstruction, "KLD": kld}


def test_pytorch_vae(backend):
    namespace = {"BetaVAE": BetaVAE}
    exec(short(snippet("pytorch-vae")), namespace)
    params = {"latent_dim": 4, "gamma": 10.0, "max_capacity": 25, "Capacity_max_iter": 20}
    torch.manual_seed(0)
    original, ours = BetaVAE(**params).to(backend), namespace["FastBetaVAE"](**params).to(backend)
    ours.layer.load_state_dict(original.layer.state_dict())
    images = torch.rand(6, 3, 4, 4, device=backend) * 2 - 1
    for _ in range(3):
        results = []
        for model in (original, ours):
            model.zero_grad()
            losses = model.loss_function(*model(images), M_N=0.05, optimizer_idx=0, batch_idx=1)
            losses["loss"].backward()
            results.append((losses, model.layer.weight.grad))
        (expected, expected_grad), (losses, grad) = results
        assert losses.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(losses[name], expected[name])
        torch.testing.assert_close(grad, expected_grad)
    assert "objective.step" in ours.state_dict()


def test_diffusers(backend):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).to(backend)
    images = torch.rand(2, 3, 8, 8, device=backend)
    eps = next_noise((2, 4, 8, 8), backend)
    namespace = {"vae": vae, "images": images}
    exec(short(snippet("diffusers")), namespace)
    z, kl = namespace["z"], namespace["kl"]
    posterior = vae.encode(images).latent_dist
    expected_z, expected_kl = posterior.mean + posterior.std * eps.to(backend), posterior.kl()
    torch.testing.assert_close(z, expected_z)
    torch.testing.assert_close(kl, expected_kl)
    weights = list(vae.encoder.parameters())
    ours = torch.autograd.grad(z.square().sum() + kl.mean(), weights)
    expected = torch.autograd.grad(expected_z.square().sum() + expected_kl.mean(), weights)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class VAE(nn.Module):
    """A plain VAE with the layers of PyTorch's example, in miniature."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(784, 16), nn.Linear(16, 5), nn.Linear(16, 5)
        self.fc3, self.fc4 = nn.Linear(5, 16), nn.Linear(16, 784)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.fc1(x))
        return self.fc21(h), self.fc22(h)

    def original_loss(self, x: Tensor, eps: Tensor) -> Tensor:
        mu, logvar = self.encode(x.view(-1, 784))
        z = mu + eps * torch.exp(0.5 * logvar)
        recon = torch.sigmoid(self.fc4(torch.relu(self.fc3(z))))
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return F.binary_cross_entropy(recon, x.view(-1, 784), reduction="sum") + kld


def test_plain_vae(backend):
    namespace = {"VAE": VAE, "torch": torch}
    exec(short(snippet("plain-vae")), namespace)
    torch.manual_seed(0)
    model = namespace["FastVAE"]().to(backend)
    x = torch.rand(7, 1, 28, 28, device=backend)
    eps = next_noise((7, 5), backend)
    loss = namespace["loss_function"](*(out := model(x))[:1], x, out[1])
    expected = model.original_loss(x, eps.to(backend))
    torch.testing.assert_close(loss, expected)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
