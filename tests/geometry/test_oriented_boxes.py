"""The canonical order of boxes: unique, stable under noise, mirrored by flips; and boxes from vertices."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spear_lightning.errors import ShapeError
from spear_lightning.geometry import quaternions
from spear_lightning.geometry.oriented_boxes import (
    MIRRORED_VERTEX,
    VERTEX_SIGNS,
    OrientedBox,
    box_from_vertices,
    canonical_axes,
)

seeds = st.integers(0, 2**32 - 1)


def random_boxes(count: int, seed: int) -> OrientedBox:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn((count, 3), generator=generator, dtype=torch.float64)
    rotation = quaternions.random_unit((count,), generator, dtype=torch.float64)
    return OrientedBox(centre, rotation, torch.rand((count, 3), generator=generator, dtype=torch.float64) + 0.05)


def proper_relabellings() -> list[Tensor]:
    """The 24 matrices that map axes onto axes without mirroring."""
    matrices = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            matrix = torch.zeros(3, 3, dtype=torch.float64)
            for column, row in enumerate(order):
                matrix[row, column] = signs[column]
            if torch.linalg.det(matrix) > 0:
                matrices.append(matrix)
    return matrices


def turned(angles: Tensor, axis: int) -> Tensor:
    vectors = torch.zeros(len(angles), 3, dtype=torch.float64)
    vectors[:, axis] = angles
    return quaternions.to_matrix(quaternions.from_rotvec(vectors))


def test_all_24_frames_of_a_box_have_one_canonical_form() -> None:
    box = random_boxes(200, 0)
    expected = box.canonical()
    assert len(proper_relabellings()) == 24
    for matrix in proper_relabellings():
        rotated = quaternions.from_matrix(box.axes @ matrix)
        other = OrientedBox(box.centre, rotated, box.extents @ matrix.abs())
        # The set of vertices is the same before, their order is the same after.
        assert torch.cdist(other.vertices(), box.vertices()).amin(-1).max() < 1e-12
        torch.testing.assert_close(other.canonical().vertices(), expected.vertices())
        torch.testing.assert_close(other.canonical().extents, expected.extents)
    torch.testing.assert_close(torch.linalg.det(expected.axes), torch.ones(200, dtype=torch.float64))


def test_a_box_on_a_table_has_the_documented_vertices() -> None:
    # A camera that looks 30 degrees down at a box 0.4 wide, 0.2 high and 0.3 deep whose front faces it.
    pitch = math.radians(30)
    down = torch.tensor([0.0, math.cos(pitch), math.sin(pitch)])
    away = torch.tensor([0.0, -math.sin(pitch), math.cos(pitch)])
    axes = torch.stack([away, -torch.tensor([1.0, 0.0, 0.0]), -down], dim=-1)
    axes[:, 1] *= torch.linalg.det(axes)
    written = OrientedBox(
        torch.tensor([0.0, 0.0, 1.0]), quaternions.from_matrix(axes), torch.tensor([0.3, 0.4, 0.2])
    )
    box = written.canonical()
    torch.testing.assert_close(box.extents, torch.tensor([0.4, 0.2, 0.3]))
    vertices = box.vertices()
    assert ((vertices[:, 0] > 0) == torch.tensor([False, True] * 4)).all()
    height = vertices @ down
    assert ((height > height.mean()) == torch.tensor([False, False, True, True] * 2)).all()
    depth = vertices @ away
    assert ((depth > depth.mean()) == torch.tensor([False] * 4 + [True] * 4)).all()


@given(seeds)
def test_flipping_the_image_exchanges_left_and_right_vertices_alone(seed: int) -> None:
    box = random_boxes(20, seed).canonical()
    mirrored_points = box.vertices() * torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
    mirrored = box.mirrored()
    torch.testing.assert_close(mirrored.vertices(), mirrored_points[:, list(MIRRORED_VERTEX)])
    torch.testing.assert_close(mirrored.canonical().vertices(), mirrored.vertices())


def changed_share(axes: Tensor, noise_degrees: float, seed: int) -> float:
    """Share of orientations whose canonical frame jumps when the box is turned by random noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(axes), 3), generator=generator, dtype=torch.float64) * math.radians(noise_degrees)
    moved = quaternions.to_matrix(quaternions.from_rotvec(noise)) @ axes
    before, after = (quaternions.from_matrix(canonical_axes(part)) for part in (axes, moved))
    return float((quaternions.rotation_angle(before, after) > math.radians(30)).double().mean())


