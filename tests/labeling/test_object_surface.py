"""Surfaces smoothed and continued in the image, against the planes and spheres they were drawn from."""

from __future__ import annotations

import numpy as np
import pytest

from spear_lightning.labeling.object_surface import smooth_surface

ROWS, COLUMNS, FOCAL = 40, 50, 80.0


def rays() -> np.ndarray:
    v, u = np.mgrid[:ROWS, :COLUMNS] + 0.5
    return np.stack([(u - 21.0) / FOCAL, (v - 17.0) / FOCAL, np.ones((ROWS, COLUMNS))], axis=-1)


def wall(normal: tuple[float, float, float], distance: float = 1.0) -> np.ndarray:
    """Points of the plane normal . p = distance that the pixels see."""
    return rays() * (distance / (rays() @ np.array(normal)))[..., None]


def border(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    inner = np.ones_like(mask)
    for row in range(3):
        for column in range(3):
            inner &= padded[row : row + ROWS, column : column + COLUMNS]
    return mask & ~inner


@pytest.mark.parametrize("normal", [(0, 0, 1), (0.5, -0.4, 0.7), (-0.6, 0.1, 0.6)])
@pytest.mark.parametrize("half_window", [2, 3])
def test_planes_stay_planes_and_reach_the_outline(normal: tuple[float, float, float], half_window: int) -> None:
    points = wall(normal)
    mask = np.zeros((ROWS, COLUMNS), bool)
    mask[5:30, 8:40] = True
    mask[5:10, 8:12] = False
    keep = mask & ~border(mask)
    broken = points.copy()
    broken[~keep] = np.nan
    surface, outline = smooth_surface(broken, mask, keep, half_window, reach=1, max_points=ROWS * COLUMNS)
    np.testing.assert_allclose(surface, points[keep], rtol=1e-6)
    # Where every border pixel's point truly is, row by row.
    np.testing.assert_allclose(outline, points[border(mask)], rtol=1e-6)


def test_noise_becomes_small_and_the_outline_does_not_suffer() -> None:
    rng = np.random.default_rng(0)
    points = wall((0.3, -0.5, 0.8))
    mask = np.ones((ROWS, COLUMNS), bool)
    mask[:, :3] = False
    keep = mask & ~border(mask)
    noisy = points + 0.002 * rng.normal(size=points.shape)
    # The border's own points are those of a background.
    noisy[~keep] *= 1.5
    surface, outline = smooth_surface(noisy, mask, keep, 3, reach=1, max_points=ROWS * COLUMNS)
    before = np.linalg.norm((noisy - points)[keep], axis=-1)
    after = np.linalg.norm(surface - points[keep], axis=-1)
    assert np.sqrt((after**2).mean()) < 0.25 * np.sqrt((before**2).mean())
    assert after.max() < 0.4 * before.max()
    assert np.linalg.norm(outline - points[border(mask)], axis=-1).max() < before.max()


def test_edges_between_faces_stay_sharp_without_noise_and_nearly_with() -> None:
    # Two walls that meet in a ridge at 90 degrees: the nearer surface is seen.
    first, second = wall((0.7, 0, 0.7)), wall((-0.7, 0, 0.7))
    points = np.where((first[..., 2] < second[..., 2])[..., None], first, second)
    keep = np.ones((ROWS, COLUMNS), bool)
    surface, outline = smooth_surface(points, keep, keep, 3, reach=1, max_points=ROWS * COLUMNS)
    assert len(outline) == 0
    np.testing.assert_allclose(surface, points[keep], atol=1e-6)
    noisy = points + 0.002 * np.random.default_rng(0).normal(size=points.shape)
    smoothed, _ = smooth_surface(noisy, keep, keep, 3, reach=1, max_points=ROWS * COLUMNS)
    before, after = (
        np.linalg.norm(noisy[keep] - points[keep], axis=-1),
        np.linalg.norm(smoothed - points[keep], axis=-1),
    )
    assert np.sqrt((after**2).mean()) < 0.5 * np.sqrt((before**2).mean())
    assert np.quantile(after, 0.95) < 0.6 * np.quantile(before, 0.95)


def test_what_was_left_out_within_is_no_outline_and_lone_pixels_stay() -> None:
    points = wall((0.2, 0.1, 0.9))
    mask = np.ones((ROWS, COLUMNS), bool)
    keep = np.zeros_like(mask)
    keep[10:20, 10:20] = True
    keep[30, 30] = True
    broken = np.where(keep[..., None], points, 1.5 * points)
    surface, outline = smooth_surface(broken, mask, keep, 3, reach=2, max_points=ROWS * COLUMNS)
    np.testing.assert_allclose(surface, points[keep], rtol=1e-6)
    # The mask's border is farther than two pixels from what was kept.
    assert len(outline) == 0


def test_border_pixels_that_agree_with_their_inside_keep_their_points() -> None:
    # A box edge that goes away steeply within the last pixels, and a background that shines through elsewhere.
    points = wall((0.1, 0.2, 0.9))
    mask = np.zeros((ROWS, COLUMNS), bool)
    mask[10:30, 10:40] = True
    keep = mask & ~border(mask)
    seen = points * 1.0
    seen[:20][border(mask)[:20]] *= 1.004
    seen[20:][border(mask)[20:]] *= 1.2
    surface, outline = smooth_surface(seen, mask, keep, 2, reach=1, max_points=ROWS * COLUMNS)
    upper = border(mask) & (np.arange(ROWS) < 20)[:, None]
    assert len(surface) == (keep | upper).sum()
    np.testing.assert_allclose(outline, points[border(mask) & ~upper], rtol=1e-2)


def test_large_surfaces_are_thinned_but_for_their_border() -> None:
    points = wall((0.2, 0.1, 0.9))
    mask = np.ones((ROWS, COLUMNS), bool)
    mask[0] = False
    keep = mask & ~border(mask)
    surface, outline = smooth_surface(np.where(keep[..., None], points, np.nan), mask, keep, 3, 1, max_points=150)
    rim = keep & border(keep)
    assert rim.sum() + 75 <= len(surface) <= rim.sum() + 150
    nearest = np.linalg.norm(points[rim][:, None] - surface, axis=-1).min(1)
    np.testing.assert_allclose(nearest, 0, atol=1e-9)
    np.testing.assert_allclose(outline, points[border(mask)], rtol=1e-6)
