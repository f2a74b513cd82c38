"""What `train_step.py` times: the networks at full size, and one batch for each, with random values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

INSTRUCTION = "pick up the mug.  "
"""18 bytes: with bos and newline 20 tokens, as a byte tokenizer counts."""

QUESTION_TOKENS, ANSWER_TOKENS, TEXT_TOKENS = 64, 100, 192
"""Four pairs about an image, and what they are padded to."""


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        compiled: Whether blocks are compiled.
        packed: Whether the model is packed.
        float8: Recipe of products in 8 bits of Gemma and SigLIP.
        whole_mlps: Whether their MLPs are one step each then.
        moge: Whether MoGe is there.
        cameras: Camera name -> height and width.
        wrist_share: Share of samples that have the second camera.
        multiple: Of the number of text tokens; otherwise there are 48.
        one_pass: Whether clipping and AdamW are one pass over memory.
    """

    compiled: bool = True
    packed: bool = True
    float8: str | None = None
    whole_mlps: bool = True
    moge: bool = True
    cameras: dict[str, tuple[int, int]] = field(
        default_factory=lambda: {"primary": (210, 280), "wrist": (112, 112)}
    )
    wrist_share: float = 1.0
    multiple: int | None = None
    one_pass: bool = True


LIKE_PI0 = {"primary": (224, 224), "wrist": (224, 224)}
CONTENDERS = {
    "spear": Contender(),
    "eager": Contender(compiled=False),
    "torch-adamw": Contender(one_pass=False),
    "padded": Contender(packed=False),
    "trimmed": Contender(packed=False, multiple=8),
    "float8": Contender(float8="tensorwise"),
    "float8-torch-adamw": Contender(float8="tensorwise", one_pass=False),
    "float8-layers": Contender(float8="tensorwise", whole_mlps=False),
    "float8-trimmed": Contender(packed=False, multiple=8, float8="tensorwise"),
    "float8-rowwise": Contender(float8="rowwise"),
    "float8-rowwise-gw": Contender(float8="rowwise_with_gw_hp"),
    "half-absent": Contender(wrist_share=0.5),
    "half-absent-padded": Contender(wrist_share=0.5, packed=False),
    "spear-as-pi0": Contender(moge=False, cameras=LIKE_PI0),
}


def build_vlm(contender: Contender, small: bool, new_tokens: int) -> nn.Module:
    """Return the network of SPEAR-VLM, with random weights."""
    from spear_lightning.models import GemmaShape, MogeEncoder, SiglipEncoder, SpearVLM

    if small:
        shape = GemmaShape(64, 128, 2, 4, 1, 32, 2048, new_tokens)
        encoders: dict[str, Any] = {"siglip": SiglipEncoder(width=32, depth=2, heads=2, mlp_width=48)}
        if contender.moge:
            encoders["moge"] = MogeEncoder(hidden_width=32, depth=4, heads=2, layers=range(4))
    else:
        shape = GemmaShape(2048, 16384, 18, 8, 1, 256, 257216, new_tokens)
        encoders = {"siglip": SiglipEncoder()}
        if contender.moge:
            encoders["moge"] = MogeEncoder()
    return SpearVLM(shape, encoders, packed=contender.packed)


