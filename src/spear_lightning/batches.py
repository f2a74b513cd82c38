"""The typed batches that data rooms produce and models consume: the one place that defines them.

Legend of shape letters, used in all of the package: B batch, H horizon (actions in a chunk), N visual
tokens, L text tokens, D width, A numbers in an action.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

STATE_WIDTH = 8
"""Numbers in a proprioceptive state and in an action: translation 3, quaternion xyzw 4, gripper 1."""


@dataclass
class RobotBatch:
    """Samples of robot episodes in physical units; the policy normalises them on the device.

    Attributes:
        images: Camera name -> uint8 RGB (B, 3, height, width). Cameras may differ in size.
        image_mask: Camera name -> bool (B,); False where the sample has no such camera (pixels are 0).
        instructions: B natural language instructions; "" where there is none.
        state: float32 (B, 8), the current end-effector pose and gripper [x, q, g]: position in metres
            and unit quaternion xyzw (w >= 0) in the robot's base frame, gripper openness in [0, 1].
        actions: float32 (B, H, 8), the chunk [x, q, g]: translation in metres in the base frame, rotation
            as unit quaternion xyzw (w >= 0) in the tool frame, both relative to the current pose
            (cumulative) or to the previous target (per step); commanded gripper openness in [0, 1].
        action_mask: bool (B, H), False for targets past the end of the episode.
        dataset: int64 (B,), which dataset of the mixture a sample is from.
        position: int64 (B,), the sample's position in the global sample stream (its identity).
    """

    images: dict[str, Tensor]
    image_mask: dict[str, Tensor]
    instructions: list[str]
    state: Tensor
    actions: Tensor
    action_mask: Tensor
    dataset: Tensor
    position: Tensor

    def __len__(self) -> int:
        return self.state.shape[0]

    def _map(self, function: Callable[[Tensor], Tensor]) -> RobotBatch:
        changed: dict[str, object] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, dict):
                changed[field.name] = {name: function(tensor) for name, tensor in value.items()}
        return replace(self, **changed)  # type: ignore[arg-type]

    def with_images(self, images: dict[str, Tensor]) -> RobotBatch:
        """Return the batch with other pixels."""
        return replace(self, images=images)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RobotBatch:
        """Return the batch with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> RobotBatch:
        """Return the batch in page-locked memory, so that copies to a GPU can overlap with work."""
        return self._map(lambda tensor: tensor.pin_memory())
