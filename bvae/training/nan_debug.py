"""Find the module that makes the first NaN or Inf: train in eager mode, and check every module."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bvae.kernels import launch
from bvae.training.run import Run
from bvae.training.step import NotFinite


def find_not_finite(run: Run) -> str | None:
    """Continue training, without writing, until a number is not finite; say its step and source, or None.

    With float16's gradient scaler only the forward pass is checked, because gradients may overflow there.
    """
    launch.NETWORK = False  # the last block's kernel is several modules, whose outputs it does not give
    watch = _Watch(run, backward=not run.step.scaler.is_enabled())
    bar = tqdm(total=run.steps, initial=run.done, desc="checking every module", unit=" steps", disable=None)
    with bar, warnings.catch_warnings(), torch.autograd.set_detect_anomaly(watch.backward):
        warnings.simplefilter("ignore")  # anomaly detection warns that it is on, and prints call stacks
        while run.done < run.steps:
            for images in run.batches():
                try:
                    watch.start()
                    run.advance(images)
                    watch.finish()
                except NotFinite as error:
                    return str(error)
                except RuntimeError as error:
                    if "returned nan values" not in str(error):
                        raise
                    return f"{watch.backward_of} gives nan at step {run.done} ({error})"
                bar.update()
                if run.done == run.steps:
                    break
    return None


class _Watch:
    """Checks the inputs and outputs of each module, the gradients in the backward pass, and the weights."""

    def __init__(self, run: Run, backward: bool) -> None:
        self.run, self.backward = run, backward
        self._last = ""  # the module whose output's gradient was seen last
        named = [(f"{name} ({type(m).__name__})", m) for name, m in run.model.named_modules() if name]
        objective = [("the loss", run.loss)]
        if run.step.penalty is not None:
            objective.append(("the penalty", run.step.penalty))
        for name, module in [*named, *objective]:
            module.register_forward_pre_hook(self._before(name))
            module.register_forward_hook(self._after(name, (name, module) not in objective))

    @property
    def backward_of(self) -> str:
        return f"the backward pass of {self._last or 'the loss'}"

    def start(self) -> None:
        self._last = ""

    def finish(self) -> None:
        """After a step. Raises NotFinite for a gradient or a weight."""
        for name, parameter in self.run.model.named_parameters():
            if self.backward and parameter.grad is not None:
                self._check(parameter.grad, f"the gradient of {name}")
            self._check(parameter, f"{name} after its update")

    def _before(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: Any) -> None:
            for tensor in _tensors(inputs):
                self._check(tensor, f"the input of {name}")

        return hook

    def _after(self, name: str, backward: bool) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            for tensor in _tensors(output):
                self._check(tensor, f"the output of {name}")
                if backward and self.backward and tensor.requires_grad:
                    tensor.register_hook(check_gradient)

        def check_gradient(gradient: Tensor) -> None:
            self._check(gradient, self.backward_of)
            self._last = name

        return hook

    def _check(self, tensor: Tensor, name: str) -> None:
        if not tensor.isfinite().all():
            raise NotFinite(f"{name} is {'nan' if tensor.isnan().any() else 'inf'}", self.run.done)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
