"""When images of a labelling run are done, and how busy the GPU is meanwhile."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import torch

from spear_lightning.labeling.pipeline import Tally

SETTLED = 0.15
"""This share of the images at each end of a run does not count: steps fill up and run empty."""


@dataclass
class Clock:
    """Notes when images are done, and how busy the GPU says it was when they were."""

    times: list[float] = field(default_factory=list)
    tally: Tally | None = None
    busy: list[tuple[float, int]] = field(default_factory=list)

    def __call__(self, tally: Tally) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())
        self.tally = tally

    def rate(self) -> float:
        """Images per second, without the ends of the run."""
        # The first call is before any image.
        done = self.times[1:]
        first, last = int(len(done) * SETTLED), int(len(done) * (1 - SETTLED)) - 1
        return (last - first) / (done[last] - done[first])

    def busy_share(self) -> float | None:
        """Share of the time, without the ends of the run, in which any kernel ran, by the driver's own counter."""
        done = self.times[1:]
        first, last = done[int(len(done) * SETTLED)], done[int(len(done) * (1 - SETTLED)) - 1]
        seen = [percent for moment, percent in self.busy if first <= moment <= last]
        return sum(seen) / len(seen) / 100 if seen else None

    def watch(self, stop: threading.Event) -> None:
        """Note what the driver says until `stop` is set; nothing where its library (nvidia-ml-py) is missing."""
        while not stop.wait(0.05):
            try:
                self.busy.append((time.perf_counter(), torch.cuda.utilization()))
            except ModuleNotFoundError:
                return
