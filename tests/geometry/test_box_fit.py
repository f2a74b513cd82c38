"""Boxes fitted to points of known boxes: whole, seen from one side, noisy, degenerate; and outlier removal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from spear_lightning.errors import DataError
from spear_lightning.geometry import quaternions
from spear_lightning.geometry.box_fit import MAX_HULL, _candidates, _hull, _hull_of_many, fit_box
from spear_lightning.geometry.box_iou import box_iou
from spear_lightning.geometry.oriented_boxes import OrientedBox
from spear_lightning.geometry.outliers import SAMPLED, SLANTED, inliers

EXTENTS = torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)


def surface(seed: int, faces: int, count: int = 3000, noise: float = 0.0) -> tuple[OrientedBox, np.ndarray]:
    """A box in a random pose, and points on its first faces (three of one corner, then the other three)."""
    generator = torch.Generator().manual_seed(seed)
    rotation = quaternions.random_unit((), generator, dtype=torch.float64)
    box = OrientedBox(torch.tensor([0.1, -0.2, 1.0], dtype=torch.float64), rotation, EXTENTS)
    local = torch.rand((count, 3), generator=generator, dtype=torch.float64) - 0.5
    face = torch.randint(faces, (count,), generator=generator)
    local[torch.arange(count), face % 3] = torch.where(face < 3, 0.5, -0.5).double()
    points = box.centre + (local * EXTENTS) @ box.axes.T
    return box, (points + noise * torch.randn((count, 3), generator=generator, dtype=torch.float64)).numpy()


def agreement(found: OrientedBox, true: OrientedBox) -> float:
    first, second = (
        OrientedBox(*(part[None] for part in (b.centre, b.quaternion, b.extents))) for b in (found, true)
    )
    return box_iou(first, second).item()


@pytest.mark.parametrize(("faces", "noise", "least"), [(6, 0, 0.99), (3, 0, 0.99), (2, 0, 0.98), (3, 0.001, 0.88)])
def test_boxes_are_recovered_from_the_faces_that_are_seen(faces: int, noise: float, least: float) -> None:
    for seed in range(8):
        box, points = surface(seed, faces, noise=noise)
        found = fit_box(points)
        assert agreement(found, box) > least
        # Canonical, and the same label as the true box has, but for boxes near a tie.
        torch.testing.assert_close(found.canonical().vertices(), found.vertices())
        assert found.contains(torch.from_numpy(points), margin=1e-9).all()


def test_no_larger_than_trimesh() -> None:
    trimesh = pytest.importorskip("trimesh")
    for seed in range(5):
        points = surface(seed, 3)[1] + 0.02 * np.random.default_rng(seed).normal(size=(3000, 3))
        volume = fit_box(points).volume.item()
        assert volume < 1.05 * float(np.prod(trimesh.bounds.oriented_bounds(points)[1]))


def test_the_same_object_gets_the_same_label_under_noise() -> None:
    # A box, a cube and a cylinder stand 0.8 m before a camera that looks 40 degrees down; yaw 15 degrees off.
    pitch = quaternions.from_rotvec(torch.tensor([math.radians(40), 0, 0], dtype=torch.float64))
    yaw = quaternions.from_rotvec(torch.tensor([0, math.radians(15), 0], dtype=torch.float64))
    axes = quaternions.to_matrix(quaternions.multiply(pitch, yaw)).numpy()
    rng = np.random.default_rng(0)
    cube = rng.uniform(-0.5, 0.5, (2000, 3))
    cube[np.arange(2000), rng.integers(0, 3, 2000)] = -0.5
    angle = rng.uniform(0, 2 * np.pi, 2000)
    cylinder = np.stack([np.cos(angle) / 2, rng.uniform(-0.5, 0.5, 2000), np.sin(angle) / 2], axis=-1)
    for shape, size in ((cube, (0.12, 0.06, 0.08)), (cube, (0.08, 0.08, 0.08)), (cylinder, (0.08, 0.1, 0.08))):
        clean = (shape * size) @ axes.T + [0.0, 0.0, 0.8]
        reference = fit_box(clean).vertices()
        for _ in range(6):
            noisy = fit_box(clean + 0.001 * rng.normal(size=clean.shape)).vertices()
            shift = torch.linalg.vector_norm(noisy - reference, dim=-1).max().item()
            # A swapped pair of vertices would be at least an edge apart.
            assert shift < 0.5 * min(size)


@pytest.mark.parametrize(
    ("points", "extents"),
    [
        ([[0, 0, 1], [1, 0, 1], [0, 2, 1], [1, 2, 1], [0.5, 0.5, 1]], [0.01, 1, 2]),
        ([[0, 0, 1], [1, 1, 1], [2, 2, 1], [3, 3, 1]], [0.01, 0.01, math.sqrt(18)]),
        ([[1, 1, 1]] * 5, [0.01, 0.01, 0.01]),
    ],
)
def test_flat_straight_and_single_points_get_the_least_extent(
    points: list[list[float]], extents: list[float]
) -> None:
    box = fit_box(np.array(points), min_extent=0.01)
    torch.testing.assert_close(
        box.extents.sort().values, torch.tensor(extents, dtype=torch.float64), atol=2e-4, rtol=1e-3
    )
    middle = (np.min(points, 0) + np.max(points, 0)) / 2
    torch.testing.assert_close(box.centre, torch.from_numpy(middle), atol=1e-3, rtol=0)


def test_smooth_shapes_with_huge_hulls() -> None:
    points = np.random.default_rng(0).normal(size=(10_000, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    box = fit_box(points * [0.1, 0.1, 0.2])
    torch.testing.assert_close(
        box.extents.sort().values, torch.tensor([0.2, 0.2, 0.4], dtype=torch.float64), rtol=0.01, atol=0
    )


def test_too_few_or_infinite_points_are_refused() -> None:
    with pytest.raises(DataError, match="3 points"):
        fit_box(np.zeros((3, 3)))
    broken = np.random.default_rng(0).normal(size=(100, 3))
    broken[3] = np.inf
    with pytest.raises(DataError, match="1 of them not finite"):
        fit_box(broken)


def in_cloud(points: np.ndarray) -> np.ndarray:
    """The inliers of points that lie in no image's order."""
    return inliers(points[None], np.ones((1, len(points)), bool))[0]


