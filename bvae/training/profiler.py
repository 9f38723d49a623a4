"""Profile a training step: a Chrome trace, and each part's share of the time."""

import os
import re
import tempfile
import time
from pathlib import Path

import torch
from torch import profiler
from torch._inductor import config as inductor

from bvae import files

SKIPPED, WARM_UP, STEPS = 5, 2, 20  # steps before, steps recorded but discarded, steps that count
TRACE = "trace.json"

# The first pattern found in the name of a kernel or an operation decides its part. Inductor names its kernels
# after the operations that they fuse; cuDNN's convolutions have names of matrix products. A kernel that
# inductor builds from several independent ones has no operation in its name. Reductions among these belong to
# BatchNorm, because all other reductions of a step have names; the rest casts weights and scales images.
PARTS = (
    (
        "BatchNorm, LeakyReLU",
        re.compile(r"batch_?norm|bn_fw|bn_bw|leaky_?relu|triton_(red|per|unk)_fused_\d+$", re.IGNORECASE),
    ),
    ("convolution", re.compile(r"conv|fprop|dgrad|wgrad|implicit|nchw|nhwc", re.IGNORECASE)),
    ("linear layers", re.compile(r"mm$|mm_|gemm|nvjet|cublas|cutlass", re.IGNORECASE)),
    ("optimizer", re.compile(r"adam|adagrad|optimizer|multi_tensor|amp_", re.IGNORECASE)),
    (
        "sample, KL, loss",
        re.compile(r"_(for|back)ward_kernel|tanh|exp(?!and)|sigmoid|bitwise|stack", re.IGNORECASE),
    ),
    # the gradients of biases, and the concatenated ones of mu and log_var
    ("linear layers", re.compile(r"_fused_(\w*_)?(sum|cat|unsafe_view)_")),
    ("gather, scale, cast", re.compile(r"_fused_")),
)
LABELS = tuple(dict.fromkeys(label for label, _ in PARTS))
OTHER, IDLE = "other", "idle"


def part(name: str) -> str:
    """The part to which an operation or a kernel belongs."""
    return next((label for label, pattern in PARTS if pattern.search(name)), OTHER)


class Profile:
    """Records `STEPS` steps of a run; writes `trace.json` into its folder and prints the table.

    On a GPU the kernels count, and idle is the time in which none of them runs. On a CPU the operations of
    the main thread count.
    """

    def __init__(self, out: Path, device: torch.device) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # no warning about a missing GPU
        self._out, self._cuda = out, device.type == "cuda"
        self._reported = False
        self._steps = 0
        self._since = 0.0
        self._wall = 0.0  # seconds per recorded step, set after the last one
        activities = [profiler.ProfilerActivity.CPU]
        if self._cuda:
            activities.append(profiler.ProfilerActivity.CUDA)
        self._profile = profiler.profile(
            activities=activities,
            schedule=profiler.schedule(wait=SKIPPED, warmup=WARM_UP, active=STEPS, repeat=1),
            on_trace_ready=self._report,
        )
        self._profile.start()

    def step(self) -> None:
        """Count one step.

        The host is ahead of a GPU, so it waits where the record begins and ends. Then clock and record cover
        the same steps.
        """
        self._steps += 1
        begins, ends = self._steps == SKIPPED + WARM_UP, self._steps == SKIPPED + WARM_UP + STEPS
        if self._cuda and (begins or ends):
            torch.cuda.synchronize()
        if ends:
            self._wall = (time.perf_counter() - self._since) / STEPS
        self._profile.step()
        if begins:
            self._since = time.perf_counter()

    def close(self) -> None:
        """Stop, and print a line if the run was too short."""
        self._profile.stop()
        if not self._reported:
            print(f"--profile needs {SKIPPED + WARM_UP + STEPS} steps: nothing was recorded")

    def _report(self, profile: profiler.profile) -> None:
        if not self._wall:  # stopped before the last step that counts
            return
        path = self._out / TRACE
        with tempfile.TemporaryDirectory() as folder:
            profile.export_chrome_trace(str(Path(folder, TRACE)))
            files.write_bytes(path, Path(folder, TRACE).read_bytes())
        print(table(self._seconds(profile), self._wall))
        print(
            f"profile of {STEPS} steps: {path} (open it in chrome://tracing or ui.perfetto.dev)", flush=True
        )
        self._reported = True

    def _seconds(self, profile: profiler.profile) -> dict[str, float]:
        """Each part's seconds per step."""
        seconds: dict[str, float] = {}
        for event in profile.key_averages():
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            # a GPU's record also has spans that contain kernels, such as the optimizer's step
            span = event.key.startswith("ProfilerStep") or (on_device and event.is_user_annotation)
            if on_device == self._cuda and not span:
                own = event.self_device_time_total if self._cuda else event.self_cpu_time_total
                label = part(event.key)
                seconds[label] = seconds.get(label, 0.0) + own / 1e6 / STEPS
        return seconds


def table(seconds: dict[str, float], wall: float) -> str:
    """Each part's milliseconds per step, and its share of the `wall` seconds that a step takes."""
    idle = max(0.0, wall - sum(seconds.values()))
    rows = [*((label, seconds.get(label, 0.0)) for label in (*LABELS, OTHER)), (IDLE, idle)]
    lines = [f"{label:22} {1000 * value:9.3f} ms {value / wall:6.1%}" for label, value in rows]
    return "\n".join([*lines, f"{'a step':22} {1000 * wall:9.3f} ms"])


def name_kernels() -> None:
    """Make inductor name its C++ kernels in profiles. Call it before anything is compiled."""
    inductor.cpp.enable_kernel_profile = True
