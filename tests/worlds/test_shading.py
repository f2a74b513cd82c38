"""Pictures: a shadow and a brightness in closed form, the same picture by different ways, noise, colours."""

from __future__ import annotations

from dataclasses import replace

import mujoco
import numpy as np
import pytest

from spear_lightning.errors import ShapeError, SpearError
from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.worlds.tabletop.egl_camera import EglRenderer
from spear_lightning.worlds.tabletop.experts import Expert
from spear_lightning.worlds.tabletop.patterns import Pattern, pattern_weights
from spear_lightning.worlds.tabletop.ray_camera import CameraPose, RayCamera
from spear_lightning.worlds.tabletop.ray_renderer import RayRenderer
from spear_lightning.worlds.tabletop.scene import look_at, object_name
from spear_lightning.worlds.tabletop.shading import SKY_LIGHT, Look, SensorNoise
from spear_lightning.worlds.tabletop.world import Tabletop

SIZES = {"primary": (112, 84), "secondary": (56, 56), "wrist": (56, 56)}
CAMERA = PixelIntrinsics(100.0, 100.0, 70.0, 50.0, width=140, height=100)

BALL = """
<mujoco><worldbody>
  <geom name="ground" type="{ground}" size="3 3 0.1" pos="0 0 {height}" rgba="0.6 0.5 0.4 1"/>
  <body pos="0 0 0.5">{joint}<geom name="ball" size="0.2" rgba="0.9 0.2 0.1 1"/></body>
</worldbody></mujoco>
"""


def state(model: mujoco.MjModel) -> mujoco.MjData:
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return data


def towards(position: tuple[float, float, float], target: tuple[float, float, float] = (0, 0, 0)) -> CameraPose:
    start = np.array(position)
    return CameraPose(start, look_at(start, np.array(target), np.array([0, 0, 1.0])))


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("joint", ["", "<freejoint/>"])
@pytest.mark.parametrize(("ground", "height"), [("plane", 0.0), ("box", -0.1)])
def test_shadow_and_brightness_under_a_ball(ground: str, height: float, joint: str, pictures: int) -> None:
    model = mujoco.MjModel.from_xml_string(BALL.format(ground=ground, height=height, joint=joint))
    light = np.array([0.0, 0.0, 2.0])
    look = replace(Look.plain(model), light_position_m=light, specular=np.zeros(2))
    data, pose = state(model), towards((1.5, 0.2, 1.0))
    renderer = RayRenderer(model, look, {"c": CAMERA})
    for _ in range(pictures):
        picture = renderer.render(data, {"c": pose})["c"]
    image = RayCamera(model, CAMERA).see(data, pose)
    on_ground = image.geom_HW == 0
    points = image.points_HW3[on_ground] @ pose.rotation.T + pose.position_m
    radius = np.hypot(points[:, 0], points[:, 1])
    # The cone from the light around the ball has the half angle asin(0.2 / 1.5) and meets the ground 2 below.
    umbra = 2 * np.tan(np.arcsin(0.2 / 1.5))
    inside, outside = radius < umbra - 1e-4, (radius > umbra + 1e-4) & (radius < 3)
    assert inside.sum() > 100
    assert outside.sum() > 1000
    cosine = 2 / np.sqrt(radius**2 + 4)
    albedo, ambient, direct = np.square([0.6, 0.5, 0.4]), look.ambient_rgb, look.light_rgb
    dark = 255 * np.sqrt(albedo * ambient)
    bright = 255 * np.sqrt(albedo * (ambient + cosine[:, None] * direct))
    values = picture[on_ground].astype(float)
    assert np.abs(values[inside] - dark).max() <= 0.51
    assert np.abs(values[outside] - bright[outside]).max() <= 0.51
    ball = image.normals_HW3[image.geom_HW == 1]
    below = ball[:, 2] < -0.2
    expected = np.square([0.9, 0.2, 0.1]) * ambient * (1 - SKY_LIGHT / 2 + SKY_LIGHT / 2 * ball[below, 2:])
    assert np.abs(picture[image.geom_HW == 1][below] - 255 * np.sqrt(expected)).max() <= 0.51