def standing(count: int, seed: int, roll_spread: float = 5.0) -> tuple[Tensor, Tensor]:
    """Boxes that stand on a table: normal roll, pitch 10 to 75, any yaw; returns axes and yaw in degrees."""
    generator = torch.Generator().manual_seed(seed)
    roll = torch.randn(count, generator=generator, dtype=torch.float64) * roll_spread
    pitch = torch.rand(count, generator=generator, dtype=torch.float64) * 65 + 10
    yaw = torch.rand(count, generator=generator, dtype=torch.float64) * 360
    turn = math.pi / 180
    return turned(roll * turn, 2) @ turned(pitch * turn, 0) @ turned(yaw * turn, 1), yaw


def test_noise_keeps_the_order_of_boxes_away_from_ties() -> None:
    axes, yaw = standing(20_000, 0, roll_spread=0)
    # 45 degrees of yaw (and every 90 further) is the tie; 10 degrees from it, one degree of noise changes nothing.
    off_tie = (yaw % 90 - 45).abs() > 10
    assert changed_share(axes[off_tie], 1.0, 1) == 0
    # Over all yaws, the least possible: E|one degree of normal noise| / 90 degrees = 0.0089.
    for roll_spread in (0, 5):
        axes, _ = standing(20_000, 0, roll_spread)
        assert changed_share(axes, 1.0, 1) == pytest.approx(math.sqrt(2 / math.pi) / 90, rel=0.25)


def test_how_often_ties_are_met_by_random_orientations() -> None:
    uniform = quaternions.to_matrix(
        quaternions.random_unit((20_000,), torch.Generator().manual_seed(2), dtype=torch.float64)
    )
    assert 0.015 < changed_share(uniform, 1.0, 3) < 0.035


@pytest.mark.parametrize("extents", [(0.05, 0.05, 0.05), (0.1, 0.1, 0.3)])
def test_equal_extents_do_not_matter(extents: tuple[float, float, float]) -> None:
    axes, yaw = standing(500, 4)
    axes = axes[(yaw % 90 - 45).abs() > 10]
    box = OrientedBox(
        torch.zeros(len(axes), 3, dtype=torch.float64),
        quaternions.from_matrix(axes),
        torch.tensor(extents, dtype=torch.float64).expand(len(axes), 3),
    )
    generator = torch.Generator().manual_seed(5)
    noisy_extents = box.extents * (1 + 0.05 * torch.randn(box.extents.shape, generator=generator))
    turn = torch.randn((len(axes), 3), generator=generator, dtype=torch.float64) * math.radians(1)
    noisy = OrientedBox(
        box.centre, quaternions.multiply(quaternions.from_rotvec(turn), box.quaternion), noisy_extents
    )
    shift = torch.linalg.vector_norm(noisy.canonical().vertices() - box.canonical().vertices(), dim=-1)
    assert shift.max() < 0.4 * min(extents)


@given(seeds)
def test_vertices_describe_their_box(seed: int) -> None:
    box = random_boxes(10, seed).canonical()
    rebuilt, residual = box_from_vertices(box.vertices())
    torch.testing.assert_close(rebuilt.vertices(), box.vertices())
    torch.testing.assert_close(rebuilt.extents, box.extents)
    assert residual.max() < 1e-12


def test_vertices_that_are_no_box_have_a_residual_and_still_give_a_proper_frame() -> None:
    box = random_boxes(50, 0).canonical()
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn((50, 8, 3), generator=generator, dtype=torch.float64)
    rebuilt, residual = box_from_vertices(box.vertices() + noise)
    # 24 numbers of noise, 9 of which the box can follow.
    assert residual.square().mean().sqrt().item() == pytest.approx(0.01 * math.sqrt(3 * 15 / 24), rel=0.1)
    assert (rebuilt.centre - box.centre).abs().max() < 0.02
    mirrored, residual = box_from_vertices(box.vertices()[:, list(MIRRORED_VERTEX)])
    torch.testing.assert_close(torch.linalg.det(mirrored.axes), torch.ones(50, dtype=torch.float64))
    assert residual.min() > 0.01


def test_containment_is_that_of_the_vertices() -> None:
    box = random_boxes(20, 1)
    inwards = box.centre.unsqueeze(-2) + 0.999 * (box.vertices() - box.centre.unsqueeze(-2))
    outwards = box.centre.unsqueeze(-2) + 1.001 * (box.vertices() - box.centre.unsqueeze(-2))
    assert box.contains(inwards).all()
    assert not box.contains(outwards).any()
    assert box.contains(outwards, margin=0.01).all()


def test_shapes_are_checked() -> None:
    assert len(set(VERTEX_SIGNS)) == 8
    with pytest.raises(ShapeError, match="three extents"):
        OrientedBox(torch.zeros(3), torch.zeros(4), torch.zeros(2))
