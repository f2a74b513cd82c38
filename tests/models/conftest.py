"""Small networks and inputs for the tests of the models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spear_lightning.models import (
    ActionExpert,
    GemmaShape,
    MogeEncoder,
    SiglipEncoder,
    SpearVLA,
    SpearVLM,
)

# What several tests compare with (`moge_reference.py`); pytest's import mode leaves test folders out of the path.
sys.path.insert(0, str(Path(__file__).parent))


def small_siglip() -> SiglipEncoder:
    return SiglipEncoder(width=16, depth=2, heads=2, mlp_width=24, image_size=56)


def small_moge() -> MogeEncoder:
    return MogeEncoder(hidden_width=16, depth=3, heads=2, layers=[0, 1], image_size=70)


@pytest.fixture
def make_vla() -> Callable[[], SpearVLA]:
    """Makes a SPEAR-1 with both encoders; every call gives the same weights."""

    def make() -> SpearVLA:
        torch.manual_seed(0)
        shape = GemmaShape(width=32, mlp_width=48, depth=3, heads=4, kv_heads=2, head_dim=8, vocab_size=300)
        vlm = SpearVLM(shape, {"siglip": small_siglip(), "moge": small_moge()})
        expert = ActionExpert(width=24, mlp_width=40, depth=3, heads=2, kv_heads=2, head_dim=8)
        return SpearVLA(vlm, expert)

    return make


@pytest.fixture
def vla(make_vla: Callable[[], SpearVLA]) -> SpearVLA:
    return make_vla()


@pytest.fixture
def images() -> dict[str, Tensor]:
    """Two samples of two cameras of different size: 3 x 4 and 2 x 2 patches."""
    generator = torch.Generator().manual_seed(1)

    def picture(height: int, width: int) -> Tensor:
        return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)

    return {"front": picture(42, 56), "wrist": picture(28, 28)}


@pytest.fixture
def image_mask() -> dict[str, Tensor]:
    return {"front": torch.tensor([True, True]), "wrist": torch.tensor([True, False])}


@pytest.fixture
def text() -> tuple[Tensor, Tensor]:
    """Token ids (2, 6) and their mask; the first prompt has 4 tokens, the second 6."""
    input_ids = torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(2))
    return input_ids, torch.tensor([[True] * 4 + [False] * 2, [True] * 6])


@pytest.fixture
def flow_point() -> tuple[Tensor, Tensor, Tensor]:
    """State (2, 8), noisy actions (2, 5, 8) and flow time (2,)."""
    generator = torch.Generator().manual_seed(3)
    state, noisy = torch.randn(2, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    return state, noisy, torch.tensor([0.3, 0.9])
