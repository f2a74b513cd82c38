"""The tabletop as a benchmark: which episodes, when they end, what counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from spear_lightning.worlds.tabletop.benchmark import FIRST_EVALUATION_SEED, TabletopBenchmark, beside
from spear_lightning.worlds.tabletop.demonstrations import episode_seed
from spear_lightning.worlds.tabletop.random_targets import RandomTargets
from spear_lightning.worlds.tabletop.tasks import TASKS
from spear_lightning.worlds.tabletop.world import WORKSPACE_HIGH_M, WORKSPACE_LOW_M

STILL = {"actions": np.array([0.3, 0.0, 0.2, 0.0, 0.0, 0.0, 1.0, 1.0])}


def started(benchmark: TabletopBenchmark, task: str, number: int = 0) -> dict[str, Any]:
    what = next(item for item in benchmark.get_tasks() if item["name"] == task)

    async def start() -> dict[str, Any]:
        await benchmark.start_episode({**what, "episode_idx": number})
        return await benchmark.get_observation()

    return anyio.run(start)


def played(benchmark: TabletopBenchmark, task: str, number: int = 0) -> dict[str, Any]:
    started(benchmark, task, number)
    result = benchmark.step(STILL)
    while not benchmark.check_done(result):
        result = benchmark.step(STILL)
    return benchmark.get_step_result(result) | {"steps": benchmark._steps}


@pytest.mark.parametrize("task", list(TASKS))
def test_the_expert_gets_it_done_and_leaves_it_done(task: str) -> None:
    outcome = played(TabletopBenchmark(controller="expert"), task)
    assert outcome["success"]
    assert outcome["final_success"]
    assert outcome["steps"] == outcome["first_success_step"] + 4
    sooner = played(TabletopBenchmark(controller="expert", success_mode="first"), task)
    assert sooner["first_success_step"] == sooner["steps"] == outcome["first_success_step"]


def test_standing_still_takes_all_the_time_and_fails() -> None:
    outcome = played(TabletopBenchmark(), "touch")
    assert outcome["steps"] == TASKS["touch"].max_steps
    assert not outcome["success"]
    assert outcome["first_success_step"] is None


def test_an_episode_is_the_same_whatever_is_seen_of_it() -> None:
    seen = TabletopBenchmark(cameras={"primary": (56, 42), "wrist": (28, 28)})
    unseen = TabletopBenchmark(controller="expert")
    for number in (0, 1):
        ours, theirs = started(seen, "put_on", number), started(unseen, "put_on", number)
        assert {name: image.shape for name, image in ours["images"].items()} == {
            "primary": (42, 56, 3),
            "wrist": (28, 28, 3),
        }
        assert theirs["images"] == {}
        assert ours["task_description"] == theirs["task_description"]
        assert np.array_equal(ours["states"], theirs["states"])
        assert np.array_equal(seen._world.data.qpos, unseen._world.data.qpos)


def test_episodes_differ_and_are_held_out() -> None:
    benchmark = TabletopBenchmark()
    instructions = {started(benchmark, "put_on", number)["task_description"] for number in range(6)}
    assert len(instructions) > 2
    assert benchmark._episode_seed == FIRST_EVALUATION_SEED + 5
    # Blocks of one seed follow one another without overlap; demonstrations stay below.
    facts = [TabletopBenchmark(seed=seed).get_metadata() for seed in (0, 1)]
    assert facts[1]["first_episode_seed"] == facts[0]["first_episode_seed"] + facts[0]["max_episodes_per_task"]
    demonstrated = [episode_seed(seed, episode) for seed in range(20) for episode in range(500)]
    assert max(demonstrated) < facts[0]["first_episode_seed"]


class Scripted(TabletopBenchmark):
    """Says whether the task is done as told."""

    def __init__(self, done: Sequence[bool], **options: Any) -> None:
        super().__init__(**options)
        self.done = done

    def make_world(self) -> Any:
        return World(self.done)


class World:
    max_steps = 8
    instruction = "wait"
    state = np.array([0.3, 0.0, 0.2, 0.0, 0.0, 0.0, 1.0, 1.0], np.float32)

    def __init__(self, done: Sequence[bool]) -> None:
        self.done = done

    def reset(self, task: str, seed: int) -> Any:
        self.steps, self.images, self.success = 0, {}, False
        return self

    def step(self, target: np.ndarray) -> Any:
        self.success = self.steps < len(self.done) and self.done[self.steps]
        self.steps += 1
        return self


T, F = True, False


@pytest.mark.parametrize(
    ("mode", "done", "success", "ever", "final", "first_at", "steps"),
    [
        ("held", [F, T, T, T], True, True, True, 2, 4),
        ("held", [F, T, F, T, T, T], True, True, True, 2, 6),
        ("held", [F, T, T, F], False, True, False, 2, 8),
        ("held", [F] * 6 + [T, T], True, True, True, 7, 8),
        ("first", [F, T, T, F], True, True, True, 2, 2),
        ("first", [F] * 8, False, False, False, None, 8),
    ],
)
def test_when_an_episode_ends_and_what_counts(
    mode: str, done: list[bool], success: bool, ever: bool, final: bool, first_at: int | None, steps: int
) -> None:
    outcome = played(Scripted(done, success_mode=mode, hold_steps=3), "touch")
    assert (outcome["success"], outcome["first_success"], outcome["final_success"]) == (success, ever, final)
    assert (outcome["first_success_step"], outcome["steps"]) == (first_at, steps)


def test_frames_are_kept_of_the_episodes_that_are_asked_for(tmp_path: Path) -> None:
    cameras = {"primary": (56, 42), "wrist": (28, 28)}
    benchmark = TabletopBenchmark(
        cameras=cameras, controller="expert", success_mode="first", frames_folder=str(tmp_path), recorded=1
    )
    steps = played(benchmark, "touch", 0)["steps"]
    played(benchmark, "touch", 1)
    (path,) = tmp_path.iterdir()
    assert path.name == "touch_00000.npz"
    with np.load(path) as stored:
        assert stored["frames"].shape == (steps + 1, 42, 84, 3)
        assert str(stored["instruction"]).startswith("touch the")
    low = np.full((2, 3, 3), 7, np.uint8)
    assert beside([low, np.ones((4, 2, 3), np.uint8)])[:, :3, 0].tolist() == [[7] * 3] * 2 + [[0] * 3] * 2


def test_random_targets_are_smooth_over_the_table_and_repeatable() -> None:
    def targets(seed: int) -> np.ndarray:
        policy = RandomTargets(np.array([0.3, 0, 0.1, 0, 0, 0, 1, 1]), np.random.default_rng(seed))
        return np.array([policy.act() for _ in range(2000)])

    path = targets(0)
    assert np.linalg.norm(np.diff(path[:, :3], axis=0), axis=1).max() <= 0.04 + 1e-9
    assert np.linalg.norm(path[:, 3:7], axis=1) == pytest.approx(np.ones(2000))
    yaw = np.unwrap(2 * np.arctan2(path[:, 5], path[:, 6]))
    assert np.abs(np.diff(yaw)).max() <= 0.3 + 1e-9
    assert (path[:, :3] >= WORKSPACE_LOW_M - 1e-9).all()
    assert (path[:, :3] <= WORKSPACE_HIGH_M + 1e-9).all()
    # It goes everywhere, low too, and both opens and closes.
    spread = path[:, :2].max(0) - path[:, :2].min(0)
    assert (spread > 0.8 * (WORKSPACE_HIGH_M - WORKSPACE_LOW_M)[:2]).all()
    assert path[:, 2].min() < 0.03
    assert set(path[:, 7]) == {0.0, 1.0}
    assert np.array_equal(path, targets(0))
    assert not np.array_equal(path, targets(1))
