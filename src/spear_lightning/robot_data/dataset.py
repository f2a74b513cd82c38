"""Places in a sample stream -> typed batches of pixels, states and chunks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from spear_lightning.batches import STATE_WIDTH, RobotBatch
from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.chunks import ChunkSpec, read_chunks
from spear_lightning.robot_data.images import BrokenImage, CameraSpec, fit_image
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


class RobotDataset(torch.utils.data.Dataset[RobotBatch]):
    """Reads whole batches: low-dimensional streams at once per data set, pictures one by one.

    Args:
        sources: The frames of each data set.
        finder: Place -> (data set, sample).
        cameras: Camera name -> size and fit, in the order the model sees them.
        chunks: What a chunk of actions is.

    Raises:
        ConfigError: If no data set has a camera.
    """

    def __init__(
        self,
        sources: Sequence[SampleSource],
        finder: FindsSamples,
        cameras: Mapping[str, CameraSpec],
        chunks: ChunkSpec,
    ) -> None:
        self._sources = list(sources)
        self._finder = finder
        self._cameras = dict(cameras)
        self._chunks = chunks
        self.broken_images = 0
        there = {camera for source in sources for camera in source.index.cameras}
        unknown = {name: camera.source or name for name, camera in self._cameras.items()}
        unknown = {name: source for name, source in unknown.items() if source not in there}
        if unknown or not cameras:
            raise ConfigError(
                "No data set of the mixture has such a camera",
                where="data.cameras",
                found=sorted(unknown.values()) or "no cameras",
                expected=f"some of {sorted(there)}",
            )

    def __getitem__(self, place: int) -> RobotBatch:
        """Return a batch of one."""
        return self.__getitems__([place])

    def __getitems__(self, places: Sequence[int]) -> RobotBatch:
        """Return the batch of some places; `DataLoader` calls this once per batch.

        Raises:
            DataError: If a shard cannot be read. A picture that cannot be decoded is masked and reported instead.
        """
        places_B = np.asarray(places, np.int64)
        dataset_B, sample_B = self._finder[places_B]
        size, horizon = len(places_B), self._chunks.horizon
        batch = RobotBatch(
            images={},
            image_mask={name: torch.zeros(size, dtype=torch.bool) for name in self._cameras},
            instructions=[""] * size,
            state=torch.empty(size, STATE_WIDTH),
            actions=torch.empty(size, horizon, STATE_WIDTH),
            action_mask=torch.empty(size, horizon, dtype=torch.bool),
            dataset=torch.from_numpy(dataset_B),
            position=torch.from_numpy(places_B),
        )
        pixels = {
            name: np.zeros((size, camera.height, camera.width, 3), np.uint8)
            for name, camera in self._cameras.items()
        }
        for dataset in np.unique(dataset_B):
            rows = np.flatnonzero(dataset_B == dataset)
            self._fill(batch, pixels, rows, self._sources[dataset], sample_B[rows])
        # Channels-last memory: rows of a picture stay together, so nothing is transposed on the CPU.
        batch.images = {name: torch.from_numpy(array).permute(0, 3, 1, 2) for name, array in pixels.items()}
        return batch

    def _fill(
        self,
        batch: RobotBatch,
        pixels: Mapping[str, np.ndarray],
        rows: np.ndarray,
        source: SampleSource,
        samples: np.ndarray,
    ) -> None:
        index = source.index
        frames = source.frames(samples)
        episodes = index.episode_of(frames)
        chunks = read_chunks(index, frames, self._chunks)
        batch.state[rows], batch.actions[rows] = chunks.state, chunks.actions
        batch.action_mask[rows] = chunks.mask
        for row, frame, episode in zip(rows.tolist(), frames.tolist(), episodes.tolist(), strict=True):
            batch.instructions[row] = index.instructions[index.instruction_ids[episode]]
            for name, camera in self._cameras.items():
                key = camera.source or name
                if key not in index.cameras or not index.has_image(key, frame, episode):
                    continue
                try:
                    image_HW3 = index.read_image(key, frame, episode)
                except BrokenImage as error:
                    self._report(error)
                    continue
                pixels[name][row] = fit_image(image_HW3, camera).permute(1, 2, 0).numpy()
                batch.image_mask[name][row] = True

    def _report(self, error: BrokenImage) -> None:
        """Say the first broken picture of this process aloud, and count the others."""
        self.broken_images += 1
        if self.broken_images == 1:
            log.warning("%s\n  The camera is masked in this sample; further ones are not reported.", error)


def as_is(batch: Any) -> Any:
    """Collate function of a dataset that already returns batches."""
    return batch
