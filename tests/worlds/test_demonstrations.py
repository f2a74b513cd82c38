"""Demonstrations: the same bytes every time, what they hold, and readers that agree about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.index_build import ensure_index
from spear_lightning.robot_data.registry import entry_of
from spear_lightning.robot_data.tfrecord import read_records
from spear_lightning.worlds.tabletop import demonstrations
from spear_lightning.worlds.tabletop.benchmark import FIRST_EVALUATION_SEED
from spear_lightning.worlds.tabletop.commands import camera_size, main
from spear_lightning.worlds.tabletop.demonstrations import (
    JOINED_LATE,
    STEPS_AFTER_SUCCESS,
    DemonstrationPlan,
    demonstration,
    write_demonstrations,
)
from spear_lightning.worlds.tabletop.scene import START_LOW_M
from spear_lightning.worlds.tabletop.tasks import TASKS
from spear_lightning.worlds.tabletop.world import WORKSPACE_HIGH_M, WORKSPACE_LOW_M, Tabletop

SIZES = {"primary": (32, 24), "wrist": (16, 16)}
PLAN = DemonstrationPlan(10, image_sizes=SIZES, seed=4)


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Any:
    """Several shards of few episodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstrations, "EPISODES_PER_SHARD", 4)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, small_shards: None) -> Path:
    root = tmp_path_factory.mktemp("demonstrations")
    write_demonstrations(root, PLAN, processes=1)
    return root


@pytest.fixture(scope="module")
def episodes(root: Path) -> list[dict[str, Any]]:
    """Every episode as tensorflow-datasets parses it, pictures decoded."""
    folder = root / "tabletop" / "1.0.0"
    builder = tfds.builder_from_directory(str(folder))
    assert builder.info.splits["train"].num_examples == 10
    assert builder.info.splits["train"].shard_lengths == [4, 4, 2]
    parsed = [
        builder.info.features.deserialize_example_np(bytes(payload))
        for shard in sorted(folder.glob("*.tfrecord*"))
        for _, payload in read_records(shard)
    ]
    return [{**episode, "steps": list(episode["steps"])} for episode in parsed]


def column(episode: dict[str, Any], *keys: str) -> np.ndarray:
    values = episode["steps"]
    for key in keys:
        values = [value[key] for value in values]
    return np.stack(values)


