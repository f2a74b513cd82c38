"""The random policy: the row of a results table that shows what success by chance would be."""

from __future__ import annotations

import numpy as np

from spear_lightning.worlds.tabletop.world import WORKSPACE_HIGH_M, WORKSPACE_LOW_M

_STEP_M, _STEP_RADIANS = 0.04, 0.3
_STEPS_PER_GOAL = 12
_HIGHEST_M = 0.15


class RandomTargets:
    """Moves smoothly from one random pose to another, over the table.

    A goal is a uniform position above the table up to a height of 15 cm, where the objects are, a uniform yaw
    within a quarter turn either way with the fingers pointing down, and an open or closed gripper with equal
    chance. The tool goes towards it by at most 4 cm and 0.3 rad a control step, the pace of a demonstration, and
    after 12 steps (2.4 s) to another.

    Args:
        state: (8,) where the tool is at the start, [x m, q xyzw, openness] in the base frame.
        rng: Source of the goals.
    """

    def __init__(self, state: np.ndarray, rng: np.random.Generator) -> None:
        self._position = np.asarray(state[:3], np.float64)
        self._yaw = 2 * float(np.arctan2(state[5], state[6]))
        self._rng = rng
        self._left = 0

    def act(self) -> np.ndarray:
        """Return the target of the next control step, float64 (8,) [x, q xyzw, openness] in the base frame."""
        if self._left == 0:
            self._goal = self._rng.uniform(WORKSPACE_LOW_M, [*WORKSPACE_HIGH_M[:2], _HIGHEST_M])
            self._goal_yaw = self._rng.uniform(-np.pi / 2, np.pi / 2)
            self._openness = float(self._rng.integers(2))
            self._left = _STEPS_PER_GOAL
        self._left -= 1
        way, turn = self._goal - self._position, self._goal_yaw - self._yaw
        self._position = self._position + way * min(1.0, _STEP_M / max(float(np.linalg.norm(way)), 1e-9))
        self._yaw += float(np.clip(turn, -_STEP_RADIANS, _STEP_RADIANS))
        half = self._yaw / 2
        return np.array([*self._position, 0.0, 0.0, np.sin(half), np.cos(half), self._openness])
