"""LightningDataModule of pictures with depth: an endless shuffled stream, and held-out scenes."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from spear_lightning.batches import GeometryBatch
from spear_lightning.errors import ConfigError
from spear_lightning.labeling.depth_picture_order import ShuffledPictures
from spear_lightning.labeling.depth_pictures import DepthPictures
from spear_lightning.labeling.picture_stream import PicturesInOrder, PictureStream
from spear_lightning.training.data_module_checks import (
    equal_share,
    gpu_of,
    place_of,
    require_at_least,
    share_of_batch,
)


class GeometryDataModule(L.LightningDataModule):
    """Batches of pictures with depth, as `spear data tabletop --depth_pictures N` writes them.

    Args:
        root: Folder that holds the store; the one place that says where data is.
        pictures: Folder of the store, relative to `root`.
        batch_size: Samples per step of all processes together.
        validation_samples: The last so many pictures are held out: a multiple of the pictures of a scene (5 in
            the tabletop world), so that no scene is on both sides.
        seed: Of the order.
        num_workers: Worker processes per trainer process; 0 reads in the trainer.
    """

    def __init__(
        self,
        root: str,
        pictures: str = "depth",
        batch_size: int = 256,
        validation_samples: int = 1000,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size, validation_samples=validation_samples)
        require_at_least(0, num_workers=num_workers)
        self.root = root
        self.pictures = pictures
        self.batch_size = batch_size
        self.validation_samples = validation_samples
        self.seed = seed
        self.num_workers = num_workers
        self._store: DepthPictures | None = None

    def open_store(self) -> DepthPictures:
        """Open the store.

        Raises:
            DataError: If there is none.
            ConfigError: If nothing would be left to train on.
        """
        if self._store is None:
            store = DepthPictures(Path(self.root) / self.pictures)
            if len(store) <= self.validation_samples:
                raise ConfigError(
                    "All pictures are held out",
                    where="data.validation_samples",
                    found=self.validation_samples,
                    expected=f"fewer than the {len(store)} there are",
                )
            self._store = store
        return self._store

    def setup(self, stage: str) -> None:
        """Open the store on every process."""
        self.open_store()

    def train_dataloader(self) -> PictureStream[GeometryBatch]:
        """Return the loader of the endless training stream."""
        store, (rank, world_size) = self.open_store(), place_of(self.trainer)
        count = len(store) - self.validation_samples
        return PictureStream(
            ShuffledPictures(store, count, self.seed),
            share_of_batch(self.batch_size, world_size),
            epoch_batches=max(1, count // self.batch_size),
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            device=gpu_of(self.trainer),
            data=f"{store.fingerprint}-{count}-{self.seed}",
        )

    def val_dataloader(self) -> PicturesInOrder[GeometryBatch]:
        """Return the loader of the held-out pictures of this process."""
        store, (rank, world_size) = self.open_store(), place_of(self.trainer)
        first = len(store) - self.validation_samples
        own = equal_share(self.validation_samples, rank, world_size)
        numbers = range(first + own.start, first + own.stop)
        return PicturesInOrder(store, numbers, self.batch_size // world_size or 1)

    test_dataloader = val_dataloader
