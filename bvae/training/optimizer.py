"""The optimizers that a run can choose from, and their state from a checkpoint."""

import reprlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bvae.config import TrainingConfig
from bvae.errors import UsageError
from bvae.training.muon import Muon
from bvae.weights import tensor_difference

NOT_NEGATIVE = ("exp_avg_sq", "sum")  # averages and sums of squares; infinite if a square is


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
        optimizer = _adam(parameters, training.lr, weight_decay=training.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = training.muon_lr if "momentum" in group else training.lr
    return optimizer


def build_discriminator_optimizer(
    training: TrainingConfig, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """FactorVAE's Adam for its discriminator: betas 0.5 and 0.9, a constant learning rate."""
    return _adam(list(parameters), training.discriminator_lr, betas=(0.5, 0.9))


def _adam(parameters: list[nn.Parameter], lr: float, **options: Any) -> torch.optim.Adam:
    device = parameters[0].device
    capturable = device.type == "cuda"
    rate = torch.tensor(lr, device=device)
    return torch.optim.Adam(parameters, rate, fused=True, capturable=capturable, **options)


@torch.no_grad()
def load_state(optimizer: torch.optim.Optimizer, saved: Any, steps: int) -> None:
    """Load what `optimizer.state_dict()` gave, after comparing it with a fresh state.

    The fused updates trust their state: moments of another shape would make them write beyond the memory. So
    the optimizer makes its state in a step with gradients of zero, and the saved numbers are copied there.
    The options of the groups stay those of this optimizer. Load its parameters afterwards.

    Args:
        saved: anything; from a file.
        steps: that the run has done.

    Raises:
        UsageError: it is not the state of such an optimizer after at most so many steps.
    """
    eager = set(optimizer.state)  # Adagrad's is there from the beginning
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise UsageError("the optimizer's state is not one of torch.optim")
    groups = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if _numbers(saved.get("param_groups")) != groups:
        raise UsageError("the optimizer's state is of other groups of parameters")
    states: dict[Any, Any] = saved["state"]
    for key in states:
        if type(key) is not int or key not in range(len(parameters)):
            raise UsageError(
                f"the optimizer's state is of {reprlib.repr(key)}, which is no parameter's number"
            )
    for number, parameter in enumerate(parameters):
        if number in states:
            name = f"the optimizer's state of parameter {number}"
            _copy(states[number], optimizer.state[parameter], name, steps)
        elif parameter in eager:
            raise UsageError(f"the optimizer's state lacks parameter {number}")
        else:  # it never had a gradient
            optimizer.state.pop(parameter, None)


def _numbers(groups: Any) -> list[list[int]] | None:
    """The parameters' numbers in each group of a saved state; None if it has no such groups."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return None
    numbers = [group.get("params") for group in groups]
    whole = all(isinstance(each, list) and all(type(n) is int for n in each) for each in numbers)
    return numbers if whole else None


def _copy(saved: Any, fresh: dict[str, Tensor], name: str, steps: int) -> None:
    """Copy a parameter's saved state into its fresh one. Raises UsageError if they differ."""
    if not isinstance(saved, dict) or saved.keys() != fresh.keys():
        raise UsageError(f"{name} must hold {', '.join(fresh)}")
    for key, value in fresh.items():
        if reason := tensor_difference(saved[key], value, finite=key not in NOT_NEGATIVE):
            raise UsageError(f"{name}: {key} {reason}")
        if key in NOT_NEGATIVE and not (saved[key] >= 0).all():
            raise UsageError(f"{name}: {key} is negative or NaN")
        if key == "step" and not 0 <= saved[key].item() <= steps:
            raise UsageError(f"{name}: step is {saved[key].item()} after {steps} steps")
        value.copy_(saved[key])