def test_outliers_go_and_a_noisy_slanted_surface_stays() -> None:
    box, points = surface(0, 3, count=4000, noise=0.001)
    rng = np.random.default_rng(0)
    points[:20] = np.array([0, 0, 3]) + rng.uniform(-2, 2, (20, 3))
    keep = in_cloud(points)
    assert not keep[:20].any()
    assert keep[20:].mean() > 0.995
    assert agreement(fit_box(points[keep]), box) > 0.85
    assert fit_box(points).volume.item() > 100 * EXTENTS.prod().item()
    # Spacing that grows with depth, as in a point map, is not taken for outliers.
    u, v = np.meshgrid(np.linspace(-0.5, 0.5, 80), np.linspace(0.1, 0.5, 80))
    depth = 0.5 / v
    assert inliers(np.stack([u * depth, v * depth, depth], axis=-1), np.ones(u.shape, bool)).mean() > 0.99


def test_there_may_be_more_neighbours_than_pixels_around_one() -> None:
    v, u = np.mgrid[:40, :50] / 100
    points = np.stack([u, v, np.ones_like(u)], axis=-1)
    points[20, 25, 2] = 4.0
    kept = inliers(points, np.ones(u.shape, bool), neighbours=100)
    assert np.flatnonzero(~kept).tolist() == [20 * 50 + 25]


