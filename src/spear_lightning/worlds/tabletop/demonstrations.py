"""Demonstrations: episodes of the scripted experts as an RLDS data set that tensorflow-datasets reads too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg

from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.rlds_writer import (
    STEP_ENDS,
    RldsLayout,
    jpeg,
    scalar,
    step_ends,
    text,
    vector,
    write_description,
    write_shard,
)
from spear_lightning.worlds.tabletop.experts import Expert
from spear_lightning.worlds.tabletop.scene import CAMERAS
from spear_lightning.worlds.tabletop.shards_in_parallel import shards_in_parallel
from spear_lightning.worlds.tabletop.tasks import TASKS, yaw_of
from spear_lightning.worlds.tabletop.world import Observation, Tabletop

NAME, VERSION = "tabletop", "1.0.0"

IMAGE_SIZES = {"primary": (112, 84), "secondary": (112, 84), "wrist": (56, 56)}
"""Camera name -> (width, height) in the quickstart's data."""

EPISODES_PER_SHARD = 32

JPEG_QUALITY = 92

STEPS_AFTER_SUCCESS = 5
"""The expert goes on for a second, so that a policy learns to leave alone what is done."""

MOST_ATTEMPTS = 20

JOINED_LATE = 0.4
"""Share of the episodes whose recording starts in the middle, just after the gripper was knocked off course."""

_KNOCK_LOW, _KNOCK_HIGH = np.array([-0.05, -0.05, -0.03, -0.4]), np.array([0.05, 0.05, 0.05, 0.4])
_LATEST_START = 20


@dataclass(frozen=True)
class DemonstrationPlan:
    """Which demonstrations are made; two plans that are equal give the same bytes.

    Attributes:
        episodes: How many.
        tasks: Keys of `TASKS`; episodes take turns.
        image_sizes: Camera name -> (width, height).
        seed: Episodes of one seed are the same, whatever their number.
        distractors: Fewest and most objects that a task is not about.
        plain: See `Tabletop`.
    """

    episodes: int
    tasks: tuple[str, ...] = tuple(TASKS)
    image_sizes: Mapping[str, tuple[int, int]] = field(default_factory=lambda: IMAGE_SIZES)
    seed: int = 0
    distractors: tuple[int, int] = (1, 2)
    plain: bool = False

    def layout(self) -> RldsLayout:
        """Return the features of an episode."""
        images = (jpeg(f"observation/{name}", height, width) for name, (width, height) in self.image_sizes.items())
        return RldsLayout(
            NAME,
            VERSION,
            (
                *images,
                vector("observation/state", 8),
                vector("action", 8),
                text("language_instruction"),
                *STEP_ENDS,
                scalar("episode_metadata/episode_id", "int32", per_step=False),
                scalar("episode_metadata/seed", "int64", per_step=False),
                text("episode_metadata/task", per_step=False),
            ),
        )

    def shards(self) -> list[range]:
        """Return the episodes of each shard."""
        starts = range(0, self.episodes, EPISODES_PER_SHARD)
        return [range(start, min(start + EPISODES_PER_SHARD, self.episodes)) for start in starts]


def write_demonstrations(root: Path, plan: DemonstrationPlan, processes: int | None = None) -> Path:
    """Write `root/tabletop/1.0.0` in parallel, with a progress bar.

    Args:
        root: The data root to be.
        plan: What is made.
        processes: Default: one per core.

    Returns:
        The data set's folder.

    Raises:
        ConfigError: If the plan cannot be carried out, or the folder already holds a data set.
    """
    check_demonstrations(root, plan)
    folder = root / NAME / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    write = partial(_write_shard, folder, plan)
    lengths = dict(shards_in_parallel(write, plan.shards(), processes or os.cpu_count() or 1, "demonstrations"))
    about = "Scripted experts in the tabletop world of spear-lightning."
    write_description(folder, plan.layout(), {"train": [lengths[number] for number in sorted(lengths)]}, about)
    return folder


def check_demonstrations(root: Path, plan: DemonstrationPlan) -> None:
    """Refuse what `write_demonstrations` cannot do, before anything is written or a process is started."""
    fewest, most = plan.distractors
    checks = (
        ("tasks", plan.tasks, bool(plan.tasks) and set(plan.tasks) <= set(TASKS), f"of {list(TASKS)}"),
        ("episodes", plan.episodes, plan.episodes >= 1, "at least 1"),
        ("cameras", list(plan.image_sizes), set(plan.image_sizes) <= set(CAMERAS), f"of {list(CAMERAS)}"),
        ("distractors", plan.distractors, 0 <= fewest <= most, "0 <= fewest <= most"),
        ("seed", plan.seed, plan.seed >= 0, "at least 0"),
    )
    for where, found, good, expected in checks:
        if not good:
            raise ConfigError("These demonstrations cannot be made", where=where, found=found, expected=expected)
    folder = root / NAME / VERSION
    if (folder / "dataset_info.json").exists():
        raise ConfigError(
            "The folder already holds demonstrations", where=folder, remedy="name another one, or delete it"
        )


