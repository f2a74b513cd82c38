"""Data sets in buckets: the same index and the same batches as from the same files on this machine."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from spear_lightning import cli
from spear_lightning.errors import ConfigError, DataError
from spear_lightning.robot_data.chunks import ChunkSpec
from spear_lightning.robot_data.dataset import EvenSamples, RobotDataset
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.robot_data.index_build import ensure_index
from spear_lightning.robot_data.loader import FiniteLoader
from spear_lightning.robot_data.registry import entry_of
from spear_lightning.robot_data.rlds_folder import find_rlds, open_rlds
from spear_lightning.robot_data.robot_mixture import RobotMixture
from spear_lightning.robot_data.storage import BucketPath, data_path
from spear_lightning.robot_data.tfrecord import read_records

CAMERAS = {"primary": CameraSpec(56, 42), "secondary": CameraSpec(28, 28)}


@pytest.fixture(scope="module")
def bucket(demo_root: Path) -> Iterator[str]:
    """The demo data set in a bucket that is in memory."""
    memory = fsspec.filesystem("memory")
    memory.put(str(demo_root) + "/", "/bucket/", recursive=True)
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def batch_of(root: str | Path, folder: Path):
    mixture = RobotMixture(root, {"bridge": 1.0}, ChunkSpec(), index_folder=folder)
    dataset = RobotDataset(mixture.training, mixture.stream(), CAMERAS, ChunkSpec())
    # More than the data set holds, so that some frames come twice in the batch.
    return mixture, dataset.__getitems__(range(200))


def test_an_index_of_a_bucket_equals_that_of_its_files(bucket: str, demo_root: Path, tmp_path: Path) -> None:
    local = ensure_index(demo_root, entry_of("bridge"), index_root=tmp_path / "local")
    remote = ensure_index(bucket, entry_of("bridge"), index_root=tmp_path / "remote")
    names = sorted(path.name for path in local.folder.glob("*.bin"))
    assert names == sorted(path.name for path in remote.folder.glob("*.bin"))
    assert all((local.folder / name).read_bytes() == (remote.folder / name).read_bytes() for name in names)
    assert remote.description["data_folder"] == "memory://bucket/bridge_dataset/1.0.0"
    frames, episodes = np.array([3, 11, 3]), np.array([0, 1, 0])
    remote.fetch("primary", frames, episodes)
    for frame, episode in zip(frames, episodes, strict=True):
        assert remote.encoded_image("primary", frame, episode) == local.encoded_image("primary", frame, episode)
    copy = pickle.loads(pickle.dumps(remote))
    assert copy.encoded_image("secondary", 20, 2) == local.encoded_image("secondary", 20, 2)


def test_batches_from_a_bucket_equal_local_ones(bucket: str, demo_root: Path, tmp_path: Path) -> None:
    local, expected = batch_of(demo_root, tmp_path / "local")
    remote, found = batch_of(bucket, tmp_path / "remote")
    assert remote.fingerprint() == local.fingerprint()
    for camera in CAMERAS:
        assert torch.equal(found.images[camera], expected.images[camera])
        assert found.image_mask[camera].all()
    assert torch.equal(found.actions, expected.actions)
    assert found.instructions == expected.instructions


def test_pictures_of_a_batch_are_fetched_together(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    read_ranges = BucketPath.read_ranges

    def counted(self, names, spans):
        asked.append(len(names))
        return read_ranges(self, names, spans)

    monkeypatch.setattr(BucketPath, "read_ranges", counted)
    mixture, _ = batch_of(bucket, tmp_path)
    # Once per camera; a frame that is in the batch twice, once.
    frames = len(np.unique(mixture.stream()[np.arange(200)][1]))
    assert frames < 200
    assert asked == [frames, frames]


def test_a_frame_cache_is_made_of_a_bucket(bucket: str, demo_root: Path, tmp_path: Path) -> None:
    local, _ = batch_of(demo_root, tmp_path / "local")
    remote, expected = batch_of(bucket, tmp_path / "remote")
    cached = remote.frame_caches(CAMERAS, "exact")
    dataset = RobotDataset(remote.training, remote.stream(), CAMERAS, ChunkSpec(), cached=cached)
    assert torch.equal(dataset.__getitems__(range(200)).images["primary"], expected.images["primary"])
    local.frame_caches(CAMERAS, "exact")
    (one,), (other,) = ((tmp_path / name / "frames").rglob("primary-*") for name in ("local", "remote"))
    assert (one / "00000.pictures").read_bytes() == (other / "00000.pictures").read_bytes()


def test_a_file_address_is_a_local_path(demo_root: Path, tmp_path: Path) -> None:
    assert data_path(f"file://{demo_root}") == demo_root
    assert data_path("file:///a%20b") == Path("/a b")
    mixture = RobotMixture(f"file://{demo_root}", {"bridge": 1.0}, ChunkSpec(), index_folder=tmp_path)
    assert mixture.training[0].index.description["data_folder"] == str(demo_root / "bridge_dataset" / "1.0.0")


@pytest.mark.slow
def test_processes_read_buckets(demo_root: Path, tmp_path: Path) -> None:
    # Memory is not shared with processes; a cache in front of files goes through the same driver interface.
    root = f"simplecache::file://{demo_root}"
    folder = find_rlds(root, "bridge_dataset", "1.0.0")
    assert isinstance(folder, BucketPath)
    mixture = RobotMixture(root, {"bridge": 1.0}, ChunkSpec(), index_folder=tmp_path)
    sizes = [len(source) for source in mixture.held_out]
    dataset = RobotDataset(mixture.held_out, EvenSamples(sizes, 4), CAMERAS, ChunkSpec())
    (with_worker,) = FiniteLoader(dataset, range(4), 4, num_workers=1)
    (alone,) = FiniteLoader(dataset, range(4), 4)
    assert torch.equal(with_worker.images["primary"], alone.images["primary"])
    assert with_worker.image_mask["primary"].all()


@pytest.mark.parametrize("kept", [5, -3, 100])
def test_a_cut_shard_in_a_bucket_is_an_error(bucket: str, demo_folder: Path, kept: int) -> None:
    content = sorted(demo_folder.glob("*.tfrecord*"))[0].read_bytes()
    fsspec.filesystem("memory").pipe("/bucket/cut/shard", content[:kept])
    with pytest.raises(DataError, match=r"truncated or damaged[\s\S]*memory://bucket/cut/shard, byte"):
        list(read_records(BucketPath("memory://bucket/cut/shard")))


def test_a_shard_that_is_gone_or_shorter(bucket: str, demo_root: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.copy("/bucket/bridge_dataset", "/bucket/again/bridge_dataset", recursive=True)
    index = ensure_index(f"{bucket}/again", entry_of("bridge"), index_root=tmp_path)
    (shard, _) = sorted(memory.glob("/bucket/again/bridge_dataset/1.0.0/*.tfrecord*"))
    memory.rm(shard)
    with pytest.raises(DataError, match=r"cannot be read[\s\S]*again/bridge_dataset[\s\S]*FileNotFoundError"):
        index.encoded_image("primary", 3, 0)
    with pytest.raises(DataError, match=r"A shard is missing[\s\S]*00000-of-00002"):
        ensure_index(f"{bucket}/again", entry_of("bridge"), index_root=tmp_path)


def test_missing_places_and_drivers_are_explained(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"kuka 0\.1\.0 is not under[\s\S]*bridge_dataset"):
        find_rlds(bucket, "kuka", "0.1.0")
    with pytest.raises(DataError, match="data root does not exist"):
        find_rlds("memory://nowhere", "kuka", "0.1.0")
    with pytest.raises(ConfigError, match=r"no driver[\s\S]*carrierpigeon"):
        open_rlds("carrierpigeon://bucket/bridge_dataset/1.0.0")
    command = ["data", "index", f"{bucket}/bridge_dataset/1.0.0", "--workers=1"]
    assert cli.main([*command, "--beside"]) == 1
    assert "cannot be kept in a bucket" in capsys.readouterr().err
    assert cli.main([*command, f"--index_folder={tmp_path}"]) == 0
    assert "20" in capsys.readouterr().out


def test_a_missing_driver_names_the_extra_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(url: str) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.core.url_to_fs", no_driver)
    with pytest.raises(ConfigError, match=r"pip install 'spear-lightning\[gcs\]'"):
        open_rlds("gs://gresearch/robotics/droid/1.0.1")
