"""Contenders that take turns: each round times all of them, so that what disturbs one disturbs the others.

Times are medians over the rounds with their quartiles; a ratio is the median of the rounds' own ratios. What
comes before the clock starts (the gate, compiling, warming up, counting launches) is kept apart.
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
    """What one contender took."""

    seconds: Spread  # a call
    first_call: float | None  # seconds; compiling is in it
    ratio: Spread  # its time over the hero's, round by round: how many times as fast the hero is
    launches: int | None = None  # kernels, copies and fills of a call; on a GPU
    device_seconds: float | None = None  # of these, without the gaps between them
    peak_bytes: int | None = None  # allocated beyond what was there before the call; on a GPU, not in a graph


@dataclass(frozen=True)
class Bar:
    """What the project asks of two contenders: `fast` at least so many times as fast as `slow`."""

    claim: str
    slow: str
    fast: str
    at_least: float


def now() -> str:
    """The date, as records have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass
class Result:
    """One benchmark: its contenders in order, the first of which is what people have today."""

    group: str
    name: str
    timings: dict[str, Timing]
    hero: str  # the contender that the ratios speak of
    missing: str | None  # a contender that cannot run on this device
    rounds: int
    facts: dict[str, Any] = field(default_factory=dict)  # images, bytes, the model: whatever the report needs
    bars: list[tuple[Bar, Spread]] = field(default_factory=list)  # and what was measured; none fails a run
    date: str = field(default_factory=now)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Median, lower and upper quartile."""
    median, low, high = np.percentile(values, (50, 25, 75))
    return float(median), float(low), float(high)


def paired(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times as fast `fast` is, round by round."""
    return spread([s / f for s, f in zip(slow, fast, strict=True)])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds a call, with the device done before and after."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def _launches(call: Callable[[], object], device: torch.device) -> tuple[int, float, bool]:
    """Everything that the device ran for a call, how many seconds that took, and whether a graph held it."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        synchronize(device)
    return _count(profile.events() or [])


def _count(events: Iterable[Any]) -> tuple[int, float, bool]:
    """`_launches` of a profile's events, which have spans round kernels too, such as the optimizer's step."""
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

    A round's sample of a contender is as many calls as fill `sample_seconds`; the warm-up lasts as long, and
    at least `warm_calls`: a captured step is captured within them. `max_rounds` cuts every benchmark short.
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
        """Time what `prepare` gives, once `gate` has passed.

        Args:
            gate: compares what the contenders compute, and raises if they differ: then nothing is timed.
                Returns how many seconds each one's first call took.
            prepare: the contenders' calls, in order: what people have today, its better settings, "ours", and
                "ours" without this or that. Where "ours" is `missing`, the last one takes its place.
            single: a call takes long and needs no warm-up: one call a round, and the first round counts.
            bars: what the report holds against the measured ratios.
            facts: for the record; those that are None are left out.
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
            turns.reverse()  # a, b, hero; hero, b, a; a, b, hero: a steady drift leaves the ratios alone
        timings = {}
        for key, measured in times.items():
            ratio = paired(measured, times[hero])
            timing = Timing(spread(measured), first.get(key), ratio)
            if self.device.type == "cuda" and not single:
                timing.launches, timing.device_seconds, graph = _launches(contenders[key], self.device)
                if not graph:  # whose memory was allocated at its capture
                    timing.peak_bytes = _peak_bytes(contenders[key], self.device)
            timings[key] = timing
        known = {key: value for key, value in facts.items() if value is not None}
        reached = [(bar, paired(times[bar.slow], times[bar.fast])) for bar in bars]
        result = Result(group, name, timings, hero, missing, len(times[hero]), known, reached)
        self.results.append(result)
        return result

    def _warm_up(self, call: Callable[[], object]) -> int:
        """Call until it is warm; how many calls make a sample."""
        start, taken = time.perf_counter(), list[float]()
        while len(taken) < self.warm_calls or time.perf_counter() - start < self.sample_seconds:
            taken.append(clock(call, self.device))
        return max(1, round(self.sample_seconds / max(min(taken), 1e-9)))
