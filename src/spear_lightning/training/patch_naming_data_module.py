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
from spear_lightning.robot_data.dataset import EvenSamples
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.training.data_module_checks import gpu_of, require_at_least, share_of_batch
from spear_lightning.vqa.labelled_images import LabelMixture
from spear_lightning.vqa.patch_names import NamedPatches, common_names


class PatchNamingDataModule(L.LightningDataModule):
    """Batches of labelled images with the names of what their patches show (`vqa.patch_names`).

    Give the labels, holdout and seed of the VLM's experiment: then the same images are held out.

    Args:
        root: Folder that holds the label stores; the one place that says where data is.
        labels: Folder of a label store, relative to `root` -> weight.
        camera: Size at which the encoder sees the images; its sides are multiples of `patch`.
        patch: Side of a patch in pixels: the encoder's.
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
        patch: int = 14,
        batch_size: int = 256,
        holdout: float = 0.02,
        validation_samples: int = 512,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size, validation_samples=validation_samples, patch=patch)
        require_at_least(0, num_workers=num_workers)
        if camera.width % patch or camera.height % patch:
            raise ConfigError(
                "The images do not divide into patches",
                where="data.camera",
                found=f"{camera.width} x {camera.height} pixels",
                expected=f"multiples of {patch}",
            )
        self.root, self.labels, self.camera, self.patch = root, labels, camera, patch
        self.batch_size = batch_size
        self.holdout = holdout
        self.validation_samples = validation_samples
        self.seed = seed
        self.num_workers = num_workers
        self.names: list[str] = []
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

    def find_names(self, most: int) -> list[str]:
        """Return the names that objects have most often, `most` at most, and take them as those that are known.

        Raises:
            ConfigError: If no object has a name.
        """
        parts = self.open_mixture().training
        self.names = common_names(chain.from_iterable(part.store.object_names() for part in parts), most)
        if not self.names:
            raise ConfigError("No object has a name", where="data.labels", found=sorted(self.labels))
        return self.names

    def setup(self, stage: str) -> None:
        """Open the label stores on every process."""
        self.open_mixture()

    @property
    def _world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> PictureStream[NamedPatchBatch]:
        """Return the loader of the endless training stream."""
        mixture, (rank, world_size) = self.open_mixture(), self._world
        dataset = NamedPatches(mixture.training, mixture.stream(), self.names, self.camera, self.patch)
        told = json.dumps([mixture.fingerprint(), self.names, str(self.camera), self.patch])
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
        mixture, (rank, world_size) = self.open_mixture(), self._world
        sizes = [len(part) for part in mixture.held_out]
        if not sum(sizes):
            return []
        finder = EvenSamples(sizes, self.validation_samples)
        dataset = NamedPatches(mixture.held_out, finder, self.names, self.camera, self.patch)
        # As many of them on each process: all take part in every reduction.
        own = range(rank, len(finder) - len(finder) % world_size, world_size) or range(len(finder))
        return PicturesInOrder(dataset, own, self.batch_size // world_size or 1)

    test_dataloader = val_dataloader
