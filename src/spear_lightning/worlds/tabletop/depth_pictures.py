"""Pictures of random scenes with exact depth, by cameras of many fields of view, heights and distances.

What a policy's own cameras see is among them; a network that has seen these alone would know one focal length.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spear_lightning.errors import ConfigError
from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.labeling.depth_pictures import PARTS, write_shard
from spear_lightning.worlds.tabletop.experts import Expert
from spear_lightning.worlds.tabletop.ray_camera import CameraPose, RayCamera
from spear_lightning.worlds.tabletop.ray_renderer import RayRenderer
from spear_lightning.worlds.tabletop.scene import AREA_HIGH_M, AREA_LOW_M, look_at
from spear_lightning.worlds.tabletop.shards_in_parallel import shards_in_parallel
from spear_lightning.worlds.tabletop.tasks import TASKS
from spear_lightning.worlds.tabletop.world import Tabletop

PLAN = "plan.json"
"""What a folder of pictures is to hold."""

VIEWS = 5
"""Pictures of a scene, each by another camera at another moment; a shard holds whole scenes."""

FIELD_OF_VIEW = (np.deg2rad(34), np.deg2rad(70))
"""Least and greatest vertical field of view, radians."""

DISTANCE_M = (0.25, 1.0)
"""Least and greatest distance of a camera from what it looks at; its logarithm is uniform in between."""

ELEVATION = (np.deg2rad(20), np.deg2rad(70))
"""How far down a camera looks, radians."""

ROLL = np.deg2rad(5)
"""Cameras are turned about their axis by at most this."""

DISTRACTORS = (1, 4)
"""Fewest and most objects besides the task's own."""

CLOSEST_M = 0.06
"""A camera that sees something nearer is in the gripper's way, and placed again."""

STEPS_BETWEEN = 6
"""The expert acts for less than this many steps between pictures."""


def write_depth_pictures(
    out: str | Path,
    pictures: int,
    seed: int = 0,
    size: tuple[int, int] = (168, 126),
    processes: int | None = None,
    shard_size: int = 500,
) -> Path:
    """Write pictures in parallel, with a progress bar; shards that are there already stay.

    Args:
        out: Folder of the store (see `labeling.depth_pictures`).
        pictures: How many.
        seed: Two runs with one seed give the same pictures, however many processes there are.
        size: Width and height of a picture.
        processes: Default: one per core.
        shard_size: Pictures of a shard, a multiple of `VIEWS`; each is written by one process.

    Returns:
        The folder.

    Raises:
        ConfigError: If there is nothing to write, scenes would be cut in two, or the folder holds other pictures.
    """
    folder = Path(out)
    plan = check_depth_pictures(folder, pictures, seed, size, shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{PLAN}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(plan))
    os.replace(temporary, folder / PLAN)
    shards = [range(start, min(start + shard_size, pictures)) for start in range(0, pictures, shard_size)]
    missing = [
        shard for shard in shards if not (folder / f"{shard.start // shard_size:05d}.{PARTS[-1]}.npy").exists()
    ]
    write = partial(_write, folder, seed, size, shard_size)
    for _ in shards_in_parallel(write, missing, processes or os.cpu_count() or 1, "pictures with depth"):
        pass
    return folder


def check_depth_pictures(
    folder: Path, pictures: int, seed: int = 0, size: tuple[int, int] = (168, 126), shard_size: int = 500
) -> dict[str, Any]:
    """Refuse what `write_depth_pictures` cannot do, before it writes; returns what the folder is to hold."""
    if pictures < 1 or pictures % VIEWS or shard_size % VIEWS:
        raise ConfigError(
            "Pictures come in whole scenes",
            where="depth_pictures",
            found=f"{pictures} in shards of {shard_size}",
            expected=f"positive multiples of {VIEWS}",
        )
    plan = {"pictures": pictures, "seed": seed, "size": list(size), "shard_size": shard_size, "views": VIEWS}
    path = folder / PLAN
    there = json.loads(path.read_text()) if path.is_file() else None
    if there is None and any(folder.glob("*.npy")):
        there = {"pictures": "of which it is not known how they were made"}
    if there is not None and there != plan:
        raise ConfigError(
            "The folder holds other pictures",
            where=folder,
            found=there,
            expected=plan,
            remedy="write into another folder, or delete this one",
        )
    return plan


def _write(folder: Path, seed: int, size: tuple[int, int], shard_size: int, numbers: range) -> None:
    scenes = [
        scene_pictures(seed, number, size) for number in range(numbers.start // VIEWS, numbers.stop // VIEWS)
    ]
    images, depth, focal = (np.concatenate(part) for part in zip(*scenes, strict=True))
    write_shard(folder, numbers.start // shard_size, images, depth, focal)


def scene_pictures(
    seed: int, number: int, size: tuple[int, int], views: int = VIEWS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take pictures of one random scene.

    Args:
        seed: Of the store.
        number: Of the scene in it.
        size: Width and height.
        views: How many pictures.

    Returns:
        uint8 RGB (views, 3, height, width); float32 depth (views, height, width), metres, inf where nothing is;
        float32 focal lengths (views,) in image widths.
    """
    rng = np.random.default_rng([seed, number])
    world = Tabletop({}, DISTRACTORS)
    world.reset(list(TASKS)[rng.integers(len(TASKS))], int(rng.integers(2**40)))
    expert = Expert(world, rng)
    images, depths, focals = [], [], []
    for _ in range(views):
        for _ in range(rng.integers(STEPS_BETWEEN)):
            world.act(expert.act())
        intrinsics, pose, depth_HW = _free_view(world, rng, size)
        renderer = RayRenderer(world.model, world.scene.look, {"view": intrinsics})
        images.append(renderer.render(world.data, {"view": pose}, rng)["view"].transpose(2, 0, 1))
        depths.append(depth_HW)
        focals.append(intrinsics.fx / intrinsics.width)
    return np.stack(images), np.stack(depths), np.array(focals, np.float32)


def _free_view(
    world: Tabletop, rng: np.random.Generator, size: tuple[int, int]
) -> tuple[PixelIntrinsics, CameraPose, np.ndarray]:
    while True:
        intrinsics, pose = draw_view(rng, *size)
        depth_HW = RayCamera(world.model, intrinsics).see(world.data, pose).depth_HW
        if CLOSEST_M < depth_HW.min() < np.inf:
            return intrinsics, pose, depth_HW


def draw_view(rng: np.random.Generator, width: int, height: int) -> tuple[PixelIntrinsics, CameraPose]:
    """Draw a camera somewhere above the table that looks at where objects lie."""
    focal = height / 2 / np.tan(rng.uniform(*FIELD_OF_VIEW) / 2)
    intrinsics = PixelIntrinsics(focal, focal, width / 2, height / 2, width, height)
    target_m = np.array([*rng.uniform(AREA_LOW_M, AREA_HIGH_M), rng.uniform(0, 0.1)])
    azimuth, elevation = rng.uniform(-np.pi, np.pi), rng.uniform(*ELEVATION)
    away = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    position_m = target_m + np.exp(rng.uniform(*np.log(DISTANCE_M))) * away
    rotation = look_at(position_m, target_m, np.array([0.0, 0.0, 1.0]))
    roll = rng.uniform(-ROLL, ROLL)
    turn = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    return intrinsics, CameraPose(position_m, rotation @ turn)
