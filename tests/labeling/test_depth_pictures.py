"""The store of pictures with depth and its loaders: what is written is read, in a stream that resumes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from spear_lightning.errors import CheckpointError, DataError
from spear_lightning.labeling.depth_picture_order import ShuffledPictures
from spear_lightning.labeling.depth_pictures import DepthPictures, write_shard
from spear_lightning.labeling.picture_stream import PicturesInOrder, PictureStream


@pytest.fixture
def store(tmp_path: Path) -> DepthPictures:
    """Eleven pictures in three shards; number n has pixels of n, depth n + 0.5 and focal length n + 1."""
    start = 0
    for shard, count in enumerate((4, 4, 3)):
        numbers = np.arange(start, start + count)
        images = np.broadcast_to(numbers[:, None, None, None], (count, 3, 14, 28)).astype(np.uint8)
        depth = np.broadcast_to(numbers[:, None, None] + 0.5, (count, 14, 28)).astype(np.float64)
        write_shard(tmp_path, shard, images, depth, numbers + 1.0)
        start += count
    return DepthPictures(tmp_path)


def test_pictures_are_read_as_written(store: DepthPictures) -> None:
    assert len(store) == 11
    assert store.size == (14, 28)
    batch = store.read([10, 0, 5])
    assert batch.images.dtype == torch.uint8
    assert batch.images[:, 2, 3, 4].tolist() == [10, 0, 5]
    assert batch.depth[:, 3, 4].tolist() == [10.5, 0.5, 5.5]
    assert batch.focal_x.tolist() == [11, 1, 6]
    assert batch.images.shape == (3, 3, 14, 28)
    assert not list(store.folder.glob("*.tmp"))


def test_every_epoch_shows_every_picture_once_in_another_order(store: DepthPictures) -> None:
    data = ShuffledPictures(store, 8, seed=3)
    epochs = [data[list(range(start, start + 8))].focal_x.tolist() for start in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(1, 9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert data[[6, 7, 8, 9]].focal_x.tolist() == [*epochs[0][6:], *epochs[1][:2]]


def test_the_stream_resumes_and_does_not_depend_on_processes(store: DepthPictures) -> None:
    def stream(batch_size: int, rank: int = 0, world_size: int = 1, data: str = "x") -> PictureStream:
        return PictureStream(ShuffledPictures(store, 8, 0), batch_size, 4, rank, world_size, data=data)

    whole = stream(4)
    seen = [batch.position.tolist() for batch in islice(whole, 3)]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    again = stream(4)
    again.load_state_dict({**whole.state_dict(), "batches": 2})
    assert next(iter(again)).focal_x.tolist() == ShuffledPictures(store, 8, 0)[seen[2]].focal_x.tolist()
    halves = [next(iter(stream(2, rank, 2))).position.tolist() for rank in (0, 1)]
    assert halves[0] + halves[1] == seen[0]
    with pytest.raises(CheckpointError, match="otherwise"):
        stream(4, data="y").load_state_dict(whole.state_dict())
    with pytest.raises(CheckpointError, match="otherwise"):
        stream(2).load_state_dict(whole.state_dict())


@pytest.mark.slow
def test_a_worker_gives_the_same_batches(store: DepthPictures) -> None:
    data = ShuffledPictures(store, 8, 0)
    alone, helped = (PictureStream(data, 4, 3, num_workers=count) for count in (0, 1))
    for first, second in zip(islice(alone, 3), islice(helped, 3), strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.position, second.position)


def test_held_out_pictures_come_in_order(store: DepthPictures) -> None:
    loader = PicturesInOrder(store, range(6, 11), 2)
    assert len(loader) == 3
    assert [batch.focal_x.tolist() for batch in loader] == [[7, 8], [9, 10], [11]]


def test_stores_without_whole_shards_are_refused(tmp_path: Path, store: DepthPictures) -> None:
    (store.folder / "00002.focal.npy").unlink()
    assert len(DepthPictures(store.folder)) == 8
    assert DepthPictures(store.folder).fingerprint != store.fingerprint
    (store.folder / "00001.depth.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        DepthPictures(store.folder)
    with pytest.raises(DataError, match="no pictures with depth"):
        DepthPictures(tmp_path / "empty")
