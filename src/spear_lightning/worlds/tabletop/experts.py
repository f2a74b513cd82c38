"""Scripted experts: they look at the true state and do a task as a person would, with variation and recovery.

An expert is a plan that yields one absolute target per control step. It watches what its targets lead to: it
waits until a pose is reached, notices when a grasp failed or the object slipped, and tries again. Heights,
speeds and grasps vary, and now and then it goes a little astray on purpose and comes back, so that
demonstrations show how to recover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from spear_lightning.worlds.tabletop.objects import Grasp
from spear_lightning.worlds.tabletop.tasks import Turn, wrapped, yaw_of
from spear_lightning.worlds.tabletop.world import Tabletop

Targets = Iterator[np.ndarray]

OPEN, CLOSED = 1.0, 0.0

_LOWEST_TOOL_M = 0.012
_REACHED_M, _REACHED_RADIANS = 0.006, 0.05
_ASIDE_M = 0.025
_MOST_YAW = np.deg2rad(155.0)


@dataclass(frozen=True)
class Manner:
    """How one expert moves.

    Attributes:
        speed_m: Metres per control step at most.
        turn_radians: Radians per control step at most.
        hover_m: Height above the object from which it goes down.
        lift_m: How high it carries.
        grasp_offset_m: (2,) error of its grasp, along x and y.
        grasp_yaw_error: Error of its grasp's yaw, radians.
        stray_m: (3,) how far it goes astray on its first approach; zero mostly.
    """

    speed_m: float
    turn_radians: float
    hover_m: float
    lift_m: float
    grasp_offset_m: np.ndarray
    grasp_yaw_error: float
    stray_m: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Manner:
        """Draw a manner."""
        astray = rng.random() < 0.15
        return cls(
            speed_m=rng.uniform(0.035, 0.055),
            turn_radians=rng.uniform(0.25, 0.45),
            hover_m=rng.uniform(0.05, 0.08),
            lift_m=rng.uniform(0.09, 0.12),
            grasp_offset_m=rng.normal(0.0, 0.002, 2).clip(-0.004, 0.004),
            grasp_yaw_error=float(np.clip(rng.normal(0.0, 0.04), -0.08, 0.08)),
            stray_m=rng.uniform([-0.05, -0.05, 0.0], [0.05, 0.05, 0.04]) * astray,
        )


class Expert:
    """Does a world's current task.

    Args:
        world: A world after `reset`.
        rng: Source of the variation.
    """

    def __init__(self, world: Tabletop, rng: np.random.Generator) -> None:
        self._world = world
        plan = _PLANS[world.task.name]
        self._plan = plan(Hand(world, Manner.draw(rng)))
        self._last = np.append(world.gripper.target, OPEN)

    @property
    def openness(self) -> float:
        """Openness that was last commanded."""
        return float(self._last[7])

    def act(self) -> np.ndarray:
        """Return the target of the next control step, float64 (8,); after the plan's end it holds still."""
        self._last = next(self._plan, self._last)
        return self._last


