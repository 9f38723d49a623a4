"""The race of `--network-kernels auto` without a GPU."""

import pytest
from test_gpu_step import replay_on_a_cpu

from bvae import network_ops
from bvae.training import cuda_graph, last_block, network_kernels, step_times
from bvae.training.step_times import StepTimes

OURS, COMPILER = StepTimes(compiler=3.0, ours=2.0), StepTimes(compiler=2.0, ours=3.0)


class FakeClock:
    """Shows given times, in the order in which `race` replays the steps."""

    def __init__(self, times: StepTimes) -> None:
        self.times, self.marks = times, 0

    def mark(self) -> int:
        self.marks += 1
        return self.marks - 1

    def milliseconds(self, start: int, end: int) -> float:
        turn, second = divmod(start // 2, 2)
        return self.times[second ^ turn % 2]


def fake_clock(patch: pytest.MonkeyPatch, times: StepTimes) -> list[FakeClock]:
    """Let races find these times. Gives a list with the clock of each race."""
    clocks: list[FakeClock] = []

    def clock() -> FakeClock:
        clocks.append(FakeClock(times))
        return clocks[-1]

    patch.setattr(network_kernels, "DeviceClock", clock)
    return clocks


def race_on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    """Let a CPU capture and race steps, with the reference for our kernels: it rounds in another way."""
    replay_on_a_cpu(patch)
    patch.setattr(cuda_graph, "WARM_UP", 2)
    patch.setattr(step_times, "ROUNDS", 2)
    patch.setattr(network_ops, "has_batch_norm_kernel", lambda x: True)
    patch.setattr(last_block, "ending", lambda decoder: None)  # its reference is PyTorch's layers
