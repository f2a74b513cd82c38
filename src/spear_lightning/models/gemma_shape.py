"""The sizes of a Gemma language model."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GemmaConfig

from spear_lightning.errors import ConfigError


@dataclass(frozen=True)
class GemmaShape:
    """Sizes of a Gemma transformer; the defaults are Gemma 2B as PaliGemma 3B uses it.

    Attributes:
        width: Channels of the residual stream.
        mlp_width: Channels inside the MLP.
        depth: Blocks.
        heads: Query heads.
        kv_heads: Key and value heads; divides `heads`.
        head_dim: Channels of a head; even.
        vocab_size: Rows of the embedding table, of which a tokenizer may use fewer.
        new_tokens: Tokens added to a pretrained vocabulary, with ids from `vocab_size` on; their embeddings are a
            table of their own, which can train alone.
    """

    width: int = 2048
    mlp_width: int = 16384
    depth: int = 18
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    vocab_size: int = 257216
    new_tokens: int = 0

    def __post_init__(self) -> None:
        sizes = (
            self.width,
            self.mlp_width,
            self.depth,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.vocab_size,
        )
        if min(sizes) < 1 or self.new_tokens < 0 or self.heads % self.kv_heads or self.head_dim % 2:
            raise ConfigError(
                "These sizes do not make a Gemma transformer",
                where="GemmaShape",
                found=self,
                expected="positive sizes, `heads` a multiple of `kv_heads`, `head_dim` even",
            )

    @property
    def rows(self) -> int:
        """Token ids there are embeddings for."""
        return self.vocab_size + self.new_tokens

    def config(self) -> GemmaConfig:
        """Return the sizes as a configuration of transformers."""
        return GemmaConfig(
            hidden_size=self.width,
            intermediate_size=self.mlp_width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            # Special tokens are the tokenizer's business, and a transformer without embedding has none.
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
