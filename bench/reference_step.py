"""PyTorch-VAE's training step as people write it: the baseline of every table.

The network and objective of PyTorch-VAE's BetaVAE, written again from their description: float32, contiguous,
a bias before every BatchNorm, two linear heads, Adam with its defaults, three numbers read back per step.
Options add what its users could switch on: channels_last, fused Adam, autocast, torch.compile.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _block(conv: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.LeakyReLU())


def _up(in_channels: int, out_channels: int) -> nn.Module:
    return nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1)


class PyTorchVAE(nn.Module):
    """PyTorch-VAE's BetaVAE, with the same parameter names.

    Args:
        latent_dim: dimensions of z.
        hidden_dims: the encoder's channels, first to last.
        image_size: height and width in pixels, a multiple of 2 ** len(hidden_dims); the original has 64 only.
    """

    def __init__(
        self,
        latent_dim: int = 128,
        hidden_dims: Sequence[int] = (32, 64, 128, 256, 512),
        image_size: int = 64,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        widths = list(hidden_dims)
        size = image_size >> len(widths)
        self.code_shape = (widths[-1], size, size)
        code = widths[-1] * size * size
        self.encoder = nn.Sequential(
            *(
                _block(nn.Conv2d(a, b, 3, stride=2, padding=1), b)
                for a, b in zip([in_channels, *widths], widths, strict=False)
            )
        )
        self.fc_mu, self.fc_var = nn.Linear(code, latent_dim), nn.Linear(code, latent_dim)
        self.decoder_input = nn.Linear(latent_dim, code)
        backwards = widths[::-1]
        self.decoder = nn.Sequential(*(_block(_up(a, b), b) for a, b in pairwise(backwards)))
        self.final_layer = nn.Sequential(
            *_block(_up(widths[0], widths[0]), widths[0]),
            nn.Conv2d(widths[0], in_channels, 3, padding=1),
            nn.Tanh(),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.flatten(self.encoder(x), start_dim=1)
        return self.fc_mu(code), self.fc_var(code)

    def reparameterize(self, mu: Tensor, log_var: Tensor) -> Tensor:
        std = torch.exp(0.5 * log_var)
        return torch.randn_like(std) * std + mu

    def decode(self, z: Tensor) -> Tensor:
        return self.final_layer(self.decoder(self.decoder_input(z).view(-1, *self.code_shape)))

    def forward(self, x: Tensor) -> list[Tensor]:
        mu, log_var = self.encode(x)
        return [self.decode(self.reparameterize(mu, log_var)), x, mu, log_var]


class PyTorchVAEStep:
    """One update by loss B: mse + gamma * kl_weight * |KL - C|, C rising by each step.

    Args:
        model: on its device; options change it in place.
        kl_weight: M_N, latent dimensions over pixels.
        channels_last, fused, dtype, compile: options that the original does not use. dtype is autocast's.
    """

    def __init__(
        self,
        model: PyTorchVAE,
        *,
        kl_weight: float,
        gamma: float = 10.0,
        max_capacity: float = 25.0,
        capacity_iters: int = 10_000,
        lr: float = 5e-4,
        channels_last: bool = False,
        fused: bool | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        if channels_last:
            model.to(memory_format=torch.channels_last)
        self.model, self.channels_last, self.dtype = model, channels_last, dtype
        self.weight, self.capacity_iters = gamma * kl_weight, capacity_iters
        self.max_capacity = torch.tensor(max_capacity, device=next(model.parameters()).device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=fused)
        self.num_iter = 0
        self._forward = torch.compile(self.forward, dynamic=False) if compile else self.forward

    def forward(self, images: Tensor, capacity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, MSE and KL in nats of images [B, C, H, W] in [-1, 1]."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            recon, x, mu, log_var = self.model(images)
        recon, mu, log_var = recon.float(), mu.float(), log_var.float()
        mse = F.mse_loss(recon, x)
        kld = torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1), dim=0)
        return mse + self.weight * (kld - capacity).abs(), mse, kld

    def __call__(self, images: Tensor) -> tuple[float, float, float]:
        """Loss, MSE and KL of a step on float32 images [B, C, H, W] in [-1, 1]."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        self.num_iter += 1
        capacity = self.max_capacity / self.capacity_iters * self.num_iter
        loss, mse, kld = self._forward(images, torch.minimum(capacity, self.max_capacity))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), mse.item(), kld.item()
