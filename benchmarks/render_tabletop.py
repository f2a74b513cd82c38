"""Milliseconds per moment of the tabletop world's renderer against MuJoCo's bare ray casting, on the same states.

A moment is one picture of each camera at the sizes of the quickstart. The states are those of expert episodes. The
limit is what MuJoCo needs to cast one ray for each pixel and nothing else: no shadow, no colour, no noise.

    .venv/bin/python benchmarks/render_tabletop.py
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import mujoco
import numpy as np
from rich.console import Console
from rich.table import Table

from spear_lightning.worlds.tabletop.experts import Expert
from spear_lightning.worlds.tabletop.ray_camera import CameraPose, RayCaster, pixel_rays
from spear_lightning.worlds.tabletop.ray_renderer import RayRenderer
from spear_lightning.worlds.tabletop.scene import Scene
from spear_lightning.worlds.tabletop.tasks import TASKS
from spear_lightning.worlds.tabletop.world import Tabletop

SIZES = {"primary": (112, 84), "secondary": (112, 84), "wrist": (56, 56)}

console = Console(width=120)


@dataclass
class Episode:
    """The states of an episode."""

    scene: Scene
    positions: list[np.ndarray] = field(default_factory=list)

    def play(self, picture: Callable[[mujoco.MjData, dict[str, CameraPose]], object]) -> float:
        """Set up each state, take its pictures, and return the processor time of the pictures, ms per moment."""
        data, spent = mujoco.MjData(self.scene.model), 0.0
        for position in self.positions:
            data.qpos[:] = position
            mujoco.mj_forward(self.scene.model, data)
            poses = {name: view.pose(data) for name, view in self.scene.cameras.items()}
            start = time.process_time()
            picture(data, poses)
            spent += time.process_time() - start
        return 1000 * spent / len(self.positions)


def record(episodes: int, steps: int) -> list[Episode]:
    world = Tabletop(SIZES)
    recorded = []
    for seed in range(episodes):
        world.reset(list(TASKS)[seed % len(TASKS)], seed)
        expert = Expert(world, np.random.default_rng(seed))
        episode = Episode(world.scene)
        for _ in range(steps):
            world.act(expert.act())
            episode.positions.append(world.data.qpos.copy())
        recorded.append(episode)
    return recorded


def bare_rays(scene: Scene) -> Callable[[mujoco.MjData, dict[str, CameraPose]], None]:
    """Return a picture-taker that casts one ray per pixel, one call a camera, and throws away what it hits."""
    rays = {name: pixel_rays(view.intrinsics) for name, view in scene.cameras.items()}
    caster = RayCaster(scene.model)

    def picture(data: mujoco.MjData, poses: dict[str, CameraPose]) -> None:
        for name, pose in poses.items():
            caster.cast(data, pose.position_m, rays[name] @ pose.rotation.T, normals=False)

    return picture


def rendered(
    scene: Scene, cameras: list[str], noise: float, fixed: bool
) -> Callable[[mujoco.MjData, dict[str, CameraPose]], object]:
    """Return a picture-taker; without `fixed` it may not know that a camera stands still."""
    intrinsics = {name: scene.cameras[name].intrinsics for name in cameras}
    rng = np.random.default_rng(0)
    kept = RayRenderer(scene.model, scene.look, intrinsics, noise=noise)

    def picture(data: mujoco.MjData, poses: dict[str, CameraPose]) -> object:
        renderer = kept if fixed else RayRenderer(scene.model, scene.look, intrinsics, noise=noise)
        return renderer.render(data, {name: poses[name] for name in cameras}, rng)

    return picture


def measure(episodes: list[Episode], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Return for each contender its ms per moment, and its ratios to the limit measured just before it."""
    contenders: dict[str, Callable[[Scene], Callable]] = {
        "all cameras": lambda scene: rendered(scene, list(SIZES), 2.0, True),
        "all cameras, no noise": lambda scene: rendered(scene, list(SIZES), 0.0, True),
        "all cameras, nothing remembered": lambda scene: rendered(scene, list(SIZES), 2.0, False),
        "primary alone": lambda scene: rendered(scene, ["primary"], 2.0, True),
        "wrist alone": lambda scene: rendered(scene, ["wrist"], 2.0, True),
    }
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ["limit", *contenders]}
    for _ in range(rounds):
        for episode in episodes:
            for name, make in contenders.items():
                limit = episode.play(bare_rays(episode.scene))
                spent = episode.play(make(episode.scene))
                times["limit"][0].append(limit)
                times["limit"][1].append(1.0)
                times[name][0].append(spent)
                times[name][1].append(spent / limit)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with console.status("episodes of the expert"):
        episodes = record(options.episodes, options.steps)
    with console.status("measuring"):
        times = measure(episodes, options.rounds)
    table = Table("CPU ms per moment", "median", "best", "times the limit", title="One picture of each camera")
    for name, (spent, ratios) in times.items():
        label = "limit: bare mj_multiRay, all cameras" if name == "limit" else name
        middle = f"{statistics.median(ratios):.2f}"
        table.add_row(label, f"{statistics.median(spent):.2f}", f"{min(spent):.2f}", middle)
    console.print(table)
    sizes = ", ".join(f"{name} {width}x{height}" for name, (width, height) in SIZES.items())
    console.print(f"{sizes}; {options.episodes} episodes x {options.steps} moments, {options.rounds} rounds.")
    console.print(
        f"Python {platform.python_version()}, NumPy {np.__version__}, MuJoCo {mujoco.__version__}, "
        f"{os.cpu_count()} cores, load {load:.1f} before. Processor time of one process."
    )


if __name__ == "__main__":
    main()
