"""The tasks, from easy to hard: what lies on the table, what the robot is told, and one test of success each.

Success is judged from the state of the physics alone. The first object of a task is the one to be moved or
touched, the second, if any, the one it is put on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from spear_lightning.worlds.tabletop.objects import COLOURS, GRASPABLE, TARGETS, ObjectSpec, make_object

DIRECTIONS = {"away": 0.0, "left": np.pi / 2, "the robot": np.pi, "right": -np.pi / 2}
"""Direction as the robot is told it -> yaw in the base frame (x points away from the robot, y to its left)."""


class TableState(Protocol):
    """What a success test may look at; `Tabletop` provides it. Poses are in the base frame."""

    def object_pose(self, index: int) -> np.ndarray:
        """Return the pose of an object, float64 (7,) [x m, q xyzw]."""

    def gripper_touches(self, index: int) -> bool:
        """Whether the gripper is in contact with an object."""

    def objects_touch(self, first: int, second: int) -> bool:
        """Whether two objects are in contact."""

    def on_table(self, index: int) -> bool:
        """Whether an object is in contact with the table."""

    def is_held(self, index: int) -> bool:
        """Whether the gripper holds an object."""


@dataclass
class Task(ABC):
    """One episode's task.

    Attributes:
        objects: What the task is about, the one to be moved first.
        instruction: What the robot is told.
        yaws: For each object how it lies turned about the vertical, radians.
    """

    name: ClassVar[str]
    max_steps: ClassVar[int]
    distractor_nouns: ClassVar[tuple[str, ...]] = GRASPABLE

    objects: tuple[ObjectSpec, ...]
    instruction: str
    yaws: tuple[float, ...]

    @classmethod
    @abstractmethod
    def sample(cls, rng: np.random.Generator) -> Task:
        """Draw objects and instruction."""

    def begin(self, state: TableState) -> None:
        """Remember what success is measured against; called once the objects have come to rest."""
        self._start = np.array([state.object_pose(index)[:3] for index in range(len(self.objects))])

    @abstractmethod
    def succeeded(self, state: TableState) -> bool:
        """Return whether the task is done in this state; called once after every control step."""

    def _moved_m(self, state: TableState, index: int) -> float:
        return float(np.linalg.norm(state.object_pose(index)[:3] - self._start[index]))

    def _lifted_m(self, state: TableState, index: int) -> float:
        return float(state.object_pose(index)[2] - self._start[index][2])


@dataclass
class Touch(Task):
    """Touch the object and stay at it: two control steps in contact, without pushing it 1 cm away."""

    name = "touch"
    max_steps = 40

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Touch:
        """Draw objects and instruction."""
        thing = _draw(rng, GRASPABLE)
        return cls((thing,), f"touch the {thing.name}", (_any_yaw(rng),))

    def begin(self, state: TableState) -> None:
        """Start with no contact."""
        super().begin(state)
        self._steps_in_contact = 0

    def succeeded(self, state: TableState) -> bool:
        """Return whether the gripper has stayed in contact with the object."""
        self._steps_in_contact = self._steps_in_contact + 1 if state.gripper_touches(0) else 0
        return self._steps_in_contact >= 2 and self._moved_m(state, 0) < 0.01


@dataclass
class PickUp(Task):
    """Lift the object by 6 cm and hold it."""

    name = "pick_up"
    max_steps = 50

    @classmethod
    def sample(cls, rng: np.random.Generator) -> PickUp:
        """Draw objects and instruction."""
        thing = _draw(rng, GRASPABLE)
        return cls((thing,), f"pick up the {thing.name}", (_any_yaw(rng),))

    def succeeded(self, state: TableState) -> bool:
        """Return whether the object is held well above where it lay."""
        return state.is_held(0) and self._lifted_m(state, 0) > 0.06


@dataclass
class PutOn(Task):
    """Put the object on the target and let go: it rests on it, its middle above it."""

    name = "put_on"
    max_steps = 70

    @classmethod
    def sample(cls, rng: np.random.Generator) -> PutOn:
        """Draw objects and instruction."""
        thing = _draw(rng, GRASPABLE)
        target = _draw(rng, TARGETS, but=(thing,))
        return cls((thing, target), f"put the {thing.name} on the {target.name}", (_any_yaw(rng), _any_yaw(rng)))

    def succeeded(self, state: TableState) -> bool:
        """Return whether the object lies on the target, let go of."""
        return _rests_on(state, self.objects[1]) and not state.gripper_touches(0)


@dataclass
class Stack(PutOn):
    """Stack one block on another and let go; judged as putting something on something."""

    name = "stack"

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Stack:
        """Draw objects and instruction."""
        top = _draw(rng, ("block",))
        bottom = _draw(rng, ("block",), but=(top,))
        instruction = f"stack the {top.name} on the {bottom.name}"
        return cls((top, bottom), instruction, (_any_yaw(rng), _any_yaw(rng)))


@dataclass
class Turn(Task):
    """Turn the object until its front faces a direction within 15 degrees, and let go of it on the table.

    Attributes:
        direction: Yaw in the base frame that the object's +x is to point along, radians.
    """

    name = "turn"
    max_steps = 70
    distractor_nouns = tuple(noun for noun in GRASPABLE if noun != "car")

    direction: float = 0.0

    TOLERANCE: ClassVar[float] = np.deg2rad(15.0)
    LEAST_TURN: ClassVar[float] = np.deg2rad(50.0)
    MOST_TURN: ClassVar[float] = np.deg2rad(120.0)

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Turn:
        """Draw objects and instruction."""
        car = _draw(rng, ("car",))
        word = str(rng.choice(list(DIRECTIONS)))
        turn = rng.uniform(cls.LEAST_TURN, cls.MOST_TURN) * rng.choice([-1.0, 1.0])
        yaw = wrapped(DIRECTIONS[word] - turn)
        return cls((car,), f"turn the {car.name} to face {word}", (yaw,), DIRECTIONS[word])

    def succeeded(self, state: TableState) -> bool:
        """Return whether the object stands on the table and faces the direction, let go of."""
        pose = state.object_pose(0)
        error = abs(wrapped(yaw_of(pose) - self.direction))
        upright = up_of(pose) > np.cos(np.deg2rad(20))
        return bool(error < self.TOLERANCE and upright and state.on_table(0) and not state.gripper_touches(0))


TASKS: dict[str, type[Task]] = {task.name: task for task in (Touch, PickUp, PutOn, Stack, Turn)}
"""Name -> task, from easy to hard."""


def yaw_of(pose: np.ndarray) -> float:
    """Return the direction of a pose's x axis seen from above, radians."""
    x, y, z, w = pose[3:7]
    return float(np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z)))