def episode(seed: int, steps: int) -> tuple[Tabletop, list[tuple[mujoco.MjData, dict[str, CameraPose]]]]:
    world = Tabletop(SIZES)
    world.reset(["pick_up", "stack", "turn"][seed % 3], seed)
    expert = Expert(world, np.random.default_rng(seed))
    moments = []
    for _ in range(steps):
        world.act(expert.act())
        moments.append(world.data.qpos.copy())
    return world, moments


@pytest.mark.parametrize("seed", range(3))
def test_a_remembered_background_changes_no_pixel(seed: int) -> None:
    world, moments = episode(seed, 14)
    intrinsics = {name: view.intrinsics for name, view in world.scene.cameras.items()}
    remembering = RayRenderer(world.model, world.scene.look, intrinsics)
    data, different = mujoco.MjData(world.model), 0
    for position in moments[::2]:
        data.qpos[:] = position
        mujoco.mj_forward(world.model, data)
        poses = {name: view.pose(data) for name, view in world.scene.cameras.items()}
        pictures = remembering.render(data, poses)
        afresh = RayRenderer(world.model, world.scene.look, intrinsics).render(data, poses)
        for name in SIZES:
            different += int((pictures[name] != afresh[name]).any(-1).sum())
    # A ray that grazes an edge may round either way.
    assert different <= 2


@pytest.mark.parametrize("seed", range(2))
def test_shadows_are_those_of_a_ray_to_every_pixel(seed: int) -> None:
    world, moments = episode(seed, 10)
    data = mujoco.MjData(world.model)
    data.qpos[:] = moments[-1]
    mujoco.mj_forward(world.model, data)
    view = world.scene.cameras["primary"]
    pose = view.pose(data)
    white = np.ones((world.model.ngeom, 3))
    plain = np.zeros(world.model.ngeom)
    look = replace(world.scene.look, base_rgb=white, second_rgb=white, specular=plain, light_rgb=np.ones(3))
    renderer = RayRenderer(world.model, look, {"c": view.intrinsics})
    for _ in range(2):
        picture = renderer.render(data, {"c": pose})["c"]
    image = RayCamera(world.model, view.intrinsics).see(data, pose)
    light = np.asarray(look.light_position_m)
    geom = np.zeros(1, np.int32)
    wrong = 0
    for row, column in np.argwhere(image.hit_HW):
        point = image.points_HW3[row, column].astype(float) @ pose.rotation.T + pose.position_m
        normal = image.normals_HW3[row, column]
        cosine = normal @ (light - point) / np.linalg.norm(light - point)
        reached = mujoco.mj_ray(world.model, data, light, point - light, None, 1, -1, geom, None) > 1 - 1e-5
        ambient = look.ambient_rgb[0] * (1 - SKY_LIGHT / 2 + SKY_LIGHT / 2 * normal[2])
        expected = 255 * np.sqrt(min(ambient + max(cosine, 0) * reached, 1))
        wrong += abs(picture[row, column, 0] - expected) > 1
    assert wrong <= 0.002 * image.hit_HW.sum()


def test_one_seed_gives_the_same_bytes_and_another_does_not() -> None:
    pictures = []
    for seed in (1, 1, 2):
        world, _ = episode(0, 2)
        intrinsics = {name: view.intrinsics for name, view in world.scene.cameras.items()}
        poses = {name: view.pose(world.data) for name, view in world.scene.cameras.items()}
        renderer = RayRenderer(world.model, world.scene.look, intrinsics)
        pictures.append(renderer.render(world.data, poses, np.random.default_rng(seed)))
    for name, (width, height) in SIZES.items():
        assert pictures[0][name].shape == (height, width, 3)
        assert pictures[0][name].dtype == np.uint8
        assert pictures[0][name].tobytes() == pictures[1][name].tobytes()
        assert pictures[0][name].tobytes() != pictures[2][name].tobytes()