class Hand:
    """Motions that plans are made of; each yields targets and ends when it is done.

    Args:
        world: The world it moves in.
        manner: How it moves.
    """

    def __init__(self, world: Tabletop, manner: Manner) -> None:
        self.world, self.manner = world, manner
        self.openness = OPEN

    @property
    def position_m(self) -> np.ndarray:
        """Measured position of the tool, (3,)."""
        return self.world.gripper.pose[:3]

    @property
    def yaw(self) -> float:
        """Measured yaw of the tool."""
        return yaw_of(self.world.gripper.pose)

    def move(self, position_m: np.ndarray, yaw: float, until: Callable[[], bool] = lambda: False) -> Targets:
        """Move in a straight line, slowing down before the end, until it is there or `until` says stop."""
        position_m = np.array([*position_m[:2], max(position_m[2], _LOWEST_TOOL_M)])
        patience = 40
        while patience > 0 and not until():
            target = self.world.gripper.target
            way, turn = position_m - target[:3], wrapped(yaw - yaw_of(target))
            distance = float(np.linalg.norm(way))
            step = min(self.manner.speed_m, max(0.6 * distance, 0.012))
            part = min(1.0, step / max(distance, 1e-9), self.manner.turn_radians / max(abs(turn), 1e-9))
            yield self._target(target[:3] + part * way, yaw_of(target) + part * turn)
            patience -= 1
            near = np.linalg.norm(position_m - self.position_m) < _REACHED_M
            if part == 1.0 and near and abs(wrapped(yaw - self.yaw)) < _REACHED_RADIANS:
                return

    def set_fingers(self, openness: float, steps: int = 2) -> Targets:
        """Open or close the fingers where the tool is."""
        self.openness = openness
        target = self.world.gripper.target
        for _ in range(steps):
            yield self._target(target[:3], yaw_of(target))

    def press(self, until: Callable[[], bool]) -> Targets:
        """Go down in small steps until `until` says stop, and stay there without pressing on."""
        target = self.world.gripper.target
        while not until() and target[2] > _LOWEST_TOOL_M:
            target[2] -= 0.007
            yield self._target(target[:3], yaw_of(target))
        yield self._target(self.position_m, yaw_of(target))

    def rise(self, height_m: float) -> Targets:
        """Move straight up by a height."""
        target = self.world.gripper.target
        yield from self.move(target[:3] + np.array([0.0, 0.0, height_m]), yaw_of(target))

    def grasp(self, final_turn: float = 0.0) -> Targets:
        """Take hold of object 0, again if it failed.

        Args:
            final_turn: By how much the object is to be turned afterwards; the grasp leaves the wrist room for it.
        """
        stray_m = self.manner.stray_m
        for _ in range(4):
            if self.openness != OPEN:
                yield from self.set_fingers(OPEN)
            point_m, yaw = self._grasp_pose(final_turn)
            above_m = point_m + np.array([0.0, 0.0, self.manner.hover_m])
            if stray_m.any():
                yield from self.move(above_m + stray_m, yaw)
                stray_m = np.zeros(3)
            yield from self.move(above_m, yaw)
            yield from self.move(point_m, yaw, until=partial(self._beside, point_m))
            if self._beside(point_m):
                # Knocked away on the way down: from the side, the fingers would tip the object over.
                yield from self.rise(self.manner.hover_m)
                continue
            yield from self.set_fingers(CLOSED)
            if not self.world.is_held(0):
                yield from self.set_fingers(CLOSED, steps=1)
            if self.world.is_held(0):
                return
            yield from self.set_fingers(OPEN)
            yield from self.rise(self.manner.hover_m)

    def _beside(self, point_m: np.ndarray) -> bool:
        """Whether the tool is too far aside of a point to go straight down to it."""
        return float(np.linalg.norm(self.position_m[:2] - point_m[:2])) > _ASIDE_M

    def _grasp_pose(self, final_turn: float) -> tuple[np.ndarray, float]:
        pose = self.world.object_pose(0)
        options = [grasp_yaws(grasp, yaw_of(pose), self.yaw) for grasp in self.world.task.objects[0].grasps]
        choices = [
            (_strain(yaw, final_turn, self.yaw), grasp, yaw)
            for grasp, yaws in zip(self.world.task.objects[0].grasps, options, strict=True)
            for yaw in yaws
        ]
        _, grasp, yaw = min(choices, key=lambda choice: choice[0])
        point_m = pose[:3] + _turned(np.array(grasp.point_m), yaw_of(pose))
        point_m[:2] += self.manner.grasp_offset_m
        return point_m, yaw + self.manner.grasp_yaw_error

    def lower_onto(self, support: int | None, place_m: np.ndarray, yaw: float, height_m: float) -> Targets:
        """Carry the held object over a place, put it down and let go.

        Args:
            support: Object it is put on; `None` is the table.
            place_m: (2,) where the object's middle is to be, x and y.
            yaw: Yaw of the tool at which it is put down.
            height_m: Height of the surface it is put on.
        """
        world = self.world
        pose, tool, turn = world.object_pose(0), self.position_m, wrapped(yaw - self.yaw)
        offset_m = _turned(tool - pose[:3], turn)
        bottom_m = pose[2] - world.task.objects[0].half_extents_m[2]
        goal_m = np.append(place_m + offset_m[:2], tool[2] - bottom_m + height_m + 0.002)
        above_m = np.append(goal_m[:2], max(goal_m[2] + 0.03, tool[2]))

        def down() -> bool:
            return world.on_table(0) if support is None else world.objects_touch(0, support)

        yield from self.move(above_m, yaw)
        yield from self.move(goal_m, yaw, until=down)
        yield from self.set_fingers(OPEN)
        yield from self.rise(0.07)

    def _target(self, position_m: np.ndarray, yaw: float) -> np.ndarray:
        return np.array([*position_m, 0.0, 0.0, np.sin(yaw / 2), np.cos(yaw / 2), self.openness])


