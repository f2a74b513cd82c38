"""Demonstrations: episodes of the scripted experts as an RLDS data set that tensorflow-datasets reads too."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import simplejpeg

from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.rlds_writer import (
    STEP_FLAGS,
    RldsLayout,
    jpeg,
    scalar,
    text,
    vector,
    write_description,
    write_shard,
)
from spear_lightning.worlds.tabletop.experts import Expert
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
    """

    episodes: int
    tasks: tuple[str, ...] = tuple(TASKS)
    image_sizes: Mapping[str, tuple[int, int]] = field(default_factory=lambda: IMAGE_SIZES)
    seed: int = 0
    distractors: tuple[int, int] = (1, 2)

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
                scalar("discount", "float32"),
                scalar("reward", "float32"),
                *STEP_FLAGS,
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
        ConfigError: If the plan names an unknown task, or the folder already holds a data set.
    """
    unknown = sorted(set(plan.tasks) - set(TASKS))
    if unknown or not plan.tasks or plan.episodes < 1:
        raise ConfigError(
            "These demonstrations cannot be made",
            where="tasks" if unknown or not plan.tasks else "episodes",
            found=unknown or (plan.tasks and plan.episodes),
            expected=f"tasks of {list(TASKS)}, at least one episode",
        )
    folder = root / NAME / VERSION
    if (folder / "dataset_info.json").exists():
        raise ConfigError(
            "The folder already holds demonstrations", where=folder, remedy="name another one, or delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lengths = dict(_with_progress(folder, plan, processes or os.cpu_count() or 1))
    about = "Scripted experts in the tabletop world of spear-lightning."
    write_description(folder, plan.layout(), {"train": [lengths[number] for number in sorted(lengths)]}, about)
    return folder


def _with_progress(folder: Path, plan: DemonstrationPlan, processes: int) -> Iterator[tuple[int, list[int]]]:
    """Write all shards; yields each one's number and its episodes' lengths in bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shards = plan.shards()
    processes = min(processes, len(shards))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("demonstrations", total=plan.episodes)
        if processes == 1:
            for number, shard in enumerate(shards):
                yield number, _write_shard(folder, plan, number)
                progress.advance(task, len(shard))
            return
        # Spawned: a fork of a process that runs torch threads can hang.
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = {pool.submit(_write_shard, folder, plan, number): number for number in range(len(shards))}
            try:
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
                    progress.advance(task, len(shards[waiting[done]]))
            finally:
                for future in waiting:
                    future.cancel()


def _write_shard(folder: Path, plan: DemonstrationPlan, number: int) -> list[int]:
    layout, shards = plan.layout(), plan.shards()
    world = Tabletop(plan.image_sizes, plan.distractors)
    episodes = (layout.serialize(demonstration(world, plan, episode)) for episode in shards[number])
    return write_shard(folder, layout, "train", number, len(shards), episodes)


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
    number = np.arange(steps)
    images: dict[str, Sequence[bytes]] = {
        f"observation/{name}": [encoded(observation.images[name]) for observation in observations]
        for name in plan.image_sizes
    }
    return {
        **images,
        "observation/state": np.stack([observation.state for observation in observations]),
        "action": np.stack(targets).astype(np.float32),
        "language_instruction": [observation.instruction for observation in observations],
        "discount": np.ones(steps, np.float32),
        "reward": (number == steps - 1).astype(np.float32),
        "is_first": number == 0,
        "is_last": number == steps - 1,
        "is_terminal": number == steps - 1,
        "episode_metadata/episode_id": np.array([episode]),
        "episode_metadata/seed": np.array([seed]),
        "episode_metadata/task": [task],
    }


def encoded(image_HW3: np.ndarray) -> bytes:
    """Return a picture as JPEG without chroma subsampling: small coloured objects keep their colour."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image_HW3), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444"
    )
