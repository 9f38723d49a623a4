"""Time contenders in alternation: each round times all of them, so that a disturbance affects all.

Times are medians over the rounds with their quartiles; a ratio is the median of the rounds' own ratios. The
work before the clock starts (the gate, compiling, warm-up, counting launches) is not in the times.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch

Spread = tuple[float, float, float]  # median, lower and upper quartile


@dataclass
class Timing:
    """The times of one contender."""

    seconds: Spread  # per call
    first_call: float | None  # seconds, with compiling
    ratio: Spread  # its time over the hero's, per round: how many times as fast the hero is
    launches: int | None = None  # kernels, copies and fills per call; on a GPU
    device_seconds: float | None = None  # the time of these, without the gaps between them
    peak_bytes: int | None = None  # allocated by the call; on a GPU, without a graph


@dataclass(frozen=True)
class Bar:
    """A goal of the project: `fast` is at least `at_least` times as fast as `slow`."""

    claim: str
    slow: str
    fast: str
    at_least: float


def now() -> str:
    """The date and time, in the format of the records."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass
class Result:
    """One benchmark: its contenders in order. The first is what people use today."""

    group: str
    name: str
    timings: dict[str, Timing]
    hero: str  # the contender that the ratios compare with the others
    missing: str | None  # a contender that cannot run on this device
    rounds: int
    facts: dict[str, Any] = field(default_factory=dict)  # images, bytes, the model: what the report needs
    bars: list[tuple[Bar, Spread]] = field(default_factory=list)  # with the ratios; none fails a run
    date: str = field(default_factory=now)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Median, lower and upper quartile."""
    median, low, high = np.percentile(values, (50, 25, 75))
    return float(median), float(low), float(high)


def paired(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times as fast `fast` is, per round."""
    return spread([s / f for s, f in zip(slow, fast, strict=True)])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds per call; waits for the device before and after."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def _launches(call: Callable[[], object], device: torch.device) -> tuple[int, float, bool]:
    """The number of launches of a call, their seconds, and whether a graph launched them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        synchronize(device)
    return _count(profile.events() or [])


def _count(events: Iterable[Any]) -> tuple[int, float, bool]:
    """`_launches` from a profile's events, without spans that contain kernels (the optimizer's step)."""
    events = list(events)
    on_device = [
        e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    ]
    seconds = sum(e.time_range.elapsed_us() for e in on_device) * 1e-6
    return len(on_device), seconds, any("GraphLaunch" in e.name for e in events)


def _peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass
class Race:
    """Times contenders on a device and keeps the results.

    In each round a contender is called for about `sample_seconds`. The warm-up takes as long, and at least
    `warm_calls` calls, in which a captured step is captured. `max_rounds` limits every benchmark's rounds.
    """

    device: torch.device
    results: list[Result]
    sample_seconds: float
    warm_calls: int
    max_rounds: int | None = None

    def run(
        self,
        group: str,
        name: str,
        *,
        gate: Callable[[], dict[str, float]],
        prepare: Callable[[], dict[str, Callable[[], object]]],
        missing: str | None = None,
        rounds: int = 9,
        single: bool = False,
        bars: Sequence[Bar] = (),
        **facts: Any,
    ) -> Result:
        """Time the contenders of `prepare`, after `gate` has passed.

        Args:
            gate: compares the results of the contenders, and raises if they differ: then nothing is timed.
                Returns the seconds of each contender's first call.
            prepare: the contenders' calls, in order: what people use today, its better settings, "ours", and
                "ours" without single layers. If "ours" is `missing`, the last contender is the hero.
            single: a call is long and needs no warm-up: one call per round, and the first round counts.
            bars: goals, which the report compares with the measured ratios.
            facts: for the record, without those that are None.
        """
        first = gate()
        contenders = prepare()
        calls = {key: 1 if single else self._warm_up(call) for key, call in contenders.items()}
        times: dict[str, list[float]] = {key: [] for key in contenders}
        hero = "ours" if "ours" in contenders else list(contenders)[-1]
        turns = [*(key for key in contenders if key != hero), hero]
        for _ in range(min(rounds, self.max_rounds or rounds)):
            for key in turns:
                times[key].append(clock(contenders[key], self.device, calls[key]))
            turns.reverse()  # a, b, hero; hero, b, a; a, b, hero: a steady drift does not change the ratios
        timings = {}
        for key, measured in times.items():
            ratio = paired(measured, times[hero])
            timing = Timing(spread(measured), first.get(key), ratio)
            if self.device.type == "cuda" and not single:
                timing.launches, timing.device_seconds, graph = _launches(contenders[key], self.device)
                if not graph:  # a graph's memory was allocated at its capture
                    timing.peak_bytes = _peak_bytes(contenders[key], self.device)
            timings[key] = timing
        facts = {key: value for key, value in facts.items() if value is not None}
        reached = [(bar, paired(times[bar.slow], times[bar.fast])) for bar in bars]
        result = Result(group, name, timings, hero, missing, len(times[hero]), facts, reached)
        self.results.append(result)
        return result

    def _warm_up(self, call: Callable[[], object]) -> int:
        """Call until it is warm; return the number of calls for a sample."""
        start, durations = time.perf_counter(), list[float]()
        while len(durations) < self.warm_calls or time.perf_counter() - start < self.sample_seconds:
            durations.append(clock(call, self.device))
        return max(1, round(self.sample_seconds / max(min(durations), 1e-9)))