def test_supersampling_is_the_mean_of_a_finer_picture() -> None:
    model = mujoco.MjModel.from_xml_string(BALL.format(ground="plane", height=0.0, joint=""))
    data, pose, look = state(model), towards((1.5, 0.2, 1.0)), Look.plain(model)
    finer = PixelIntrinsics(200.0, 200.0, 140.0, 100.0, width=280, height=200)
    fine = RayRenderer(model, look, {"c": finer}).render(data, {"c": pose})["c"]
    smooth = RayRenderer(model, look, {"c": CAMERA}, supersampling=2).render(data, {"c": pose})["c"]
    mean = fine.reshape(100, 2, 140, 2, 3).mean((1, 3))
    assert np.abs(smooth - mean).max() <= 0.5


def test_a_turned_and_shifted_world_looks_the_same() -> None:
    scene = """
    <mujoco><worldbody><body name="all" pos="{0} {1} 0" euler="0 0 {2}">
      <geom type="box" size="0.6 0.6 0.1" pos="0 0 -0.1"/>
      <geom type="ellipsoid" size="0.2 0.15 0.1" pos="0.1 0.1 0.1" euler="10 20 30"/>
      <geom type="cylinder" size="0.1 0.2" pos="-0.2 0.1 0.2" euler="40 0 10"/>
    </body></worldbody></mujoco>
    """
    pictures = []
    for x, y, degrees in ((0, 0, 0), (0.3, -0.2, 70)):
        model = mujoco.MjModel.from_xml_string(scene.format(x, y, degrees))
        angle = np.deg2rad(degrees)
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        shift = np.array([x, y, 0])
        look = replace(
            Look.plain(model),
            base_rgb=np.array([[0.7, 0.5, 0.3], [0.2, 0.3, 0.9], [0.9, 0.8, 0.1]]),
            second_rgb=np.array([[0.4, 0.3, 0.2], [0.9, 0.9, 0.9], [0.3, 0.3, 0.0]]),
            pattern=np.array([Pattern.WOOD, Pattern.STRIPES, Pattern.CLOUDS]),
            pattern_scale_m=np.full(3, 0.08),
            light_position_m=turn @ [0.5, 0.8, 1.5] + shift,
        )
        pose = towards((0.9, 0.5, 0.8))
        turned = CameraPose(turn @ pose.position_m + shift, turn @ pose.rotation)
        pictures.append(RayRenderer(model, look, {"c": CAMERA}).render(state(model), {"c": turned})["c"])
    different = np.abs(pictures[0].astype(int) - pictures[1]).max(-1) > 2
    # Single pixels at edges, of shadows too, may round to the other side.
    assert different.mean() < 2e-3
    assert pictures[0].std() > 30


@pytest.mark.parametrize("pattern", list(Pattern))
def test_patterns_are_weights_of_which_both_ends_are_met(pattern: Pattern) -> None:
    cells = np.random.default_rng(0).uniform(-20, 20, (3, 5000)).astype(np.float32)
    weights = pattern_weights(np.full(5000, pattern), cells)
    assert weights.shape == (5000,)
    assert weights.min() >= 0
    assert weights.max() <= 1
    if pattern == Pattern.PLAIN:
        assert weights.max() == 0
    else:
        assert weights.min() < 0.15
        assert weights.max() > 0.85


def test_checkers_alternate() -> None:
    x, y, z = np.random.default_rng(1).uniform(-9, 9, (3, 2000)).astype(np.float32)
    weights = pattern_weights(np.full(2000, Pattern.CHECKER), np.stack([x, y, z]))
    across = pattern_weights(np.full(2000, Pattern.CHECKER), np.stack([x + 1, y, z]))
    diagonal = pattern_weights(np.full(2000, Pattern.CHECKER), np.stack([x + 1, y + 1, z]))
    whole = np.abs(x - np.rint(x)).clip(0) > 1e-4
    np.testing.assert_array_equal(across[whole], 1 - weights[whole])
    steady = whole & (np.abs(y - np.rint(y)) > 1e-4)
    np.testing.assert_array_equal(diagonal[steady], weights[steady])


