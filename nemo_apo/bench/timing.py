"""Times of several pieces of work next to those of the bare matrix products.

A machine shared with others, or one that grows hot, runs at a different speed from minute to
minute. So every repeat runs everything in turn with the products in between, and each piece of
work is compared with the products just before and just after it.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass
class Times:
    """Seconds of each repeat, and the same over those of the neighbouring products."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def time_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that the work takes on the device."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def interleaved(
    works: Mapping[str, Callable[[], object]],
    products: Callable[[], object],
    repeats: int,
    device: torch.device,
) -> tuple[dict[str, Times], Times]:
    """Times of each piece of work and of the products; all of them have to be warm."""
    times = {name: Times() for name in works}
    bare = Times()
    for _ in range(repeats):
        before = seconds_of(products, device)
        bare.seconds.append(before)
        for name, work in works.items():
            seconds = seconds_of(work, device)
            after = seconds_of(products, device)
            bare.seconds.append(after)
            times[name].seconds.append(seconds)
            times[name].ratios.append(2 * seconds / (before + after))
            before = after
    bare.ratios = [seconds / bare.time_s for seconds in bare.seconds]
    return times, bare
