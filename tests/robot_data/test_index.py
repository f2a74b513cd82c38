"""The index against tensorflow-datasets' own parse of the same records."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from scipy.spatial.transform import Rotation

from spear_lightning.robot_data.episode_index import EpisodeIndex
from spear_lightning.robot_data.index_build import build_index
from spear_lightning.robot_data.registry import entry_of
from spear_lightning.robot_data.rlds_folder import open_rlds
from spear_lightning.robot_data.tfrecord import read_records


def tfds_episodes(folder: Path) -> list[dict[str, Any]]:
    """Parse a folder with tensorflow-datasets, pictures left encoded."""
    features = tfds.builder_from_directory(str(folder)).info.features
    decoders = {"steps": tfds.decode.SkipDecoding()}
    return [
        features.deserialize_example_np(bytes(payload), decoders=decoders)
        for shard in sorted(folder.glob("*.tfrecord*"))
        for _, payload in read_records(shard)
    ]


def text_of(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@pytest.fixture(scope="module", params=["bridge", "demo"])
def indexed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EpisodeIndex, Path]:
    folder = request.getfixturevalue(f"{request.param}_folder")
    root = tmp_path_factory.mktemp("index")
    return EpisodeIndex(build_index(open_rlds(folder), "train", entry_of("bridge"), root)), folder


def test_streams_and_instructions_equal_tensorflow_datasets(indexed: tuple[EpisodeIndex, Path]) -> None:
    index, folder = indexed
    episodes = tfds_episodes(folder)
    assert index.num_episodes == len(episodes)
    for number, episode in enumerate(episodes):
        steps = episode["steps"]
        frames = slice(*index.episode_starts[number : number + 2])
        np.testing.assert_array_equal(index.raw("observation/state")[frames], steps["observation"]["state"])
        np.testing.assert_array_equal(index.raw("action")[frames], steps["action"])
        instruction = index.instructions[index.instruction_ids[number]]
        assert instruction == text_of(steps["language_instruction"][0]).strip()


def test_frames_equal_tensorflow_datasets_bit_by_bit(indexed: tuple[EpisodeIndex, Path]) -> None:
    index, folder = indexed
    keys = {name: camera.key.split("/")[1] for name, camera in entry_of("bridge").cameras.items()}
    for number, episode in enumerate(tfds_episodes(folder)):
        for camera in index.cameras:
            for step, encoded in enumerate(episode["steps"]["observation"][keys[camera]]):
                frame = int(index.episode_starts[number]) + step
                assert index.encoded_image(camera, frame, number) == encoded
                pixels = index.read_image(camera, frame, number)
                np.testing.assert_array_equal(pixels, simplejpeg.decode_jpeg(encoded, colorspace="RGB"))


def test_poses_are_the_states_by_an_independent_formula(indexed: tuple[EpisodeIndex, Path]) -> None:
    index, _ = indexed
    state = np.asarray(index.raw("observation/state"), np.float64)
    np.testing.assert_array_equal(index.pose[:, :3], state[:, :3].astype(np.float32))
    # Bridge: roll, pitch, yaw about fixed axes.
    expected = Rotation.from_euler("xyz", state[:, 3:6])
    difference = Rotation.from_quat(index.pose[:, 3:]).inv() * expected
    assert difference.magnitude().max() < 1e-6
    assert (index.pose[:, 6] >= 0).all()
    np.testing.assert_allclose(index.gripper_state, np.clip(state[:, 6], 0, 1), atol=1e-7)


def test_real_bridge_wrist_dummies_are_recognised(bridge_folder: Path, tmp_path: Path) -> None:
    index = EpisodeIndex(build_index(open_rlds(bridge_folder), "train", entry_of("bridge"), tmp_path))
    present = {camera: index.camera_present(camera) for camera in index.cameras}
    assert not present["wrist"].any()
    assert present["primary"].all()
    assert not index.has_image("wrist", 0, 0)


def test_samples_leave_out_first_and_last_steps(demo_index: EpisodeIndex) -> None:
    steps = demo_index.samples - demo_index.episode_starts[demo_index.episode_of(demo_index.samples)]
    assert set(steps.tolist()) == set(range(1, 8))
    assert len(demo_index.samples) == 7 * demo_index.num_episodes
    assert demo_index.episode_sample_starts[-1] == len(demo_index.samples)


def test_parallel_and_serial_reading_write_the_same_index(demo_folder: Path, tmp_path: Path) -> None:
    folder, entry = open_rlds(demo_folder), entry_of("bridge")
    one = build_index(folder, "train", entry, tmp_path / "one", workers=1)
    two = build_index(folder, "train", entry, tmp_path / "two", workers=2)
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)


def test_an_index_travels_to_workers_without_its_data(demo_index: EpisodeIndex) -> None:
    pickled = pickle.dumps(demo_index)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    np.testing.assert_array_equal(copy.pose, demo_index.pose)
    np.testing.assert_array_equal(copy.read_image("primary", 3, 0), demo_index.read_image("primary", 3, 0))