@pytest.mark.parametrize("sigma", [1.0, 2.0, 6.0])
def test_noise_is_centred_of_the_right_size_and_independent(sigma: float) -> None:
    flat = np.full((300, 400, 3), 128, np.uint8)
    difference = SensorNoise(sigma).add(flat, np.random.default_rng(0)).astype(float) - 128
    count = difference.size
    assert abs(difference.mean()) < 5 * sigma / np.sqrt(count)
    # Rounding to whole levels adds a variance of 1/12.
    assert difference.std() == pytest.approx(np.sqrt(sigma**2 + 1 / 12), rel=0.03)
    for shifted in (np.roll(difference, 1, 0), np.roll(difference, 1, 1), np.roll(difference, 1, 2)):
        assert abs((difference * shifted).mean()) < 5 * difference.var() / np.sqrt(count)
    beyond = (np.abs(difference) > 2 * sigma + 0.5).mean()
    assert 0.01 < beyond < 0.06


def test_noise_stays_within_a_byte_and_none_is_none() -> None:
    for level in (0, 255):
        noisy = SensorNoise(4.0).add(np.full((50, 50, 3), level, np.uint8), np.random.default_rng(0))
        assert abs(int(np.median(noisy)) - level) <= 1
        assert np.abs(noisy.astype(int) - level).max() < 20
    flat = np.full((5, 5, 3), 7, np.uint8)
    assert (SensorNoise(0.0).add(flat, np.random.default_rng(0)) == 7).all()


def hue(rgb: np.ndarray) -> np.ndarray:
    """Chroma of colours: linear, without brightness."""
    linear = np.square(np.asarray(rgb, float))
    return linear / np.maximum(linear.sum(-1, keepdims=True), 1e-9)


def test_objects_keep_the_colour_they_are_named_after() -> None:
    from spear_lightning.worlds.tabletop.objects import COLOURS

    palette = hue(np.array(list(COLOURS.values())))
    right = total = 0
    for seed in range(12):
        world = Tabletop({"primary": (112, 84)}, (2, 4))
        picture = world.reset("pick_up", seed).images["primary"]
        view = world.scene.cameras["primary"]
        image = RayCamera(world.model, view.intrinsics).see(world.data, view.pose(world.data))
        for index, thing in enumerate(world.scene.objects):
            geoms = world.model.geom_bodyid == world.model.body(object_name(index)).id
            own = [g for g in np.flatnonzero(geoms) if np.allclose(world.model.geom_rgba[g, :3], thing.rgb)]
            mask = np.isin(image.geom_HW, own)
            if mask.sum() < 20:
                continue
            seen = hue(picture[mask].mean(0) / 255)
            nearest = list(COLOURS)[np.linalg.norm(palette - seen, axis=1).argmin()]
            right += nearest == thing.name.split()[0]
            total += 1
    assert total > 30
    assert right / total >= 0.95


def test_a_look_of_another_model_is_refused() -> None:
    model = mujoco.MjModel.from_xml_string(BALL.format(ground="plane", height=0.0, joint=""))
    with pytest.raises(ShapeError, match=r"Look\.specular"):
        RayRenderer(model, replace(Look.plain(model), specular=np.zeros(5)), {"c": CAMERA})


def test_opengl_shows_the_same_scene() -> None:
    model = mujoco.MjModel.from_xml_string(BALL.format(ground="box", height=-0.1, joint="<freejoint/>"))
    data, pose, look = state(model), towards((1.5, 0.2, 1.0), (0.0, 0.3, 0.2)), Look.plain(model)
    try:
        renderer = EglRenderer(model, look, {"c": CAMERA}, noise=0.0)
    except SpearError as error:
        pytest.skip(f"there is no EGL: {error}")
    picture = renderer.render(data, {"c": pose})["c"]
    renderer.close()
    chroma = hue(picture / 255)
    red = (chroma[..., 0] > 0.6) & (picture.max(-1) > 0)
    ball = RayCamera(model, CAMERA).see(data, pose).geom_HW == 1
    assert (red & ball).sum() / (red | ball).sum() > 0.96
