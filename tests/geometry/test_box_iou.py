"""Intersections of boxes against closed forms, Monte Carlo and scipy's half-space intersection."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import ConvexHull, HalfspaceIntersection

from spear_lightning.geometry import quaternions
from spear_lightning.geometry.box_iou import box_iou, intersection_volume
from spear_lightning.geometry.oriented_boxes import OrientedBox


def random_boxes(count: int, seed: int, spread: float = 0.3) -> OrientedBox:
    generator = torch.Generator().manual_seed(seed)
    return OrientedBox(
        spread * torch.randn((count, 3), generator=generator, dtype=torch.float64),
        quaternions.random_unit((count,), generator, dtype=torch.float64),
        torch.rand((count, 3), generator=generator, dtype=torch.float64) + 0.1,
    )


def straight(centres: list[list[float]], extents: list[list[float]], yaw: float = 0.0) -> OrientedBox:
    rotation = quaternions.from_rotvec(torch.tensor([0.0, yaw, 0.0], dtype=torch.float64))
    return OrientedBox(
        torch.tensor(centres, dtype=torch.float64),
        rotation.expand(len(centres), 4),
        torch.tensor(extents, dtype=torch.float64),
    )


def test_closed_forms() -> None:
    unit = straight([[0, 0, 0]] * 6, [[1, 1, 1]] * 6)
    other = straight(
        [[0, 0, 0], [0.5, 0, 0], [1, 0, 0], [3, 0, 0], [0, 0, 0], [0.5, 0.5, 0.5]],
        [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [0.5, 0.5, 2], [1, 1, 1]],
    )
    expected = torch.tensor([1, 1 / 3, 0, 0, 0.25 / 1.25, 0.125 / 1.875], dtype=torch.float64)
    torch.testing.assert_close(box_iou(unit, other), expected, atol=1e-7, rtol=1e-7)
    # A square turned by 45 degrees cuts a regular octagon of area 2 (sqrt(2) - 1) out of itself.
    turned = straight([[0, 0, 0]], [[1, 1, 1]], math.pi / 4)
    octagon = 2 * (math.sqrt(2) - 1)
    found = intersection_volume(straight([[0, 0, 0]], [[1, 1, 1]]), turned)
    assert found.item() == pytest.approx(octagon, rel=1e-7)


def test_against_the_vertices_of_the_half_space_intersection() -> None:
    first, second = random_boxes(60, 0, 0.15), random_boxes(60, 1, 0.15)
    found = intersection_volume(first, second)
    checked = 0
    for index in range(60):
        faces = []
        for box in (first, second):
            axes = box.axes[index].numpy()
            for axis in range(3):
                for sign in (1, -1):
                    normal = sign * axes[:, axis]
                    offset = float(box.centre[index].numpy() @ normal) + float(box.extents[index, axis]) / 2
                    faces.append([*normal, -offset])
        # A point inside both, found by sampling; pairs that hardly touch are left to Monte Carlo.
        generator = torch.Generator().manual_seed(index)
        local = torch.rand((20_000, 3), generator=generator, dtype=torch.float64) - 0.5
        points = first.centre[index] + (local * first.extents[index]) @ first.axes[index].T
        other = OrientedBox(second.centre[index], second.quaternion[index], second.extents[index])
        inside = other.contains(points)
        if inside.sum() < 20:
            continue
        vertices = HalfspaceIntersection(np.array(faces), points[inside].mean(0).numpy()).intersections
        assert float(found[index]) == pytest.approx(ConvexHull(vertices).volume, rel=1e-6)
        checked += 1
    assert checked > 40


def test_against_monte_carlo() -> None:
    first, second = random_boxes(100, 2), random_boxes(100, 3)
    generator = torch.Generator().manual_seed(4)
    local = torch.rand((100, 20_000, 3), generator=generator, dtype=torch.float64) - 0.5
    points = first.centre.unsqueeze(1) + (local * first.extents.unsqueeze(1)) @ first.axes.transpose(-1, -2)
    share = second.contains(points).double().mean(-1)
    found = intersection_volume(first, second) / first.volume
    assert (share - found).abs().max() < 4.5 * math.sqrt(0.25 / 20_000)
    assert (found == 0).sum() > 10


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_symmetric_invariant_and_one_for_itself(seed: int, scale: float) -> None:
    first, second = random_boxes(8, seed), random_boxes(8, seed + 1)
    iou = box_iou(first, second)
    torch.testing.assert_close(box_iou(second, first), iou, atol=1e-7, rtol=1e-6)
    turn = quaternions.random_unit((8,), torch.Generator().manual_seed(seed), dtype=torch.float64)

    def moved(box: OrientedBox) -> OrientedBox:
        centre = scale * (quaternions.rotate(turn, box.centre) + 5.0)
        return OrientedBox(centre, quaternions.multiply(turn, box.quaternion), scale * box.extents)

    torch.testing.assert_close(box_iou(moved(first), moved(second)), iou, atol=1e-7, rtol=1e-6)
    same = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(box_iou(first, first.canonical()), same, atol=1e-7, rtol=0)


def test_nearly_parallel_faces_and_flat_boxes() -> None:
    cube = straight([[0, 0, 0]], [[1, 1, 1]])
    for angle in (1e-3, 1e-5, 1e-7, 1e-9, 1e-11, 1e-13, 1e-15):
        # Two squares turned by a small angle share 1 - angle / 2, to first order.
        turned = straight([[0, 0, 0]], [[1, 1, 1]], angle)
        found = intersection_volume(cube, turned).item()
        assert found == pytest.approx(1 - angle / 2, abs=angle**2 + 1e-7)
    flat = straight([[0, 0, 0]], [[1, 0, 1]])
    assert box_iou(flat, flat).item() == 0
    assert box_iou(cube, flat).item() == 0
    nothing = OrientedBox(torch.zeros(0, 3), torch.zeros(0, 4), torch.zeros(0, 3))
    assert box_iou(nothing, nothing).shape == (0,)


def test_faces_that_coincide_up_to_float32_rounding() -> None:
    # A box fitted to the seen part of another shares faces with it, up to the rounding of stored numbers.
    outer = random_boxes(300, 7)
    shrunk = outer.extents * (0.6 + 0.4 * torch.rand((300, 3), generator=torch.Generator().manual_seed(8)))
    shift = quaternions.rotate(outer.quaternion, (outer.extents - shrunk) / 2)
    for noise in (0.0, 1e-8, 1e-7):
        generator = torch.Generator().manual_seed(9)
        turn = noise * torch.randn((300, 3), generator=generator, dtype=torch.float64)
        rotation = quaternions.multiply(quaternions.from_rotvec(turn), outer.quaternion)
        inner = OrientedBox(outer.centre + shift, rotation, shrunk)
        stored = [
            OrientedBox(box.centre.float(), box.quaternion.float(), box.extents.float()) for box in (outer, inner)
        ]
        expected = (shrunk / outer.extents).prod(-1)
        torch.testing.assert_close(box_iou(stored[0], stored[1]), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(box_iou(stored[1], stored[0]), expected, atol=1e-5, rtol=0)
