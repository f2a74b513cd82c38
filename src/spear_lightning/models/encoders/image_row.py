"""Images of several sizes in one row of tokens: every layer of a transformer runs once for all of them.

What a layer does to each token needs no images: the row is one, and so is each matrix product, forward and
backward. Attention alone is computed image by image, for all images of one size at once.

Legend: X images of a size, N tokens of each, T tokens of all images, D width, H heads, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

Groups = tuple[tuple[int, int], ...]
"""For each size, in the order of the row: how many images there are, and the tokens of each."""

ATTENTION = "spear_within_images"
"""What a transformer's configuration calls `attend_within_images`."""


def embed_patches(pixels: Sequence[Tensor], convolution: nn.Conv2d) -> list[Tensor]:
    """Return the tokens (X, N, D) of pixels (X, C, height, width) of each size, by one matrix product.

    Args:
        pixels: Float pixels of each size, in the type of the weights.
        convolution: Whose kernels are as large as its strides.
    """
    rows, columns = convolution.kernel_size
    patches = [part.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)) for part in pixels]
    flat, groups = in_one_row([part.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2) for part in patches])
    return by_size(F.linear(flat, convolution.weight.flatten(1), convolution.bias), groups)


def in_one_row(tokens: Sequence[Tensor]) -> tuple[Tensor, Groups]:
    """Return one row (1, T, D) of tokens (X, N, D) of each size, and where they are in it."""
    groups = tuple((part.shape[0], part.shape[1]) for part in tokens)
    flat = [part.flatten(0, 1)[None] for part in tokens]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1), groups


def by_size(row_1TD: Tensor, groups: Groups) -> list[Tensor]:
    """Return the tokens (X, N, D) of each size, views of a row (1, T, D); undoes `in_one_row`."""
    parts = row_1TD[0].split([math.prod(group) for group in groups])
    return [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]


def attend_within_images(
    module: nn.Module,
    query_1HTd: Tensor,
    key_1HTd: Tensor,
    value_1HTd: Tensor,
    groups: Groups,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Let every token attend to the tokens of its image, as an attention function of transformers.

    Args:
        module: The layer; unused.
        query_1HTd: (1, H, T, d).
        key_1HTd: (1, H, T, d).
        value_1HTd: (1, H, T, d).
        groups: The images; given to the layer in the place of a mask.
        scaling: Of the products of queries and keys.

    Returns:
        (1, T, H, d), and no weights.
    """
    parts = (by_size(part_1HTd.transpose(1, 2), groups) for part_1HTd in (query_1HTd, key_1HTd, value_1HTd))
    attended = [
        F.scaled_dot_product_attention(
            query_XNHd.transpose(1, 2), key_XNHd.transpose(1, 2), value_XNHd.transpose(1, 2), scale=scaling
        ).transpose(1, 2)
        for query_XNHd, key_XNHd, value_XNHd in zip(*parts, strict=True)
    ]
    return in_one_row(attended)[0], None


AttentionInterface.register(ATTENTION, attend_within_images)
