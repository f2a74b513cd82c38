"""The world: the same every time, poses and limits in closed form, grasps, and each task's test of success."""

from __future__ import annotations

import subprocess
import sys

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spear_lightning.errors import ConfigError, ShapeError
from spear_lightning.worlds.tabletop.gripper import FINGERS, HAND, MAX_OPENING_M, TARGET, to_pose
from spear_lightning.worlds.tabletop.objects import NOUNS, ObjectSpec
from spear_lightning.worlds.tabletop.scene import AREA_HIGH_M, AREA_LOW_M, CAMERAS, look_at, object_name
from spear_lightning.worlds.tabletop.tasks import DIRECTIONS, TASKS, Turn, up_of, wrapped, yaw_of
from spear_lightning.worlds.tabletop.world import (
    WORKSPACE_HIGH_M,
    WORKSPACE_LOW_M,
    Tabletop,
    limited_goal,
)

DOWN = (0.0, 0.0, 0.0, 1.0)
FAR = np.array([0.3, 0.0, 0.35])
AHEAD, UP = np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0])
unit = st.floats(-1, 1)
quaternions = st.tuples(unit, unit, unit, unit).filter(lambda q: np.linalg.norm(q) > 0.1)


def started(task: str, noun: str | None = None, least_width_m: float = 0.0) -> Tabletop:
    """Return a world whose first object is of a kind, alone with the task's others, at least so wide."""
    world = Tabletop(distractors=(0, 0))
    for seed in range(300):
        world.reset(task, seed)
        thing = world.scene.objects[0]
        if noun in (None, thing.noun) and 2 * thing.half_extents_m[1] >= least_width_m:
            return world
    raise AssertionError("no such scene in 300 seeds")


def put_object(world: Tabletop, index: int, position_m: np.ndarray, rotation: Rotation) -> None:
    """Put an object somewhere, at rest, and find its contacts."""
    joint = world.data.joint(object_name(index))
    joint.qpos[:3], joint.qpos[3:] = position_m, np.roll(rotation.as_quat(), 1)
    joint.qvel[:] = 0
    mujoco.mj_forward(world.model, world.data)


def put_hand(world: Tabletop, position_m: np.ndarray, yaw: float = 0.0, gap_m: float = MAX_OPENING_M) -> None:
    """Put the gripper somewhere, at rest, the fingers so far apart."""
    pose = np.append(position_m, Rotation.from_euler("z", yaw).as_quat())
    first = world.model.jnt_qposadr[world.model.body(HAND).jntadr[0]]
    world.data.qpos[first : first + 7] = [*pose[:3], *np.roll(pose[3:], 1)]
    for finger in FINGERS:
        world.data.joint(finger).qpos[:] = gap_m / 2
    world.data.qvel[:] = 0
    world.gripper.target = pose
    mujoco.mj_forward(world.model, world.data)


def succeeded(world: Tabletop) -> bool:
    return world.task.succeeded(world)


def top_m(world: Tabletop, index: int) -> float:
    return float(world.object_pose(index)[2] + world.scene.objects[index].half_extents_m[2])


# Reset and step.


def test_one_task_seed_and_actions_give_the_same_episode() -> None:
    rng = np.random.default_rng(0)
    actions = rng.uniform([0.2, -0.2, 0.0, 0, 0, -1, -1, 0], [0.5, 0.2, 0.2, 0, 0, 1, 1, 1], (12, 8))
    worlds = [Tabletop({"primary": (56, 42), "wrist": (28, 28)}) for _ in range(2)]
    worlds[1].reset("stack", 9)
    worlds[1].step(actions[0])
    seen = []
    for world in worlds:
        seen.append([world.reset("put_on", 7), *[world.step(action) for action in actions]])
    for first, second in zip(*seen, strict=True):
        assert first.instruction == second.instruction
        np.testing.assert_array_equal(first.state, second.state)
        for camera in ("primary", "wrist"):
            np.testing.assert_array_equal(first.images[camera], second.images[camera])
    np.testing.assert_array_equal(worlds[0].data.qpos, worlds[1].data.qpos)
    assert [world.steps for world in worlds] == [12, 12]


