"""The encoder for training from scratch: the interface of the others, and what its parts promise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from spear_lightning.errors import CheckpointError, ConfigError
from spear_lightning.models import ConvolutionalEncoder
from spear_lightning.models.encoders.convolutional import ResidualBlock, place_features


def encoder(depth: int = 0) -> ConvolutionalEncoder:
    torch.manual_seed(0)
    return ConvolutionalEncoder(width=32, channels=12, stem_blocks=1, depth=depth, heads=4, mlp_width=48)


@pytest.mark.parametrize(("height", "width"), [(14, 14), (28, 56), (210, 280)])
def test_a_token_for_each_patch(height: int, width: int) -> None:
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    assert encoder(depth=1)(images).shape == (2, (height // 14) * (width // 14), 32)


def test_tokens_are_in_row_order_and_local_without_transformer_blocks() -> None:
    model = encoder()
    torch.nn.init.normal_(model.stem[1].layers[-1].weight)
    images = torch.randint(0, 256, (1, 3, 70, 98), dtype=torch.uint8)
    before = model(images)[0]
    images[0, :, 3 * 14 + 6, 5 * 14 + 6] ^= 255
    # GroupNorm sees the whole image, so everything changes a little; the token of the pixel's patch, a lot.
    change = (model(images)[0] - before).abs().amax(-1)
    assert int(change.argmax()) == 3 * 7 + 5


def test_a_new_residual_block_changes_nothing() -> None:
    image = torch.randn(2, 12, 10, 8)
    assert torch.equal(ResidualBlock(12)(image), image)


def test_place_features_are_of_the_relative_place() -> None:
    features = place_features(3, 5).view(3, 5, 4, 8)
    frequency = math.pi / 2 * 2.0 ** torch.arange(8)
    torch.testing.assert_close(features[1, 4, 0], torch.sin(frequency * 0.5), atol=1e-4, rtol=0)
    torch.testing.assert_close(features[1, 4, 1], torch.cos(frequency * 0.5), atol=1e-4, rtol=0)
    torch.testing.assert_close(features[1, 4, 2], torch.sin(frequency * 0.9), atol=1e-4, rtol=0)
    # The middle token has the same features at any resolution.
    finer = place_features(9, 15).view(9, 15, 4, 8)
    torch.testing.assert_close(features[1, 2], finer[4, 7], atol=1e-4, rtol=0)


def test_weights_and_sizes_that_cannot_be(tmp_path: Path) -> None:
    model = encoder()
    model.load_pretrained()
    model.weights = str(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="no such weights"):
        model.load_pretrained()
    with pytest.raises(ConfigError, match="heads"):
        ConvolutionalEncoder(width=30, heads=4)
