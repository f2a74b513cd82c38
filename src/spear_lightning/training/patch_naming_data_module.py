"""LightningDataModule of labelled images whose patches have names: an endless stream, and held-out images."""

from __future__ import annotations

import hashlib
import json
from itertools import chain
from pathlib import Path

import lightning as L

from spear_lightning.batches import NamedPatchBatch
from spear_lightning.errors import ConfigError
from spear_lightning.labeling.picture_stream import PicturesInOrder, PictureStream
from spear_lightning.robot_data.dataset import EvenSamples, FindsSamples
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.training.data_module_checks import (
    equal_share,
    gpu_of,
    place_of,
    require_at_least,
    share_of_batch,
)
from spear_lightning.vqa.labelled_images import LabelledImages, LabelMixture
from spear_lightning.vqa.patch_names import NamedPatches, common_names


class PatchNamingDataModule(L.LightningDataModule):
    """Batches of labelled images with the names of what their patches show (`vqa.patch_names`).

    Give the labels, holdout and seed of the VLM's experiment: then the same images are held out.

    Args:
        root: Folder that holds the label stores; the one place that says where data is.
        labels: Folder of a label store, relative to `root` -> weight.
        camera: Size at which the encoder sees the images.
        batch_size: Samples per step of all processes together.
        holdout: Share of each store's images kept out of training for validation.
        validation_samples: Held-out images at most, spread evenly.
        seed: Of the order, and of the choice of held-out images.
        num_workers: Worker processes per trainer process; 0 reads in the trainer.
    """

    def __init__(
        self,
        root: str,
        labels: dict[str, float],
        camera: CameraSpec,
        batch_size: int = 256,
        holdout: float = 0.02,
        validation_samples: int = 512,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size, validation_samples=validation_samples)
        require_at_least(0, num_workers=num_workers)
        self.root, self.labels, self.camera = root, labels, camera
        self.batch_size = batch_size
        self.holdout = holdout
        self.validation_samples = validation_samples
        self.seed = seed
        self.num_workers = num_workers
        self._names: list[str] = []
        self._patch = 0
        self._mixture: LabelMixture | None = None

    def open_mixture(self) -> LabelMixture:
        """Open the label stores.

        Raises:
            DataError: If one is missing or broken.
        """
        if self._mixture is None:
            folders = {str(Path(self.root) / folder): weight for folder, weight in self.labels.items()}
            self._mixture = LabelMixture(folders, "per_frame", self.holdout, self.seed, masks=True)
        return self._mixture

    def prepare(self, most: int, patch: int) -> list[str]:
        """Take what the network can learn; `PatchNamingModule` calls this.

        Args:
            most: Names that it can tell apart.
            patch: Side of its patches in pixels.

        Returns:
            The names that objects have most often in these stores, held-out images included.

        Raises:
            ConfigError: If no object has a name.
        """
        parts = self.open_mixture().training
        self._patch = patch
        self._names = common_names(chain.from_iterable(part.store.object_names() for part in parts), most)
        if not self._names:
            raise ConfigError("No object has a name", where="data.labels", found=sorted(self.labels))
        return self._names

    def held_out_images(self) -> int:
        """Return how many images are held out."""
        return sum(map(len, self.open_mixture().held_out))

    def setup(self, stage: str) -> None:
        """Open the label stores on every process."""
        self.open_mixture()

    def train_dataloader(self) -> PictureStream[NamedPatchBatch]:
        """Return the loader of the endless training stream."""
        mixture, (rank, world_size) = self.open_mixture(), place_of(self.trainer)
        dataset = self._dataset(mixture.training, mixture.stream())
        told = json.dumps([mixture.fingerprint(), self._names, str(self.camera), self._patch])
        return PictureStream(
            dataset,
            share_of_batch(self.batch_size, world_size),
            epoch_batches=max(1, sum(map(len, mixture.training)) // self.batch_size),
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            device=gpu_of(self.trainer),
            data=hashlib.sha256(told.encode()).hexdigest()[:16],
        )

    def val_dataloader(self) -> PicturesInOrder[NamedPatchBatch] | list[PicturesInOrder[NamedPatchBatch]]:
        """Return the loader of this process's held-out images; none if nothing is held out."""
        mixture, (rank, world_size) = self.open_mixture(), place_of(self.trainer)
        if not self.held_out_images():
            return []
        finder = EvenSamples([len(part) for part in mixture.held_out], self.validation_samples)
        own = equal_share(len(finder), rank, world_size)
        return PicturesInOrder(self._dataset(mixture.held_out, finder), own, self.batch_size // world_size or 1)

    test_dataloader = val_dataloader

    def _dataset(self, sources: list[LabelledImages], finder: FindsSamples) -> NamedPatches:
        if not self._names:
            raise ConfigError(
                "The data module does not know the network that learns names",
                where="PatchNamingDataModule",
                remedy="train it with PatchNamingModule, or call `prepare`",
            )
        return NamedPatches(sources, finder, self._names, self.camera, self._patch)