def test_other_seeds_and_tasks_are_other_episodes() -> None:
    world = Tabletop()
    states = [world.reset(task, seed).state for task in TASKS for seed in range(3)]
    assert len(np.unique(np.round(states, 6), axis=0)) == len(states)


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no such task[\s\S]*juggle[\s\S]*pick_up"):
        Tabletop().reset("juggle", 0)
    with pytest.raises(ConfigError, match=r"no such camera[\s\S]*ceiling[\s\S]*wrist"):
        Tabletop({"ceiling": (8, 8)}).reset("touch", 0)


@pytest.mark.parametrize(
    "target",
    [
        np.zeros(7),
        np.ones((1, 8)),
        np.array([0.3, 0, 0.2, 0, 0, 0, 0, 1]),
        np.array([np.nan, 0, 0.2, *DOWN, 1]),
        np.array([0.3, 0, 0.2, *DOWN, np.inf]),
    ],
)
def test_bad_targets_are_refused_and_change_nothing(target: np.ndarray) -> None:
    world = Tabletop()
    world.reset("touch", 0)
    before = world.data.qpos.copy()
    with pytest.raises(ShapeError, match="8 finite numbers"):
        world.step(target)
    np.testing.assert_array_equal(world.data.qpos, before)
    assert world.steps == 0


# Commanded poses.


def test_the_tool_reaches_a_commanded_pose_and_opening() -> None:
    world = Tabletop()
    rng = np.random.default_rng(1)
    for seed in range(4):
        world.reset("touch", seed)
        position = rng.uniform([0.2, -0.2, 0.2], [0.5, 0.2, 0.35])
        rotation = Rotation.from_euler("zyx", rng.uniform([-2, -0.4, -0.4], [2, 0.4, 0.4]))
        openness = [0.0, 1.0, 0.3, 0.7][seed]
        # The sign of a quaternion means nothing.
        target = np.array([*position, *-rotation.as_quat(), openness])
        for _ in range(12):
            observation = world.step(target)
        assert observation.state.dtype == np.float32
        assert observation.state[6] >= 0
        np.testing.assert_allclose(observation.state[:3], position, atol=0.002)
        assert (Rotation.from_quat(observation.state[3:7]) * rotation.inv()).magnitude() < 0.02
        assert observation.state[7] == pytest.approx(openness, abs=0.03)


def test_a_step_moves_straight_to_the_goal_by_at_most_the_limit() -> None:
    world = Tabletop()
    world.reset("touch", 0)
    put_hand(world, np.array([0.2, 0.0, 0.3]))
    for step in range(1, 4):
        world.act(np.array([0.5, 0.0, 0.3, *DOWN, 1.0]))
        np.testing.assert_allclose(world.gripper.target, [0.2 + 0.07 * step, 0.0, 0.3, *DOWN], atol=1e-12)
    world.act(np.array([9.0, -9.0, -9.0, *DOWN, 1.0]))
    direction = world.gripper.target[:3] - [0.41, 0.0, 0.3]
    corner = np.array([0.58, -0.28, 0.008]) - [0.41, 0.0, 0.3]
    np.testing.assert_allclose(direction, 0.07 * corner / np.linalg.norm(corner), atol=1e-12)
    for _ in range(10):
        world.act(np.array([9.0, -9.0, -9.0, *DOWN, 1.0]))
    np.testing.assert_allclose(world.gripper.target[:3], [0.58, -0.28, 0.008], atol=1e-12)


@given(st.tuples(unit, unit, unit), quaternions, st.tuples(unit, unit, unit), quaternions)
def test_no_step_is_longer_than_the_limits_and_all_goals_are_reached(
    place: tuple[float, ...], turned: tuple[float, ...], goal: tuple[float, ...], goal_turned: tuple[float, ...]
) -> None:
    middle, half = (WORKSPACE_HIGH_M + WORKSPACE_LOW_M) / 2, (WORKSPACE_HIGH_M - WORKSPACE_LOW_M) / 2
    pose = np.array([*(middle + half * place), *(np.array(turned) / np.linalg.norm(turned))])
    wanted = np.array([*(middle + 2 * half * goal), *goal_turned])
    for _ in range(30):
        last, pose = pose, limited_goal(pose, wanted)
        assert np.linalg.norm(pose[3:]) == pytest.approx(1.0)
        assert (pose[:3] >= WORKSPACE_LOW_M - 1e-9).all()
        assert (pose[:3] <= WORKSPACE_HIGH_M + 1e-9).all()
        assert np.linalg.norm(pose[:3] - last[:3]) <= 0.07 + 1e-9
        turn = Rotation.from_quat(pose[3:]) * Rotation.from_quat(last[3:]).inv()
        # Normalised interpolation is this close to one of constant speed.
        assert turn.magnitude() <= 1.01 * 0.6
    np.testing.assert_allclose(pose[:3], wanted[:3].clip(WORKSPACE_LOW_M, WORKSPACE_HIGH_M), atol=1e-9)
    assert (Rotation.from_quat(pose[3:]) * Rotation.from_quat(goal_turned).inv()).magnitude() < 1e-6


