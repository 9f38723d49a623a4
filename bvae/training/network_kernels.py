"""Whose kernels train the network's layers, the compiler's or ours: `--network-kernels`.

`launch.NETWORK` says whose. A run keeps its kernels to the end, since others round differently: its
configuration, and so each of its checkpoints, holds the choice of `auto`.
"""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from bvae import network_ops
from bvae.kernels import launch
from bvae.layers import BatchNormLeakyReLU
from bvae.training import compiler, last_block
from bvae.training.run import Run
from bvae.training.step import TrainingStep
from bvae.training.step_times import DeviceClock, Record, StepTimes, race

Attempt = Callable[[], bool | None]  # to capture a step; False: the graph does not fit the GPU's memory

SURVEYED = 2  # images: the fewest that BatchNorm takes at 1 x 1 pixels


# ---- which layers they can take ----------------------------------------------------------------------------
def survey(step: TrainingStep, images: Tensor) -> dict[str, str | None]:
    """Why our kernels cannot take a layer of their kind, by the layers' names; None: they can.

    Args:
        images: a few, uint8 [B, H, W, C]. They go through the network, whose state is restored.
    """
    model, seen = step.model, dict[nn.Module, Tensor]()

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[module] = inputs[0]

    norms = {name: each for name, each in model.named_modules() if isinstance(each, BatchNormLeakyReLU)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(step.undone())
        for norm in norms.values():
            stack.callback(norm.register_forward_pre_hook(look).remove)
        stack.callback(setattr, launch, "NETWORK", launch.NETWORK)
        launch.NETWORK = False  # PyTorch's layers run: ours may fail to compile, which is not handled here
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(images.device.type, step.dtype, enabled=step.dtype is not None))
        x = model.scale(images.permute(0, 3, 1, 2)).to(next(model.parameters()).dtype)
        model.decode_raw(model.encode_scaled(x)[0])
    found = {
        name: None if network_ops.has_batch_norm_kernel(seen[norm]) else _reason(seen[norm])
        for name, norm in norms.items()
        if norm in seen
    }
    if parts := last_block.ending(model.decoder):
        _, norm, to_image = parts
        taken = last_block.takes(model, step.loss, norm, to_image, seen[norm])
        found["the last block"] = None if taken else _reason(seen[norm], f" for {type(step.loss).__name__}")
    return found


def _reason(x: Tensor, more: str = "") -> str:
    """Why our kernels do not take x, the input of a BatchNorm."""
    if not launch.ENABLED:
        return "--no-fused"
    if not launch.runs_triton(x.new_empty(1, dtype=torch.float32)):
        return "they need a GPU and Triton"
    dtype, layout = str(x.dtype).removeprefix("torch."), x.is_contiguous(memory_format=torch.channels_last)
    return f"{dtype} {list(x.shape)}" + ("" if layout else ", not in channels_last") + more


def say_shortfall(run: Run) -> None:
    """Print which layers of a run `--network-kernels ours` leaves to PyTorch, and why; in one line."""
    if line := shortfall(survey(run.step, run.train.head(SURVEYED))):
        print(line, flush=True)


def shortfall(found: Mapping[str, str | None]) -> str | None:
    """The line of `say_shortfall` for the layers of a `survey`; None: there is nothing to say.

    >>> shortfall({"encoder.1": None, "encoder.3": "float64"})
    "--network-kernels ours: PyTorch's layers are used for encoder.3: float64"
    """
    refused = {name: reason for name, reason in found.items() if reason}
    reasons = "; ".join(dict.fromkeys(refused.values()))
    if not found:
        return "--network-kernels ours has no effect: the network has no layer that they take"
    if len(refused) == len(found):
        return f"--network-kernels ours has no effect: {reasons}"
    if refused:
        return f"--network-kernels ours: PyTorch's layers are used for {', '.join(refused)}: {reasons}"
    return None


# ---- auto --------------------------------------------------------------------------------------------------
def capture_faster(run: Run, capture: Attempt, start: Attempt) -> bool | None:
    """Capture the step with the kernels that are faster here, and set `launch.NETWORK` to them.

    All ranks decide as rank 0. The next step is as without a race: all state is restored.

    Args:
        capture: captures the step, and raises what goes wrong.
        start: the same, and handles failures of the compiler.

    Returns:
        What `start` returns.
    """
    can_take_none = None not in survey(run.step, run.train.head(SURVEYED)).values()
    if run.distributed.any_rank(can_take_none):
        return start()
    record = Record(run)
    known: StepTimes | None = run.distributed.broadcast(record.read() if run.distributed.is_main else None)
    if known is None:
        return _race_and_capture(run, capture, start, record)
    if known.choice == "ours" and (failure := _capture_ours(run, capture)):
        launch.NETWORK = False
        _say_failure(failure)
        return start()
    _say(known, " (timed at an earlier start)")
    return known.choice == "ours" or start()


def _race_and_capture(run: Run, capture: Attempt, start: Attempt, record: Record) -> bool | None:
    step, distributed = run.step, run.distributed
    fits = start()
    if distributed.any_rank(not fits):
        return fits
    compilers = step.captured
    assert compilers is not None
    times: StepTimes | None = None
    with step.undone():
        failure = _capture_ours(run, capture)
        if not failure:
            assert step.captured is not None
            times = race(compilers.replay, step.captured.replay, DeviceClock())
    times = distributed.broadcast(times)
    if times:
        _say(times)
        if distributed.is_main:
            record.write(times)
    elif failure:
        _say_failure(failure)
    if times is None or times.choice == "compiler":
        launch.NETWORK = False
        step.captured = compilers
        step.zero_grad()  # the gradients are in the memory of the other graph
    del compilers
    if step.device.type == "cuda":
        torch.cuda.empty_cache()  # of the graph that lost
    return True


def _capture_ours(run: Run, capture: Attempt) -> str | None:
    """Capture the step with our kernels; the reason if a rank cannot."""
    launch.NETWORK = True
    images = run.train.head(run.train.batch_size)
    # Code that cannot be compiled fails in the first attempt, where no other rank waits for a gradient.
    for attempt in (partial(run.step.rehearse, images), capture):
        failure = compiler.why_not(attempt)
        if run.distributed.any_rank(failure is not None):
            return failure or "they fail in another process"
    return None


def _say(times: StepTimes, when: str = "") -> None:
    measured = f"{times.ours:.3f} ms per step with ours, {times.compiler:.3f} ms with the compiler's"
    print(f"network kernels: {times.choice}; {measured}{when}", flush=True)


def _say_failure(reason: str) -> None:
    print(f"network kernels: compiler; ours fail here: {reason}", flush=True)
