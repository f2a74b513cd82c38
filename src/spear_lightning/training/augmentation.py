"""What an augmentation of robot samples is, and several of them in turn."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from spear_lightning.batches import RobotBatch


class Augmentation(ABC):
    """Changes a batch on the device that it is on, in training alone."""

    @abstractmethod
    def __call__(self, batch: RobotBatch, generator: torch.Generator) -> RobotBatch:
        """Return the changed batch.

        Args:
            batch: In physical units, on the generator's device.
            generator: Source of what is drawn.
        """


class Augmentations(Augmentation):
    """Several augmentations, one after the other.

    Args:
        parts: The augmentations.
    """

    def __init__(self, parts: list[Augmentation]) -> None:
        self.parts = parts

    def __call__(self, batch: RobotBatch, generator: torch.Generator) -> RobotBatch:
        """Apply all of them (see `Augmentation`)."""
        for part in self.parts:
            batch = part(batch, generator)
        return batch
