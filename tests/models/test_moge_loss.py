"""MoGe's objective: the alignment against a linear programme, the terms against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from spear_lightning.models import MogeEncoder
from spear_lightning.models.moge import MogeV1, MogeV2
from spear_lightning.models.moge.alignment import align
from spear_lightning.models.moge.base import MogeOutput
from spear_lightning.models.moge.camera import normalized_intrinsics, unproject
from spear_lightning.models.moge.loss import GeometryLoss, edge_loss, normal_loss


def objective(predicted: Tensor, true: Tensor, weight: Tensor, scale: float, shift: float) -> float:
    moved = scale * predicted.double() + torch.tensor([0.0, 0.0, shift], dtype=torch.float64)
    return float((weight.double()[:, None] * (moved - true.double()).abs()).sum())


@pytest.mark.parametrize("seed", range(6))
def test_the_alignment_is_the_least_sum_of_absolute_differences(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.rand(1, 40, 3, generator=generator) + 0.5
    true = 2.5 * predicted + torch.tensor([0.0, 0.0, 0.7])
    true = true + 0.3 * torch.randn(true.shape, generator=generator) * (
        torch.rand(1, 40, 1, generator=generator) > 0.5
    )
    weight = torch.rand(1, 40, generator=generator) * (torch.rand(1, 40, generator=generator) > 0.2)
    found = align(predicted, true, weight)
    # min sum w e with -e <= s p + t - q <= e, over (s, t, e).
    p, q, w = predicted[0].double().numpy(), true[0].double().numpy(), weight[0].double().numpy()
    columns = np.stack([p.ravel(), np.tile([0.0, 0.0, 1.0], 40)], axis=1)
    upper = np.block([[columns, -np.eye(120)], [-columns, -np.eye(120)]])
    cost = np.concatenate([[0, 0], np.repeat(w, 3)])
    bounds = [(None, None)] * 2 + [(0, None)] * 120
    best = linprog(cost, A_ub=upper, b_ub=np.concatenate([q.ravel(), -q.ravel()]), bounds=bounds)
    ours = objective(predicted[0], true[0], weight[0], found.scale.item(), found.shift.item())
    assert ours == pytest.approx(best.fun, rel=1e-4)


def test_alignment_undoes_scale_and_shift_in_spite_of_outliers_and_holes() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(3, 64, 3, generator=generator) + 1
    scale, shift = torch.tensor([0.2, 1.0, 7.0]), torch.tensor([0.5, -0.3, 0.0])
    predicted = (true - torch.stack([torch.zeros(3)] * 2 + [shift], -1)[:, None]) / scale[:, None, None]
    predicted[:, :8] *= 1.6
    true[:, 60:] = torch.nan
    weight = torch.ones(3, 64)
    weight[:, 60:] = 0
    weight[2] = 0
    # Predictions of any size have their scale.
    predicted[0] *= 1e-12
    found = align(predicted, true, weight)
    torch.testing.assert_close(found.scale, torch.tensor([0.2e12, 1.0, 1.0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.shift, torch.tensor([0.5, -0.3, 0.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.apply(predicted)[:2, 8:60], true[:2, 8:60], rtol=1e-4, atol=1e-4)


def test_points_without_a_positive_scale_are_brought_to_the_right_size() -> None:
    true = torch.rand(1, 30, 3, generator=torch.Generator().manual_seed(0)) + 1
    found = align(-4 * true, true, torch.ones(1, 30))
    assert found.scale.item() == pytest.approx(0.25, rel=0.01)


def scene() -> tuple[Tensor, Tensor]:
    """Points of a slanted wall and a nearer box before it, and where there is something."""
    depth = 1 + 0.3 * torch.linspace(0, 1, 40)[None, None].expand(2, 30, 40).clone()
    depth[:, 10:20, 10:25] = 0.7
    known = torch.ones(2, 30, 40, dtype=torch.bool)
    known[:, :3] = False
    points = unproject(depth, normalized_intrinsics(torch.tensor([1.2, 1.5]), 40 / 30))
    return points, known


def small(version: type) -> MogeV1 | MogeV2:
    encoder = MogeEncoder(hidden_width=16, depth=4, heads=2, layers=[0, 1, 2, 3], image_size=42)
    if version is MogeV1:
        return MogeV1(encoder, 16, (32, 16, 16), 1, 1, 8, (6, 12))
    return MogeV2(encoder, (16, 16, 8, 8, 8), scale_hidden=8, num_tokens_range=(6, 12))


@pytest.mark.parametrize("version", [MogeV1, MogeV2])
def test_the_truth_up_to_scale_and_shift_costs_nothing(version: type) -> None:
    points, known = scene()
    moge = small(version)
    predicted = (points - torch.tensor([0.0, 0.0, 0.2])) / 3
    predicted[:, :3] = 9
    size = sum(predicted[index, 3:, :, 2].log().mean().item() ** 2 for index in range(2)) / 2
    right = known.float() if version is MogeV1 else 40.0 * (2 * known.float() - 1)
    scale = None if version is MogeV1 else torch.full((2,), 3.0)
    losses = GeometryLoss()(moge, MogeOutput(predicted, right, scale), points, known)
    assert losses.pop("size").item() == pytest.approx(size)
    assert losses.pop("total").item() == pytest.approx(0.02 * size, abs=1e-4)
    assert losses.keys() == {"points", "edges", "normals", "mask"} | ({"scale"} if scale is not None else set())
    for name, value in losses.items():
        assert value.item() == pytest.approx(0, abs=1e-4), name
    if scale is not None:
        wrong = GeometryLoss()(moge, MogeOutput(predicted, right, 2 * scale), points, known)
        assert wrong["scale"].item() == pytest.approx(math.log(2), abs=1e-3)


def test_terms_have_their_closed_forms() -> None:
    points, known = scene()
    # A bump of 1 % of the depth on every second column: the alignment cannot take it away.
    bumpy = points.clone()
    bumpy[:, :, ::2] *= 1.02
    losses = GeometryLoss()(small(MogeV1), MogeOutput(bumpy, known.float()), points, known)
    rays = (points / points[..., 2:])[known]
    assert losses["points"].item() == pytest.approx(0.01 * rays.abs().sum(-1).mean().item(), rel=0.25)
    flat = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(9.0), indexing="ij")[::-1], -1)
    flat = torch.cat([flat, torch.full((8, 9, 1), 20.0)], -1)[None]
    # Turned about the y axis by 60 degrees, the normal turns as much.
    turned = flat.clone()
    turned[..., 0], turned[..., 2] = 0.5 * flat[..., 0], 20 + math.sqrt(0.75) * flat[..., 0]
    everywhere = torch.ones(1, 8, 9, dtype=torch.bool)
    assert normal_loss(turned, flat, everywhere).item() == pytest.approx(0.5, abs=1e-5)
    assert edge_loss(3 * flat, flat, everywhere).item() == pytest.approx(2 / 20, rel=1e-5)
    assert edge_loss(3 * flat, flat, ~everywhere).item() == 0


def test_gradients_are_finite_and_reach_every_parameter_that_trains() -> None:
    points, known = scene()
    moge = small(MogeV2)
    images = torch.randint(0, 256, (2, 3, 30, 40), dtype=torch.uint8)
    output = moge(images)
    GeometryLoss()(moge, output, points, known)["total"].backward()
    silent = {name for name, value in moge.named_parameters() if value.grad is None}
    assert {name.split(".")[1] for name in silent} == {"normal_head"}
    assert all(bool(value.grad.isfinite().all()) for value in moge.parameters() if value.grad is not None)
