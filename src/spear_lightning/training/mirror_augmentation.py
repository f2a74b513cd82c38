"""Mirrored robot samples: a second world for nothing, where robot and cameras are symmetric.

Shape letters: B samples, H actions in a chunk.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import ConfigError
from spear_lightning.geometry import quaternions
from spear_lightning.training.augmentation import Augmentation
from spear_lightning.vqa.augment import mirror_words

_SIGNS = (1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0)
"""Factors of [x, q, g]: y changes its sign, and so do rotations about x and z."""


class MirrorAugmentation(Augmentation):
    """Mirrors samples at the vertical plane through the robot's x axis: y becomes -y.

    Images are flipped, left and right change places in instructions, and poses and actions become those of the
    mirror image, in which the tool's frame is mirrored at its own x-z plane. This is exact where base and tool are
    symmetric about these planes and every camera looks along one of them, as in the tabletop world. Elsewhere the
    mirrored pictures are of a robot that does not exist: do not use it for robots seen from the side.

    Args:
        probability: Share of samples that are mirrored, in [0, 1].
    """

    def __init__(self, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise ConfigError(
                "This share of samples cannot be mirrored",
                where="model.augmentation.probability",
                found=probability,
                expected="in [0, 1]",
            )
        self.probability = probability

    def __call__(self, batch: RobotBatch, generator: torch.Generator) -> RobotBatch:
        """Mirror some samples (see `Augmentation`)."""
        # Drawn in CPU memory, where the instructions are.
        drawn = np.random.default_rng(generator.initial_seed()).random(len(batch)) < self.probability
        instructions = [
            mirror_words(text) if chosen else text
            for text, chosen in zip(batch.instructions, drawn.tolist(), strict=True)
        ]
        chosen_B, device = torch.empty(len(batch), dtype=torch.bool), batch.state.device
        chosen_B.numpy()[:] = drawn
        if device.type == "cuda":
            # From ordinary memory the copy would wait until the GPU has done all its work.
            chosen_B = chosen_B.pin_memory()
        chosen_B = chosen_B.to(device, non_blocking=True)
        return replace(
            batch,
            images={
                camera: torch.where(chosen_B[:, None, None, None], pixels.flip(-1), pixels)
                for camera, pixels in batch.images.items()
            },
            instructions=instructions,
            state=torch.where(chosen_B[:, None], mirrored(batch.state), batch.state),
            actions=torch.where(chosen_B[:, None, None], mirrored(batch.actions), batch.actions),
        )


def mirrored(pose: Tensor) -> Tensor:
    """Return the mirror image, at the x-z plane, of poses or actions [x, q, g] (..., 8), with w >= 0."""
    # Numbers, not a tensor of them: that would be copied to the GPU.
    changed = torch.stack(
        [part if sign > 0 else -part for part, sign in zip(pose.unbind(-1), _SIGNS, strict=True)], dim=-1
    )
    position, rotation, gripper = changed.split([3, 4, 1], dim=-1)
    return torch.cat([position, quaternions.canonicalize(rotation), gripper], dim=-1)
