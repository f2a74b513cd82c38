"""Shift and focal length recovered from synthetic cameras; scipy, image by image, is the reference under noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares
from torch import Tensor

from spear_lightning.models.moge.camera import (
    focal_from_widths,
    normalized_intrinsics,
    recover_camera,
    unproject,
)

SIZES = [(210, 280), (480, 640), (112, 112), (640, 480)]
"""Height and width of four aspect ratios: 4:3 small and large, square, 3:4; 16:9 besides below."""


def seen(
    size: tuple[int, int], focal_x: Tensor, shift: Tensor, scale: float = 1.0, noise: float = 0.0, seed: int = 0
) -> Tensor:
    """Points of wavy walls before pinhole cameras (focal lengths in widths), written down pixel by pixel."""
    height, width = size
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[:height, :width] + 0.5
    maps = []
    for focal, offset in zip(focal_x.tolist(), shift.tolist(), strict=True):
        f_pixels = focal * width
        waves = rng.uniform(1, 8, 2)
        depth = 1.5 + 0.5 * np.sin(waves[0] * u / width) * np.cos(waves[1] * v / height)
        depth = depth * (1 + (u > width / 3) * 0.7)
        points = np.stack([(u - width / 2) / f_pixels * depth, (v - height / 2) / f_pixels * depth, depth], -1)
        points[..., 2] -= offset
        maps.append(scale * points * (1 + noise * rng.normal(size=points.shape)))
    return torch.from_numpy(np.stack(maps)).float()


@pytest.mark.parametrize("size", [*SIZES, (1080, 1920)])
def test_cameras_are_recovered(size: tuple[int, int]) -> None:
    focal, shift = torch.tensor([0.45, 0.8, 1.6, 3.0]), torch.tensor([0.6, -0.3, 0.0, 0.9])
    height, width = size
    mask = torch.rand(4, height, width, generator=torch.Generator().manual_seed(0)) > 0.3
    found = recover_camera(seen(size, focal, shift, scale=3.0), mask)
    assert found.found.all()
    torch.testing.assert_close(found.shift / 3, shift, atol=1e-4, rtol=0)
    intrinsics = normalized_intrinsics(found.focal, width / height)
    torch.testing.assert_close(intrinsics[:, 0], focal, atol=1e-4, rtol=0)
    # Square pixels.
    torch.testing.assert_close(intrinsics[:, 1] * height, focal * width, atol=0, rtol=1e-4)
    torch.testing.assert_close(focal_from_widths(focal, width / height), found.focal, atol=0, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    size=st.sampled_from([(28, 42), (60, 45), (33, 33), (40, 90)]),
    focal=st.floats(0.35, 4),
    shift=st.floats(-0.8, 0.95),
    scale=st.floats(0.01, 100),
    seed=st.integers(0, 1000),
)
def test_any_camera_is_recovered(
    size: tuple[int, int], focal: float, shift: float, scale: float, seed: int
) -> None:
    points = seen(size, torch.tensor([focal]), torch.tensor([shift]), scale, seed=seed)
    found = recover_camera(points, torch.ones(1, *size, dtype=torch.bool))
    assert found.shift.item() / scale == pytest.approx(shift, abs=2e-4)
    assert normalized_intrinsics(found.focal, size[1] / size[0])[0, 0].item() == pytest.approx(focal, rel=2e-4)


def reference(points: np.ndarray, mask: np.ndarray, focal: float | None) -> tuple[np.ndarray, np.ndarray, object]:
    """Residuals of the published objective on the 64 x 64 nearest points, and scipy's best of three starts."""
    height, width = mask.shape
    rows, columns = np.arange(64) * height // 64, np.arange(64) * width // 64
    diagonal = math.hypot(height, width) / 2
    v, u = np.meshgrid(rows + 0.5 - height / 2, columns + 0.5 - width / 2, indexing="ij")
    chosen = mask[rows][:, columns]
    xyz = points[rows][:, columns][chosen].astype(np.float64)
    plane = np.stack([u, v], -1)[chosen] / diagonal

    def residual(shift: np.ndarray) -> np.ndarray:
        p = xyz[:, :2] / (xyz[:, 2:] + shift)
        f = (p * plane).sum() / (p * p).sum() if focal is None else focal
        return (f * p - plane).ravel()

    starts = [least_squares(residual, x0=x0, method="lm", ftol=1e-12, xtol=1e-12) for x0 in (0.0, 0.3, 0.6)]
    return residual, min(starts, key=lambda result: result.cost), starts


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("size", [(112, 112), (210, 280)])
def test_noisy_points_give_the_least_error(size: tuple[int, int], known: bool) -> None:
    focal, shift = torch.tensor([0.6, 1.2, 2.0]), torch.tensor([0.5, 0.1, 0.3])
    points = seen(size, focal, shift, noise=0.05)
    mask = torch.rand(3, *size, generator=torch.Generator().manual_seed(1)) > 0.2
    half_diagonals = focal_from_widths(focal, size[1] / size[0])
    found = recover_camera(points, mask, half_diagonals if known else None)
    for index in range(3):
        given_focal = half_diagonals[index].item() if known else None
        residual, best, _ = reference(points[index].numpy(), mask[index].numpy(), given_focal)
        ours = 0.5 * float((residual(found.shift[index].double().numpy()) ** 2).sum())
        assert ours <= best.cost * (1 + 1e-6)
        if best.cost < ours * (1 + 1e-6):
            assert found.shift[index].item() == pytest.approx(float(best.x[0]), abs=1e-4)


def test_known_and_unknown_focal_lengths_share_a_batch() -> None:
    focal, shift = torch.tensor([0.8, 1.1]), torch.tensor([0.4, 0.2])
    points, mask = seen((84, 112), focal, shift), torch.ones(2, 84, 112, dtype=torch.bool)
    wrong = focal_from_widths(torch.tensor([1.0]), 112 / 84).item()
    found = recover_camera(points, mask, torch.tensor([wrong, math.nan]))
    assert found.focal[0].item() == pytest.approx(wrong)
    assert found.shift[1].item() == pytest.approx(0.2, abs=1e-4)


def test_images_without_geometry_are_told_apart() -> None:
    points = seen((56, 56), torch.tensor([0.8, 0.8, 0.8]), torch.tensor([0.4, 0.4, 0.4]))
    mask = torch.ones(3, 56, 56, dtype=torch.bool)
    mask[0] = False
    points[1, :, :28] = torch.inf
    points[2] = torch.nan
    found = recover_camera(points, mask)
    assert found.found.tolist() == [False, True, False]
    assert found.shift.tolist() == pytest.approx([0, 0.4, 0], abs=1e-4)
    assert found.focal[[0, 2]].tolist() == [1, 1]


def test_depth_and_camera_give_the_points_back() -> None:
    points = seen((42, 70), torch.tensor([0.7, 1.3]), torch.zeros(2))
    intrinsics = normalized_intrinsics(focal_from_widths(torch.tensor([0.7, 1.3]), 70 / 42), 70 / 42)
    torch.testing.assert_close(unproject(points[..., 2], intrinsics), points, atol=1e-5, rtol=1e-5)
