"""Pictures of random scenes with exact labels, as a label store (see `labeling.store`)."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np

from spear_lightning.errors import ConfigError
from spear_lightning.labeling.records import ImageLabel
from spear_lightning.labeling.store import LabelWriter
from spear_lightning.worlds.tabletop.demonstrations import encoded
from spear_lightning.worlds.tabletop.experts import Expert
from spear_lightning.worlds.tabletop.labels import SOURCE, ground_truth, image_label
from spear_lightning.worlds.tabletop.shards_in_parallel import shards_in_parallel
from spear_lightning.worlds.tabletop.tasks import TASKS
from spear_lightning.worlds.tabletop.world import Tabletop

CAMERAS = ("primary", "secondary")
"""Cameras of the pictures; which one is drawn at random."""

DISTRACTORS = (0, 4)
"""Fewest and most objects besides the task's own. Where there are few, a model can learn to find objects before it
can read which one is meant: all objects of a picture lie about as far apart as all objects of all pictures."""

LATEST_MOMENT = 12
"""The expert of a random task acts for less than this many steps before the picture is taken."""

LEAST_VISIBLE = 0.15
"""Objects of which less is visible get no label: nobody could tell what they are."""


def write_labelled_images(
    out: str | Path,
    images: int,
    seed: int = 0,
    size: tuple[int, int] = (112, 84),
    processes: int | None = None,
    shard_size: int = 200,
) -> Path:
    """Write pictures with exact labels in parallel, with a progress bar.

    Args:
        out: Folder of the label store to be.
        images: How many.
        seed: Two runs with one seed give the same labels and pictures, however many processes there are.
        size: Width and height of a picture.
        processes: Default: one per core.
        shard_size: Images of a shard; each is written by one process.

    Returns:
        The folder.

    Raises:
        ConfigError: If there is nothing to write, or the folder already holds labels.
    """
    folder = Path(out)
    check_labelled_images(folder, images)
    folder.mkdir(parents=True, exist_ok=True)
    shards = [range(start, min(start + shard_size, images)) for start in range(0, images, shard_size)]
    write = partial(_write_shard, folder, seed, size, shard_size)
    for _ in shards_in_parallel(write, shards, processes or os.cpu_count() or 1, "labelled images"):
        pass
    return folder


def check_labelled_images(folder: Path, images: int) -> None:
    """Refuse what `write_labelled_images` cannot do, before anything is written."""
    if images < 1:
        raise ConfigError("There are no images to write", where="images", found=images, expected="at least 1")
    if any(folder.glob("*.parquet")):
        raise ConfigError("The folder already holds labels", where=folder, remedy="name another one, or delete it")


def _write_shard(folder: Path, seed: int, size: tuple[int, int], shard_size: int, numbers: range) -> None:
    with LabelWriter(folder, shard_size, first_shard=numbers.start // shard_size) as writer:
        for number in numbers:
            label, image_HW3 = labelled_image(seed, number, size)
            writer.add(label, encoded(image_HW3))


def labelled_image(seed: int, number: int, size: tuple[int, int]) -> tuple[ImageLabel, np.ndarray]:
    """Make one labelled picture: a random scene at a random moment of a random task.

    Args:
        seed: Of the data set.
        number: Of the picture in it.
        size: Width and height.

    Returns:
        The label (metric), and the picture, uint8 RGB (height, width, 3).
    """
    rng = np.random.default_rng([seed, number])
    camera = CAMERAS[rng.integers(len(CAMERAS))]
    task = list(TASKS)[rng.integers(len(TASKS))]
    world = Tabletop({camera: size}, DISTRACTORS)
    world.reset(task, int(rng.integers(2**40)))
    expert = Expert(world, rng)
    for _ in range(rng.integers(LATEST_MOMENT)):
        world.act(expert.act())
    picture = world.observe().images[camera]
    truth = ground_truth(world.scene, world.data, camera)
    return image_label(truth, f"{SOURCE}-{seed}-{number:06d}", rng, LEAST_VISIBLE), picture
