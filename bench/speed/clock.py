"""Seconds of calls: the device's own, between events, or the host's where there is no device."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

# cycles for which the device is kept busy before a timed call, so that the host gets ahead: some milliseconds
HEAD_START = 10_000_000
# bytes written before a timed call, more than any cache holds
CACHE = 2**28


class Clock:
    """Times consecutive parts of one call."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.elsewhere = torch.empty(CACHE if self.cuda else 0, dtype=torch.uint8, device=device)

    def __call__(self, *parts: Callable[[], Any]) -> list[float]:
        return self._on_device(parts) if self.cuda else self._on_host(parts)

    def _on_device(self, parts: tuple[Callable[[], Any], ...]) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        self.elsewhere.fill_(1)  # nothing of the inputs stays in the cache
        torch.cuda._sleep(HEAD_START)
        events[0].record()
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record()
        events[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]

    def _on_host(self, parts: tuple[Callable[[], Any], ...]) -> list[float]:
        times = [time.perf_counter()]
        for part in parts:
            part()
            times.append(time.perf_counter())
        return [end - start for start, end in pairwise(times)]
