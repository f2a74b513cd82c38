"""Random numbers as a function of (seed, stream, step, rank), so that a resumed run draws the same ones."""

from __future__ import annotations

import numpy as np
import torch

TRAIN, VALIDATE, PREDICT, AUGMENT = 0, 1, 2, 3
"""Streams: what the numbers are for."""


def generator_at(seed: int, stream: int, step: int, rank: int, device: torch.device | str) -> torch.Generator:
    """Return a generator for one step of one process.

    Args:
        seed: The run's seed.
        stream: One of TRAIN, VALIDATE, PREDICT, AUGMENT.
        step: Index of the batch within the stream.
        rank: Global rank of the process.
        device: Where the numbers are needed.
    """
    state = np.random.SeedSequence([seed, stream, step, rank]).generate_state(1, np.uint64)[0]
    # torch takes signed 64-bit seeds.
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
