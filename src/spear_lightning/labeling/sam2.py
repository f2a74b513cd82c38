"""SAM 2 of transformers as a segmenter: boxes become masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from spear_lightning.errors import CheckpointError, SpearError
from spear_lightning.labeling.detections import Detections
from spear_lightning.labeling.detector import Picture
from spear_lightning.labeling.device_copies import fetch, own_stream, to_device
from spear_lightning.labeling.segmenter import Masks, Segmenter


class Sam2(Segmenter):
    """SAM 2 (Ravi et al., arXiv:2408.00714) as an image segmenter, from transformers.

    The image encoder runs once for each image, over batches of them; all boxes of a batch are then decoded
    together. SAM 2's own processor needs torchvision; the little it does is done here: images are stretched to
    the network's square, and the masks' logits back to the image.

    Args:
        weights: Hub id or folder of a `Sam2Model`.
        batch_size: Images that are encoded together.
        half: Compute in bfloat16 on a GPU; float32 elsewhere.
    """

    MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    """Of ImageNet's colours in [0, 1]."""

    def __init__(
        self, weights: str = "facebook/sam2.1-hiera-large", batch_size: int = 8, half: bool = True
    ) -> None:
        self._weights, self._half = weights, half
        self.batch_size = batch_size
        self._device = torch.device("cpu")
        self._network: Any = None

    @property
    def version(self) -> str:
        """Class and weights."""
        return f"SAM 2 {self._weights}"

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Load the network (see `Segmenter.prepare`).

        Raises:
            CheckpointError: If it cannot be loaded.
        """
        from transformers import Sam2Model

        try:
            network = Sam2Model.from_pretrained(self._weights)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                "The segmenter's weights cannot be loaded", where="segmenter.weights", found=error
            ) from error
        self.use(network, device)

    def use(self, network: Any, device: torch.device | str = "cpu") -> None:
        """Use a `Sam2Model` that is there already."""
        self._device = torch.device(device)
        self._mean, self._spread = (
            torch.tensor(values, device=self._device)[:, None, None] for values in (self.MEAN, self.SPREAD)
        )
        self._network = network.eval().requires_grad_(False).to(self._device)

    @torch.inference_mode()
    def segment(self, pictures: Sequence[Picture], boxes: Sequence[Detections]) -> list[Masks | SpearError]:
        """Return the masks of a batch of images (see `Segmenter.segment`)."""
        with own_stream(self._device):
            return self._masks(pictures, boxes)

    def _masks(self, pictures: Sequence[Picture], boxes: Sequence[Detections]) -> list[Masks | SpearError]:
        sizes = [picture.pixels_HW3.shape[:2] for picture in pictures]
        images_B3SS = torch.cat([self._prepared(picture.pixels_HW3) for picture in pictures])
        boxes_BN4 = self._stretched(boxes, sizes)
        half = self._half and self._device.type == "cuda"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            embeddings = self._network.get_image_embeddings(images_B3SS)
            # A single mask for each box: several are for prompts that leave open what is meant.
            outputs = self._network(image_embeddings=embeddings, input_boxes=boxes_BN4, multimask_output=False)
        scores_BN = outputs.iou_scores[..., 0].float().clamp(0, 1)
        masks = []
        for logits_N1hw, found, size in zip(outputs.pred_masks, boxes, sizes, strict=True):
            logits_N1HW = functional.interpolate(
                logits_N1hw[: len(found)].float(), size, mode="bilinear", align_corners=False
            )
            masks.append(logits_N1HW[:, 0] > 0)
        scores, *fetched = fetch([scores_BN, *masks])
        return [Masks(masks_NHW, row[: len(masks_NHW)]) for masks_NHW, row in zip(fetched, scores, strict=True)]

    @property
    def _side(self) -> int:
        return int(self._network.config.prompt_encoder_config.image_size)

    def _prepared(self, image_HW3: np.ndarray) -> Tensor:
        """Return (1, 3, S, S): stretched to the square and normalised, on the device."""
        pixels_13HW = to_device([image_HW3], self._device).permute(0, 3, 1, 2).float() / 255
        side = (self._side, self._side)
        if pixels_13HW.shape[-2:] != side:
            pixels_13HW = functional.interpolate(
                pixels_13HW, side, mode="bilinear", align_corners=False, antialias=True
            )
        return (pixels_13HW - self._mean) / self._spread

    def _stretched(self, boxes: Sequence[Detections], sizes: Sequence[tuple[int, ...]]) -> Tensor:
        """Return (B, N, 4) boxes in the square's pixels; images with fewer boxes repeat their last."""
        most = max(map(len, boxes))
        stretched = []
        for found, (height, width) in zip(boxes, sizes, strict=True):
            scale = self._side / np.array([width, height, width, height], np.float32)
            rows = np.minimum(np.arange(most), len(found) - 1)
            stretched.append(found.boxes_N4[rows] * scale)
        return to_device([boxes_N4.astype(np.float32) for boxes_N4 in stretched], self._device)
