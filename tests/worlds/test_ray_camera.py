"""Rendered geometry against closed forms of the shapes, mj_ray pixel by pixel, and the intrinsics."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.worlds.tabletop.coverage import CoverageGrid
from spear_lightning.worlds.tabletop.ray_camera import CameraPose, RayCamera, RayCaster
from spear_lightning.worlds.tabletop.scene import look_at

CAMERA = PixelIntrinsics(90.0, 95.0, 50.5, 40.0, width=112, height=84)

SHAPES = {
    "box": "0.2 0.3 0.1",
    "sphere": "0.2",
    "cylinder": "0.15 0.3",
    "ellipsoid": "0.3 0.2 0.1",
    "capsule": "0.12 0.2",
}


def see(model: mujoco.MjModel, pose: CameraPose, hidden: tuple[int, ...] = ()) -> tuple:
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return data, RayCamera(model, CAMERA, hidden).see(data, pose)


def pose_towards(position: np.ndarray, target: np.ndarray) -> CameraPose:
    return CameraPose(position, look_at(position, target, np.array([0.0, 0.3, 1.0])))


def off_surface(shape: str, size: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Distance of points (N, 3) in the geom's frame from its surface; to first order for the ellipsoid."""
    if shape == "box":
        return np.abs((np.abs(p) - size).max(1))
    if shape == "sphere":
        return np.abs(np.linalg.norm(p, axis=1) - size[0])
    if shape == "cylinder":
        return np.abs(np.maximum(np.hypot(p[:, 0], p[:, 1]) - size[0], np.abs(p[:, 2]) - size[1]))
    if shape == "capsule":
        beyond = p - np.stack([0 * p[:, 0], 0 * p[:, 0], p[:, 2].clip(-size[1], size[1])], 1)
        return np.abs(np.linalg.norm(beyond, axis=1) - size[0])
    level = np.square(p / size).sum(1) - 1
    return np.abs(level) / np.linalg.norm(2 * p / size**2, axis=1)