def text_of(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def same_files(first: Path, second: Path) -> bool:
    files = [sorted(path for path in root.rglob("*") if path.is_file()) for root in (first, second)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert len(files[0]) > 2
    return all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_one_seed_writes_the_same_bytes_and_another_seed_others(root: Path, tmp_path: Path) -> None:
    write_demonstrations(tmp_path / "again", PLAN, processes=1)
    assert same_files(root, tmp_path / "again")
    write_demonstrations(tmp_path / "other", DemonstrationPlan(10, image_sizes=SIZES, seed=5), processes=1)
    assert not same_files(root, tmp_path / "other")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Spawned processes do not see what a test has patched.
    monkeypatch.setattr(demonstrations, "EPISODES_PER_SHARD", 32)
    plan = DemonstrationPlan(34, ("touch",), {"wrist": (16, 16)}, seed=1)
    for processes in (1, 2):
        write_demonstrations(tmp_path / str(processes), plan, processes)
    assert same_files(tmp_path / "1", tmp_path / "2")


def test_more_episodes_begin_with_the_same_ones() -> None:
    world = Tabletop(SIZES)
    few, many = (demonstration(world, DemonstrationPlan(n, image_sizes=SIZES, seed=4), 1) for n in (2, 50))
    np.testing.assert_array_equal(few["observation/state"], many["observation/state"])
    assert few["observation/primary"] == many["observation/primary"]


def test_our_index_reads_what_tensorflow_datasets_reads(
    root: Path, episodes: list[dict[str, Any]], tmp_path: Path
) -> None:
    index = ensure_index(root, entry_of("tabletop"), index_root=tmp_path)
    assert index.num_episodes == len(episodes)
    for number, episode in enumerate(episodes):
        first, last = index.episode_starts[number : number + 2]
        states, actions = column(episode, "observation", "state"), column(episode, "action")
        np.testing.assert_array_equal(index.raw("observation/state")[first:last], states)
        np.testing.assert_array_equal(index.raw("action")[first:last], actions)
        instructions = {text_of(value) for value in column(episode, "language_instruction")}
        assert instructions == {index.instructions[index.instruction_ids[number]]}
        for camera, (width, height) in SIZES.items():
            pictures = column(episode, "observation", camera)
            assert pictures.shape == (last - first, height, width, 3)
            ours = index.read_image(camera, int(first), number)
            # Two JPEG decoders may round differently.
            assert np.abs(ours.astype(int) - pictures[0]).max() <= 3


def test_what_an_episode_holds(episodes: list[dict[str, Any]]) -> None:
    for number, episode in enumerate(episodes):
        meta = episode["episode_metadata"]
        task = list(TASKS)[number % len(TASKS)]
        assert int(meta["episode_id"]) == number
        assert text_of(meta["task"]) == task
        assert 0 <= int(meta["seed"]) < FIRST_EVALUATION_SEED
        world = Tabletop()
        world.reset(task, int(meta["seed"]))
        assert text_of(episode["steps"][0]["language_instruction"]) == world.instruction
        steps = len(episode["steps"])
        assert 3 <= steps <= world.max_steps
        last = np.arange(steps) == steps - 1
        for flag, expected in (("is_first", np.arange(steps) == 0), ("is_last", last), ("is_terminal", last)):
            np.testing.assert_array_equal(column(episode, flag), expected)
        np.testing.assert_array_equal(column(episode, "reward"), last.astype(np.float32))
        np.testing.assert_array_equal(column(episode, "discount"), 1)
        states, actions = column(episode, "observation", "state"), column(episode, "action")
        assert states.shape == actions.shape == (steps, 8)
        assert states.dtype == actions.dtype == np.float32
        for poses in (states, actions):
            np.testing.assert_allclose(np.linalg.norm(poses[:, 3:7], axis=1), 1, atol=1e-6)
            assert (poses[:, :3] >= WORKSPACE_LOW_M - 0.02).all()
            assert (poses[:, :3] <= WORKSPACE_HIGH_M + 0.02).all()
        assert (states[:, 6] >= 0).all()
        assert ((states[:, 7] >= 0) & (states[:, 7] <= 1)).all()
        # The gripper is commanded to be open or closed, nothing between.
        assert set(np.unique(actions[:, 7])) <= {0.0, 1.0}
        # A command leads where it says: the tool is nearer to it a step later.
        before, after = (np.linalg.norm(states[k : steps - 1 + k, :3] - actions[:-1, :3], axis=1) for k in (0, 1))
        moving = before > 0.02
        assert (after[moving] < before[moving]).mean() > 0.95


def replayed(plan: DemonstrationPlan, episode: int, features: dict[str, Any]) -> Tabletop:
    """Act out the recorded actions from the recorded episode's seed."""
    world = Tabletop(plan.image_sizes)
    world.reset(features["episode_metadata/task"][0], int(features["episode_metadata/seed"][0]))
    np.testing.assert_array_equal(features["observation/state"][0], world.state)
    for number, action in enumerate(features["action"]):
        np.testing.assert_allclose(features["observation/state"][number], world.state, atol=2e-3)
        world.act(action)
    return world


def test_recorded_actions_do_the_task_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstrations, "JOINED_LATE", 0.0)
    plan = DemonstrationPlan(5, image_sizes={"wrist": (16, 16)}, seed=2)
    world = Tabletop(plan.image_sizes)
    for episode, task in enumerate(TASKS):
        features: dict[str, Any] = demonstration(world, plan, episode)
        assert replayed(plan, episode, features).success, task
        steps = len(features["action"])
        assert steps < TASKS[task].max_steps
        # It goes on for a while after the task was done first.
        again = Tabletop()
        again.reset(task, int(features["episode_metadata/seed"][0]))
        done = []
        for action in features["action"]:
            again.act(action)
            done.append(again.success)
        assert done.index(True) == pytest.approx(steps - 1 - STEPS_AFTER_SUCCESS, abs=1)


def test_a_late_start_begins_after_the_knock_and_records_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    knocked: list[tuple[np.ndarray, int]] = []
    original = demonstrations._knocked_off

    def watched(world: Tabletop, *rest: Any) -> Any:
        observation = original(world, *rest)
        knocked.append((observation.state.copy(), world.steps))
        return observation

    monkeypatch.setattr(demonstrations, "_knocked_off", watched)
    plan = DemonstrationPlan(30, ("pick_up",), {"wrist": (16, 16)}, seed=3)
    world, late = Tabletop(plan.image_sizes), 0
    for episode in range(plan.episodes):
        knocked.clear()
        features: dict[str, Any] = demonstration(world, plan, episode)
        states = features["observation/state"]
        if knocked and np.array_equal(states[0], knocked[-1][0]):
            late += 1
            unrecorded = knocked[-1][1]
            assert unrecorded >= 2
            assert len(states) == len(features["action"]) == world.steps - unrecorded
        else:
            assert len(states) == world.steps
            assert states[0, 2] > START_LOW_M[2] - 0.01
    # Within three standard deviations of the share that is meant.
    assert abs(late / plan.episodes - JOINED_LATE) < 3 * np.sqrt(JOINED_LATE * (1 - JOINED_LATE) / plan.episodes)


def test_a_folder_that_holds_a_data_set_is_refused(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(ConfigError, match=r"already holds demonstrations[\s\S]*tabletop"):
        write_demonstrations(root, PLAN, processes=1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (DemonstrationPlan(2, ("touch", "juggle")), r"tasks[\s\S]*juggle[\s\S]*pick_up"),
        (DemonstrationPlan(2, ()), "tasks"),
        (DemonstrationPlan(0), r"episodes[\s\S]*at least 1"),
        (DemonstrationPlan(2, image_sizes={"ceiling": (8, 8)}), r"cameras[\s\S]*ceiling[\s\S]*wrist"),
        (DemonstrationPlan(2, distractors=(3, 1)), "distractors"),
        (DemonstrationPlan(2, seed=-1), "seed"),
    ],
)
def test_plans_that_cannot_be_made_are_refused_before_anything_is_written(
    plan: DemonstrationPlan, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_demonstrations(tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["primary", "primary=", "=8x8", "primary=8", "primary=8x0", "wrist=axb", "a=-8x8"]
)
def test_sizes_that_cannot_be_understood_are_refused(text: str, tmp_path: Path) -> None:
    assert camera_size("wrist=56x42") == ("wrist", (56, 42))
    with pytest.raises(ConfigError, match=r"--cameras[\s\S]*NAME=WxH"):
        main(["--out", str(tmp_path / "out"), "--episodes", "1", "--cameras", text])
    assert not (tmp_path / "out").exists()


def test_the_command_writes_what_the_plan_writes(tmp_path: Path) -> None:
    options = ["--episodes", "2", "--tasks", "turn", "touch", "--cameras", "wrist=16x16", "--seed", "6"]
    assert main(["--out", str(tmp_path / "a"), *options, "--distractors", "0", "1"]) == 0
    plan = DemonstrationPlan(2, ("turn", "touch"), {"wrist": (16, 16)}, 6, (0, 1))
    write_demonstrations(tmp_path / "b", plan)
    assert same_files(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ConfigError, match="nothing to write"):
        main(["--out", str(tmp_path / "c")])
    with pytest.raises(ConfigError, match=r"primary[\s\S]*--cameras"):
        main(["--out", str(tmp_path / "c"), "--labelled_images", "1", "--cameras", "wrist=16x16"])
