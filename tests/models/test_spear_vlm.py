"""SPEAR-VLM against transformers' PaliGemma on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from paligemma_reference import IMAGE_TOKEN, SIGLIP, paligemma
from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration

from spear_lightning.errors import CheckpointError, ConfigError, ShapeError
from spear_lightning.models import GemmaShape, MogeEncoder, SiglipEncoder, SpearVLA, SpearVLM

LANGUAGE = GemmaShape(width=32, mlp_width=48, depth=3, heads=4, kv_heads=1, head_dim=8, vocab_size=300)


@pytest.fixture
def reference() -> PaliGemmaForConditionalGeneration:
    return paligemma()


@pytest.fixture
def pictures() -> Tensor:
    return torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def loaded(reference: PaliGemmaForConditionalGeneration, tmp_path: Path) -> SpearVLM:
    reference.save_pretrained(tmp_path)
    vlm = SpearVLM(LANGUAGE, {"siglip": SiglipEncoder(**SIGLIP)}, weights=str(tmp_path)).eval()
    vlm.load_pretrained()
    return vlm


def tokens(*shape: int, seed: int = 4) -> Tensor:
    return torch.randint(3, 298, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_equal_paligemma(
    reference: PaliGemmaForConditionalGeneration, loaded: SpearVLM, pictures: Tensor
) -> None:
    prompt, answer = tokens(2, 5), tokens(2, 4, seed=5)
    image_ids = torch.full((2, 4), IMAGE_TOKEN)
    input_ids = torch.cat([image_ids, prompt, answer], dim=1)
    token_type_ids = torch.tensor([[0] * 9 + [1] * 4] * 2)
    expected = reference(
        input_ids=input_ids,
        pixel_values=pictures / 127.5 - 1,
        token_type_ids=token_type_ids,
        attention_mask=torch.ones_like(input_ids),
    ).logits
    is_answer = torch.arange(9).expand(2, 9) >= 5
    hidden = loaded({"front": pictures}, None, torch.cat([prompt, answer], dim=1), None, is_answer)
    torch.testing.assert_close(loaded.language_head(hidden), expected, atol=1e-4, rtol=1e-4)
    prefix_alone = loaded.language_head(loaded({"front": pictures}, None, prompt, None))
    torch.testing.assert_close(prefix_alone, expected[:, :9], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_changes_no_logits(loaded: SpearVLM, pictures: Tensor) -> None:
    prompt, answer = tokens(2, 5), tokens(2, 4, seed=5)
    both = torch.cat([prompt, answer], dim=1)
    plain = loaded({"front": pictures}, None, both, None, torch.arange(9).expand(2, 9) >= 5)
    # After the answer, as batches have it; and after the prompt.
    place = torch.arange(12).expand(2, 12)
    behind = torch.cat([both, tokens(2, 3, seed=6)], dim=1)
    found = loaded({"front": pictures}, None, behind, place < 9, (place >= 5) & (place < 9))
    torch.testing.assert_close(found[:, :13], plain, atol=1e-5, rtol=1e-5)
    between = torch.cat([prompt, tokens(2, 3, seed=6), answer], dim=1)
    found = loaded({"front": pictures}, None, between, (place < 5) | (place >= 8), place >= 8)
    torch.testing.assert_close(found[:, -4:], plain[:, -4:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, :9], plain[:, :9], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_answer_is_causal_and_the_prefix_does_not_see_it(loaded: SpearVLM, pictures: Tensor) -> None:
    prompt, answer = tokens(2, 5), tokens(2, 4, seed=5)
    changed = answer.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 298
    is_answer = torch.arange(9).expand(2, 9) >= 5
    before, after = (
        loaded({"front": pictures}, None, torch.cat([prompt, part], dim=1), None, is_answer)
        for part in (answer, changed)
    )
    differs = (before != after).any(dim=-1).any(dim=0).tolist()
    assert differs == [False] * 11 + [True] * 2


@torch.no_grad()
def test_two_encoders_are_averaged_in_paligemmas_space(
    reference: PaliGemmaForConditionalGeneration, tmp_path: Path, pictures: Tensor
) -> None:
    reference.save_pretrained(tmp_path)
    moge = MogeEncoder(hidden_width=16, depth=2, heads=2, layers=[0, 1], image_size=28)
    vlm = SpearVLM(LANGUAGE, {"moge": moge, "siglip": SiglipEncoder(**SIGLIP)}, weights=str(tmp_path)).eval()
    own_projection = vlm.projections["moge"].weight.clone()
    vlm.load_pretrained()
    assert torch.equal(vlm.projections["moge"].weight, own_projection)
    semantic = reference.get_image_features(pictures / 127.5 - 1).pooler_output
    depth = moge(pictures) @ own_projection.T + vlm.projections["moge"].bias
    found = vlm.encode_images({"front": pictures})["front"]
    torch.testing.assert_close(found, (semantic + depth) / 2, atol=1e-5, rtol=1e-5)


def test_cameras_of_other_sizes_keep_their_own_grids(vla: SpearVLA) -> None:
    images = {
        name: torch.zeros(1, 3, *size, dtype=torch.uint8)
        for name, size in {"external": (210, 280), "wrist": (112, 112)}.items()
    }
    shapes = {camera: tuple(found.shape) for camera, found in vla.vlm.encode_images(images).items()}
    assert shapes == {"external": (1, 300, 32), "wrist": (1, 64, 32)}


def test_an_encoders_own_weights_win_over_paligemmas(
    reference: PaliGemmaForConditionalGeneration, tmp_path: Path, pictures: Tensor
) -> None:
    reference.save_pretrained(tmp_path / "paligemma")
    torch.manual_seed(7)
    other = SiglipEncoder(**SIGLIP)
    other.model.save_pretrained(tmp_path / "siglip")
    siglip = SiglipEncoder(**SIGLIP, weights=str(tmp_path / "siglip"))
    SpearVLM(LANGUAGE, {"siglip": siglip}, weights=str(tmp_path / "paligemma")).load_pretrained()
    assert torch.equal(siglip(pictures), other(pictures))


def test_paligemma_without_siglip_loads_the_language_model_alone(
    reference: PaliGemmaForConditionalGeneration, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path)
    moge = MogeEncoder(hidden_width=16, depth=2, heads=2, layers=[0, 1], image_size=28)
    vlm = SpearVLM(LANGUAGE, {"moge": moge}, weights=str(tmp_path))
    before = {name: value.clone() for name, value in vlm.encoders.state_dict().items()}
    vlm.load_pretrained()
    expected = reference.model.language_model.state_dict()
    found = vlm.language_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(torch.equal(before[name], value) for name, value in vlm.encoders.state_dict().items())


def test_weights_that_do_not_fit_are_refused(reference: PaliGemmaForConditionalGeneration, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    wrong = GemmaShape(width=32, mlp_width=64, depth=3, heads=4, kv_heads=1, head_dim=8, vocab_size=300)
    with pytest.raises(CheckpointError, match=r"(?s)9 of another shape.*\(48, 32\) in the file, \(64, 32\)"):
        SpearVLM(wrong, {"siglip": SiglipEncoder(**SIGLIP)}, weights=str(tmp_path)).load_pretrained()
    impostor = MogeEncoder(hidden_width=16, depth=2, heads=2, layers=[0], image_size=28)
    with pytest.raises(ConfigError, match=r"SiglipEncoder"):
        SpearVLM(LANGUAGE, {"siglip": impostor}, weights=str(tmp_path)).load_pretrained()
    SiglipEncoder(**SIGLIP).model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"not laid out as PaliGemma's"):
        SpearVLM(LANGUAGE, {"siglip": SiglipEncoder(**SIGLIP)}, weights=str(tmp_path)).load_pretrained()


def test_configurations_that_cannot_work(images: dict[str, Tensor], vla: SpearVLA) -> None:
    with pytest.raises(ConfigError, match=r"at least one encoder"):
        SpearVLM(LANGUAGE, {})
    with pytest.raises(ConfigError, match=r"Gemma"):
        GemmaShape(heads=8, kv_heads=3)
    with pytest.raises(ShapeError, match=r"Every camera needs a mask"):
        vla.vlm.embed_prefix(images, {"front": torch.ones(2, dtype=torch.bool)}, tokens(2, 3), None)


def test_the_default_sizes_are_paligemma_3b() -> None:
    with torch.device("meta"):
        vlm = SpearVLM(GemmaShape(), {"siglip": SiglipEncoder()})
    # 2923.47 M with its real sizes (facts on PaliGemma).
    assert round(sum(parameter.numel() for parameter in vlm.parameters()) / 1e4) == 292347
