"""Broken data: one clear error, or a counted skip; never half an index."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.robot_data.chunks import ChunkSpec
from spear_lightning.robot_data.dataset import EvenSamples, RobotDataset
from spear_lightning.robot_data.demo_episodes import bridge_layout, demo_episode
from spear_lightning.robot_data.episode_index import EpisodeIndex
from spear_lightning.robot_data.images import PNG_START, BrokenImage, CameraSpec, decode_image
from spear_lightning.robot_data.index_build import BESIDE, build_index, ensure_index, index_path
from spear_lightning.robot_data.index_store import DESCRIPTION
from spear_lightning.robot_data.registry import entry_for_folder, entry_of
from spear_lightning.robot_data.rlds_folder import find_rlds, open_rlds
from spear_lightning.robot_data.rlds_writer import write_description, write_shard
from spear_lightning.robot_data.robot_mixture import RobotMixture
from spear_lightning.robot_data.sample_source import split_episodes
from spear_lightning.robot_data.tfrecord import read_records, write_records

LAYOUT = bridge_layout(32, 32)
Change = Callable[[dict], None]


def write_episodes(root: Path, changes: dict[int, Change], episodes: int = 4) -> Path:
    """Write a data set of which some episodes are changed."""
    folder = root / "bridge_dataset" / "1.0.0"
    folder.mkdir(parents=True)
    payloads = []
    for number in range(episodes):
        episode = demo_episode(LAYOUT, seed=1, episode=number, steps=6)
        changes.get(number, lambda _: None)(episode)
        payloads.append(LAYOUT.serialize(episode))
    write_description(folder, LAYOUT, {"train": [write_shard(folder, LAYOUT, "train", 0, 1, payloads)]}, "test")
    return folder


def index_of(folder: Path, root: Path, verify: bool = False) -> EpisodeIndex:
    return EpisodeIndex(build_index(open_rlds(folder), "train", entry_of("bridge"), root, 1, verify))


def test_a_missing_root_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)data root does not exist.*data\.root.*nowhere"):
        find_rlds(tmp_path / "nowhere", "bridge_dataset", "1.0.0")


def test_a_missing_data_set_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "other_dataset").mkdir()
    with pytest.raises(DataError, match=r"(?s)bridge_dataset 1\.0\.0 is not under.*other_dataset"):
        find_rlds(tmp_path, "bridge_dataset", "1.0.0")


def test_an_unknown_data_set_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean bridge"):
        entry_of("brigde")
    with pytest.raises(ConfigError, match="--dataset ID"):
        entry_for_folder(Path("somewhere"), "my_robot")


def test_a_folder_that_is_no_rlds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)not an RLDS folder.*dataset_info\.json"):
        open_rlds(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "features.json").write_text('{"featuresDict": {"features": {}}}')
    with pytest.raises(DataError, match="holds no episodes"):
        open_rlds(tmp_path)
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot be read[\s\S]*features\.json"):
        open_rlds(tmp_path)


def test_promised_keys_that_are_missing_are_all_named(tmp_path: Path) -> None:
    folder = write_episodes(tmp_path, {})
    features = json.loads((folder / "features.json").read_text())
    steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    del steps["observation"]["featuresDict"]["features"]["image_0"]
    steps["action"]["tensor"]["shape"]["dimensions"] = ["6"]
    (folder / "features.json").write_text(json.dumps(features))
    with pytest.raises(DataError) as error:
        index_of(folder, tmp_path / "index")
    assert "action: 6 numbers instead of at least 7" in str(error.value)
    assert "observation/image_0: missing" in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_broken_shard_is_an_error_and_leaves_no_index(tmp_path: Path, damage: str) -> None:
    folder = write_episodes(tmp_path, {})
    shard = next(folder.glob("*.tfrecord*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flipped" else content[:-100])
    with pytest.raises(DataError, match=r"truncated or damaged|A shard is missing") as error:
        index_of(folder, tmp_path / "index")
    assert shard.name in str(error.value)
    assert not list((tmp_path / "index").glob("*")) if (tmp_path / "index").exists() else True


def break_state(episode: dict) -> None:
    episode["observation/state"] = episode["observation/state"].copy()
    episode["observation/state"][2, 1] = np.nan


def break_first_image(episode: dict) -> None:
    episode["observation/image_0"][3] = episode["observation/image_0"][3][:-200]


def break_image_inside(episode: dict) -> None:
    # Whole at both ends, but the tables that decoding needs are gone.
    data = episode["observation/image_0"][3]
    episode["observation/image_0"][3] = data[:20] + b"\x00" * 500 + data[-50:]


def empty_instruction(episode: dict) -> None:
    episode["language_instruction"] = [" "] * len(episode["language_instruction"])


def blank_second_camera(episode: dict) -> None:
    from spear_lightning.robot_data.demo_episodes import _encode

    blank = _encode(np.zeros((32, 32, 3), np.uint8))
    episode["observation/image_1"] = [blank] * len(episode["observation/image_1"])


def test_non_finite_state_skips_and_counts_the_episode(tmp_path: Path) -> None:
    index = index_of(write_episodes(tmp_path, {1: break_state}), tmp_path / "index")
    assert index.num_episodes == 3
    assert index.description["problems"] == {"episodes skipped: non-finite state or action": 1}
    assert "episode 1" in next(iter(index.description["problem_examples"].values()))


def test_broken_frame_is_skipped_but_its_neighbours_stay(tmp_path: Path) -> None:
    whole = index_of(write_episodes(tmp_path / "whole", {}), tmp_path / "a")
    index = index_of(write_episodes(tmp_path / "broken", {1: break_first_image}), tmp_path / "b")
    assert index.num_episodes == whole.num_episodes
    assert set(whole.samples) - set(index.samples) == {6 + 3}
    assert index.description["problems"] == {"frames skipped: broken image of camera primary": 1}


def test_damage_inside_an_image_is_found_by_verification(tmp_path: Path) -> None:
    folder = write_episodes(tmp_path, {1: break_image_inside})
    quick = index_of(folder, tmp_path / "quick")
    with pytest.raises(DataError, match=r"cannot be decoded[\s\S]*episode 1, step 3[\s\S]*--verify_images"):
        quick.read_image("primary", 6 + 3, 1)
    verified = index_of(folder, tmp_path / "verified", verify=True)
    assert set(quick.samples) - set(verified.samples) == {6 + 3}


def test_empty_instructions_are_counted_and_left_out_on_request(tmp_path: Path) -> None:
    index = index_of(write_episodes(tmp_path, {0: empty_instruction}), tmp_path / "index")
    assert index.description["problems"] == {"episodes without an instruction (kept in the index)": 1}
    without, _ = split_episodes(index, 0.0, keep_without_instruction=False, seed=0)
    kept, _ = split_episodes(index, 0.0, keep_without_instruction=True, seed=0)
    assert without.tolist() == [1, 2, 3]
    assert kept.tolist() == [0, 1, 2, 3]


def test_nothing_with_an_instruction_is_an_error(tmp_path: Path) -> None:
    write_episodes(tmp_path, dict.fromkeys(range(4), empty_instruction))
    with pytest.raises(DataError, match="keep_without_instruction"):
        RobotMixture(tmp_path, {"bridge": 1.0}, ChunkSpec(), index_folder=tmp_path / "index")


def test_blank_pictures_of_an_optional_camera_are_dummies(tmp_path: Path) -> None:
    index = index_of(write_episodes(tmp_path, {2: blank_second_camera}), tmp_path / "index")
    assert index.camera_present("secondary").tolist() == [True, True, False, True]


def test_all_episodes_broken_is_an_error(tmp_path: Path) -> None:
    folder = write_episodes(tmp_path, dict.fromkeys(range(4), break_state))
    with pytest.raises(DataError, match=r"No episode[\s\S]*non-finite state or action': 4"):
        index_of(folder, tmp_path / "index")


def test_a_shard_that_vanishes_after_indexing(tmp_path: Path) -> None:
    folder = write_episodes(tmp_path, {})
    index = index_of(folder, tmp_path / "index")
    shutil.move(folder, tmp_path / "moved")
    with pytest.raises(DataError, match=r"is gone[\s\S]*index the data set where it is now"):
        index.read_image("primary", 1, 0)


def test_a_damaged_index_is_not_used(tmp_path: Path) -> None:
    index = index_of(write_episodes(tmp_path, {}), tmp_path / "index")
    pose = index.folder / "pose.bin"
    pose.write_bytes(pose.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"wrong size[\s\S]*pose\.bin"):
        EpisodeIndex(index.folder)


def test_changed_data_or_conventions_get_another_index(tmp_path: Path) -> None:
    folder = write_episodes(tmp_path, {})
    rlds, entry = open_rlds(folder), entry_of("bridge")
    before = index_path(rlds, "train", entry, tmp_path)
    assert index_path(rlds, "train", replace(entry, rate_hz=10), tmp_path) != before
    shard = next(folder.glob("*.tfrecord*"))
    os.utime(shard, ns=(1, 1))
    assert index_path(rlds, "train", entry, tmp_path) != before


def test_a_killed_index_leaves_nothing_that_is_taken_for_one(tmp_path: Path) -> None:
    folder = write_episodes(tmp_path, {})
    code = f"""
