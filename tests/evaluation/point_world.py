"""A world without physics, with the interface of the tabletop's, for tests that are about everything around it.

A point follows the targets. The task is done while the point is to the left of where it started; the picture shows
where it is. The shards' processes import this file by name.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from spear_lightning.worlds.tabletop.benchmark import TabletopBenchmark


class PointWorld:
    max_steps = 12

    def __init__(self, cameras: dict[str, tuple[int, int]]) -> None:
        self.cameras = cameras

    def reset(self, task: str, seed: int) -> Any:
        rng = np.random.default_rng([seed, len(task)])
        self.start = rng.uniform([0.2, -0.3, 0.0], [0.5, 0.3, 0.4])
        self.instruction = f"{task} the thing"
        self.state = np.array([*self.start, 0, 0, 0, 1, 1], np.float32)
        self.success = False
        return self.observe()

    def act(self, target: np.ndarray) -> None:
        assert target.shape == (8,)
        self.state = np.asarray(target, np.float32)
        self.success = bool(self.state[1] > self.start[1] + 0.025)

    def step(self, target: np.ndarray) -> Any:
        self.act(target)
        return self.observe()

    def observe(self) -> Any:
        colour = (np.abs(self.state[:3]) * 400 % 256).astype(np.uint8)
        images = {name: np.tile(colour, (height, width, 1)) for name, (width, height) in self.cameras.items()}
        return SimpleNamespace(images=images, state=self.state, instruction=self.instruction)


class Leftwards:
    def __init__(self, world: PointWorld, step_m: float) -> None:
        self.target, self.step_m = world.state.astype(np.float64), step_m

    def act(self) -> np.ndarray:
        self.target[1] += self.step_m
        return self.target.copy()


class PointBenchmark(TabletopBenchmark):
    def all_tasks(self) -> list[str]:
        return ["shift", "nudge"]

    def make_world(self) -> PointWorld:
        return PointWorld(self.cameras)

    def world_facts(self) -> dict[str, Any]:
        return {"world": "point", "world_version": "1", "simulator": "none", "control_hz": 5.0, "max_steps": 12}

    def make_acting(self, rng: np.random.Generator) -> Leftwards:
        return Leftwards(self._world, 0.01 if self.controller == "expert" else -0.01)


class BrokenBenchmark(PointBenchmark):
    def step(self, action: dict[str, Any]) -> Any:
        if self._number == 1:
            raise RuntimeError("the table fell over")
        return super().step(action)
