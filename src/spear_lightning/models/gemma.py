"""Gemma's transformer blocks with keys and values in the open.

The parts and the parameter names are those of transformers' `GemmaModel`; the attention differs in how it is
called. It returns its keys and values and takes those of a context as an argument, instead of through a cache
that grows with every call: a context can be used many times, gradients flow through it, and blocks can be
compiled, sharded and recomputed one by one.

Legend: B batch, L tokens, K tokens attended to, D width, H heads, G key and value heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm, repeat_kv

from spear_lightning.models.gemma_shape import GemmaShape
from spear_lightning.models.packing import Packing, fold_heads, packed_attention, unfold_heads
from spear_lightning.models.rotary import Rotation, rotate, rotation_at

_ROWS_AT_ONCE = 16384
"""Embeddings from which new ones are drawn at a time."""


class KeyValue(NamedTuple):
    """Keys (rotated) and values of one block: (B, kv_heads, L, head_dim) each."""

    key: Tensor
    value: Tensor


class GemmaAttention(nn.Module):
    """Grouped-query attention with rotary positions.

    Args:
        shape: Sizes.
    """

    def __init__(self, shape: GemmaShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.q_proj = nn.Linear(shape.width, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.width, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.width, bias=False)

    def key_value(self, hidden_BLD: Tensor, rotation: Rotation) -> KeyValue:
        """Return the keys and values of tokens (B, L, D)."""
        return KeyValue(
            rotate(self._heads(self.k_proj(hidden_BLD)), rotation), self._heads(self.v_proj(hidden_BLD))
        )

    def forward(
        self, hidden_BLD: Tensor, rotation: Rotation, mask: Tensor | Packing | None, context: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Attend; see `GemmaBlock.forward`."""
        own = self.key_value(hidden_BLD, rotation)
        query_BHLd = rotate(self._heads(self.q_proj(hidden_BLD)), rotation)
        key, value = own
        if context is not None:
            key, value = torch.cat([context.key, key], dim=2), torch.cat([context.value, value], dim=2)
        attended_BHLd = attend(query_BHLd, key, value, mask)
        return self.o_proj(attended_BHLd.transpose(1, 2).flatten(2)), own

    def _heads(self, projected_BLX: Tensor) -> Tensor:
        return projected_BLX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def attend(query_BHLd: Tensor, key_BGKd: Tensor, value_BGKd: Tensor, mask: Tensor | Packing | None) -> Tensor:
    """Grouped-query attention in whichever form keeps CUDA on a fast kernel.

    Args:
        query_BHLd: (B, H, L, d).
        key_BGKd: (B, G, K, d); G divides H.
        value_BGKd: (B, G, K, d).
        mask: See `GemmaBlock.forward`.

    Returns:
        (B, H, L, d).
    """
    if isinstance(mask, Packing):
        return packed_attention(query_BHLd, key_BGKd, value_BGKd, mask)
    groups = query_BHLd.shape[1] // key_BGKd.shape[1]
    if mask is None or groups == 1:
        return F.scaled_dot_product_attention(
            query_BHLd, key_BGKd, value_BGKd, attn_mask=mask, enable_gqa=groups > 1
        )
    # With a mask, grouped heads would leave CUDA nothing but its slowest attention kernel. Folding repeats rows of
    # the mask, if it has rows, instead of keys and values: cheaper where the queries are few.
    few_rows = mask.shape[2] == 1 or query_BHLd.shape[2] * 8 <= key_BGKd.shape[2]
    if key_BGKd.shape[1] == 1 and few_rows:
        folded, mask = fold_heads(query_BHLd, mask)
        attended = F.scaled_dot_product_attention(folded, key_BGKd, value_BGKd, attn_mask=mask)
        return unfold_heads(attended, groups)
    key, value = repeat_kv(key_BGKd, groups), repeat_kv(value_BGKd, groups)
    return F.scaled_dot_product_attention(query_BHLd, key, value, attn_mask=mask)


class GemmaBlock(nn.Module):
    """One transformer block: attention and gated MLP, each after an RMSNorm.

    Args:
        shape: Sizes.
    """

    def __init__(self, shape: GemmaShape) -> None:
        super().__init__()
        config = shape.config()
        self.self_attn = GemmaAttention(shape)
        self.mlp = GemmaMLP(config)
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_BLD: Tensor,
        rotation: Rotation,
        mask: Tensor | Packing | None = None,
        context: KeyValue | None = None,
        key_value_only: bool = False,
    ) -> tuple[Tensor, KeyValue]:
        """Run the block.

        Args:
            hidden_BLD: Tokens (B, L, D).
            rotation: Rotation at the tokens' positions.
            mask: bool, broadcastable to (B, 1, L, K), True = attend; K counts the context's tokens first,
                then the block's own. `None`: every token attends to all. A `Packing`: the tokens are a packed row
                (1, T, D) without context, and attend as it says.
            context: Keys and values of earlier tokens to attend to as well.
            key_value_only: Compute nothing but keys and values.

        Returns:
            The new tokens (B, L, D) (with `key_value_only` the old ones), and their own keys and values.
        """
        normed_BLD = self.input_layernorm(hidden_BLD)
        if key_value_only:
            return hidden_BLD, self.self_attn.key_value(normed_BLD, rotation)
        attended_BLD, own = self.self_attn(normed_BLD, rotation, mask, context)
        hidden_BLD = hidden_BLD + attended_BLD
        return hidden_BLD + self.mlp(self.post_attention_layernorm(hidden_BLD)), own


