"""The network against transformers' PI0 on the same weights, with an absent camera and padded text."""

from __future__ import annotations

import torch
from paligemma_reference import IMAGE_TOKEN, SIGLIP, SIGLIP_CONFIG
from torch import Tensor
from transformers import PI0Config, PI0ForConditionalGeneration

from spear_lightning.models import ActionExpert, GemmaShape, SiglipEncoder, SpearVLA, SpearVLM

HORIZON, IMAGE_TOKENS = 3, 4


def pi0() -> PI0ForConditionalGeneration:
    gemma = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    text = {"model_type": "gemma", "hidden_size": 32, "intermediate_size": 48, "vocab_size": 300, **gemma}
    vlm = {
        "model_type": "paligemma",
        "text_config": text,
        "vision_config": SIGLIP_CONFIG,
        "projection_dim": 32,
        "hidden_size": 32,
        "image_token_index": IMAGE_TOKEN,
        "image_token_id": IMAGE_TOKEN,
    }
    expert = {"model_type": "gemma", "hidden_size": 24, "intermediate_size": 40, **gemma}
    config = PI0Config(vlm_config=vlm, dit_config=expert, chunk_size=HORIZON, max_state_dim=8, max_action_dim=8)
    torch.manual_seed(0)
    model = PI0ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def spear_like(reference: PI0ForConditionalGeneration) -> SpearVLA:
    """SPEAR-1 with SigLIP alone, carrying PI0's weights."""
    gemma = {"depth": 3, "heads": 4, "kv_heads": 2, "head_dim": 8}
    siglip = SiglipEncoder(**SIGLIP)
    vlm = SpearVLM(GemmaShape(width=32, mlp_width=48, vocab_size=300, **gemma), {"siglip": siglip})
    expert = ActionExpert(width=24, mlp_width=40, **gemma)
    source = reference.model.vlm
    vlm.language_model.load_state_dict(source.language_model.state_dict())
    siglip.model.load_state_dict(source.vision_tower.state_dict())
    vlm.projections["siglip"].load_state_dict(source.multi_modal_projector.linear.state_dict())
    blocks = {
        name: value for name, value in reference.model.dit.state_dict().items() if "embed_tokens" not in name
    }
    expert.transformer.load_state_dict(blocks)
    embedding = reference.embed_action_time
    expert.state_in.load_state_dict(embedding.state_proj.state_dict())
    expert.action_in.load_state_dict(embedding.action_in_proj.state_dict())
    expert.action_time_in.load_state_dict(embedding.action_time_mlp_in.state_dict())
    expert.action_time_out.load_state_dict(embedding.action_time_mlp_out.state_dict())
    expert.action_out.load_state_dict(reference.action_out_proj.state_dict())
    return SpearVLA(vlm, expert).eval()


def pi0_prompts(input_ids: Tensor, text_mask: Tensor, cameras: Tensor) -> tuple[Tensor, Tensor]:
    """PI0's ids and mask: a sample has image tokens for its own cameras alone, padding comes last."""
    rows = []
    for ids, mask, present in zip(input_ids, text_mask, cameras, strict=True):
        images = torch.full((int(present.sum()) * IMAGE_TOKENS,), IMAGE_TOKEN)
        rows.append(torch.cat([images, ids[mask]]))
    length = max(map(len, rows))
    padded = torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=7) for row in rows])
    return padded, torch.stack([(torch.arange(length) < len(row)).long() for row in rows])


@torch.no_grad()
def test_velocities_equal_pi0(text: tuple[Tensor, Tensor]) -> None:
    reference = pi0()
    vla = spear_like(reference)
    generator = torch.Generator().manual_seed(5)
    pictures = torch.randint(0, 256, (2, 2, 3, 28, 28), dtype=torch.uint8, generator=generator)
    cameras = torch.tensor([[True, True], [False, True]])
    input_ids, text_mask = text[0] % IMAGE_TOKEN, text[1]
    state = torch.randn(2, 8, generator=generator)
    noisy = torch.randn(2, HORIZON, 8, generator=generator)
    tau = torch.tensor([0.25, 0.8])
    pi0_ids, pi0_mask = pi0_prompts(input_ids, text_mask, cameras)
    expected = reference(
        state=state,
        noise=noisy,
        timestep=tau,
        input_ids=pi0_ids,
        attention_mask=pi0_mask,
        pixel_values=pictures / 127.5 - 1,
        pixel_attention_mask=cameras,
    ).logits
    images = {"front": pictures[:, 0], "wrist": pictures[:, 1]}
    image_mask = {"front": cameras[:, 0], "wrist": cameras[:, 1]}
    found = vla.velocity(vla.encode_prefix(images, image_mask, input_ids, text_mask), state, noisy, tau)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
