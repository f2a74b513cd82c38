"""What every data module checks of its arguments and asks of its trainer."""

from __future__ import annotations

import lightning as L
import torch

from spear_lightning.errors import ConfigError


def require_at_least(least: int, **numbers: int | None) -> None:
    """Check arguments of a data module, given by their names; `None` is an argument left to its default.

    Raises:
        ConfigError: If a number is smaller than `least`.
    """
    for name, value in numbers.items():
        if value is not None and value < least:
            raise ConfigError(
                "A number of the data module is too small",
                where=f"data.{name}",
                found=value,
                expected=f"at least {least}",
            )


def share_of_batch(batch_size: int, world_size: int) -> int:
    """Return the samples of a training batch that each process reads.

    Raises:
        ConfigError: If the batch does not divide evenly.
    """
    if batch_size % world_size:
        raise ConfigError(
            "The batch cannot be divided evenly",
            where="data.batch_size",
            found=f"{batch_size} samples on {world_size} processes",
            remedy="choose a multiple of the number of processes",
        )
    return batch_size // world_size


def equal_share(samples: int, rank: int, world_size: int) -> range:
    """Return which validation samples a process takes: as many as every other, and all where there are fewer.

    Reductions need the same number of batches in all processes; up to `world_size - 1` samples are left out.

    Args:
        samples: How many there are.
        rank: This process.
        world_size: Number of processes.
    """
    share = samples // world_size
    return range(rank * share, (rank + 1) * share) if share else range(samples)


def place_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """Return rank and number of processes."""
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def gpu_of(trainer: L.Trainer | None) -> torch.device | None:
    """Return the GPU on which this process trains; `None` if there is none."""
    if trainer is None or trainer.strategy.root_device.type != "cuda":
        return None
    return trainer.strategy.root_device