def outward(shape: str, size: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Unit normals of points on the surface, in the geom's frame."""
    if shape == "box":
        face = np.abs(np.abs(p) - size).argmin(1)
        normal = np.eye(3)[face] * np.sign(p)
    elif shape == "cylinder":
        top = np.abs(np.abs(p[:, 2]) - size[1]) < np.abs(np.hypot(p[:, 0], p[:, 1]) - size[0])
        normal = np.where(top[:, None], p * [0, 0, 1], p * [1, 1, 0])
    elif shape == "capsule":
        normal = p - np.stack([0 * p[:, 0], 0 * p[:, 0], p[:, 2].clip(-size[1], size[1])], 1)
    else:
        normal = p / (size**2 if shape == "ellipsoid" else 1)
    return normal / np.linalg.norm(normal, axis=1, keepdims=True)


@pytest.mark.parametrize("collides", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_points_and_normals_are_those_of_the_shape(shape: str, collides: int) -> None:
    rng = np.random.default_rng(len(shape))
    for joint in ("", "<freejoint/>"):
        quaternion = " ".join(map(str, rng.normal(size=4)))
        model = mujoco.MjModel.from_xml_string(
            f'<mujoco><worldbody><body pos="0.1 -0.2 0.3" quat="{quaternion}">{joint}'
            f'<geom type="{shape}" size="{SHAPES[shape]}" contype="{collides}" conaffinity="{collides}"/>'
            f'<geom type="sphere" size="0.01" pos="0 0 0.9"/></body></worldbody></mujoco>'
        )
        direction = rng.normal(size=3)
        position = model.body_pos[1] + 1.2 * direction / np.linalg.norm(direction)
        pose = pose_towards(position, model.body_pos[1])
        data, image = see(model, pose)
        seen = image.geom_HW == 0
        assert 200 < seen.sum() < seen.size
        world = image.points_HW3[seen].astype(np.float64) @ pose.rotation.T + pose.position_m
        axes = data.geom_xmat[0].reshape(3, 3)
        local = (world - data.geom_xpos[0]) @ axes
        size = model.geom_size[0]
        assert off_surface(shape, size, local).max() < 1e-5
        normal = image.normals_HW3[seen]
        # Points within rounding of an edge may be given the normal of either side.
        wrong = np.abs(normal @ axes - outward(shape, size, local)).max(1) > 1e-3
        assert wrong.mean() < 0.01
        assert ((world - pose.position_m) * normal).sum(1).max() < 1e-6
        np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-5)


CLUTTER = """
<mujoco><worldbody>
  <geom name="floor" type="plane" size="1 1 1" pos="0 0 -0.4"/>
  <geom name="table" type="box" size="0.5 0.5 0.02" pos="0 0 -0.02"/>
  <geom name="picture" type="box" size="2 2 0.02" pos="0 0 -0.3" contype="0" conaffinity="0"/>
  <geom name="ghost" type="sphere" size="0.2" pos="0 0 0.2" group="4"/>
  <body name="free" pos="0.1 0.1 0.1" quat="0.3 0.5 0.1 0.8"><freejoint/>
    <geom type="box" size="0.05 0.03 0.1"/>
    <geom type="capsule" size="0.02 0.3" pos="0 0 0.4" contype="0" conaffinity="0"/></body>
  <body name="pushed" mocap="true" pos="-0.2 0.1 0.2"><geom type="ellipsoid" size="0.1 0.05 0.03"/></body>
  <body name="hinged" pos="-0.1 -0.2 0.1" euler="20 40 0"><joint/><geom type="cylinder" size="0.05 0.1"/>
    <body pos="0.2 0 0"><geom type="box" size="0.1 0.01 0.02" contype="0" conaffinity="0"/></body></body>
  <geom type="sphere" size="0.05" rgba="1 0 0 0" pos="0.2 -0.2 0.1"/>
</worldbody></mujoco>
"""


@pytest.mark.parametrize("position", [(0.9, 0.3, 0.5), (-0.5, -0.8, 0.2), (1e-9, 0.0, 0.9), (0.2, 0.2, 0.05)])
@pytest.mark.parametrize("hidden", [(), (4,)])
def test_every_pixel_sees_what_mj_ray_sees(position: tuple[float, ...], hidden: tuple[int, ...]) -> None:
    model = mujoco.MjModel.from_xml_string(CLUTTER)
    pose = pose_towards(np.array(position), np.zeros(3))
    data, image = see(model, pose, hidden)
    groups = np.array([group not in hidden for group in range(6)], np.uint8)
    pixels = torch.tensor([[u + 0.5, v + 0.5] for v in range(84) for u in range(112)], dtype=torch.float64)
    rays = CAMERA.unproject(pixels, torch.ones(len(pixels), dtype=torch.float64)).numpy() @ pose.rotation.T
    expected, distances, geom = np.empty(len(rays), int), np.empty(len(rays)), np.zeros(1, np.int32)
    for number, ray in enumerate(rays):
        distances[number] = mujoco.mj_ray(model, data, pose.position_m, ray, groups, 1, -1, geom, None)
        expected[number] = geom[0]
    np.testing.assert_array_equal(image.geom_HW.ravel(), expected)
    np.testing.assert_array_equal(image.hit_HW.ravel(), expected >= 0)
    assert len(np.unique(expected)) > 4
    np.testing.assert_allclose(
        image.depth_HW.ravel(), np.where(expected >= 0, distances, np.inf), rtol=1e-6, atol=1e-6
    )


def test_points_project_to_their_pixels_and_follow_from_depth() -> None:
    model = mujoco.MjModel.from_xml_string(CLUTTER)
    _, image = see(model, pose_towards(np.array([0.6, 0.5, 0.4]), np.array([0.0, 0.0, 0.1])))
    rows, columns = np.nonzero(image.hit_HW)
    centres = torch.from_numpy(np.stack([columns, rows], 1) + 0.5)
    points = torch.from_numpy(image.points_HW3[image.hit_HW]).double()
    assert (CAMERA.project(points) - centres).abs().max() < 1e-4
    depth = torch.from_numpy(image.depth_HW[image.hit_HW]).double()
    assert (CAMERA.unproject(centres, depth) - points).abs().max() < 1e-6
    assert {array.dtype for array in (image.depth_HW, image.points_HW3, image.normals_HW3)} == {np.dtype("f4")}


def test_where_nothing_is_there_is_nothing() -> None:
    model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><geom size="0.1"/></worldbody></mujoco>')
    _, image = see(model, pose_towards(np.array([1.0, 0.0, 0.0]), np.zeros(3)))
    nothing = ~image.hit_HW
    assert 0 < nothing.sum() < nothing.size
    assert (image.geom_HW[nothing] == -1).all()
    assert np.isposinf(image.depth_HW[nothing]).all()
    assert np.isposinf(image.points_HW3[nothing]).all()
    assert (image.normals_HW3[nothing] == 0).all()


def test_a_part_of_a_scene_can_be_looked_at_alone() -> None:
    model = mujoco.MjModel.from_xml_string(CLUTTER)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    rays = np.random.default_rng(0).normal(size=(4000, 3)) * [1, 1, 0.3] - [0, 0, 1]
    chosen = model.body("hinged").geomadr[0]
    hits = RayCaster(model, only=[chosen]).cast(data, np.array([-0.1, -0.2, 0.6]), rays)
    assert set(hits.geom_N.tolist()) == {-1, int(chosen)}


def test_spheres_hold_everything_that_moves() -> None:
    model = mujoco.MjModel.from_xml_string(CLUTTER)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    centres, radii = RayCaster(model).moving_spheres(data)
    _, image = see(model, pose := pose_towards(np.array([0.7, 0.4, 0.5]), np.array([0.0, 0.0, 0.2])))
    moving = [geom for geom in range(model.ngeom) if model.body(model.geom_bodyid[geom]).name or geom > 8]
    seen = np.isin(image.geom_HW, [g for g in moving if model.geom_bodyid[g] != 0])
    points = image.points_HW3[seen] @ pose.rotation.T + pose.position_m
    assert len(points) > 300
    inside = np.linalg.norm(points[:, None] - centres, axis=-1) <= radii + 1e-5
    assert inside.any(1).all()


finite = st.floats(-1.0, 1.0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(finite, finite, st.floats(-0.5, 2), st.floats(0.001, 0.5)), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_coverage_is_never_too_small(spheres: list[tuple[float, ...]], seed: int) -> None:
    grid = CoverageGrid(PixelIntrinsics(20.0, 25.0, 15.0, 17.0, 30, 40))
    array = np.array(spheres)
    covered = grid.covered(array[:, :3], array[:, 3])
    rng = np.random.default_rng(seed)
    inside = rng.normal(size=(200, 3))
    inside /= np.linalg.norm(inside, axis=1, keepdims=True)
    chosen = rng.integers(len(array), size=200)
    points = array[chosen, :3] + array[chosen, 3:] * inside * rng.uniform(0, 1, (200, 1)) ** 0.1
    assert covered[grid.cells(points.T)].all()


def test_coverage_of_a_small_sphere_is_small() -> None:
    grid = CoverageGrid(PixelIntrinsics(100.0, 100.0, 50.0, 50.0, 100, 100))
    covered = grid.covered(np.array([[0.1, -0.2, 1.0]]), np.array([0.05]))
    # It is seen between tangents 0.1 +- about 0.05 to the right of the axis, and 0.2 +- 0.05 above it.
    rows, columns = np.nonzero(covered[:-1].reshape(100, 100))
    assert (columns.min(), columns.max()) == (54, 65)
    assert (rows.min(), rows.max()) == (24, 35)
    assert not covered[grid.behind]
