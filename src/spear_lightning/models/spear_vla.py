"""SPEAR-1's network: SPEAR-VLM and the action expert (spec section 7).

Legend: B batch, P prefix tokens, H horizon, S suffix tokens (1 state + H actions), A action numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spear_lightning.errors import ConfigError, ShapeError
from spear_lightning.models.action_expert import ActionExpert
from spear_lightning.models.gemma import KeyValue
from spear_lightning.models.packing import RealTokens, pack_real_tokens
from spear_lightning.models.spear_vlm import SpearVLM, positions_of


@dataclass(frozen=True)
class Prefix:
    """What the action expert sees of an observation; made once, used for any number of velocities.

    Attributes:
        key_values: Keys and values of each of the VLM's blocks, (B, kv_heads, P, head_dim) each.
        mask: bool (B, P), False for padding and absent cameras; `None` if all tokens are real.
        positions: int64 (B or 1, P), positions of the tokens; real ones are numbered from 0.
    """

    key_values: list[KeyValue]
    mask: Tensor | None
    positions: Tensor

    def repeated(self, times: int) -> Prefix:
        """Return the prefix of a batch in which every sample stands `times` times, one after the other."""
        if times == 1:
            return self
        return Prefix(
            [KeyValue(*(part.repeat_interleave(times, dim=0) for part in pair)) for pair in self.key_values],
            None if self.mask is None else self.mask.repeat_interleave(times, dim=0),
            self.positions.repeat_interleave(times, dim=0) if len(self.positions) > 1 else self.positions,
        )


class SpearVLA(nn.Module):
    """SPEAR-1: images, instruction, state and a noisy action chunk -> velocity of the chunk.

    The prefix [cameras | text] attends to itself alone. The state token attends to prefix and itself, action
    tokens to prefix, state and all actions.

    Args:
        vlm: Vision-language model.
        expert: Action expert; its depth, kv_heads and head_dim must be those of the VLM's language model.
    """

    def __init__(self, vlm: SpearVLM, expert: ActionExpert) -> None:
        super().__init__()
        for name in ("depth", "kv_heads", "head_dim"):
            found, expected = getattr(expert.shape, name), getattr(vlm.language, name)
            if found != expected:
                raise ConfigError(
                    "The action expert cannot read the VLM's keys and values",
                    where=f"vla.expert.{name}",
                    found=found,
                    expected=f"{expected}, the VLM's `language.{name}`",
                )
        self.vlm = vlm
        self.expert = expert

    def forward(
        self,
        images: Mapping[str, Tensor],
        image_mask: Mapping[str, Tensor] | None,
        input_ids: Tensor,
        text_mask: Tensor | None,
        state: Tensor,
        noisy: Tensor,
        tau: Tensor,
        real: RealTokens | None = None,
    ) -> Tensor:
        """Return `velocity` of observations, each of which may stand for several points of flow paths.

        Args:
            images: See `encode_prefix`; B samples.
            image_mask: See `encode_prefix`.
            input_ids: See `encode_prefix`.
            text_mask: See `encode_prefix`.
            state: See `velocity`; a multiple of B samples, all points of an observation one after the other.
            noisy: See `velocity`.
            tau: See `velocity`.
            real: See `encode_prefix`.
        """
        prefix = self.encode_prefix(images, image_mask, input_ids, text_mask, real)
        return self.velocity(prefix.repeated(len(tau) // len(input_ids)), state, noisy, tau)

    def encode_prefix(
        self,
        images: Mapping[str, Tensor],
        image_mask: Mapping[str, Tensor] | None,
        input_ids: Tensor,
        text_mask: Tensor | None,
        real: RealTokens | None = None,
    ) -> Prefix:
        """Encode an observation.

        With both masks `None` the attention needs no mask, which lets CUDA use its fastest kernels. With masks and
        the numbers of what is real, absent images are not encoded, and the language model reads the real tokens of
        all samples in one row: the result is the same, without the work on padding.

        Args:
            images: Camera name -> uint8 RGB (B, 3, H, W), in the order the model sees them.
            image_mask: Camera name -> bool (B,), False where a sample lacks the camera; `None`: all present.
            input_ids: int64 (B, L), see `PromptTokenizer`.
            text_mask: bool (B, L), False for padding; `None`: no padding.
            real: How much of it is real; `None` computes padding as well.
        """
        present = None if real is None else real.images
        tokens_BPD, mask_BP = self.vlm.embed_prefix(images, image_mask, input_ids, text_mask, present)
        positions = positions_of(tokens_BPD, mask_BP)
        language_model = self.vlm.language_model
        if mask_BP is None or real is None:
            mask = None if mask_BP is None else mask_BP[:, None, None]
            return Prefix(language_model.key_values(tokens_BPD, positions, mask), mask_BP, positions)
        packing = pack_real_tokens(mask_BP, self.vlm.real_tokens(images, real))
        packed = language_model.key_values(packing.pack(tokens_BPD), packing.pack(positions), packing)
        parts = packing.unpack_each([part.transpose(1, 2) for pair in packed for part in pair])
        padded = [part.transpose(1, 2) for part in parts]
        key_values = [KeyValue(*pair) for pair in zip(padded[::2], padded[1::2], strict=True)]
        return Prefix(key_values, mask_BP, positions)

    def velocity(self, prefix: Prefix, state: Tensor, noisy: Tensor, tau: Tensor) -> Tensor:
        """Predict the flow's velocity at a point of its path.

        Args:
            prefix: The observation; left as it is.
            state: (B, state_width) current pose and gripper in network units.
            noisy: (B, H, A) point of the path in network units.
            tau: (B,) flow time in [0, 1], 0 noise, 1 data.

        Returns:
            float32 (B, H, A), in network units per unit of flow time.

        Raises:
            ShapeError: If a tensor has another shape.
        """
        batch = prefix.key_values[0].key.shape[0]
        expert = self.expert
        expected = [(batch, expert.state_width), (batch, noisy.shape[1], expert.action_width), (batch,)]
        found = [tuple(state.shape), tuple(noisy.shape), tuple(tau.shape)]
        if found != expected:
            raise ShapeError(
                "State, noisy actions and flow time do not fit the prefix and the expert",
                where="velocity(prefix, state, noisy, tau)",
                found=found,
                expected=expected,
            )
        tokens_BSW = expert.embed(state, noisy, tau)
        suffix_length = tokens_BSW.shape[1]
        positions = prefix.positions[:, -1:] + 1 + torch.arange(suffix_length, device=tau.device)
        mask = suffix_mask(prefix, suffix_length)
        hidden_BSW = expert.transformer(tokens_BSW, positions, mask, prefix.key_values)
        return expert.read_velocity(hidden_BSW)

    def unused_parameters(self) -> list[str]:
        """Names of parameters that no velocity depends on.

        They are the parts of the VLM's last block and norm that come after its keys and values, and what the
        encoders do not use. Distributed training has to know of them, and an optimizer should not decay them.
        """
        beyond = self.vlm.language_model.parameters_beyond_key_values()
        unused = [f"vlm.language_model.{name}" for name in beyond]
        for encoder_name, encoder in self.vlm.vision_encoders().items():
            unused += [f"vlm.encoders.{encoder_name}.{name}" for name in encoder.unused_parameters()]
        return unused


def suffix_mask(prefix: Prefix, suffix_length: int) -> Tensor:
    """Say what each suffix token attends to: bool (B or 1, 1, S, P + S), True = attend.

    Args:
        prefix: Its padding is hidden from all.
        suffix_length: S, the state and the actions.
    """
    device = prefix.positions.device
    block_S = torch.arange(suffix_length, device=device).clamp(max=1)
    suffix_SS = block_S[:, None] >= block_S
    all_real = torch.ones_like(prefix.positions, dtype=torch.bool)
    prefix_BP = all_real if prefix.mask is None else prefix.mask
    size = (len(prefix_BP), 1, suffix_length, -1)
    return torch.cat([prefix_BP[:, None, None].expand(size), suffix_SS.expand(size)], dim=-1)
