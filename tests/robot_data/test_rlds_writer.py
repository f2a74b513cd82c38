"""What we write as RLDS is read by tensorflow-datasets, and is the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from spear_lightning.errors import DataError
from spear_lightning.robot_data.demo_episodes import bridge_layout, demo_episode, write_demo_episodes
from spear_lightning.robot_data.rlds_folder import open_rlds
from spear_lightning.robot_data.tfrecord import read_records

LAYOUT = bridge_layout(48, 64)


def test_tensorflow_datasets_reads_it(demo_folder: Path) -> None:
    builder = tfds.builder_from_directory(str(demo_folder))
    assert builder.info.splits["train"].num_examples == 20
    assert [split.shard_lengths for split in builder.info.splits.values()] == [[16, 4]]
    shard = sorted(demo_folder.glob("*.tfrecord*"))[0]
    payload = next(bytes(payload) for _, payload in read_records(shard))
    episode = builder.info.features.deserialize_example_np(payload)
    expected = demo_episode(LAYOUT, seed=0, episode=0, steps=9)
    steps = list(episode["steps"])
    assert len(steps) == 9
    for number, step in enumerate(steps):
        np.testing.assert_array_equal(step["observation"]["state"], expected["observation/state"][number])
        np.testing.assert_array_equal(step["action"], expected["action"][number])
        assert step["observation"]["image_0"].shape == (48, 64, 3)
        assert bool(step["is_last"]) == (number == 8)
    assert int(episode["episode_metadata"]["episode_id"]) == 0


def test_our_description_reads_back_as_the_layout(demo_folder: Path) -> None:
    folder = open_rlds(demo_folder)
    assert (folder.name, folder.version) == ("bridge_dataset", "1.0.0")
    assert folder.features == {feature.key: feature for feature in LAYOUT.features}
    assert [count for _, count in folder.require_split("train")] == [16, 4]
    with pytest.raises(DataError, match="no such split"):
        folder.require_split("val")


def test_one_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_demo_episodes(tmp_path / name, episodes=2, steps=4, height=32, width=32, seed=5)
    files = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("a", "b")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_wrong_episodes_are_refused() -> None:
    episode = demo_episode(LAYOUT, seed=0, episode=0, steps=4)
    with pytest.raises(DataError, match=r"missing \['action'\]"):
        LAYOUT.serialize({key: value for key, value in episode.items() if key != "action"})
    with pytest.raises(DataError, match=r"action[\s\S]*21 values"):
        LAYOUT.serialize({**episode, "action": np.zeros((3, 7), np.float32)})