# Quaternions: MuJoCo's wxyz, ours xyzw.


@given(quaternions)
def test_poses_are_xyzw_with_w_not_negative(wxyz: tuple[float, ...]) -> None:
    quat = np.array(wxyz) / np.linalg.norm(wxyz)
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, quat)
    pose = to_pose(np.array([1.0, 2.0, 3.0]), quat)
    assert pose[6] >= 0
    np.testing.assert_array_equal(pose[:3], [1, 2, 3])
    rotation = Rotation.from_quat(pose[3:])
    np.testing.assert_allclose(rotation.as_matrix(), matrix.reshape(3, 3), atol=1e-9)
    x_axis, z_axis = rotation.apply([1, 0, 0]), rotation.apply([0, 0, 1])
    assert up_of(pose) == pytest.approx(z_axis[2])
    if np.hypot(*x_axis[:2]) > 1e-3:
        assert abs(wrapped(yaw_of(pose) - np.arctan2(x_axis[1], x_axis[0]))) < 1e-6


def test_poses_of_tool_target_and_objects_turn_as_mujoco_has_them() -> None:
    world = started("put_on")
    world.act(np.array([0.4, 0.1, 0.3, *Rotation.from_euler("xyz", [0.2, -0.3, 0.5]).as_quat(), 1.0]))
    put_object(world, 0, np.array([0.3, 0.1, 0.2]), Rotation.from_euler("xyz", [0.4, 0.5, 2.0]))
    bodies = {HAND: world.gripper.pose, TARGET: world.gripper.target, object_name(0): world.object_pose(0)}
    for name, pose in bodies.items():
        matrix = world.data.body(name).xmat.reshape(3, 3)
        if name == TARGET:
            mujoco.mju_quat2Mat(matrix.ravel(), world.data.mocap_quat[0])
        np.testing.assert_allclose(Rotation.from_quat(pose[3:]).as_matrix(), matrix, atol=1e-9)
    assert Rotation.from_quat(world.object_pose(0)[3:]).as_euler("xyz") == pytest.approx([0.4, 0.5, 2.0])


# Grasps.


def closed_around(world: Tabletop) -> np.ndarray:
    """Close the fingers around object 0 where it lies; returns the target that did it."""
    pose = world.object_pose(0)
    put_hand(world, np.array([*pose[:2], 0.02]), yaw_of(pose))
    target = np.append(world.gripper.target, 0.0)
    world.act(target)
    world.act(target)
    return target


def test_a_grasp_holds_by_contact_and_ends_by_opening() -> None:
    world = started("pick_up", "cube")
    target = closed_around(world)
    assert world.is_held(0)
    assert world.gripper_touches(0)
    # The fingers stand as far apart as the cube is wide, but for what soft contacts give.
    width = 2 * world.scene.objects[0].half_extents_m[1]
    assert world.gripper.openness * MAX_OPENING_M == pytest.approx(width, abs=5e-3)
    before = world.object_pose(0)
    target[2] += 0.1
    for _ in range(4):
        world.act(target)
    np.testing.assert_allclose(world.object_pose(0)[:3] - before[:3], [0, 0, 0.1], atol=0.004)
    assert world.success
    target[7] = 1.0
    world.act(target)
    assert world.gripper.held is None
    world.act(target)
    assert world.on_table(0)
    assert not world.success


def test_pressing_with_closed_fingers_from_above_is_no_grasp() -> None:
    for noun in ("cube", "can", "egg", "pill"):
        world = started("touch", noun)
        pose = world.object_pose(0)
        put_hand(world, np.array([*pose[:2], top_m(world, 0) + 0.03]), yaw_of(pose), gap_m=0.0)
        touched = False
        for depth in (0.0, 0.02, 0.03, 0.035, 0.04):
            world.act(np.array([*pose[:2], top_m(world, 0) + 0.03 - depth, *world.gripper.target[3:], 0.0]))
            touched |= world.gripper_touches(0)
            assert world.gripper.held is None, noun
        assert touched


