"""The typed batches that data rooms produce and models consume: the one place that defines them.

Legend of shape letters, used in all of the package: B batch, H horizon (actions in a chunk), N visual
tokens, L text tokens, D width, A numbers in an action.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""Label of tokens that are not predicted, as in torch's cross entropy."""

STATE_WIDTH = 8
"""Numbers in a proprioceptive state and in an action: translation 3, quaternion xyzw 4, gripper 1."""


class TensorBatch:
    """What all batches can do; their tensors are fields, or in dictionaries that are fields."""

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, object] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, dict):
                changed[field.name] = {
                    name: function(item) if isinstance(item, Tensor) else item for name, item in value.items()
                }
        return replace(self, **changed)  # type: ignore[type-var]

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors of the batch."""
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, dict):
                yield from (item for item in value.values() if isinstance(item, Tensor))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Say that a stream works on the batch: its memory is not used again before that work is done."""
        for tensor in self.tensors():
            tensor.record_stream(stream)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch with its tensors on ``device``, counted."""
        return self.counted()._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def counted(self) -> Self:
        """Return the batch with the numbers in it that can be had for nothing only while it is in CPU memory."""
        return self

    def pin_memory(self) -> Self:
        """Return the batch in page-locked memory, so that copies to a GPU can overlap with work."""
        return self._map(lambda tensor: tensor.pin_memory())


@dataclass
class RobotBatch(TensorBatch):
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
        present: Camera name -> how many samples have it; counted when the batch leaves CPU memory, since counting
            on a GPU would wait for it.
    """

    images: dict[str, Tensor]
    image_mask: dict[str, Tensor]
    instructions: list[str]
    state: Tensor
    actions: Tensor
    action_mask: Tensor
    dataset: Tensor
    position: Tensor
    present: dict[str, int] | None = None

    def __len__(self) -> int:
        return self.state.shape[0]

    def counted(self) -> RobotBatch:
        """Return the batch with its cameras counted."""
        return self if self.present is not None else replace(self, present=cameras_present(self.image_mask))

    def with_images(self, images: dict[str, Tensor]) -> RobotBatch:
        """Return the batch with other pixels."""
        return replace(self, images=images)


def cameras_present(image_mask: dict[str, Tensor]) -> dict[str, int]:
    """Return camera name -> how many samples have it."""
    return {name: int(mask_B.sum()) for name, mask_B in image_mask.items()}


@dataclass(frozen=True)
class TrueAnswer:
    """What the answer to a question should say, before it was made into tokens.

    Attributes:
        task: Class path of the task that asked.
        values: float64 numbers, in the shape that the task gives them: lengths in units of the batch's `unit`, or
            pixels of the image the model sees.
        choice: The name that is to be chosen; "" where there is nothing to choose.
    """

    task: str
    values: np.ndarray
    choice: str = ""


@dataclass
class VqaBatch(TensorBatch):
    """Questions about images with their answers, as the VLM reads them: bos, questions, newline | answers, eos.

    Several questions about one image stand in one sample, one a line, and so do their answers.

    Attributes:
        images: Camera name -> uint8 RGB (B, 3, height, width).
        image_mask: Camera name -> bool (B,); False where the sample has no such camera (pixels are 0).
        input_ids: int64 (B, L) token ids of the text, padded at the right.
        token_mask: bool (B, L), False for padding.
        answer_mask: bool (B, L), True for the tokens of the answers, eos included: what is to be predicted, each
            from the tokens before it. A sample about which nothing could be asked has none.
        answer_places: int64 (T,), the places of these tokens in the flattened (B * L), in order. Whoever makes the
            batch finds them: a GPU that is asked how many there are makes its process wait for all its work.
        coordinate_mask: bool (B, L), True for those of them that are 3D tokens.
        questions: B texts of questions.
        answers: B texts of answers.
        asked: For each sample, what the answers should say, in the order of the questions.
        clamped: int64 (B,), how many numbers lay outside the range of the 3D tokens and became the outermost ones.
        unit: float32 (B,), the length that counts as one in coordinates, in the unit of the label (metres if
            `metric`).
        metric: bool (B,), whether the label is in metres.
        intrinsics: float32 (B, 4), fx, fy, cx, cy in pixels of the image the model sees; NaN where unknown.
        dataset: int64 (B,), which data set of the mixture a sample is from.
        position: int64 (B,), the sample's position in the global sample stream (its identity).
        present: Camera name -> how many samples have it; counted when the batch leaves CPU memory, since counting
            on a GPU would wait for it.
        text_tokens: How many tokens are not padding; counted likewise.
    """

    images: dict[str, Tensor]
    image_mask: dict[str, Tensor]
    input_ids: Tensor
    token_mask: Tensor
    answer_mask: Tensor
    answer_places: Tensor
    coordinate_mask: Tensor
    questions: list[str]
    answers: list[str]
    asked: list[list[TrueAnswer]]
    clamped: Tensor
    unit: Tensor
    metric: Tensor
    intrinsics: Tensor
    dataset: Tensor
    position: Tensor
    present: dict[str, int] | None = None
    text_tokens: int | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def counted(self) -> VqaBatch:
        """Return the batch with its cameras and tokens counted."""
        if self.present is not None and self.text_tokens is not None:
            return self
        tokens = int(self.token_mask.sum())
        return replace(self, present=cameras_present(self.image_mask), text_tokens=tokens)

    @property
    def labels(self) -> Tensor:
        """The ids of the answers' tokens, int64 (B, L), and -100 elsewhere; not shifted."""
        return self.input_ids.masked_fill(~self.answer_mask, IGNORED)

    def at_answers(self, values_BL: Tensor) -> Tensor:
        """Return the values (T,) at the answers' tokens, row by row, of values (B, L)."""
        return values_BL.flatten().index_select(0, self.answer_places)

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Return the ids of the questions alone, int64 (B, P), 0 at the padding, and their mask, bool (B, P)."""
        mask = self.token_mask & ~self.answer_mask
        # Questions come first in every row, so cutting at the longest loses none.
        length = int(mask.sum(-1).max())
        return self.input_ids[:, :length].masked_fill(~mask[:, :length], 0), mask[:, :length]


@dataclass
class GeometryBatch(TensorBatch):
    """Pictures with the depth of every pixel, taken by pinhole cameras with square pixels.

    Attributes:
        images: uint8 RGB (B, 3, H, W).
        depth: float32 (B, H, W), z in the OpenCV camera frame, metres; inf where nothing is.
        focal_x: float32 (B,), focal lengths in image widths; principal points are in the middle.
        position: int64 (B,), the sample's position in the global sample stream (its identity).
    """

    images: Tensor
    depth: Tensor
    focal_x: Tensor
    position: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]


@dataclass
class NamedPatchBatch(TensorBatch):
    """Pictures with what each of their patches shows.

    Attributes:
        images: uint8 RGB (B, 3, H, W).
        names: int64 (B, N), patches row by row: 0 where no object is, a name's number from 1 on, `IGNORED` where
            it is not known.
        position: int64 (B,), the sample's position in the global sample stream (its identity).
    """

    images: Tensor
    names: Tensor
    position: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]
