"""Places in a sample stream -> typed batches of pixels, states and chunks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spear_lightning.batches import STATE_WIDTH, RobotBatch
from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.chunks import ChunkSpec, read_chunks
from spear_lightning.robot_data.images import BrokenImage, BrokenImages, CameraSpec
from spear_lightning.robot_data.pictures import EncodedPictures, Pictures
from spear_lightning.robot_data.sample_source import SampleSource

log = logging.getLogger(__name__)


class FindsSamples(Protocol):
    """Place -> (data set, sample): the endless `SampleStream`, or a finite list."""

    def __getitem__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (data set, sample), int64 (n,), of places (n,)."""


class EvenSamples:
    """A finite list of samples, spread evenly over all sources: for validation.

    Args:
        sizes: Samples of each source; may be 0.
        count: Samples wanted; fewer if the sources have fewer.
    """

    def __init__(self, sizes: Sequence[int], count: int) -> None:
        self._upper = np.cumsum(sizes)
        total = int(self._upper[-1])
        self._chosen = np.unique(np.linspace(0, max(total - 1, 0), min(count, total)).astype(np.int64))

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._chosen)

    def __getitem__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (data set, sample) of places below len."""
        chosen = self._chosen[places]
        dataset = np.searchsorted(self._upper, chosen, side="right")
        before = np.concatenate([[0], self._upper])[dataset]
        return dataset, chosen - before


Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Returns memory of some shape and type for a part of a batch."""


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory of this process, whatever it holds."""
    return torch.empty(shape, dtype=dtype)


class RobotDataset(torch.utils.data.Dataset[RobotBatch]):
    """Reads whole batches: low-dimensional streams at once per data set, pictures one by one.

    Args:
        sources: The frames of each data set.
        finder: Place -> (data set, sample).
        cameras: Camera name -> size and fit, in the order the model sees them.
        chunks: What a chunk of actions is.
        scaled_decode: Whether JPEGs are decoded at a fraction of their size where that is enough: faster, and
            pixels that differ a little (see `images.reduction`).
        cached: Per data set, camera name -> pictures made in advance (see `frame_cache`); decoded where missing.

    Raises:
        ConfigError: If no data set has a camera.
    """

    def __init__(
        self,
        sources: Sequence[SampleSource],
        finder: FindsSamples,
        cameras: Mapping[str, CameraSpec],
        chunks: ChunkSpec,
        scaled_decode: bool = False,
        cached: Sequence[Mapping[str, Pictures]] | None = None,
    ) -> None:
        self._sources = list(sources)
        self._finder = finder
        self._cameras = dict(cameras)
        self._chunks = chunks
        self._broken = BrokenImages(log, "The camera is masked in this sample")
        there = {camera for source in sources for camera in source.index.cameras}
        wanted = {name: camera.source or name for name, camera in self._cameras.items()}
        unknown = sorted(source for source in wanted.values() if source not in there)
        if unknown or not cameras:
            raise ConfigError(
                "No data set of the mixture has such a camera",
                where="data.cameras",
                found=unknown or "no cameras",
                expected=f"some of {sorted(there)}",
            )
        self._pictures: list[dict[str, Pictures]] = [
            {
                name: EncodedPictures(source.index, wanted[name], camera, scaled_decode)
                for name, camera in self._cameras.items()
                if wanted[name] in source.index.cameras
            }
            for source in self._sources
        ]
        for pictures, ready in zip(self._pictures, cached or [], strict=bool(cached)):
            pictures.update(ready)

    @property
    def broken_images(self) -> int:
        """Pictures so far in this process that could not be decoded; they are masked."""
        return self._broken.count

    def __getitem__(self, place: int) -> RobotBatch:
        """Return a batch of one."""
        return self.__getitems__([place])

    def __getitems__(self, places: Sequence[int]) -> RobotBatch:
        """Return the batch of some places; `DataLoader` calls this once per batch.

        Raises:
            DataError: If a shard cannot be read. A picture that cannot be decoded is masked and reported instead.
        """
        batch = self.empty(len(places))
        self.fill(batch, places)
        return batch

    def empty(self, size: int, allocate: Allocate = allocate) -> RobotBatch:
        """Return a batch of some size that `fill` can write into.

        Args:
            size: Samples.
            allocate: Where its tensors get their memory.
        """
        cameras = self._cameras.items()
        pixels = {name: allocate((size, spec.height, spec.width, 3), torch.uint8) for name, spec in cameras}
        return RobotBatch(
            # Channels-last memory: rows of a picture stay together, so nothing is transposed on the CPU.
            images={name: pixels_BHW3.permute(0, 3, 1, 2) for name, pixels_BHW3 in pixels.items()},
            image_mask={name: allocate((size,), torch.bool) for name in self._cameras},
            instructions=[""] * size,
            state=allocate((size, STATE_WIDTH), torch.float32),
            actions=allocate((size, self._chunks.horizon, STATE_WIDTH), torch.float32),
            action_mask=allocate((size, self._chunks.horizon), torch.bool),
            dataset=allocate((size,), torch.int64),
            position=allocate((size,), torch.int64),
        )

    def fill(self, batch: RobotBatch, places: Sequence[int]) -> None:
        """Write the samples of some places into a batch of as many, over whatever it holds.

        Raises:
            DataError: As `__getitems__`.
        """
        places_B = np.asarray(places, np.int64)
        dataset_B, sample_B = self._finder[places_B]
        batch.position.copy_(torch.from_numpy(places_B))
        batch.dataset.copy_(torch.from_numpy(dataset_B))
        for dataset in np.unique(dataset_B).tolist():
            rows = np.flatnonzero(dataset_B == dataset)
            self._fill_rows(batch, rows, dataset, sample_B[rows])

    def _fill_rows(self, batch: RobotBatch, rows: np.ndarray, dataset: int, samples: np.ndarray) -> None:
        index = self._sources[dataset].index
        frames = self._sources[dataset].frames(samples)
        episodes = index.episode_of(frames)
        chunks = read_chunks(index, frames, self._chunks)
        batch.state[rows], batch.actions[rows] = chunks.state, chunks.actions
        batch.action_mask[rows] = chunks.mask
        spots = list(zip(rows.tolist(), frames.tolist(), episodes.tolist(), strict=True))
        for row, instruction in zip(rows.tolist(), index.instruction_ids[episodes].tolist(), strict=True):
            batch.instructions[row] = index.instructions[instruction]
        for name, image_B3HW in batch.images.items():
            pictures = self._pictures[dataset].get(name)
            if pictures is not None:
                pictures.fetch(frames, episodes)
            shown = [self._read(pictures, frame, episode, image_B3HW[row]) for row, frame, episode in spots]
            batch.image_mask[name][rows] = torch.tensor(shown)

    def _read(self, pictures: Pictures | None, frame: int, episode: int, out_3HW: Tensor) -> bool:
        """Write one picture, or black where there is none; returns whether there is one."""
        try:
            if pictures is not None and pictures.read_into(frame, episode, out_3HW):
                return True
        except BrokenImage as error:
            self._broken.note(error)
        out_3HW.zero_()
        return False