def test_one_finger_is_no_grasp() -> None:
    world = started("pick_up", "cube")
    pose = world.object_pose(0)
    yaw = yaw_of(pose)
    across = np.array([-np.sin(yaw), np.cos(yaw)])
    put_hand(world, np.array([*(pose[:2] - 0.05 * across), 0.02]), yaw, gap_m=0.0)
    touched = False
    for _ in range(4):
        goal = np.append(world.gripper.target, 0.0)
        goal[:2] += 0.015 * across
        world.act(goal)
        touched |= world.gripper_touches(0)
        assert world.gripper.held is None
    assert touched
    assert np.linalg.norm(world.object_pose(0)[:2] - pose[:2]) > 0.005


def test_fingers_that_are_not_meant_to_close_make_no_grasp() -> None:
    world = started("stack", "block", least_width_m=0.046)
    pose = world.object_pose(0)
    put_hand(world, np.array([*pose[:2], 0.02]), yaw_of(pose))
    # Half open is narrower than the block: both fingers press on it.
    for _ in range(3):
        world.act(np.append(world.gripper.target, 0.5))
    assert world.gripper_touches(0)
    assert world.gripper.held is None
    world.act(np.append(world.gripper.target, 0.49))
    assert world.is_held(0)


# Success and near misses, from states that are put together.


def test_touch_wants_two_steps_of_contact_with_an_object_that_stays() -> None:
    world = started("touch", "cube")
    pose = world.object_pose(0)
    rotation = Rotation.from_quat(pose[3:])
    # The fingertips are 8 mm below the tool's origin.
    above = np.array([*pose[:2], top_m(world, 0) + 0.008])
    put_hand(world, above + 0.002 * UP, gap_m=0.0)
    assert [succeeded(world) for _ in range(3)] == [False, False, False]
    put_hand(world, above - 0.001 * UP, gap_m=0.0)
    assert [succeeded(world) for _ in range(3)] == [False, True, True]
    put_hand(world, FAR)
    assert not succeeded(world)
    put_hand(world, above - 0.001 * UP, gap_m=0.0)
    assert [succeeded(world) for _ in range(2)] == [False, True]
    put_object(world, 0, pose[:3] + 0.0095 * AHEAD, rotation)
    assert succeeded(world)
    put_object(world, 0, pose[:3] + 0.0105 * AHEAD, rotation)
    assert not succeeded(world)


def test_pick_up_wants_six_centimetres_in_the_grip() -> None:
    world = started("pick_up", "cube")
    pose = world.object_pose(0)
    for height, held, done in [(0.061, True, True), (0.059, True, False), (0.2, False, False)]:
        put_object(world, 0, pose[:3] + height * UP, Rotation.identity())
        world.data.eq_active[world.model.equality(object_name(0)).id] = held
        assert succeeded(world) is done


@pytest.mark.parametrize(("task", "noun"), [("put_on", "cube"), ("put_on", "brick"), ("stack", "block")])
def test_put_on_and_stack_want_the_middle_over_the_support(task: str, noun: str) -> None:
    world = started(task, noun)
    put_hand(world, FAR)
    thing, support = world.scene.objects[:2]
    below = world.object_pose(1)
    turned = Rotation.from_quat(below[3:])

    def put(share_x: float, share_y: float, gap_m: float = -0.0005) -> bool:
        offset = turned.apply([share_x * support.half_extents_m[0], share_y * support.half_extents_m[1], 0.0])
        height = support.half_extents_m[2] + thing.half_extents_m[2] + gap_m
        put_object(world, 0, below[:3] + offset + height * UP, turned)
        return succeeded(world)

    assert put(0, 0)
    assert put(0.95, 0)
    assert put(0, -0.95)
    # Its middle is just beside the outline: no success, though it touches.
    assert not put(1.05, 0)
    assert world.objects_touch(0, 1)
    assert not put(0, 1.05)
    # In the air above it.
    assert not put(0, 0, gap_m=0.004)
    # In the gripper still, though in the right place.
    assert put(0, 0)
    pose = world.object_pose(0)
    put_hand(world, pose[:3] + 0.004 * UP, yaw_of(pose), gap_m=2 * thing.half_extents_m[1] - 0.001)
    assert world.gripper_touches(0)
    assert not succeeded(world)
    put_hand(world, FAR)
    assert succeeded(world)
    # Beside it on the table, where it began.
    world.reset(task, 0)
    assert not succeeded(world)


