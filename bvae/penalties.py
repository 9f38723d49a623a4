"""What the trainer adds to recon + KL for disentanglement, as modules: functions of a batch's latents.

loss = recon + kl_weight KL + weight * penalty(z, mu, log_var)
"""

from torch import Tensor, nn

from bvae import ops, reference
from bvae.arguments import LEAST_BATCH


class Penalty(nn.Module):
    """A number of a batch's latents that training keeps small; `weight` multiplies it in the loss."""

    least_batch = 2  # images
    weight: float

    def forward(self, z: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
        """The penalty without its weight, 0-d, of latents `[B, D]`."""
        raise NotImplementedError


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
