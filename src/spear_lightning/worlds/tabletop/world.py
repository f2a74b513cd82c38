"""The tabletop world: reset to a task and a seed, step with absolute end-effector targets, ask for success."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mujoco
import numpy as np

from spear_lightning.errors import ConfigError, ShapeError
from spear_lightning.worlds.tabletop.gripper import FINGERS, Gripper, to_pose
from spear_lightning.worlds.tabletop.ray_renderer import RayRenderer
from spear_lightning.worlds.tabletop.scene import TIMESTEP_S, Scene, build_scene, object_name
from spear_lightning.worlds.tabletop.tasks import TASKS, Task

WORLD_VERSION = "1"
"""Changes whenever the same seed and actions would give another episode; part of every result's protocol."""

CONTROL_HZ = 5.0
"""Control steps per second."""

MAX_STEP_M, MAX_STEP_RADIANS = 0.07, 0.6
"""The commanded pose moves by at most this in a control step, as a real arm's controller would allow."""

WORKSPACE_LOW_M, WORKSPACE_HIGH_M = np.array([0.14, -0.28, 0.008]), np.array([0.58, 0.28, 0.40])
"""Where the tool may be commanded to, x, y and z in the base frame."""

_SUBSTEPS = round(1 / CONTROL_HZ / TIMESTEP_S)
_SETTLE_SUBSTEPS = 60
_GRASP_EVERY = 4