def test_leaning_on_the_table_is_not_lying_on_the_target() -> None:
    world = started("put_on", "brick")
    put_hand(world, FAR)
    below, thing = world.object_pose(1), world.scene.objects[0]
    # Deep inside the target, down to the table: in contact with both.
    put_object(world, 0, np.array([*below[:2], thing.half_extents_m[2] - 0.0005]), Rotation.identity())
    assert world.objects_touch(0, 1)
    assert world.on_table(0)
    assert not succeeded(world)


FACING = {"away": (1, 0), "left": (0, 1), "the robot": (-1, 0), "right": (0, -1)}
"""The robot stands at the origin and looks along x."""


@pytest.mark.parametrize("word", list(FACING))
def test_turn_wants_the_front_within_15_degrees_on_the_table(word: str) -> None:
    world = Tabletop(distractors=(0, 0))
    seed = next(s for s in range(100) if world.reset("turn", s).instruction.endswith(f"to face {word}"))
    put_hand(world, FAR)
    assert isinstance(world.task, Turn)
    assert (np.cos(DIRECTIONS[word]), np.sin(DIRECTIONS[word])) == pytest.approx(FACING[word])
    assert world.task.direction == DIRECTIONS[word]
    front = np.arctan2(FACING[word][1], FACING[word][0])
    start = world.object_pose(0)
    # At the start there is enough left to be turned.
    assert np.deg2rad(49) < abs(wrapped(yaw_of(start) - front)) < np.deg2rad(121), seed
    assert not succeeded(world)

    def put(degrees: float, lifted_m: float = -0.0003, rolled: float = 0.0) -> bool:
        rotation = Rotation.from_euler("z", front + np.deg2rad(degrees)) * Rotation.from_euler("x", rolled)
        half = world.scene.objects[0].half_extents_m[2]
        put_object(world, 0, np.array([*start[:2], half + lifted_m]), rotation)
        return succeeded(world)

    assert put(0)
    assert put(14.5)
    assert put(-14.5)
    assert not put(15.5)
    assert not put(-15.5)
    assert not put(180)
    assert not put(0, lifted_m=0.003)
    # Tipped by 25 degrees, its edge in the table.
    assert not put(0, rolled=np.deg2rad(25))
    assert world.on_table(0)
    assert put(0)
    pose, width = world.object_pose(0), world.scene.objects[0].geoms[0].size_m[1]
    put_hand(world, np.array([*pose[:2], 0.012]), yaw_of(pose), gap_m=2 * width - 0.001)
    assert world.gripper_touches(0)
    assert not succeeded(world)


# Layout.


@pytest.mark.parametrize("task", list(TASKS))
def test_objects_lie_apart_with_room_for_the_fingers_and_names_of_their_own(task: str) -> None:
    world = Tabletop(distractors=(2, 4))
    counts = set()
    for seed in range(12):
        world.reset(task, seed)
        things = world.scene.objects
        counts.add(len(things) - len(world.task.objects))
        assert things[: len(world.task.objects)] == world.task.objects
        assert len({thing.name for thing in things}) == len(things)
        assert all(thing.name in world.instruction for thing in world.task.objects)
        assert not any(world.objects_touch(a, b) for a in range(len(things)) for b in range(a))
        for index, thing in enumerate(things):
            pose = world.object_pose(index)
            # Eggs and pills may roll a little while everything comes to rest.
            assert (pose[:2] > AREA_LOW_M - 0.02).all()
            assert (pose[:2] < AREA_HIGH_M + 0.02).all()
            assert up_of(pose) > 0.95
            assert world.on_table(index)
            grasp_without_touching_others(world, index, thing)
    assert len(counts) > 1


def grasp_without_touching_others(world: Tabletop, index: int, thing: ObjectSpec) -> None:
    """Go down around an object with open fingers, in each way it can be grasped."""
    pose = world.object_pose(index)
    turned = Rotation.from_quat(pose[3:])
    for grasp in thing.grasps:
        for yaw in np.arange(0.0, np.pi, 0.3) if grasp.any_yaw else [grasp.yaw]:
            point = pose[:3] + turned.apply(grasp.point_m)
            put_hand(world, np.array([*point[:2], max(point[2], 0.012)]), yaw_of(pose) + yaw)
            others = [other for other in range(len(world.scene.objects)) if other != index]
            assert not any(world.gripper_touches(other) for other in others), (thing.name, yaw)


