"""BatchNorm without a count that nobody reads."""

import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, except that `num_batches_tracked` stays as it is.

    Only `momentum=None` reads that count, and to keep it takes a launch a layer and step. The state dict has
    it still, so that weights go from one to the other.

    Args:
        num_features: channels.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W], normalised over N, H and W: by its own statistics in training, else the running."""
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum,  # type: ignore[arg-type]  # only an argument could make it None
            eps=self.eps,
        )
