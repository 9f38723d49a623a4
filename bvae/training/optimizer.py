"""The optimizers that a run can choose from."""

from collections.abc import Iterable

import torch
from torch import nn

from bvae.config import TrainingConfig
from bvae.training.muon import Muon


def build_optimizer(training: TrainingConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015), one launch for all parameters; Muon; or Adagrad (Duchi et al. 2011).

    The learning rates of Adam and Muon are tensors on the parameters' device, so that a CUDA graph can hold
    the update. Each group's `initial_lr` is the number from which the schedule starts.
    """
    parameters = list(parameters)
    device = parameters[0].device
    optimizer: torch.optim.Optimizer
    if training.optimizer == "adagrad":
        optimizer = torch.optim.Adagrad(parameters, training.lr, weight_decay=training.weight_decay)
    elif training.optimizer == "muon":
        optimizer = Muon(
            parameters,
            torch.tensor(training.muon_lr, device=device),
            torch.tensor(training.lr, device=device),
            weight_decay=training.muon_weight_decay,
            adam_weight_decay=training.weight_decay,
        )
    else:
        optimizer = torch.optim.Adam(
            parameters,
            torch.tensor(training.lr, device=device),
            weight_decay=training.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
    for group in optimizer.param_groups:
        group["initial_lr"] = training.muon_lr if "momentum" in group else training.lr
    return optimizer
