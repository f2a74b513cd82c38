"""SigLIP and plain DINOv2 against transformers' own forward passes; the encoders' interface; fusion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from spear_lightning.errors import CheckpointError, ConfigError, ShapeError
from spear_lightning.models import Dinov2Encoder, MeanFusion, MogeEncoder, SiglipEncoder
from spear_lightning.models.encoders.siglip import LinearThenBias

SIZES = [(210, 280, 300), (112, 112, 64), (28, 28, 4)]
"""Height, width and tokens: the external camera, the wrist camera, and the grid of the position tables."""

SIGLIP = {"width": 24, "depth": 2, "heads": 3, "mlp_width": 40, "image_size": 28}
DINOV2 = {"hidden_width": 24, "depth": 4, "heads": 3, "image_size": 28}


def picture(height: int, width: int) -> Tensor:
    return torch.randint(
        0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def siglip_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=28,
        patch_size=14,
        vision_use_head=False,
    )


@pytest.mark.parametrize(("height", "width", "tokens"), SIZES)
def test_siglip_equals_transformers(tmp_path: Path, height: int, width: int, tokens: int) -> None:
    torch.manual_seed(0)
    reference = SiglipVisionModel(siglip_config()).eval()
    reference.save_pretrained(tmp_path)
    encoder = SiglipEncoder(**SIGLIP, weights=str(tmp_path))
    encoder.load_pretrained()
    images = picture(height, width)
    with torch.no_grad():
        expected = reference(images / 127.5 - 1, interpolate_pos_encoding=True).last_hidden_state
        found = encoder(images)
    assert found.shape == (2, tokens, encoder.width)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_siglip_loads_the_tower_of_a_two_tower_checkpoint(tmp_path: Path) -> None:
    text = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    vision = {**siglip_config().to_dict(), "vision_use_head": True}
    reference = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    reference.save_pretrained(tmp_path)
    encoder = SiglipEncoder(**SIGLIP, weights=str(tmp_path))
    encoder.load_pretrained()
    with torch.no_grad():
        expected = reference.vision_model(picture(28, 28) / 127.5 - 1).last_hidden_state
        torch.testing.assert_close(encoder(picture(28, 28)), expected, atol=1e-5, rtol=1e-5)


def dinov2_reference() -> Dinov2Model:
    config = Dinov2Config(hidden_size=24, num_hidden_layers=4, num_attention_heads=3, image_size=28, patch_size=14)
    torch.manual_seed(0)
    reference = Dinov2Model(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return reference


@pytest.mark.parametrize(("height", "width", "tokens"), SIZES)
def test_dinov2_equals_transformers(tmp_path: Path, height: int, width: int, tokens: int) -> None:
    reference = dinov2_reference()
    reference.save_pretrained(tmp_path)
    encoder = Dinov2Encoder(**DINOV2, layers=[1, 3], weights=str(tmp_path))
    encoder.load_pretrained()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        outputs = reference((picture(height, width) / 255 - mean) / std, output_hidden_states=True)
        expected = torch.cat(
            [reference.layernorm(outputs.hidden_states[index + 1])[:, 1:] for index in (1, 3)], -1
        )
        found = encoder(picture(height, width))
    assert found.shape == (2, tokens, encoder.width) == (2, tokens, 48)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert encoder.unused_parameters() == []


def test_dinov2_takes_the_last_layer_by_default_and_can_leave_it_unnormed() -> None:
    normed, raw = Dinov2Encoder(**DINOV2), Dinov2Encoder(**DINOV2, apply_norm=False)
    raw.load_state_dict(normed.state_dict())
    images = picture(28, 42)
    assert normed.width == 24
    torch.testing.assert_close(normed.model.layernorm(raw(images)), normed(images))
    assert raw.unused_parameters() == ["model.layernorm.weight", "model.layernorm.bias"]


@pytest.mark.parametrize("layers", [[], [4], [-1], [2, 1], [1, 1]])
def test_layers_must_be_blocks(layers: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"from 0 to 3"):
        Dinov2Encoder(**DINOV2, layers=layers)


@pytest.mark.parametrize(("height", "width"), [(211, 280), (210, 281), (7, 14)])
def test_sizes_that_do_not_divide_are_refused(height: int, width: int) -> None:
    for encoder in (SiglipEncoder(**SIGLIP), Dinov2Encoder(**DINOV2)):
        with pytest.raises(ConfigError, match=r"the nearest are (210 and 280|14 and 14)"):
            encoder(picture(height, width))


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 28, 28), torch.zeros(3, 28, 28, dtype=torch.uint8)])
def test_only_batches_of_bytes_are_images(images: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"uint8"):
        SiglipEncoder(**SIGLIP)(images)


def test_bfloat16_encoders_normalise_and_interpolate_in_float32() -> None:
    torch.manual_seed(0)
    encoder = Dinov2Encoder(**DINOV2, layers=[0])
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            # What is left of the network: pixels + positions, in values that bfloat16 holds exactly.
            if "position" not in name:
                parameter.zero_()
        positions = torch.randn(5, 24).bfloat16().float()
        encoder.model.embeddings.position_embeddings.copy_(positions[None])
        encoder.apply_norm = False
        wide = encoder(picture(42, 56))
        narrow = encoder.bfloat16()(picture(42, 56))
    torch.testing.assert_close(narrow.float(), wide.bfloat16().float(), atol=0, rtol=0)


def test_biases_that_are_added_later_keep_the_type_of_the_product() -> None:
    plain = nn.Linear(16, 32)
    layer = LinearThenBias.of(plain)
    inputs = torch.randn(5, 16)
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    torch.testing.assert_close(layer(inputs), plain(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(inputs), plain(inputs)
    assert found.dtype == torch.bfloat16
    # The sum is rounded once more.
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2**-7)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    SiglipVisionModel(siglip_config()).save_pretrained(tmp_path)
    wider = SiglipEncoder(**{**SIGLIP, "width": 48}, weights=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"(?s)of another shape.*\(24,\) in the file, \(48,\) in the model"):
        wider.load_pretrained()
    deeper = SiglipEncoder(**{**SIGLIP, "depth": 3}, weights=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"16 missing \['encoder\.layers\.2"):
        deeper.load_pretrained()
    with pytest.raises(CheckpointError, match=r"unexpected"):
        Dinov2Encoder(**DINOV2, weights=str(tmp_path)).load_pretrained()
    dinov2_reference().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no SigLIP vision tower"):
        SiglipEncoder(**SIGLIP, weights=str(tmp_path)).load_pretrained()


def test_without_weights_loading_changes_nothing() -> None:
    for encoder in (SiglipEncoder(**SIGLIP), Dinov2Encoder(**DINOV2), MogeEncoder(**DINOV2, layers=None)):
        before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        encoder.load_pretrained()
        assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_mean_fusion() -> None:
    tokens = {name: torch.randn(2, 4, 8) for name in ("siglip", "moge", "dinov2")}
    torch.testing.assert_close(MeanFusion()(tokens), torch.stack(list(tokens.values())).mean(0))
    assert torch.equal(MeanFusion()({"siglip": tokens["siglip"]}), tokens["siglip"])
