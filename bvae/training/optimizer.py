"""The optimizers that a run can choose from."""

from collections.abc import Iterable

import torch
from torch import nn

from bvae.config import TrainingConfig


def build_optimizer(training: TrainingConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015), one launch for all parameters, or Adagrad (Duchi et al. 2011).

    Adam's learning rate is a tensor on the parameters' device, so that a CUDA graph can hold the update.
    """
    parameters = list(parameters)
    if training.optimizer == "adagrad":
        return torch.optim.Adagrad(parameters, training.lr, weight_decay=training.weight_decay)
    device = parameters[0].device
    return torch.optim.Adam(
        parameters,
        torch.tensor(training.lr, device=device),
        weight_decay=training.weight_decay,
        fused=True,
        capturable=device.type == "cuda",
    )