import os, signal
from pathlib import Path
from spear_lightning.robot_data import index_build
from spear_lightning.robot_data.index_store import ArrayFolderWriter
from spear_lightning.robot_data.registry import entry_of
from spear_lightning.robot_data.rlds_folder import open_rlds
append = ArrayFolderWriter.append
def append_then_die(self, name, rows):
    append(self, name, rows)
    if name == "sample":
        os.kill(os.getpid(), signal.SIGKILL)
ArrayFolderWriter.append = append_then_die
folder = open_rlds({str(folder)!r})
index_build.build_index(folder, "train", entry_of("bridge"), Path({str(tmp_path / "index")!r}), 1)
"""
    result = subprocess.run([sys.executable, "-c", code], check=False)
    assert result.returncode == -signal.SIGKILL
    assert not list((tmp_path / "index").glob(f"bridge*/{DESCRIPTION}"))
    assert index_of(folder, tmp_path / "index").num_episodes == 4


def test_a_shard_cut_between_episodes_is_an_error(tmp_path: Path) -> None:
    folder = write_episodes(tmp_path, {})
    shard = next(folder.glob("*.tfrecord*"))
    payloads = [bytes(payload) for _, payload in read_records(shard)]
    write_records(shard, payloads[:3])
    with pytest.raises(DataError, match=r"does not hold the episodes[\s\S]*3 episodes[\s\S]*expected: 4"):
        index_of(folder, tmp_path / "index")


def test_what_is_skipped_is_reported_when_training_indexes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_episodes(tmp_path, {1: break_state})
    RobotMixture(tmp_path, {"bridge": 1.0}, ChunkSpec(), index_folder=tmp_path / "index")
    assert "1 x episodes skipped: non-finite state or action" in caplog.text


def test_a_picture_broken_inside_is_masked_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_episodes(tmp_path, {1: break_image_inside})
    mixture = RobotMixture(tmp_path, {"bridge": 1.0}, ChunkSpec(), holdout=0, index_folder=tmp_path / "index")
    (source,) = mixture.training
    cameras = {"primary": CameraSpec(28, 28), "secondary": CameraSpec(28, 28)}
    dataset = RobotDataset(mixture.training, EvenSamples([len(source)], 99), cameras, ChunkSpec())
    batch = dataset.__getitems__(range(len(source)))
    broken = source.frames(np.arange(len(source))) == 6 + 3
    assert (batch.image_mask["primary"].numpy() == ~broken).all()
    assert batch.image_mask["secondary"].all()
    assert not batch.images["primary"][broken].any()
    assert "episode 1, step 3" in caplog.text


def test_an_index_beside_the_data_moves_with_it(tmp_path: Path) -> None:
    folder = write_episodes(tmp_path / "old", {})
    build_index(open_rlds(folder), "train", entry_of("bridge"), folder / BESIDE)
    shutil.move(tmp_path / "old", tmp_path / "new")
    index = ensure_index(tmp_path / "new", entry_of("bridge"), index_root=tmp_path / "unused")
    assert index.folder.is_relative_to(tmp_path / "new")
    assert index.read_image("primary", 1, 0).shape == (32, 32, 3)
    assert not (tmp_path / "unused").exists()


def test_leftovers_of_killed_indexing_are_removed(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    leftover = tmp_path / "index" / f".x.{socket.gethostname()}.{int(finished.stdout)}.tmp"
    leftover.mkdir(parents=True)
    index_of(write_episodes(tmp_path, {}), tmp_path / "index")
    assert not leftover.exists()


def test_a_picture_that_claims_to_be_huge_is_a_broken_one() -> None:
    # A PNG of a few bytes whose header says 40,000 x 40,000: it must neither be decoded nor end a run.
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    data = PNG_START + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    with pytest.raises(BrokenImage, match="decompression bomb"):
        decode_image(data + end, "here")
