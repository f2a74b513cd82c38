"""How often the scripted experts, and chance, get the tasks done; and experts that are knocked off course."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from spear_lightning.worlds.tabletop.experts import Expert, _strain
from spear_lightning.worlds.tabletop.random_targets import RandomTargets
from spear_lightning.worlds.tabletop.tasks import TASKS
from spear_lightning.worlds.tabletop.world import WORKSPACE_HIGH_M, WORKSPACE_LOW_M, Tabletop

STARTS = 200
CHANCES = 60
"""Starts of chance, which takes all the time there is. `spear eval --policy random --episodes 200` has more."""
FIRST_SEED = 50_000


def acted_out(world: Tabletop, controller: Expert | RandomTargets) -> bool:
    """Act until the task is done or time is out."""
    while world.steps < world.max_steps and not world.success:
        world.act(controller.act())
    return world.success


@pytest.mark.slow
@pytest.mark.parametrize("task", list(TASKS))
def test_the_expert_succeeds_in_95_percent_of_200_starts(task: str) -> None:
    world, failed = Tabletop(), []
    for seed in range(FIRST_SEED, FIRST_SEED + STARTS):
        world.reset(task, seed)
        if not acted_out(world, Expert(world, np.random.default_rng(seed))):
            failed.append(seed)
    assert len(failed) <= 0.05 * STARTS, f"{task}: {STARTS - len(failed)} of {STARTS}, not with seeds {failed}"


@pytest.mark.slow
@pytest.mark.parametrize("task", list(TASKS))
def test_chance_succeeds_in_less_than_5_percent_of_its_starts(task: str) -> None:
    world, done = Tabletop(), []
    for seed in range(FIRST_SEED, FIRST_SEED + CHANCES):
        start = world.reset(task, seed)
        if acted_out(world, RandomTargets(start.state, np.random.default_rng(seed))):
            done.append(seed)
    assert len(done) < 0.05 * CHANCES, f"{task}: {len(done)} of {CHANCES}, with seeds {done}"


@pytest.mark.parametrize("task", list(TASKS))
def test_an_expert_that_is_knocked_off_course_still_succeeds(task: str) -> None:
    world, failed, knocked = Tabletop(), [], 0
    for seed in range(20):
        world.reset(task, seed)
        rng = np.random.default_rng(seed)
        expert = Expert(world, rng)
        for _ in range(int(rng.integers(4, 10))):
            world.act(expert.act())
        if world.success:
            continue
        knocked += 1
        before = world.state[:3]
        # Up before sideways: what is tipped over, no expert can turn.
        knock = np.append(world.gripper.target, expert.openness)
        for shift in ([0.0, 0.0, 0.05], [*rng.choice([-0.05, 0.05], 2), 0.0]):
            knock[:3] += shift
            world.act(knock)
        assert np.linalg.norm(world.state[:3] - before) > 0.04
        if not acted_out(world, expert):
            failed.append(seed)
    assert knocked >= 16
    assert len(failed) <= 1, f"{task}: of {knocked} knocked off course, failed with seeds {failed}"


def test_what_experts_ask_for_is_within_what_the_world_allows() -> None:
    world = Tabletop()
    for task in TASKS:
        world.reset(task, 3)
        expert = Expert(world, np.random.default_rng(3))
        while world.steps < world.max_steps and not world.success:
            last, target = world.gripper.target, expert.act()
            assert np.linalg.norm(target[:3] - last[:3]) <= 0.055 + 1e-9
            assert (target[:3] >= WORKSPACE_LOW_M).all()
            assert (target[:3] <= WORKSPACE_HIGH_M).all()
            between = Rotation.from_quat(target[3:7]) * Rotation.from_quat(last[3:7]).inv()
            assert between.magnitude() <= 0.45 + 1e-9
            # The fingers always point straight down.
            np.testing.assert_allclose(Rotation.from_quat(target[3:7]).apply([0, 0, 1]), [0, 0, 1], atol=1e-9)
            assert target[7] in (0.0, 1.0)
            world.act(target)


def test_experts_differ_in_their_manner_and_hold_still_when_done() -> None:
    ways = []
    for seed in (0, 0, 1):
        world = Tabletop()
        world.reset("touch", 5)
        expert = Expert(world, np.random.default_rng(seed))
        ways.append([])
        while world.steps < world.max_steps:
            ways[-1].append(expert.act())
            world.act(ways[-1][-1])
        np.testing.assert_array_equal(ways[-1][-1], ways[-1][-2])
        assert world.success
    np.testing.assert_array_equal(ways[0], ways[1])
    assert np.abs(np.array(ways[0]) - ways[2]).max() > 1e-3


def test_where_no_grasp_leaves_room_for_the_turn_the_nearest_is_taken() -> None:
    # A turn of 150 degrees after 60 or 10 goes beyond the wrist's 155, after -120 it does not.
    strains = {yaw: _strain(np.deg2rad(yaw), np.deg2rad(150), 0.0) for yaw in (60, -120, 10)}
    assert strains[60][0] == pytest.approx(np.deg2rad(55))
    assert strains[-120][0] == 0.0
    assert min(strains, key=strains.__getitem__) == -120
    assert min((60, 10), key=strains.__getitem__) == 10
