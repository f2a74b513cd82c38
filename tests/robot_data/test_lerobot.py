"""LeRobot data sets behind the same index: states, frames and batches equal what was written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import av
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lerobot_writer import Motions, picture, with_pictures, write_v3, write_v21
from scipy.spatial.transform import Rotation

from spear_lightning import cli
from spear_lightning.errors import ConfigError, DataError
from spear_lightning.robot_data.chunks import ChunkSpec
from spear_lightning.robot_data.data_check import check_mixture
from spear_lightning.robot_data.dataset import RobotDataset
from spear_lightning.robot_data.demo_episodes import write_demo_episodes
from spear_lightning.robot_data.episode_index import EpisodeIndex
from spear_lightning.robot_data.images import CameraSpec, fit_image
from spear_lightning.robot_data.index_build import ensure_index
from spear_lightning.robot_data.lerobot_folder import open_lerobot
from spear_lightning.robot_data.registry import entry_of
from spear_lightning.robot_data.robot_mixture import RobotMixture
from spear_lightning.robot_data.video_frames import VideoFrames

NAME, FPS = "bridge_orig_lerobot", 5
LENGTHS = (12, 7, 9, 10)
TASKS = ("open the drawer", " ", "close the drawer", "held out")
SEEN = {"primary": "observation.images.image_0", "secondary": "observation.images.image_1"}


@pytest.fixture(scope="module")
def motions() -> Motions:
    rng = np.random.default_rng(0)
    made = []
    for steps in LENGTHS:
        state = np.zeros((steps, 8), np.float32)
        state[:, :3] = [0.3, 0.03, 0.07] + 0.01 * rng.normal(size=(steps, 3))
        state[:, 3:6] = 0.3 * rng.normal(size=(steps, 3))
        state[:, 7] = rng.uniform(0, 1, steps)
        action = rng.normal(size=(steps, 7)).astype(np.float32)
        action[:, 6] = np.arange(steps) < 4
        made.append((state, action))
    return made


@pytest.fixture(scope="module", params=["v3.0 short", "v3.0 long", "v2.1"])
def root(request: pytest.FixtureRequest, motions: Motions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lerobot")
    # LeRobot itself puts a key frame at every second frame; other encoders at every 250th.
    key_every = 250 if request.param == "v3.0 long" else 2
    write = write_v21 if request.param == "v2.1" else write_v3
    write(root / NAME, motions, TASKS, FPS, key_every)
    return root


@pytest.fixture(scope="module")
def index(root: Path) -> EpisodeIndex:
    return ensure_index(root, entry_of("bridge_lerobot"), index_root=root / "index")


def test_states_and_instructions(index: EpisodeIndex, motions: Motions) -> None:
    # The fourth episode is in another split.
    assert np.diff(index.episode_starts).tolist() == list(LENGTHS[:3])
    state = np.concatenate([state for state, _ in motions[:3]])
    action = np.concatenate([action for _, action in motions[:3]])
    np.testing.assert_array_equal(index.pose[:, :3], state[:, :3])
    rotation = Rotation.from_quat(index.pose[:, 3:])
    assert (rotation.inv() * Rotation.from_euler("xyz", state[:, 3:6])).magnitude().max() < 1e-5
    np.testing.assert_array_equal(index.gripper_state, state[:, 7])
    np.testing.assert_array_equal(index.gripper_command, action[:, 6])
    np.testing.assert_array_equal(index.raw("action"), action)
    assert [index.instructions[number] for number in index.instruction_ids] == [TASKS[0], "", TASKS[2]]
    assert index.rate_hz == FPS
    assert index.cameras == ["primary", "secondary"]


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_every_frame_in_any_order_is_the_one_that_was_written(root: Path, index: EpisodeIndex) -> None:
    for camera, column in SEEN.items():
        files = sorted(path for path in root.rglob("*.mp4") if column in str(path))
        whole = [frame for path in files for frame in decoded(path)]
        for frame in np.random.default_rng(1).permutation(len(index)).tolist():
            episode = int(index.episode_of(np.array([frame]))[0])
            shown = index.read_image(camera, frame, episode)
            # Exactly what decoding from the beginning gives, and the colours of this episode and step.
            np.testing.assert_array_equal(shown, whole[frame])
            expected = picture(column, episode, frame - int(index.episode_starts[episode]))
            assert np.abs(shown.astype(int) - expected)[-8:, -8:].max() <= 8
    assert "mp4" in index.place("primary", 3, 0)


def test_frames_in_order_are_decoded_without_seeking(index: EpisodeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    sought = []
    from_frame = VideoFrames._from

    def counted(self: VideoFrames, video: object, frame: int) -> object:
        sought.append(frame)
        return from_frame(self, video, frame)

    monkeypatch.setattr(VideoFrames, "_from", counted)
    copy = pickle.loads(pickle.dumps(index))
    for frame in range(LENGTHS[0]):
        copy.read_image("primary", frame, 0)
    assert sought == [0]


def test_batches_caches_and_checks_work_as_with_rlds(root: Path, tmp_path: Path) -> None:
    options = {"holdout": 0, "keep_without_instruction": True, "index_folder": tmp_path}
    mixture = RobotMixture(root, {"bridge_lerobot": 1.0}, ChunkSpec(), **options)
    cameras = {"primary": CameraSpec(56, 42), "wrist": CameraSpec(28, 28, source="secondary")}
    places = list(range(len(mixture.training[0])))
    dataset = RobotDataset(mixture.training, mixture.stream(), cameras, ChunkSpec())
    batch = dataset.__getitems__(places)
    assert batch.image_mask["primary"].all()
    index = mixture.training[0].index
    frames = mixture.training[0].frames(mixture.stream()[np.array(places)][1])
    for row, frame in enumerate(frames[:5].tolist()):
        episode = int(index.episode_of(np.array([frame]))[0])
        expected = fit_image(index.read_image("secondary", frame, episode), cameras["wrist"])
        assert torch.equal(batch.images["wrist"][row], expected)
    cached = mixture.frame_caches(cameras, "exact")
    from_cache = RobotDataset(mixture.training, mixture.stream(), cameras, ChunkSpec(), cached=cached)
    assert torch.equal(from_cache.__getitems__(places).images["primary"], batch.images["primary"])
    given = {"root": root, "weights": {"bridge_lerobot": 1.0}, "chunks": ChunkSpec(), **options}
    (found,) = check_mixture(given, cameras, clamp=1.5).datasets
    assert (found.episodes, found.frames) == (3, sum(LENGTHS[:3]))


def test_the_command_line_knows_the_format(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "index", str(root / NAME), f"--index_folder={tmp_path}", "--workers=1", "--verify_images"]
    assert cli.main(command) == 0
    assert "28 at 5 Hz" in capsys.readouterr().out
    assert cli.main(["data", "show", str(root / NAME), f"--index_folder={tmp_path}"]) == 0
    assert "close the drawer" in capsys.readouterr().out


def test_a_bucket_holds_the_same(root: Path, index: EpisodeIndex, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(root / NAME) + "/", "/lerobot/" + NAME + "/", recursive=True)
    remote = ensure_index("memory://lerobot", entry_of("bridge_lerobot"), index_root=tmp_path)
    np.testing.assert_array_equal(remote.pose, index.pose)
    np.testing.assert_array_equal(remote.read_image("primary", 15, 1), index.read_image("primary", 15, 1))
    memory.rm("/lerobot", recursive=True)


@pytest.fixture
def fresh(motions: Motions, tmp_path: Path) -> Path:
    write_v3(tmp_path / NAME, motions, TASKS, FPS, 2)
    return tmp_path


def rewrite_info(root: Path, **changes: object) -> None:
    path = root / NAME / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def indexed(root: Path) -> EpisodeIndex:
    return ensure_index(root, entry_of("bridge_lerobot"), index_root=root / "index")


def test_what_an_entry_promises_and_the_data_set_lacks_is_named(fresh: Path) -> None:
    features = json.loads((fresh / NAME / "meta" / "info.json").read_text())["features"]
    features["observation.state"]["shape"] = [7]
    features["observation.images.image_0"]["dtype"] = "float32"
    rewrite_info(fresh, features=features, fps=10)
    with pytest.raises(DataError) as error:
        indexed(fresh)
    for part in (
        "'bridge_lerobot'",
        "observation.state: 7 numbers instead of at least 8",
        "observation.images.image_0: float32, no pictures",
        "fps 10 instead of 5",
    ):
        assert part in str(error.value)


def test_unknown_versions_and_missing_folders(fresh: Path) -> None:
    rewrite_info(fresh, codebase_version="v1.6")
    with pytest.raises(DataError, match=r"version of LeRobot's format[\s\S]*v1\.6"):
        indexed(fresh)
    (fresh / NAME / "meta" / "info.json").write_text('{"codebase_version": "v3.0"}')
    with pytest.raises(DataError, match=r"cannot be read[\s\S]*features"):
        open_lerobot(fresh / NAME)
    with pytest.raises(DataError, match=r"bridge_orig_lerobot is not under[\s\S]*info\.json"):
        indexed(fresh / "elsewhere")


def test_a_cut_data_file_is_an_error(fresh: Path) -> None:
    path = fresh / NAME / "data" / "chunk-000" / "file-001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 8), path)
    with pytest.raises(DataError, match=r"file-001\.parquet, episode 2[\s\S]*8 frames[\s\S]*expected: 9"):
        indexed(fresh)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cannot be read[\s\S]*file-001\.parquet"):
        indexed(fresh)


def test_a_short_video_leaves_frames_out(fresh: Path, motions: Motions) -> None:
    from lerobot_writer import write_video

    column = SEEN["primary"]
    path = fresh / NAME / "videos" / column / "chunk-000" / "file-000.mp4"
    write_video(path, [picture(column, 0, step) for step in range(LENGTHS[0] - 3)], FPS, 2)
    index = indexed(fresh)
    # Only the last frame is looked at without verification; its neighbours are found missing when they are read.
    assert index.description["problems"]["frames skipped: broken image of camera primary"] == 1
    with pytest.raises(DataError, match=r"file-000\.mp4, frame 9"):
        index.read_image("primary", 9, 0)
    path.unlink()
    with pytest.raises(DataError, match=r"video of a data set cannot be opened[\s\S]*file-000\.mp4"):
        ensure_index(fresh, entry_of("bridge_lerobot"), index_root=fresh / "again")


@pytest.mark.parametrize("place", ["local", "bucket"])
def test_pictures_in_the_data_files(motions: Motions, tmp_path: Path, place: str) -> None:
    write_v21(tmp_path / NAME, motions, TASKS, FPS, 2)
    with_pictures(tmp_path / NAME, len(motions))
    root: Path | str = tmp_path
    if place == "bucket":
        fsspec.filesystem("memory").put(str(tmp_path / NAME) + "/", "/pictures/" + NAME + "/", recursive=True)
        root = "memory://pictures"
    index = ensure_index(root, entry_of("bridge_lerobot"), index_root=tmp_path / "index")
    for camera, column in SEEN.items():
        for frame in np.random.default_rng(2).permutation(len(index)).tolist():
            episode = int(index.episode_of(np.array([frame]))[0])
            expected = picture(column, episode, frame - int(index.episode_starts[episode]))
            np.testing.assert_array_equal(index.read_image(camera, frame, episode), expected)
    assert index.encoded_image("primary", 3, 0).startswith(b"\x89PNG")
    assert "row 3: camera primary" in index.place("primary", 3, 0)
    mixture = RobotMixture(root, {"bridge_lerobot": 1.0}, ChunkSpec(), index_folder=tmp_path / "index")
    dataset = RobotDataset(mixture.training, mixture.stream(), {"primary": CameraSpec(28, 28)}, ChunkSpec())
    assert dataset.__getitems__(range(20)).image_mask["primary"].all()
    if place == "bucket":
        fsspec.filesystem("memory").rm("/pictures", recursive=True)


def test_both_formats_in_one_mixture(fresh: Path) -> None:
    write_demo_episodes(fresh, episodes=4, steps=9, height=48, width=64)
    weights = {"bridge_lerobot": 1.0, "bridge": 1.0}
    mixture = RobotMixture(fresh, weights, ChunkSpec(), weighting="share", index_folder=fresh / "index")
    dataset = RobotDataset(mixture.training, mixture.stream(), {"primary": CameraSpec(28, 28)}, ChunkSpec())
    batch = dataset.__getitems__(range(40))
    assert set(batch.dataset.tolist()) == {0, 1}
    assert batch.image_mask["primary"].all()
    for row, number in enumerate(batch.dataset.tolist()):
        assert ("the drawer", "reach for the")[number] in batch.instructions[row]


def test_pictures_in_videos_have_no_bytes_of_their_own(fresh: Path) -> None:
    with pytest.raises(ConfigError, match="not stored one by one"):
        indexed(fresh).encoded_image("primary", 0, 0)


def test_without_pyav_the_extra_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match=r"spear-lightning\[video\]"):
        indexed(fresh)


def test_a_split_may_go_on_to_the_last_episode(motions: Motions, tmp_path: Path) -> None:
    write_v21(tmp_path / NAME, motions, TASKS, FPS, 2)
    path = tmp_path / NAME / "meta" / "info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "splits": {"train": ":2", "val": "2:"}}))
    folder = open_lerobot(tmp_path / NAME)
    numbers = {
        split: [each.number for _, episodes in files for each in episodes] for split, files in folder.files.items()
    }
    assert numbers == {"train": [0, 1], "val": [2, 3]}