def test_the_shortcut_past_the_neighbour_search_changes_no_answer() -> None:
    from scipy.spatial.distance import cdist

    v, u = np.mgrid[:40, :50] / 100
    known = np.ones(u.shape, bool)
    known[:9, :30] = known[20:, 40:49] = False
    places = np.flatnonzero(known)
    rows, columns = np.divmod(places, 50)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        depth = 1 + 0.5 * v + 0.1 * np.sin(20 * u) + 0.002 * rng.normal(size=u.shape)
        points = np.stack([u * depth, v * depth, depth], axis=-1)
        wild = rng.choice(places, 60, replace=False)
        points.reshape(-1, 3)[wild] += rng.normal(size=(60, 3)) * rng.uniform(0.01, 0.3, (60, 1))
        distances = cdist(points[known], points[known])
        spacing = np.log(np.sort(distances, axis=1)[:, 1:17].mean(1))
        # What is usual: a sample's nearest of those within four pixels.
        sample = np.linspace(0, len(places) - 1, SAMPLED).astype(int)
        far = (np.abs(rows - rows[sample, None]) > 4) | (np.abs(columns - columns[sample, None]) > 4)
        usual = np.log(np.sort(np.where(far, np.inf, distances[sample]), axis=1)[:, 1:17].mean(1))
        middle = np.median(usual)
        spread = 1.4826 * np.median(np.abs(usual - middle))
        expected = spacing <= middle + max(4.0 * spread, math.log(SLANTED))
        found = inliers(points, known)
        np.testing.assert_array_equal(found[known], expected)
        assert not found[~known].any()
        assert 5 < (~expected).sum() < 60


def test_the_smallest_of_all_boxes_on_faces_is_among_those_looked_at() -> None:
    from scipy.spatial import ConvexHull

    for seed in range(4):
        rng = np.random.default_rng(seed)
        points = rng.normal(size=(40, 3)) * [3, 2, 1]
        axes, extents = _candidates(_hull(points, 0.0), 0.0)
        np.testing.assert_allclose(np.ptp(np.einsum("ni,mij->mnj", points, axes), axis=1), extents, rtol=1e-9)
        # Every face with every edge of the hull, on its outline or not.
        hull = ConvexHull(points)
        smallest = math.inf
        for normal in hull.equations[:, :3]:
            for first, second in ((0, 1), (1, 2), (2, 0)):
                along = points[hull.simplices[:, first]] - points[hull.simplices[:, second]]
                along = along - (along @ normal)[:, None] * normal
                along = along[np.linalg.norm(along, axis=1) > 1e-9]
                along /= np.linalg.norm(along, axis=1)[:, None]
                across = np.cross(normal, along)
                areas = np.ptp(points @ along.T, axis=0) * np.ptp(points @ across.T, axis=0)
                smallest = min(smallest, float(areas.min() * np.ptp(points @ normal)))
        assert extents.prod(-1).min() == pytest.approx(smallest, rel=1e-9)


def test_a_thinned_cloud_has_the_hull_of_all() -> None:
    from scipy.spatial import ConvexHull

    for seed in range(4):
        points = surface(seed, 3, count=3000, noise=0.0005)[1]
        points = points - points.mean(0)
        expected = ConvexHull(points)
        assert 20 < len(expected.vertices) <= MAX_HULL
        # But for points that stick out by less than a hundred thousandth.
        assert _hull_of_many(points).volume == pytest.approx(expected.volume, rel=1e-4)


def test_few_points_are_kept() -> None:
    _, points = surface(1, 3, count=5000)
    assert in_cloud(points[:10]).all()
    assert in_cloud(points[:18]).mean() > 0.5


def test_a_side_seen_at_a_grazing_angle_is_no_outlier() -> None:
    # A densely seen top, and a side with a sixth of its points per area.
    rng = np.random.default_rng(0)
    top = rng.uniform(-0.5, 0.5, (3000, 3)) * [0.1, 0.0, 0.1]
    side = rng.uniform(-0.5, 0.5, (500, 3)) * [0.1, 0.1, 0.0] + np.array([0.0, 0.05, -0.05])
    keep = in_cloud(np.concatenate([top, side]))
    assert keep[:3000].mean() > 0.999
    assert keep[3000:].mean() > 0.95
