"""What the trainer adds to recon + KL for disentanglement, as modules: functions of a batch's latents.

loss = recon + kl_weight KL + weight * penalty(z, mu, log_var)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bvae import ops, reference
from bvae.arguments import LEAST_BATCH
from bvae.kernels import noise

_PERMUTATION = 0x7065726D  # changes the random seed, so that permutations and the latents' noise differ


class Penalty(nn.Module):
    """A number of a batch's latents that training keeps small; `weight` multiplies it in the loss.

    Called with z, mu and log_var `[B, D]`, it returns the penalty without its weight, 0-d.
    """

    least_batch = 2  # images
    weight: float


class TotalCorrelation(Penalty):
    """`bvae.ops.total_correlation`, nats: beta-TCVAE (Chen et al. 2018) with the weight beta - 1.

    Args:
        dataset_size: the number of training images.
        weight: in the loss.
    """

    least_batch = LEAST_BATCH

    def __init__(self, dataset_size: int, weight: float) -> None:
        super().__init__()
        self.dataset_size, self.weight = dataset_size, weight

    def forward(self, z: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
        return ops.total_correlation(z, mu, log_var, self.dataset_size)


class Covariance(Penalty):
    """`bvae.reference.covariance_penalty`: DIP-VAE-I, or II with `of_samples` (Kumar et al. 2018).

    Args:
        off_diagonal, diagonal: weights of the covariances and of the variances' distances from 1.
        of_samples: of z; False: of mu.
        weight: of both in the loss.
    """

    def __init__(self, off_diagonal: float, diagonal: float, *, of_samples: bool, weight: float) -> None:
        super().__init__()
        self.off_diagonal, self.diagonal = off_diagonal, diagonal
        self.of_samples, self.weight = of_samples, weight

    def forward(self, z: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
        spread = log_var if self.of_samples else None
        return reference.covariance_penalty(mu, spread, self.off_diagonal, self.diagonal)


class Discriminator(Penalty):
    """The total correlation by a discriminator: FactorVAE (Kim & Mnih 2018), as in disentanglement_lib.

    It tells samples of q(z) (class 0) from samples of the product of its marginals (class 1), which are the
    batch with each latent permuted among the images. The difference of its logits estimates
    log q(z) - sum_d log q(z_d). Six layers of 1000 with LeakyReLU(0.2), and two logits, float32.

    Args:
        latents: D.
        weight: in the loss; the paper's gamma.
    """

    def __init__(self, latents: int, weight: float, *, width: int = 1000, layers: int = 6) -> None:
        super().__init__()
        self.weight = weight
        modules: list[nn.Module] = []
        for inputs in (latents, *(layers - 1) * (width,)):
            modules += [nn.Linear(inputs, width), nn.LeakyReLU(0.2)]
        self.network = nn.Sequential(*modules, nn.Linear(width, 2))

    def forward(self, z: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
        """The mean difference of the logits, nats. Its gradient reaches z alone, not the discriminator."""
        frozen = {name: value.detach() for name, value in self.network.named_parameters()}
        logits = functional_call(self.network, frozen, (self._input(z),))
        return (logits[:, 0] - logits[:, 1]).mean()

    def loss(self, z: Tensor, seed: Tensor, step: Tensor, first_sample: int) -> Tensor:
        """The mean cross-entropy of both classes, nats, 0-d; its gradient reaches the discriminator alone.

        Args:
            z: `[B, D]`.
            seed, step, first_sample: of the permutation, as of the noise in `bvae.ops.reparam_kl`.
        """
        z = self._input(z.detach())
        joint, product = self.network(z), self.network(permuted(z, seed, step, first_sample))
        of_joint, of_product = (torch.full((len(z),), label, device=z.device) for label in (0, 1))
        return 0.5 * (F.cross_entropy(joint, of_joint) + F.cross_entropy(product, of_product))

    def _input(self, z: Tensor) -> Tensor:
        return z.flatten(1).to(next(self.parameters()).dtype)


def permuted(z: Tensor, seed: Tensor, step: Tensor, first_sample: int = 0) -> Tensor:
    """z `[B, D]` with each column in an order of its own, a function of (seed, step, first_sample, column).

    The order is that of random numbers that a counter gives: a CUDA graph can hold it, and a resumed run
    repeats it.
    """
    keys = noise.normal(z.shape, seed ^ _PERMUTATION, step, first_sample)
    return z.gather(0, keys.argsort(dim=0, stable=True))
