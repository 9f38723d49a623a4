"""The fused sample, KL and loss in a VAE of your own: what changes in it is marked.

python examples/fused_loss.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from bvae import reparam_kl, vae_loss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=30, help="default: %(default)s, some seconds on a CPU")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
images = torch.tensor(load_digits().data / 16, dtype=torch.float32, device=device)  # [1797, 64] in [0, 1]
encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2 * 8)).to(device)
decoder = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 64)).to(device)
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)

for epoch in range(1, options.epochs + 1):
    total = torch.zeros((), device=device)
    for x in images[torch.randperm(len(images), device=device)].split(128):
        mu, log_var = encoder(x).chunk(2, dim=1)
        # was: z = mu + torch.randn_like(mu) * torch.exp(0.5 * log_var)
        #      kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1)
        z, kl = reparam_kl(mu, log_var)
        # was: bce = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum") / len(x)
        #      loss = bce + kl.mean()
        loss = vae_loss(decoder(z), x, kl, likelihood="bernoulli", reduction="sum").loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(x)
    print(f"epoch {epoch}: {total.item() / len(images):.2f} nats per image")