class GemmaTransformer(nn.Module):
    """A stack of Gemma blocks without token embedding.

    Matrices start from a normal distribution of variance 1 / fan-in, as in Gemma's original code. The fixed
    standard deviation 0.02 of transformers is about that at Gemma's width, but too small for narrow models.

    Args:
        shape: Sizes; `vocab_size` is not used.
    """

    def __init__(self, shape: GemmaShape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(GemmaBlock(shape) for _ in range(shape.depth))
        self.norm = GemmaRMSNorm(shape.width, eps=shape.config().rms_norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(
        self,
        hidden_BLD: Tensor,
        positions_BL: Tensor,
        mask: Tensor | Packing | None = None,
        context: Sequence[KeyValue] | None = None,
    ) -> Tensor:
        """Run all blocks and the final RMSNorm.

        Args:
            hidden_BLD: Embedded tokens (B, L, D).
            positions_BL: int64 (B or 1, L), positions of the tokens.
            mask: See `GemmaBlock.forward`.
            context: Keys and values that each block attends to besides its own; left as they are.

        Returns:
            Hidden states (B, L, D) after the final norm.
        """
        hidden_BLD, _ = self.with_key_values(hidden_BLD, positions_BL, mask, context)
        return hidden_BLD

    def with_key_values(
        self,
        hidden_BLD: Tensor,
        positions_BL: Tensor,
        mask: Tensor | Packing | None = None,
        context: Sequence[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Return what `forward` returns, and the tokens' own keys and values in every block."""
        rotation = rotation_at(positions_BL, self.shape.head_dim)
        collected = []
        for index, block in enumerate(self.layers):
            hidden_BLD, own = block(hidden_BLD, rotation, mask, None if context is None else context[index])
            collected.append(own)
        return self.norm(hidden_BLD), collected

    def key_values(
        self, hidden_BLD: Tensor, positions_BL: Tensor, mask: Tensor | Packing | None = None
    ) -> list[KeyValue]:
        """Return the keys and values of every block, and compute nothing beyond the last ones.

        Args:
            hidden_BLD: Embedded tokens (B, L, D).
            positions_BL: int64 (B or 1, L), positions of the tokens.
            mask: See `GemmaBlock.forward`.
        """
        rotation = rotation_at(positions_BL, self.shape.head_dim)
        collected = []
        for index, block in enumerate(self.layers):
            last = index == len(self.layers) - 1
            hidden_BLD, own = block(hidden_BLD, rotation, mask, key_value_only=last)
            collected.append(own)
        return collected

    def parameters_beyond_key_values(self) -> list[str]:
        """Names of parameters that `key_values` does not depend on."""
        last = f"layers.{len(self.layers) - 1}."
        kept = tuple(f"{last}{part}" for part in ("input_layernorm.", "self_attn.k_proj.", "self_attn.v_proj."))
        names = [name for name, _ in self.named_parameters() if name.startswith((last, "norm."))]
        return [name for name in names if not name.startswith(kept)]


class GemmaLanguageModel(GemmaTransformer):
    """A Gemma with its token embedding, which is its output head as well.

    Tokens that are added to a pretrained vocabulary lie in a table of their own, `new_embeddings`. With the base
    table `embed_tokens` frozen they train alone: no gradient and no optimizer state for its rows.

    Args:
        shape: Sizes.
    """

    def __init__(self, shape: GemmaShape) -> None:
        super().__init__(shape)
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.width)
        nn.init.normal_(self.embed_tokens.weight, std=shape.width**-0.5)
        self.new_embeddings: nn.Embedding | None = None
        if shape.new_tokens:
            self.new_embeddings = nn.Embedding(shape.new_tokens, shape.width)
            nn.init.normal_(self.new_embeddings.weight, std=shape.width**-0.5)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings (B, L, D) of token ids (B, L), scaled by the square root of the width."""
        scale = self.shape.width**0.5
        if self.new_embeddings is None:
            return self.embed_tokens(input_ids) * scale
        is_new_BL = input_ids >= self.shape.vocab_size
        old_BLD = self.embed_tokens(input_ids.masked_fill(is_new_BL, 0))
        new_BLD = self.new_embeddings((input_ids - self.shape.vocab_size).clamp(min=0))
        return torch.where(is_new_BL[..., None], new_BLD, old_BLD) * scale

    def head(self, hidden_BLD: Tensor) -> Tensor:
        """Return logits (B, L, vocab_size + new_tokens) of hidden states (B, L, D)."""
        logits = F.linear(hidden_BLD, self.embed_tokens.weight)
        if self.new_embeddings is None:
            return logits
        return torch.cat([logits, F.linear(hidden_BLD, self.new_embeddings.weight)], dim=-1)

    @torch.no_grad()
    def draw_new_embeddings(self, seed: int = 0) -> None:
        """Draw the new rows from a normal distribution with mean and covariance of the base rows (spec section 4).

        Args:
            seed: Of the draw, which is the same in every process.
        """
        if self.new_embeddings is None:
            return
        base, new = self.embed_tokens.weight, self.new_embeddings.weight
        generator = torch.Generator().manual_seed(seed)
        mean, drawn = base.float().mean(0), torch.zeros_like(new, dtype=torch.float32)
        # Independent normal multiples of all centred rows have the rows' covariance; no factorisation is needed.
        for rows in base.split(_ROWS_AT_ONCE):
            multiples = torch.randn(len(new), len(rows), generator=generator).to(base.device)
            drawn += multiples @ (rows.float() - mean)
        new.copy_(mean + drawn / max(1, len(base) - 1) ** 0.5)
