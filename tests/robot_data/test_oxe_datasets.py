"""Each of the 24 OXE data sets, written in its own conventions, is read as the motion that was meant."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from oxe_layouts import COLOUR, LAYOUTS, Motion, motion
from scipy.spatial.transform import Rotation

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.robot_data.episode_index import EpisodeIndex
from spear_lightning.robot_data.index_build import ensure_index
from spear_lightning.robot_data.registry import entry_for_folder, entry_of, read_registry, registry
from spear_lightning.robot_data.rlds_folder import open_rlds

BASE = {
    # Our base frame in terms of the recorded one, computed by hand: x' = -y, y' = x; and x' = y, y' = -x.
    "jaco_play": [[0, -1, 0], [1, 0, 0], [0, 0, 1]],
    "dobbe": [[0, 1, 0], [-1, 0, 0], [0, 0, 1]],
}
WITHOUT_INSTRUCTION = {"kuka", "buds", "nyu_franka_play", "sailor", "sirius"}


def index_of(root: Path, dataset: str, episodes: list[bytes]) -> EpisodeIndex:
    LAYOUTS[dataset].write(root, episodes)
    return ensure_index(root, entry_of(dataset), index_root=root / "index")


def motions(dataset: str, *steps: int) -> list[Motion]:
    return [motion(LAYOUTS[dataset].centre, count, seed) for seed, count in enumerate(steps)]


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_poses_grippers_cameras_and_language(dataset: str, tmp_path: Path) -> None:
    layout, moved = LAYOUTS[dataset], motions(dataset, 12, 9)
    good = [layout.serialize(each) for each in moved]
    bad = layout.serialize(moved[0], good=False)
    left_out = dataset in ("kuka", "droid", "ucsd_pick_place")
    index = index_of(tmp_path, dataset, [good[0], bad, good[1]] if left_out else good)
    assert index.rate_hz == layout.hz
    assert index.num_episodes == 2
    base = Rotation.from_matrix(BASE.get(dataset, np.eye(3)))
    position = np.concatenate([each.position for each in moved])
    rotation = base * Rotation.concatenate([each.rotation for each in moved])
    np.testing.assert_allclose(index.pose[:, :3], base.apply(position), atol=2e-6)
    assert (Rotation.from_quat(index.pose[:, 3:]).inv() * rotation).magnitude().max() < 2e-5
    assert (index.pose[:, 6] >= 0).all()
    np.testing.assert_allclose(np.linalg.norm(index.pose[:, 3:], axis=1), 1, atol=1e-6)
    state = [each.openness if layout.own_gripper else np.r_[each.opens[:1], each.opens[:-1]] for each in moved]
    command = [
        each.opens if layout.own_command else np.r_[each.openness[1:], each.openness[-1:]] for each in moved
    ]
    np.testing.assert_allclose(index.gripper_state, np.concatenate(state), atol=2e-6)
    np.testing.assert_allclose(index.gripper_command, np.concatenate(command), atol=2e-6)
    expected = "" if dataset in WITHOUT_INSTRUCTION else "push the button"
    assert [index.instructions[number] for number in index.instruction_ids] == [expected] * 2
    assert sorted(index.cameras) == sorted(layout.cameras)
    for camera, feature in layout.cameras.items():
        shown = index.read_image(camera, 3, 0)
        assert shown.shape == feature.shape
        assert np.abs(shown[-1, -1].astype(int) - COLOUR).max() <= 3
    problems = set(index.description["problems"])
    assert problems == (
        {f"episodes skipped: left out on purpose, by {layout.episode[0][0].key}"} if left_out else set()
    )


def test_the_registry_has_these_24_and_our_own_world() -> None:
    assert {dataset for dataset, entry in registry().items() if entry.format == "rlds"} == {*LAYOUTS, "tabletop"}
    for dataset, layout in LAYOUTS.items():
        entry = entry_of(dataset)
        assert f"{entry.name}/{entry.version}" == layout.folder


@pytest.mark.parametrize("dataset", ["viola", "buds", "sirius", "dobbe"])
def test_steps_without_a_measured_pose_cut_an_episode_in_two(dataset: str, tmp_path: Path) -> None:
    layout, (moved,) = LAYOUTS[dataset], motions(dataset, 12)
    values = {key: np.array(array) for key, array in layout.store(moved).items()}
    for array in values.values():
        if dataset == "dobbe":
            array[4:6, :1] = 10.0
        elif array.ndim == 2 and array.shape[1] in (16, 24):
            array[4:6] = 0
    lost = replace(layout, store=lambda _: values)
    index = index_of(tmp_path, dataset, [layout.serialize(moved)])
    cut = EpisodeIndex(index_of_layout(tmp_path / "cut", dataset, lost.serialize(moved)).folder)
    assert cut.description["problems"] == {"steps left out: no measured pose": 2}
    assert cut.episode_starts.tolist() == [0, 4, 10]
    kept = np.r_[0:4, 6:12]
    np.testing.assert_array_equal(cut.pose, index.pose[kept])
    np.testing.assert_array_equal(cut.gripper_command, index.gripper_command[kept])
    # The steps before the gap and at the end have no motion after them.
    assert cut.samples.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(
        cut.read_image(next(iter(layout.cameras)), 5, 1), index.read_image(next(iter(layout.cameras)), 7, 0)
    )


def index_of_layout(root: Path, dataset: str, episode: bytes) -> EpisodeIndex:
    LAYOUTS[dataset].write(root, [episode])
    return ensure_index(root, entry_of(dataset), index_root=root / "index")


def test_idle_frames_start_no_chunk(tmp_path: Path) -> None:
    layout, (moved,) = LAYOUTS["droid"], motions("droid", 70)
    # A centimetre a step; at rest from step 20 to 50, and told to open before step 30.
    rest = np.r_[0:20, np.full(31, 20), 21:40]
    position = np.array(layout.centre) + 0.01 * rest[:, None] * [0, 0, 0.3]
    commands = (np.arange(70) >= 30) * 1.0
    still = Motion(position, moved.rotation[np.zeros(70, int)], moved.openness, commands)
    index = index_of(tmp_path, "droid", [layout.serialize(still)])
    # A second is 15 steps: it must pass without motion, which ends the rest at 50, and with one command, since 30.
    assert np.setdiff1d(np.arange(69), index.samples).tolist() == list(range(30, 36))


def test_two_rotations_that_disagree_are_counted(tmp_path: Path) -> None:
    layout, (moved,) = LAYOUTS["hydra"], motions("hydra", 12)
    values = layout.store(moved)
    values["observation/state"][3:5, 7] += 0.3
    index = index_of(tmp_path, "hydra", [replace(layout, store=lambda _: values).serialize(moved)])
    assert index.description["problems"] == {"steps whose two stored rotations disagree (kept)": 2}


@pytest.mark.parametrize(("encoding", "size"), [("jpeg", 240), ("png", 224)])
def test_re_encoded_copies_are_not_flipped_again(tmp_path: Path, encoding: str, size: int) -> None:
    layout, (moved,) = LAYOUTS["hydra"], motions("hydra", 8)
    cameras = {
        name: replace(each, encoding=encoding, shape=(size, size, 3)) for name, each in layout.cameras.items()
    }
    copy = replace(layout, cameras=cameras, blue_first=())
    copy.write(tmp_path, [copy.serialize(moved)])
    index = ensure_index(tmp_path, entry_of("hydra"), index_root=tmp_path / "index")
    assert not index.blue_first("primary")
    assert np.abs(index.read_image("primary", 0, 0)[-1, -1].astype(int) - COLOUR).max() <= 3


def test_labels_instead_of_relative_commands_are_noticed(tmp_path: Path) -> None:
    layout, (moved,) = LAYOUTS["jaco_play"], motions("jaco_play", 12)
    values = dict(layout.store(moved))
    values["action/gripper_closedness_action"] = values["action/gripper_closedness_action"] + 1
    copy = replace(layout, store=lambda _: values)
    with pytest.raises(DataError, match="relative gripper commands beyond 1': 1"):
        index_of(tmp_path, "jaco_play", [copy.serialize(moved)])


def test_names_with_slashes_are_read_as_tfds_writes_them(tmp_path: Path) -> None:
    layout, (moved,) = LAYOUTS["bc_z"], motions("bc_z", 8)
    folder = layout.write(tmp_path, [layout.serialize(moved)])
    path = folder / "features.json"
    tree = json.loads(path.read_text())
    steps = tree["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    observation = steps["observation"]["featuresDict"]["features"]
    inner = observation.pop("present")["featuresDict"]["features"]
    observation.update({f"present/{name}": feature for name, feature in inner.items()})
    path.write_text(json.dumps(tree))
    assert open_rlds(folder).features["observation/present/xyz"].shape == (3,)
    index = ensure_index(tmp_path, entry_of("bc_z"), index_root=tmp_path / "index")
    np.testing.assert_allclose(index.pose[:, :3], moved.position, atol=1e-6)


def test_a_missing_filter_feature_is_an_error(tmp_path: Path) -> None:
    layout, (moved,) = LAYOUTS["kuka"], motions("kuka", 8)
    copy = replace(layout, episode=())
    copy.write(tmp_path, [copy.serialize(moved)])
    with pytest.raises(DataError, match=r"'kuka'[\s\S]*success: missing"):
        ensure_index(tmp_path, entry_of("kuka"), index_root=tmp_path / "index")


def test_droid_s_folder_is_found_by_its_own_name() -> None:
    assert entry_for_folder(Path("data/droid/1.0.1"), "r2d2_faceblur").id == "droid"


def test_a_registry_file_adds_and_changes_entries(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    own = {
        "hydra": {"cameras": {"primary": {"key": "observation/image"}}},
        "mine": {
            "name": "my_robot",
            "version": "1.0.0",
            "rate_hz": 12.5,
            "cameras": {"primary": {"key": "image"}},
            "position": {"key": "pose", "slice": [0, 3]},
            "rotation": {"key": "pose", "slice": [3, 7], "convention": "quat_wxyz"},
        },
    }
    path.write_text(yaml.safe_dump({"schema": 1, "datasets": own}))
    entries = read_registry(path)
    assert not entries["hydra"].cameras["primary"].bgr
    assert entries["hydra"].rotation == entry_of("hydra").rotation
    assert entry_of("mine", entries).rate_hz == 12.5
    assert set(entries) == {*registry(), "mine"}
    own["mine"]["base_axes"] = ["x", "y", "-z"]
    path.write_text(yaml.safe_dump({"schema": 1, "datasets": own}))
    with pytest.raises(ConfigError, match=r"right-handed[\s\S]*mine\.base_axes"):
        read_registry(path)
    own["mine"] |= {"base_axes": None, "speed": 3}
    path.write_text(yaml.safe_dump({"schema": 1, "datasets": own}))
    with pytest.raises(ConfigError, match=r"mine[\s\S]*speed"):
        read_registry(path)
