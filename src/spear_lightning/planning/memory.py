"""Memory of one process, in bytes, from names and shapes alone.

Weights, gradients, averages and both moments of AdamW are float32. What is divided is divided as FSDP2 does it:
along the first dimension of each tensor, in pieces of `ceil(rows / processes)`; the first process has the largest.

The largest need comes at one of two moments. At the end of the forward pass everything that the backward pass
wants is there, and no gradient yet; at the optimizer step all gradients are there, and nothing else of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from spear_lightning.planning.experiment import Experiment
from spear_lightning.planning.trace import Trace
from spear_lightning.training.freeze_plan import named_parameters
from spear_lightning.training.network_blocks import list_entries

FLOAT32 = 4
GATHERED_UNITS = 2
"""Blocks whose weights are whole at a time: the one that is computed, and the next, which is being gathered."""

KEPT_EAGER, KEPT_COMPILED = 1.10, 0.84
"""Measured bytes a sample over those of the trace, on an H200 with torch 2.11: autocast keeps some tensors in
float32 (1.60 GiB over 1.45), and compiled blocks compute cheap ones anew (1.22 GiB over 1.45)."""

OUTSIDE_BYTES = 2.0 * 2**30
"""CUDA's own memory, NCCL's and cuBLAS's buffers, and what the allocator cannot use; an estimate."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        weights: Its share of the weights.
        optimizer: Its share of AdamW's moments.
        averages: Its share of the averages.
        gradients: Its share of the gradients.
        communication: Whole weights and gradients that are under way, or buffers of all-reduce.
        activations: What waits for the backward pass, with copies of weights in the type of the products.
        step: What the optimizer needs while it steps.
    """

    weights: float
    optimizer: float
    averages: float
    gradients: float
    communication: float
    activations: float
    step: float

    @property
    def peak(self) -> float:
        """The largest sum that occurs."""
        lasting = self.weights + self.optimizer + self.averages + self.communication + OUTSIDE_BYTES
        return lasting + max(self.activations, self.gradients + self.step)


def share(shape: tuple[int, ...], processes: int) -> int:
    """Return how many numbers of a tensor the first of some processes has."""
    if not shape:
        return 1
    return math.ceil(shape[0] / processes) * math.prod(shape[1:])


def memory_of(experiment: Experiment, phase: str, processes: int, trace: Trace) -> Memory:
    """Return the memory of the first process.

    Args:
        experiment: The experiment.
        phase: Name of the phase.
        processes: How many train.
        trace: A step of one sample in that phase.
    """
    network, trained = experiment.module.components, experiment.phases[phase]
    group = (experiment.shard_size or processes) if experiment.sharded else 1
    shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(network)}
    own = {name: share(shape, group) for name, shape in shapes.items()}
    own_trained = sum(own[name] for name in trained)
    # Averages of parts that an earlier phase trained go on.
    earlier = [name for name, start in experiment.starts.items() if start <= experiment.starts[phase]]
    averaged = set().union(*(experiment.phases[name] for name in earlier)) if experiment.averaged else set()
    samples = math.ceil(experiment.batch_size / processes)
    ratio = KEPT_COMPILED if experiment.compiled else KEPT_EAGER
    # Without mixed precision all that is kept is float32.
    kept = trace.kept_bytes * samples * (ratio if experiment.mixed else 2.0)
    whole_trained = sum(math.prod(shapes[name]) for name in trained)
    if experiment.sharded:
        communication = _gathered(experiment, shapes)
    else:
        # DistributedDataParallel has a buffer for every gradient; autocast keeps a copy of every weight.
        communication = FLOAT32 * whole_trained if processes > 1 else 0.0
        kept += 2.0 * whole_trained if experiment.mixed else 0.0
    return Memory(
        weights=FLOAT32 * sum(own.values()),
        optimizer=2 * FLOAT32 * own_trained,
        averages=FLOAT32 * sum(own[name] for name in averaged),
        gradients=FLOAT32 * own_trained,
        communication=communication,
        activations=kept,
        step=0.0 if experiment.fused else FLOAT32 * own_trained,
    )


def _gathered(experiment: Experiment, shapes: dict[str, tuple[int, ...]]) -> float:
    """Return the bytes of whole weights and gradients that exist at a time."""
    width = 2 if experiment.mixed else FLOAT32
    blocks = block_sizes(experiment.module.components, shapes)
    tables = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("embed_tokens.weight"))
    rest = sum(math.prod(shape) for shape in shapes.values()) - sum(blocks.values()) - tables
    largest = max(blocks.values(), default=0)
    whole = sum(blocks.values()) if not experiment.regathers else GATHERED_UNITS * largest
    # A gradient is whole in the type of the products, and once more in float32 while it is summed over processes.
    gradients = GATHERED_UNITS * largest * (width + FLOAT32)
    at_the_end = (tables + rest) * (width + FLOAT32)
    return width * (whole + tables) + FLOAT32 * rest + max(gradients, at_the_end)


def block_sizes(network: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Return block name -> numbers in its weights."""
    return {
        block: sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(f"{block}."))
        for block in list_entries(network)
    }