def _write_shard(folder: Path, plan: DemonstrationPlan, episodes: range) -> list[int]:
    """Write one shard; returns its episodes' lengths in bytes."""
    layout, world = plan.layout(), Tabletop(plan.image_sizes, plan.distractors, plan.plain)
    payloads = (layout.serialize(demonstration(world, plan, episode)) for episode in episodes)
    number = episodes.start // EPISODES_PER_SHARD
    return write_shard(folder, layout, "train", number, len(plan.shards()), payloads)


def demonstration(
    world: Tabletop, plan: DemonstrationPlan, episode: int
) -> dict[str, np.ndarray | Sequence[bytes] | Sequence[str]]:
    """Run the expert until it succeeds, and return that episode as the layout's features.

    Args:
        world: A world with the plan's cameras.
        plan: What is made.
        episode: Number of the episode.

    Raises:
        RuntimeError: If the expert fails time and again, which its tests exclude.
    """
    task = plan.tasks[episode % len(plan.tasks)]
    for attempt in range(MOST_ATTEMPTS):
        seed = episode_seed(plan.seed, episode, attempt)
        observations, targets, success = _act_out(world, task, seed)
        if success:
            return _features(plan, observations, targets, episode, seed, task)
    raise RuntimeError(f"the expert failed {MOST_ATTEMPTS} times in episode {episode} ({task})")


def episode_seed(seed: int, episode: int, attempt: int = 0) -> int:
    """Return the world's seed of a demonstration; below 2**40, where seeds for evaluation begin."""
    return int(np.random.SeedSequence([seed, episode, attempt]).generate_state(1, np.uint64)[0] % 2**40)


def _act_out(world: Tabletop, task: str, seed: int) -> tuple[list[Observation], list[np.ndarray], bool]:
    """Run the expert; returns what was seen, the targets it gave, and whether it succeeded."""
    observation = world.reset(task, seed)
    rng = np.random.default_rng([seed, 1])
    expert = Expert(world, rng)
    if rng.random() < JOINED_LATE:
        observation = _knocked_off(world, expert, rng)
    observations: list[Observation] = []
    targets: list[np.ndarray] = []
    done, left = False, STEPS_AFTER_SUCCESS
    while left > 0 and len(targets) < world.max_steps:
        observations.append(observation)
        targets.append(expert.act())
        observation = world.step(targets[-1])
        left -= done
        done |= world.success
    return observations, targets, world.success


def _knocked_off(world: Tabletop, expert: Expert, rng: np.random.Generator) -> Observation:
    """Let the expert begin, then push the gripper somewhere else; nothing of this is recorded.

    What is recorded afterwards shows how to get back from where a policy's own errors may lead, without showing
    the error itself.
    """
    for _ in range(int(rng.integers(_LATEST_START))):
        if world.success:
            break
        world.act(expert.act())
    target = world.gripper.target
    x, y, z, turn = rng.uniform(_KNOCK_LOW, _KNOCK_HIGH)
    yaw = yaw_of(target) + turn
    position = target[:3] + np.array([x, y, z])
    knock = np.array([*position, 0.0, 0.0, np.sin(yaw / 2), np.cos(yaw / 2), expert.openness])
    world.act(knock)
    return world.step(knock)


def _features(
    plan: DemonstrationPlan,
    observations: list[Observation],
    targets: list[np.ndarray],
    episode: int,
    seed: int,
    task: str,
) -> dict[str, np.ndarray | Sequence[bytes] | Sequence[str]]:
    steps = len(observations)
    images: dict[str, Sequence[bytes]] = {
        f"observation/{name}": [encoded(observation.images[name]) for observation in observations]
        for name in plan.image_sizes
    }
    return {
        **images,
        "observation/state": np.stack([observation.state for observation in observations]),
        "action": np.stack(targets).astype(np.float32),
        "language_instruction": [observation.instruction for observation in observations],
        **step_ends(steps),
        "episode_metadata/episode_id": np.array([episode]),
        "episode_metadata/seed": np.array([seed]),
        "episode_metadata/task": [task],
    }


def encoded(image_HW3: np.ndarray) -> bytes:
    """Return a picture as JPEG without chroma subsampling: small coloured objects keep their colour."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image_HW3), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444"
    )