def grasp_yaws(grasp: Grasp, object_yaw: float, tool_yaw: float) -> list[float]:
    """Return the tool's yaws that make a grasp: fingers may be swapped; a round object leaves the choice."""
    if grasp.any_yaw:
        return [tool_yaw]
    return [wrapped(object_yaw + grasp.yaw + swap) for swap in (0.0, np.pi)]


def _strain(yaw: float, final_turn: float, tool_yaw: float) -> tuple[float, float]:
    """How far a grasp and the turn after it go beyond what the wrist can, and how far it has to go."""
    furthest = max(abs(yaw), abs(yaw + final_turn))
    return max(0.0, furthest - _MOST_YAW), abs(yaw - tool_yaw) if final_turn == 0 else furthest


def _turned(vector_m: np.ndarray, yaw: float) -> np.ndarray:
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([cos * vector_m[0] - sin * vector_m[1], sin * vector_m[0] + cos * vector_m[1], vector_m[2]])


def touch(hand: Hand) -> Targets:
    """Come down on the object with closed fingers and stay."""
    world = hand.world
    pose = world.object_pose(0)
    point_m = pose[:3] + _turned(np.array(world.task.objects[0].grasps[0].point_m), yaw_of(pose))
    top_m = pose[2] + world.task.objects[0].half_extents_m[2]
    above_m = np.append(point_m[:2] + hand.manner.grasp_offset_m, top_m + hand.manner.hover_m)
    hand.openness = CLOSED
    if hand.manner.stray_m.any():
        yield from hand.move(above_m + hand.manner.stray_m, hand.yaw)
    yield from hand.move(above_m, hand.yaw)
    yield from hand.move(np.append(above_m[:2], top_m + 0.015), hand.yaw)
    yield from hand.press(lambda: world.gripper_touches(0))


def pick_up(hand: Hand) -> Targets:
    """Grasp and lift; once more if it slipped."""
    for _ in range(2):
        yield from hand.grasp()
        yield from hand.rise(hand.manner.lift_m)
        if hand.world.is_held(0):
            return


def put_on(hand: Hand) -> Targets:
    """Grasp, lift, carry over the other object, put down, let go."""
    world = hand.world
    for _ in range(2):
        yield from hand.grasp()
        yield from hand.rise(hand.manner.lift_m)
        if world.is_held(0):
            support = world.object_pose(1)
            height_m = support[2] + world.task.objects[1].half_extents_m[2]
            yield from hand.lower_onto(1, support[:2], hand.yaw, height_m)
        if world.success:
            return


def turn(hand: Hand) -> Targets:
    """Grasp, lift a little, turn, put down, let go; once more if it still faces another way."""
    world = hand.world
    task = world.task
    assert isinstance(task, Turn)
    for _ in range(2):
        missing = wrapped(task.direction - yaw_of(world.object_pose(0)))
        if abs(missing) < 0.6 * task.TOLERANCE:
            return
        place_m = world.object_pose(0)[:2]
        yield from hand.grasp(final_turn=missing)
        yield from hand.rise(0.3 * hand.manner.lift_m)
        missing = wrapped(task.direction - yaw_of(world.object_pose(0)))
        yield from hand.lower_onto(None, place_m, hand.yaw + missing, 0.0)


_PLANS: dict[str, Callable[[Hand], Targets]] = {
    "touch": touch,
    "pick_up": pick_up,
    "put_on": put_on,
    "stack": put_on,
    "turn": turn,
}
