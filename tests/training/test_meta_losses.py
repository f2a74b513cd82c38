"""The losses of a step need no values: on the meta device nothing has any, and only text comes from CPU memory.

A value that is read back would make the process wait for a GPU, and so would a tensor that is made in CPU memory.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spear_lightning.batches import RobotBatch, VqaBatch
from spear_lightning.flow import ActionFlow
from spear_lightning.models import (
    ActionExpert,
    GemmaShape,
    MogeEncoder,
    PromptTokenizer,
    SiglipEncoder,
    SpearVLA,
    SpearVLM,
)
from spear_lightning.policy import Answerer, Policy

CAMERAS = {"primary": (42, 56), "wrist": (28, 28)}


class CopiesFromCpu(TorchDispatchMode):
    """Notes the sizes of tensors in CPU memory that a result on the meta device depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if _is_on("cpu", leaf)]
        if sizes and any(_is_on("meta", leaf) for leaf in tree_leaves(result)):
            self.found.append((str(func), sizes))
        return result


def _is_on(device: str, leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == device


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    # The meta device knows none.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def network(packed: bool) -> SpearVLM:
    siglip = SiglipEncoder(width=16, depth=2, heads=2, mlp_width=24, image_size=56)
    moge = MogeEncoder(hidden_width=16, depth=2, heads=2, layers=[0, 1], image_size=70)
    return SpearVLM(GemmaShape(32, 48, 2, 4, 1, 8, 2048, 16), {"siglip": siglip, "moge": moge}, packed=packed)


def pictures() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    images = {name: torch.zeros((2, 3, *size), dtype=torch.uint8) for name, size in CAMERAS.items()}
    return images, {"primary": torch.ones(2, dtype=torch.bool), "wrist": torch.tensor([True, False])}


@pytest.mark.parametrize("packed", [True, False])
def test_a_policys_losses_take_nothing_but_the_text_from_cpu_memory(packed: bool) -> None:
    expert = ActionExpert(width=24, mlp_width=40, depth=2, heads=4, kv_heads=1, head_dim=8)
    policy = Policy(SpearVLA(network(packed), expert), ActionFlow(), PromptTokenizer(max_length=12))
    policy.normalizer.set_identity()
    images, image_mask = pictures()
    batch = RobotBatch(
        images=images,
        image_mask=image_mask,
        instructions=["push", "pull it"],
        state=torch.zeros(2, 8),
        actions=torch.zeros(2, 5, 8),
        action_mask=torch.ones(2, 5, dtype=torch.bool),
        dataset=torch.zeros(2, dtype=torch.int64),
        position=torch.zeros(2, dtype=torch.int64),
    ).to("meta")
    policy = policy.to("meta")
    with CopiesFromCpu() as copies:
        policy.losses(batch, None, flow_samples=2)["total"].backward()  # type: ignore[arg-type]
    # Ids and mask, which a GPU gets from page-locked memory.
    assert copies.found == [("aten._to_copy.default", [(2, 12)])] * 2


@pytest.mark.parametrize("packed", [True, False])
def test_an_answerers_losses_take_nothing_from_cpu_memory(packed: bool) -> None:
    answerer = Answerer(network(packed), PromptTokenizer(max_length=12))
    images, image_mask = pictures()
    token_mask = torch.arange(9) < torch.tensor([[9], [6]])
    answer_mask = token_mask & (torch.arange(9) >= 4)
    batch = VqaBatch(
        images=images,
        image_mask=image_mask,
        input_ids=torch.full((2, 9), 5),
        token_mask=token_mask,
        answer_mask=answer_mask,
        answer_places=answer_mask.flatten().nonzero()[:, 0],
        coordinate_mask=answer_mask,
        questions=[""] * 2,
        answers=[""] * 2,
        asked=[[], []],
        clamped=torch.zeros(2, dtype=torch.int64),
        unit=torch.ones(2),
        metric=torch.ones(2, dtype=torch.bool),
        intrinsics=torch.ones(2, 4),
        dataset=torch.zeros(2, dtype=torch.int64),
        position=torch.zeros(2, dtype=torch.int64),
    ).to("meta")
    answerer = answerer.to("meta")
    with CopiesFromCpu() as copies:
        losses, _ = answerer.losses(batch)
        losses.mean().backward()
    assert copies.found == []


def test_what_comes_from_cpu_memory_is_found_and_values_cannot_be_read() -> None:
    values = torch.ones(3, device="meta")
    with CopiesFromCpu() as copies:
        _ = values * torch.tensor(2.0)
        _ = torch.arange(3).to("meta") + values
    assert [sizes for _, sizes in copies.found] == [[()], [(3,)]]
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((values > 0).any())
