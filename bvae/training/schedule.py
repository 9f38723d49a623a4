"""The learning rate over a run."""

import math

from bvae.config import TrainingConfig


def lr_factor(training: TrainingConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """The factor on the learning rates in a step, from 1 to `steps`; none of them is zero.

    Example:
        >>> from bvae.config import TrainingConfig
        >>> from bvae.training.schedule import lr_factor
        >>> training = TrainingConfig(schedule="linear", warmup=2)
        >>> [lr_factor(training, step, 4, steps_per_epoch=4) for step in (1, 2, 3, 4)]
        [0.5, 0.75, 0.5, 0.25]
    """
    rise = min(1.0, step / training.warmup) if training.warmup else 1.0
    done = (step - 1) / steps
    if training.schedule == "linear":
        return rise * (1 - done)
    if training.schedule == "cosine":
        return rise * (1 + math.cos(math.pi * done)) / 2
    if training.schedule == "exponential":
        try:
            return rise * training.lr_gamma ** ((step - 1) // steps_per_epoch)
        except OverflowError:
            return math.inf
    return rise