def vla_step(contender: Contender, batch: int, small: bool, device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return the network and a function that computes a loss; MoGe is frozen, as in the paper."""
    from spear_lightning.batches import RobotBatch
    from spear_lightning.flow import ActionFlow
    from spear_lightning.models import ActionExpert, PromptTokenizer, SpearVLA
    from spear_lightning.policy import ActionNormalizer, Policy

    expert = ActionExpert(width=32, mlp_width=48, depth=2, heads=4, kv_heads=1, head_dim=32) if small else None
    with torch.device(device):
        vla = SpearVLA(build_vlm(contender, small, 0), expert or ActionExpert())
    normalizer = ActionNormalizer()
    normalizer.fit([-1] * 3, [1] * 3, [-1] * 3, [1] * 3)
    prompt = PromptTokenizer(tokenizer="byte", max_length=48, multiple=contender.multiple)
    policy = Policy(vla, ActionFlow(), prompt, normalizer).to(device)
    freeze(vla, vla.unused_parameters())
    pose = torch.tensor([0.1, 0.1, 0.1, 0, 0, 0, 1, 1])
    present = torch.arange(batch) % 100 < 100 * contender.wrist_share
    robot_batch = RobotBatch(
        images=random_images(contender, batch),
        image_mask={"primary": torch.ones(batch, dtype=torch.bool), "wrist": present},
        instructions=[INSTRUCTION] * batch,
        state=pose.expand(batch, 8).clone(),
        actions=pose.expand(batch, 5, 8).clone(),
        action_mask=torch.ones(batch, 5, dtype=torch.bool),
        dataset=torch.zeros(batch, dtype=torch.int64),
        position=torch.arange(batch),
    ).to(device)
    generator = torch.Generator(device).manual_seed(0)
    return vla, lambda: policy.losses(robot_batch, generator)["total"]


def vlm_step(contender: Contender, batch: int, small: bool, device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return the network and a function that computes a loss; all of it trains, as in the paper's stage 1b."""
    from spear_lightning.batches import VqaBatch
    from spear_lightning.models import PromptTokenizer
    from spear_lightning.policy import Answerer

    new_tokens = 16 if small else 1024
    prompt = PromptTokenizer(tokenizer="byte", max_length=48)
    with torch.device(device):
        vlm = build_vlm(contender, small, new_tokens)
        answerer = Answerer(vlm, prompt)
    place_L = torch.arange(TEXT_TOKENS)
    token_mask = (place_L < QUESTION_TOKENS + ANSWER_TOKENS).expand(batch, -1)
    answer_mask = token_mask & (place_L >= QUESTION_TOKENS)
    images = {"primary": random_images(contender, batch)["primary"]}
    first = vlm.language.vocab_size
    ids = torch.where(answer_mask, first + place_L % new_tokens, 3 + place_L % 250)
    vqa_batch = VqaBatch(
        images=images,
        image_mask={"primary": torch.ones(batch, dtype=torch.bool)},
        input_ids=ids.clone(),
        token_mask=token_mask.clone(),
        answer_mask=answer_mask.clone(),
        answer_places=answer_mask.flatten().nonzero()[:, 0],
        coordinate_mask=answer_mask.clone(),
        questions=[""] * batch,
        answers=[""] * batch,
        asked=[[] for _ in range(batch)],
        clamped=torch.zeros(batch, dtype=torch.int64),
        unit=torch.ones(batch),
        metric=torch.ones(batch, dtype=torch.bool),
        intrinsics=torch.ones(batch, 4),
        dataset=torch.zeros(batch, dtype=torch.int64),
        position=torch.arange(batch),
    ).to(device)
    return vlm, lambda: answerer.losses(vqa_batch)[0].mean()


def pi0_step(batch: int, small: bool, device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return transformers' PI0 in bfloat16, compiled as a whole, and a function that computes its loss."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    config = PI0Config(chunk_size=5, max_state_dim=8, max_action_dim=8)
    if small:
        gemma = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
        vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        text = {"model_type": "gemma", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 2048, **gemma}
        vlm = {
            "model_type": "paligemma",
            "text_config": text,
            "vision_config": {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 14, **vision},
            "projection_dim": 64,
            "hidden_size": 64,
            "image_token_id": 2047,
        }
        expert = {"model_type": "gemma", "hidden_size": 32, "intermediate_size": 48, **gemma}
        config = PI0Config(vlm_config=vlm, dit_config=expert, chunk_size=5, max_state_dim=8, max_action_dim=8)
    with torch.device(device):
        model = PI0ForConditionalGeneration(config)
    model = model.to(torch.bfloat16).train()
    image_token = config.vlm_config.image_token_id
    cameras = len(LIKE_PI0)
    ids = torch.cat([torch.full((cameras * 256,), image_token), torch.arange(3, 23)]).expand(batch, -1)
    inputs = {
        "pixel_values": torch.rand(batch, cameras, 3, 224, 224, device=device).bfloat16() * 2 - 1,
        "pixel_attention_mask": torch.ones(batch, cameras, dtype=torch.bool, device=device),
        "input_ids": ids.to(device),
        "attention_mask": torch.ones(batch, ids.shape[1], dtype=torch.int64, device=device),
        "state": torch.randn(batch, 8, device=device).bfloat16(),
        "actions": torch.randn(batch, 5, 8, device=device).bfloat16(),
    }
    compiled = torch.compile(model) if device == "cuda" else model
    return model, lambda: compiled(**inputs).loss.mean()


def freeze(network: nn.Module, unused: list[str]) -> None:
    """Freeze what the loss does not reach, and MoGe."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in unused and ".moge" not in name.rsplit("projections", 1)[0])


def random_images(contender: Contender, batch: int) -> dict[str, Tensor]:
    """Return camera name -> uint8 (B, 3, H, W)."""
    return {
        name: torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
        for name, size in contender.cameras.items()
    }
