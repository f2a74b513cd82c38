"""Muon for matrices of blocks: against torch's own Muon and AdamW, and what it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spear_lightning.errors import ConfigError
from spear_lightning.training import MuonRecipe
from spear_lightning.training.freeze_plan import Component
from spear_lightning.training.muon import MuonAdamW, orthogonalized


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)) for _ in range(2))
    return nn.ModuleDict({"enter": nn.Linear(5, 12), "blocks": blocks, "leave": nn.Linear(12, 3)})


def groups_of(model: nn.Module, recipe: MuonRecipe) -> list[dict[str, Any]]:
    component = Component("all", None, 0, dict(model.named_parameters()))
    return recipe.groups([component])


def test_steps_are_those_of_torchs_muon_and_adamw() -> None:
    model, twin = network(), network()
    recipe = MuonRecipe(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    optimizer = recipe.optimizer(groups_of(model, recipe))
    named = dict(twin.named_parameters())
    hidden = [name for name in named if name.startswith("blocks") and name.endswith("weight")]
    outer = [name for name in named if name not in hidden]
    muon = torch.optim.Muon(
        [named[name] for name in hidden], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    decays = [0.1 if named[name].ndim > 1 else 0.0 for name in outer]
    adamw = torch.optim.AdamW(
        [{"params": [named[name]], "weight_decay": decay} for name, decay in zip(outer, decays, strict=True)],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            other.grad = parameter.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        # Orthogonalising is done in bfloat16, whose products depend on how matrices are stacked.
        tolerance = 2e-4 if name in hidden else 1e-7
        assert torch.allclose(parameter, other, atol=tolerance), name
        assert not torch.allclose(parameter, network().get_parameter(name), atol=5 * tolerance), name


def test_singular_values_become_about_one() -> None:
    matrices = (
        torch.randn(3, 16, 40, dtype=torch.float64) * torch.logspace(-1, 1, 16, dtype=torch.float64)[:, None]
    )
    for given in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalized(given).double())
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_matrices_of_blocks_alone_are_muons() -> None:
    groups = groups_of(network(), MuonRecipe(lr=1e-3))
    assert [(group["name"], group.get("muon", False), len(group["params"])) for group in groups] == [
        ("all/muon", True, 4),
        ("all", False, 2),
        ("all/no_decay", False, 6),
    ]


def test_the_state_can_be_saved_and_continued() -> None:
    recipe = MuonRecipe(lr=1e-2)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            value = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
            hidden = model["enter"](value)  # type: ignore[index, operator]
            for block in model["blocks"]:  # type: ignore[index, union-attr]
                hidden = hidden + block(hidden)
            model["leave"](hidden).square().sum().backward()  # type: ignore[index, operator]
            optimizer.step()

    whole, first = network(), network()
    run(whole, recipe.optimizer(groups_of(whole, recipe)), range(6))
    optimizer = recipe.optimizer(groups_of(first, recipe))
    run(first, optimizer, range(3))
    second = network()
    second.load_state_dict(first.state_dict())
    resumed = recipe.optimizer(groups_of(second, recipe))
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, range(3, 6))
    assert isinstance(resumed, MuonAdamW)
    for parameter, expected in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_a_momentum_of_one_never_learns() -> None:
    with pytest.raises(ConfigError, match="momentum"):
        MuonRecipe(momentum=1.0)