def test_half_extents_are_those_of_mujocos_geoms() -> None:
    world, seen = Tabletop(distractors=(2, 4)), set()
    for seed in range(60):
        world.reset(list(TASKS)[seed % len(TASKS)], seed)
        for index, thing in enumerate(world.scene.objects):
            body = world.model.body(object_name(index))
            lows, highs = [], []
            for geom in range(body.geomadr[0], body.geomadr[0] + body.geomnum[0]):
                middle, half = np.split(world.model.geom_aabb[geom], 2)
                turned = Rotation.from_quat(np.roll(world.model.geom_quat[geom], -1)).as_matrix()
                middle = world.model.geom_pos[geom] + turned @ middle
                lows.append(middle - np.abs(turned) @ half)
                highs.append(middle + np.abs(turned) @ half)
            np.testing.assert_allclose(np.max(highs, axis=0), thing.half_extents_m, atol=1e-9)
            np.testing.assert_allclose(np.min(lows, axis=0), np.negative(thing.half_extents_m), atol=1e-9)
            seen.add(thing.noun)
    assert seen == set(NOUNS)


# Cameras.


def test_look_at_in_closed_form() -> None:
    rotation = look_at(np.array([0.0, 0, 1]), np.array([5.0, 0, 1]), np.array([0.0, 0, 1]))
    np.testing.assert_allclose(rotation, [[0, 0, 1], [-1, 0, 0], [0, -1, 0]], atol=1e-12)
    down = look_at(np.array([0.0, 0, 1]), np.array([0.0, 0, 0]), np.array([0.0, 1, 0]))
    np.testing.assert_allclose(down, np.diag([1, -1, -1]), atol=1e-12)


@settings(deadline=None)
@given(st.tuples(unit, unit, unit), st.tuples(unit, unit, unit), quaternions)
def test_look_at_puts_the_target_in_the_middle_and_up_above_it(
    position: tuple[float, ...], target: tuple[float, ...], turned: tuple[float, ...]
) -> None:
    eye, goal = np.array(position), np.array(target)
    up = Rotation.from_quat(turned).apply([0, 0, 1])
    way = goal - eye
    if np.linalg.norm(way) < 0.05 or np.linalg.norm(np.cross(way, up)) < 0.05 * np.linalg.norm(way):
        return
    rotation = look_at(eye, goal, up)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-9)
    assert np.linalg.det(rotation) == pytest.approx(1)
    np.testing.assert_allclose(rotation.T @ way, [0, 0, np.linalg.norm(way)], atol=1e-9)
    in_picture = rotation.T @ up
    assert in_picture[0] == pytest.approx(0, abs=1e-9)
    assert in_picture[1] < 0


def test_the_wrist_camera_rides_on_the_hand_and_the_others_stand_still() -> None:
    world = Tabletop({"primary": (16, 12), "wrist": (12, 12)})
    world.reset("touch", 0)
    poses = []
    for position, yaw in [(FAR, 0.0), (np.array([0.4, 0.1, 0.2]), 1.0)]:
        put_hand(world, position, yaw)
        poses.append({name: camera.pose(world.data) for name, camera in world.scene.cameras.items()})
        place, turned = CAMERAS["wrist"], Rotation.from_euler("z", yaw)
        np.testing.assert_allclose(
            poses[-1]["wrist"].position_m, position + turned.apply(place.position_m), atol=1e-9
        )
        looks_at = position + turned.apply(place.looks_at_m)
        way = poses[-1]["wrist"].rotation.T @ (looks_at - poses[-1]["wrist"].position_m)
        np.testing.assert_allclose(way[:2], 0, atol=1e-9)
    np.testing.assert_array_equal(poses[0]["primary"].position_m, poses[1]["primary"].position_m)
    np.testing.assert_array_equal(poses[0]["primary"].rotation, poses[1]["primary"].rotation)


def test_simulating_needs_no_torch() -> None:
    """It takes longer to import than all else that a simulating process needs."""
    rooms = "benchmark, demonstrations, experts, world"
    code = f"import sys; from spear_lightning.worlds.tabletop import {rooms}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