def up_of(pose: np.ndarray) -> float:
    """Return the vertical component of a pose's z axis: 1 upright, -1 upside down."""
    x, y = pose[3:5]
    return float(1 - 2 * (x * x + y * y))


def wrapped(angle: float) -> float:
    """Return an angle in [-pi, pi)."""
    return float((angle + np.pi) % (2 * np.pi) - np.pi)


def draw_distractors(task: Task, count: int, rng: np.random.Generator) -> list[ObjectSpec]:
    """Return objects that the task is not about; none is named as another object in the scene."""
    objects = list(task.objects)
    for _ in range(count):
        objects.append(_draw(rng, task.distractor_nouns, but=tuple(objects)))
    return objects[len(task.objects) :]


def _draw(rng: np.random.Generator, nouns: tuple[str, ...], but: tuple[ObjectSpec, ...] = ()) -> ObjectSpec:
    taken = {thing.name for thing in but}
    names = [(noun, colour) for noun in nouns for colour in COLOURS if f"{colour} {noun}" not in taken]
    noun, colour = names[int(rng.integers(len(names)))]
    return make_object(noun, colour, rng)


def _any_yaw(rng: np.random.Generator) -> float:
    return float(rng.uniform(-np.pi, np.pi))


def _rests_on(state: TableState, support: ObjectSpec) -> bool:
    """Whether object 0 touches object 1, not the table, with its middle above object 1's outline."""
    top, bottom = state.object_pose(0), state.object_pose(1)
    yaw = yaw_of(bottom)
    offset = top[:2] - bottom[:2]
    along = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]]) @ offset
    over = bool(np.all(np.abs(along) <= np.array(support.half_extents_m[:2])))
    return over and top[2] > bottom[2] and state.objects_touch(0, 1) and not state.on_table(0)
