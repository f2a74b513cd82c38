"""SPEAR-VLM: PaliGemma with a second, geometric encoder (spec sections 3 and 4).

Legend: B batch, N visual tokens of a camera, L text tokens, P prefix tokens (cameras, then text), D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spear_lightning.errors import ConfigError, ShapeError
from spear_lightning.models.encoders.base import VisionEncoder
from spear_lightning.models.encoders.fusion import Fusion, MeanFusion
from spear_lightning.models.encoders.image_row import by_size, in_one_row
from spear_lightning.models.gemma import GemmaLanguageModel
from spear_lightning.models.gemma_shape import GemmaShape
from spear_lightning.models.packing import RealTokens, pack_answers
from spear_lightning.models.paligemma_weights import load_paligemma


class SpearVLM(nn.Module):
    """Vision encoders, a linear projection each, their fusion, and Gemma.

    The prefix is [tokens of each camera | bos, prompt, newline] and attends to all of itself. Projected image
    tokens enter Gemma as they are; text embeddings are scaled by the square root of the width (PaliGemma).

    Args:
        language: Sizes of Gemma.
        encoders: Name -> vision encoder, at least one. The projection of the one named `siglip` is
            PaliGemma's own; the others' start random.
        fusion: Joins the encoders' projected tokens; `None` takes their mean.
        weights: PaliGemma's weights: hub id, folder or file; `None` keeps the random ones.
        packed: Whether training spares the work on padding: images that samples lack are not encoded, and the
            language model reads the real tokens of all samples in one row. The results are the same. It pays
            where the model is large and much is padded; a small model takes longer for the extra steps.
    """

    def __init__(
        self,
        language: GemmaShape,
        encoders: dict[str, VisionEncoder],
        fusion: Fusion | None = None,
        weights: str | None = None,
        packed: bool = False,
    ) -> None:
        super().__init__()
        patch_sizes = {name: encoder.patch_size for name, encoder in encoders.items()}
        if len(set(patch_sizes.values())) != 1:
            raise ConfigError(
                "The encoders' tokens do not lie on one grid",
                where="vlm.encoders",
                found=f"patch sizes {patch_sizes}",
                expected="at least one encoder, all of one patch size",
            )
        self.language = language
        self.weights = weights
        self.packed = packed
        self.encoders = nn.ModuleDict(encoders)
        self.projections = nn.ModuleDict(
            {name: nn.Linear(encoder.width, language.width) for name, encoder in encoders.items()}
        )
        self.fusion = fusion or MeanFusion()
        self.language_model = GemmaLanguageModel(language)

    def load_pretrained(self) -> None:
        """Load PaliGemma's weights where `weights` names some, then those of each encoder that names its own.

        Raises:
            CheckpointError: If weights cannot be read or belong to another architecture.
        """
        if self.weights is not None:
            load_paligemma(self, self.weights)
        for encoder in self.vision_encoders().values():
            encoder.load_pretrained()

    def vision_encoders(self) -> dict[str, VisionEncoder]:
        """Return the encoders by name."""
        return {name: cast(VisionEncoder, encoder) for name, encoder in self.encoders.items()}

    def real_tokens(self, images: Mapping[str, Tensor], real: RealTokens) -> int:
        """Return how many tokens of a batch's prefixes are real, of images (B, 3, H, W) and text together."""
        encoder = next(iter(self.vision_encoders().values()))
        visual = {camera: math.prod(encoder.grid(*pixels.shape[-2:])) for camera, pixels in images.items()}
        return real.text + sum(visual[camera] * number for camera, number in real.images.items())

    def encode_images(
        self,
        images: Mapping[str, Tensor],
        image_mask: Mapping[str, Tensor] | None = None,
        present: Mapping[str, int] | None = None,
    ) -> dict[str, Tensor]:
        """Turn pixels into visual tokens; all cameras pass the encoders together.

        Args:
            images: Camera name -> uint8 RGB (B, 3, H, W); cameras may differ in size.
            image_mask: Camera name -> bool (B,), False where a sample lacks the camera.
            present: Camera name -> how many samples have it. With it, images that samples lack are not encoded,
                and their tokens are zero.

        Returns:
            Camera name -> fused tokens (B, N, D), N = (H / patch)(W / patch).

        Raises:
            ConfigError: If H or W is not a multiple of the patch size.
        """
        rows, shown = {}, dict(images)
        if image_mask is not None and present is not None:
            for camera, count in present.items():
                if count < len(images[camera]):
                    # At least one, so that every process runs every encoder as often as all others.
                    order_B = torch.argsort(image_mask[camera], descending=True, stable=True)
                    rows[camera] = order_B[: max(1, count)]
                    shown[camera] = images[camera].index_select(0, rows[camera])
        sizes: dict[torch.Size, list[str]] = {}
        for camera, pixels in shown.items():
            sizes.setdefault(pixels.shape[1:], []).append(camera)
        batches = [[shown[camera] for camera in cameras] for cameras in sizes.values()]
        fused: dict[str, Tensor] = {}
        for cameras, tokens_XND in zip(sizes.values(), self._encode(batches), strict=True):
            counts = [len(shown[camera]) for camera in cameras]
            fused.update(zip(cameras, tokens_XND.split(counts), strict=True))
        for camera, rows_X in rows.items():
            size = (len(images[camera]), *fused[camera].shape[1:])
            fused[camera] = fused[camera].new_zeros(size).index_copy(0, rows_X, fused[camera])
        return {camera: fused[camera] for camera in images}

    def _encode(self, batches: list[list[Tensor]]) -> list[Tensor]:
        """Return the fused tokens (X, N, D) of the images of each size."""
        if not batches:
            return []
        images = [batch[0] if len(batch) == 1 else torch.cat(batch) for batch in batches]
        projected: list[dict[str, Tensor]] = [{} for _ in images]
        for name, encoder in self.vision_encoders().items():
            row_1TD, groups = in_one_row(encoder.encode_images(images))
            for tokens, tokens_XND in zip(
                projected, by_size(self.projections[name](row_1TD), groups), strict=True
            ):
                tokens[name] = tokens_XND
        return [self.fusion(tokens) for tokens in projected]

    def embed_prefix(
        self,
        images: Mapping[str, Tensor],
        image_mask: Mapping[str, Tensor] | None,
        input_ids: Tensor,
        text_mask: Tensor | None,
        present: Mapping[str, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embed cameras and text.

        Args:
            images: Camera name -> uint8 RGB (B, 3, H, W), in the order the model sees them.
            image_mask: Camera name -> bool (B,), False where a sample lacks the camera; `None`: all present.
            input_ids: int64 (B, L), see `PromptTokenizer`.
            text_mask: bool (B, L), False for padding; `None`: no padding.
            present: See `encode_images`.

        Returns:
            Embedded tokens (B, P, D) and which of them are real, bool (B, P), or `None` where all are.

        Raises:
            ShapeError: If a camera has no mask.
        """
        visual = self.encode_images(images, image_mask, present)
        text_BLD = self.language_model.embed(input_ids)
        parts = [*visual.values()]
        # The blocks work in the type of the visual tokens: bfloat16 under autocast.
        parts.append(text_BLD.to(parts[0].dtype) if parts else text_BLD)
        tokens_BPD = torch.cat(parts, dim=1)
        if image_mask is None and text_mask is None:
            return tokens_BPD, None
        if image_mask is not None and not visual.keys() <= image_mask.keys():
            raise ShapeError(
                "Every camera needs a mask",
                where="image_mask",
                found=sorted(image_mask),
                expected=sorted(visual),
            )
        masks = [
            image_mask[camera][:, None].expand(tokens_BND.shape[:2])
            if image_mask is not None
            else tokens_BND.new_ones(tokens_BND.shape[:2], dtype=torch.bool)
            for camera, tokens_BND in visual.items()
        ]
        masks.append(torch.ones_like(input_ids, dtype=torch.bool) if text_mask is None else text_mask)
        return tokens_BPD, torch.cat(masks, dim=1)

    def forward(
        self,
        images: Mapping[str, Tensor],
        image_mask: Mapping[str, Tensor] | None,
        input_ids: Tensor,
        text_mask: Tensor | None,
        answer_mask: Tensor | None = None,
        real: RealTokens | None = None,
    ) -> Tensor:
        """Run the language model over images and text (prefix-LM: answers are causal).

        Args:
            images: See `embed_prefix`.
            image_mask: See `embed_prefix`.
            input_ids: See `embed_prefix`; each row is a prompt, which may be followed by its answer.
            text_mask: See `embed_prefix`; padding comes last.
            answer_mask: bool like `input_ids`, True for the tokens of the answer; `None`: there are no answers.
            real: How much of the batch is real: absent images are not encoded, and the language model reads
                the real tokens of all samples in one row. `None` computes padding as well.

        Returns:
            Hidden states (B, P, D) after the final norm, the last L of them the text's; `language_head` gives
            their logits.
        """
        present = None if real is None else real.images
        tokens_BPD, valid_BP = self.embed_prefix(images, image_mask, input_ids, text_mask, present)
        positions = positions_of(tokens_BPD, valid_BP)
        if answer_mask is None:
            mask = None if valid_BP is None else valid_BP[:, None, None]
            return self.language_model(tokens_BPD, positions, mask)
        length = tokens_BPD.shape[1]
        causal_BP = F.pad(answer_mask, (length - input_ids.shape[1], 0))
        place_P = torch.arange(length, device=input_ids.device)
        mask_BPP = (place_P[:, None] >= place_P) | ~causal_BP[:, None]
        if valid_BP is not None:
            mask_BPP = mask_BPP & valid_BP[:, None]
        if valid_BP is None or real is None:
            return self.language_model(tokens_BPD, positions, mask_BPP[:, None])
        count = self.real_tokens(images, real)
        packing = pack_answers(valid_BP, causal_BP, mask_BPP, count, real.answers)
        packed = self.language_model(packing.pack(tokens_BPD), packing.pack(positions), packing)
        return packing.unpack(packed)

    def language_head(self, hidden_BLD: Tensor) -> Tensor:
        """Return logits (B, L, vocab_size + new_tokens) of hidden states (B, L, D)."""
        return self.language_model.head(hidden_BLD)


def positions_of(tokens_BPD: Tensor, valid_BP: Tensor | None) -> Tensor:
    """Number the real tokens of each sample from 0; a padded token repeats the number before it.

    Args:
        tokens_BPD: Embedded tokens (B, P, D).
        valid_BP: bool (B, P), or `None` if all are real.

    Returns:
        int64 (B, P), or (1, P) where `valid_BP` is `None`.
    """
    if valid_BP is None:
        return torch.arange(tokens_BPD.shape[1], device=tokens_BPD.device)[None]
    return (valid_BP.cumsum(dim=1) - 1).clamp(min=0)