@dataclass(frozen=True)
class Observation:
    """What a policy gets to see.

    Attributes:
        images: Camera name -> uint8 RGB (height, width, 3).
        state: float32 (8,), measured tool pose [x m, q xyzw with w >= 0] in the base frame and gripper openness
            in [0, 1].
        instruction: What to do.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: str


class Tabletop:
    """One simulated robot at a table.

    Args:
        image_sizes: Camera name -> (width, height) of its image; cameras that are not named are not rendered.
        distractors: Fewest and most objects that the task is not about.
        plain: One table, one light, cameras always in the same place: an easier world for small experiments.
    """

    scene: Scene
    data: mujoco.MjData
    gripper: Gripper

    def __init__(
        self,
        image_sizes: Mapping[str, tuple[int, int]] | None = None,
        distractors: tuple[int, int] = (1, 2),
        plain: bool = False,
    ) -> None:
        self.image_sizes = dict(image_sizes or {})
        self._distractors = distractors
        self._plain = plain

    def reset(self, task: str, seed: int) -> Observation:
        """Start an episode.

        Args:
            task: A key of `TASKS`.
            seed: Of everything in the episode that is random; not negative.

        Raises:
            ConfigError: If there is no such task.
        """
        if task not in TASKS:
            raise ConfigError("The tabletop world has no such task", found=task, expected=f"one of {list(TASKS)}")
        rng = np.random.default_rng([list(TASKS).index(task), seed])
        self.scene = build_scene(TASKS[task].sample(rng), rng, self.image_sizes, self._distractors, self._plain)
        self.model = self.scene.model
        self.data = mujoco.MjData(self.model)
        self._bodies = [self.model.body(object_name(index)).id for index in range(len(self.scene.objects))]
        self._table = self.model.geom("table").id
        self.gripper = Gripper(self.model, self.data, [object_name(i) for i in range(len(self._bodies))])
        self.gripper.command_opening(1.0)
        for name in FINGERS:
            self.data.qpos[self.model.joint(name).qposadr[0]] = self.model.joint(name).range[1]
        mujoco.mj_step(self.model, self.data, _SETTLE_SUBSTEPS)
        self.steps = 0
        self.success = False
        self.ever_succeeded = False
        self.task.begin(self)
        self._noise = rng.spawn(1)[0]
        cameras = self.scene.cameras
        self._renderer = RayRenderer(self.model, self.scene.look, {n: c.intrinsics for n, c in cameras.items()})
        return self.observe()

    @property
    def task(self) -> Task:
        """The episode's task."""
        return self.scene.task

    @property
    def instruction(self) -> str:
        """What the robot is told."""
        return self.task.instruction

    @property
    def max_steps(self) -> int:
        """Control steps after which the episode has failed."""
        return self.task.max_steps

    @property
    def state(self) -> np.ndarray:
        """Measured tool pose and openness, float32 (8,); see `Observation`."""
        return np.append(self.gripper.pose, self.gripper.openness).astype(np.float32)

    def observe(self) -> Observation:
        """Render the cameras."""
        poses = {name: camera.pose(self.data) for name, camera in self.scene.cameras.items()}
        images = self._renderer.render(self.data, poses, self._noise) if poses else {}
        return Observation(images, self.state, self.instruction)

    def step(self, target: np.ndarray) -> Observation:
        """Move towards a target for one control step of 0.2 s.

        Args:
            target: (8,) tool pose [x m, q xyzw] in the base frame and openness in [0, 1] (below a half closes).
                It is cut to the workspace and to what can be moved in a step.

        Raises:
            ShapeError: If it is not 8 finite numbers, or its quaternion is zero.
        """
        self.act(target)
        return self.observe()

    def act(self, target: np.ndarray) -> None:
        """Do what `step` does without rendering."""
        target = np.asarray(target, np.float64)
        if target.shape != (8,) or not np.isfinite(target).all() or np.linalg.norm(target[3:7]) < 1e-3:
            raise ShapeError(
                "A target is a pose [x, q xyzw] and an openness", found=target, expected="8 finite numbers"
            )
        start = self.gripper.target
        goal = limited_goal(start, target[:7])
        self.gripper.command_opening(float(target[7]))
        for substep in range(0, _SUBSTEPS, _GRASP_EVERY):
            self.gripper.target = _between(start, goal, (substep + _GRASP_EVERY) / _SUBSTEPS)
            mujoco.mj_step(self.model, self.data, _GRASP_EVERY)
            self.gripper.close_grasp()
        self.steps += 1
        self.success = self.task.succeeded(self)
        self.ever_succeeded |= self.success

    def object_pose(self, index: int) -> np.ndarray:
        """Return the pose of an object in the base frame, float64 (7,) [x m, q xyzw]."""
        body = self._bodies[index]
        return to_pose(self.data.xpos[body], self.data.xquat[body])

    def gripper_touches(self, index: int) -> bool:
        """Whether the gripper is in contact with an object."""
        return self.gripper.touches(self._bodies[index])

    def is_held(self, index: int) -> bool:
        """Whether the gripper holds an object."""
        return self.gripper.held == self._bodies[index]

    def objects_touch(self, first: int, second: int) -> bool:
        """Whether two objects are in contact."""
        wanted = {self._bodies[first], self._bodies[second]}
        return any(set(pair) == wanted for pair in self.model.geom_bodyid[self.data.contact.geom].tolist())

    def on_table(self, index: int) -> bool:
        """Whether an object is in contact with the table."""
        pairs = self.data.contact.geom
        bodies = self.model.geom_bodyid[pairs]
        return bool(((pairs == self._table).any(axis=1) & (bodies == self._bodies[index]).any(axis=1)).any())


def limited_goal(start: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Return the pose on the way to a goal that one control step may command, inside the workspace.

    Args:
        start: (7,) pose commanded last.
        goal: (7,) pose wanted; its quaternion need not be of unit norm.
    """
    position = np.clip(goal[:3], WORKSPACE_LOW_M, WORKSPACE_HIGH_M)
    quaternion = goal[3:7] / np.linalg.norm(goal[3:7])
    distance = float(np.linalg.norm(position - start[:3]))
    angle = 2 * np.arccos(np.clip(abs(quaternion @ start[3:7]), 0, 1))
    part = min(1.0, MAX_STEP_M / max(distance, 1e-9), MAX_STEP_RADIANS / max(angle, 1e-9))
    return _between(start, np.concatenate([position, quaternion]), part)


def _between(start: np.ndarray, goal: np.ndarray, part: float) -> np.ndarray:
    """Interpolate poses: positions linearly, rotations by normalised interpolation along the shorter way."""
    pose = (1 - part) * start + part * goal
    if goal[3:] @ start[3:] < 0:
        pose[3:] = (1 - part) * start[3:] - part * goal[3:]
    pose[3:] /= math.sqrt(pose[3:] @ pose[3:])
    return pose
