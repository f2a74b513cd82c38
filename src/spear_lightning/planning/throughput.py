"""Samples a second and days of an experiment on some GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spear_lightning.planning.experiment import Experiment
from spear_lightning.planning.memory import FLOAT32, block_sizes
from spear_lightning.planning.trace import Trace
from spear_lightning.training.freeze_plan import named_parameters

GPUS_OF_A_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        memory: Bytes that a program can have.
        peak: FLOP/s of bfloat16 products of 8192 x 8192 matrices.
        inside: Bytes a second to the GPUs of its node, one way.
        outside: Bytes a second to other nodes.
        measured: Whether the peak was measured; otherwise it is taken from a kind that was.
    """

    memory: float
    peak: float
    inside: float
    outside: float
    measured: bool


GPUS = {
    # Bandwidths are nominal: NVLink 4 with 450 GB/s one way, one 400 Gbit/s adapter per GPU.
    "h200-141": Gpu(139 * 2**30, 788e12, 450e9, 50e9, True),
    # The same processor as the H200's.
    "h100-80": Gpu(78 * 2**30, 788e12, 450e9, 50e9, False),
    # The H200's share of its nominal peak (788 of 989) of the A100's 312; NVLink 3, 200 Gbit/s.
    "a100-80": Gpu(78 * 2**30, 249e12, 300e9, 25e9, False),
}

SAMPLES = (32, 48, 64)
EAGER = (0.468, 0.489, 0.510)
COMPILED = (0.567, 0.596, 0.613)
"""Share of the peak that a whole step reached at that many samples per GPU: 66, 69, 72 samples/s eager and 80, 84,
86.5 with compiled blocks, at 5.59 TFLOP a sample (two cameras; H200, torch 2.11)."""


@dataclass(frozen=True)
class Speed:
    """Time of an optimizer step.

    Attributes:
        compute: Seconds of computation.
        communication: Seconds of communication, which runs beside it.
        samples: Samples of a step.
    """

    compute: float
    communication: float
    samples: int

    @property
    def step(self) -> float:
        """Seconds of a step: the longer of both, since each waits for the other at its end alone."""
        return max(self.compute, self.communication)

    @property
    def samples_per_second(self) -> float:
        """Samples a second of all GPUs."""
        return self.samples / self.step


def speed_of(experiment: Experiment, phase: str, processes: int, trace: Trace, gpu: Gpu) -> Speed:
    """Predict the time of a step.

    Args:
        experiment: The experiment.
        phase: Name of the phase.
        processes: GPUs.
        trace: A step of one sample in that phase.
        gpu: Their kind.
    """
    samples = math.ceil(experiment.batch_size / processes)
    efficiency = float(np.interp(samples, SAMPLES, COMPILED if experiment.compiled else EAGER))
    slower = 1.0 if experiment.mixed else 2.0
    compute = slower * samples * trace.flops / (gpu.peak * efficiency)
    return Speed(compute, communication_seconds(experiment, phase, processes, trace, gpu), samples * processes)


def communication_seconds(experiment: Experiment, phase: str, processes: int, trace: Trace, gpu: Gpu) -> float:
    """Return the seconds that a step's messages take at full bandwidth.

    Of n processes each sends (n - 1) / n of what is gathered or of what is summed and divided, and twice that of
    what is summed for all (ring algorithms; Patarasuk and Yuan 2009).
    """
    network, trained = experiment.module.components, experiment.phases[phase]
    shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(network)}
    whole_trained = FLOAT32 * sum(math.prod(shapes[name]) for name in trained)
    if not experiment.sharded:
        return 2 * _seconds(whole_trained, processes, gpu)
    group = experiment.shard_size or processes
    width = 2 if experiment.mixed else FLOAT32
    blocks = block_sizes(network, shapes)
    gathered = 0.0
    for name, size in blocks.items():
        has_gradient = any(parameter.startswith(f"{name}.") for parameter in trained)
        passes = 2 if has_gradient and experiment.regathers else 1
        gathered += width * size * trace.blocks[name].calls * passes
    gathered += FLOAT32 * (sum(math.prod(shape) for shape in shapes.values()) - sum(blocks.values()))
    seconds = _seconds(gathered, group, gpu) + _seconds(whole_trained, group, gpu)
    if group < processes:
        seconds += 2 * (whole_trained / group) * (1 - group / processes) / gpu.outside
    return seconds


def _seconds(size: float, processes: int, gpu: Gpu) -> float:
    bandwidth = gpu.inside if processes <= GPUS_OF_A_NODE else gpu.outside
    return size * (processes - 1) / processes / bandwidth
