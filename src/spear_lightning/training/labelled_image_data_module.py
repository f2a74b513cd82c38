"""LightningDataModule of labelled images: 3D questions about them, on an endless stream that resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch

from spear_lightning.batches import TrueAnswer, VqaBatch
from spear_lightning.errors import ConfigError
from spear_lightning.policy import Answerer
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.robot_data.mixture import Weighting
from spear_lightning.training.data_module_checks import (
    equal_share,
    gpu_of,
    place_of,
    require_at_least,
    share_of_batch,
)
from spear_lightning.vqa.augment import ViewRecipe
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens, Quantizer, Scale
from spear_lightning.vqa.labelled_images import LabelMixture
from spear_lightning.vqa.loader import FiniteVqaLoader, ResumableVqaLoader
from spear_lightning.vqa.mixture import TaskMixture
from spear_lightning.vqa.question_data import fingerprint, training_answers, training_dataset, validation_dataset
from spear_lightning.vqa.text_layout import TextLayout


class LabelledImageDataModule(L.LightningDataModule):
    """Batches of questions about labelled images (spec section 5), in the tokens of the model that is trained.

    An epoch is one pass over as many samples as there are training images; the stream itself is endless and
    resumes at any step.

    Args:
        root: Folder that holds the label stores; the one place that says where data is.
        labels: Folder of a label store, relative to `root` -> weight, e.g. `{labels: 1.0}`.
        cameras: The one camera of the model that sees the images: name -> width, height, fit.
        tasks: Class path of a task -> weight.
        scale: Unit of coordinates: `median_depth` of the image, or `metric` for labels in metres.
        value_range: Least and greatest coordinate, divided into equal bins; `null` fits bins to what the tasks ask
            about the training labels such that 3D tokens are used about equally often.
        views: How training images are varied.
        max_pairs: Questions of a sample at most.
        max_length: Tokens of a sample at most; questions that do not fit are left out.
        one_length: Whether every batch is padded to `max_length`: more work, but steps of one shape, which
            `GraphedNetwork` needs.
        batch_size: Samples per step of all processes together.
        weighting: `per_frame`: a store's share is its weight times its images; `share`: its weight alone.
        holdout: Share of each store's images kept out of training for validation.
        validation_samples: Held-out images at most, spread evenly.
        validation_batch_size: Samples per validation batch and process; default: as in training.
        window_batches: Batches whose samples are sorted by length together, so that padding wastes little.
        seed: Of the shuffling, the questions, the views, and the choice of held-out images.
        num_workers: Worker processes per trainer process; 0 reads in the trainer.
        prefetch: Batches each worker prepares ahead.
    """

    def __init__(
        self,
        root: str,
        labels: dict[str, float],
        cameras: dict[str, CameraSpec],
        tasks: dict[str, float],
        scale: Scale = "median_depth",
        value_range: tuple[float, float] | None = None,
        views: ViewRecipe = ViewRecipe(),  # noqa: B008 - frozen
        max_pairs: int = 4,
        max_length: int = 384,
        one_length: bool = False,
        batch_size: int = 32,
        weighting: Weighting = "per_frame",
        holdout: float = 0.02,
        validation_samples: int = 512,
        validation_batch_size: int | None = None,
        window_batches: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size, validation_samples=validation_samples, prefetch=prefetch)
        require_at_least(1, validation_batch_size=validation_batch_size, max_length=max_length)
        require_at_least(0, num_workers=num_workers)
        if len(cameras) != 1:
            raise ConfigError(
                "Labelled images are seen by one camera", where="data.cameras", found=sorted(cameras), expected=1
            )
        self.root, self.labels, self.cameras = root, labels, cameras
        self.tasks = TaskMixture(tasks, max_pairs)
        self.scale: Scale = scale
        self.value_range = value_range
        self.views = views
        self.max_length = max_length
        self.one_length = one_length
        self.batch_size = batch_size
        self.weighting: Weighting = weighting
        self.holdout = holdout
        self.validation_samples = validation_samples
        self.validation_batch_size = validation_batch_size
        self.window_batches = window_batches
        self.seed = seed
        self.num_workers, self.prefetch = num_workers, prefetch
        self.answerer: Answerer | None = None
        self._mixture: LabelMixture | None = None

    @property
    def camera(self) -> CameraSpec:
        """Size at which the model sees the images."""
        (camera,) = self.cameras.values()
        return camera

    def open_mixture(self) -> LabelMixture:
        """Open the label stores.

        Raises:
            DataError: If one is missing or broken.
        """
        if self._mixture is None:
            root = Path(self.root)
            if not root.is_dir():
                raise ConfigError("The data root does not exist", where="data.root", found=root)
            folders = {str(root / folder): weight for folder, weight in self.labels.items()}
            self._mixture = LabelMixture(folders, self.weighting, self.holdout, self.seed)
        return self._mixture

    def fit_tokens(self, bins: int) -> CoordinateTokens:
        """Return 3D tokens for the training labels, as configured.

        Args:
            bins: How many the model has.
        """
        if self.value_range is None:
            mixture = self.open_mixture()
            labels = mixture.labels(sum(map(len, mixture.training)))
            return CoordinateTokens.fit(labels, self.scale, bins, numbers=self.tasks.numbers())
        return CoordinateTokens(Quantizer.uniform(*self.value_range, bins), self.scale)

    def answers(self, images: int) -> Iterator[TrueAnswer]:
        """Yield what answers about some training images say; for baselines."""
        tokens = self._require_answerer().require_tokens()
        return training_answers(self.open_mixture(), self.tasks, tokens, self.camera, images)

    def setup(self, stage: str) -> None:
        """Open the label stores on every process."""
        self.open_mixture()

    def train_dataloader(self) -> ResumableVqaLoader:
        """Return the loader of the endless training stream."""
        mixture, tokens = self.open_mixture(), self._require_answerer().require_tokens()
        world_size = self.trainer.world_size if self.trainer else 1
        dataset = training_dataset(
            mixture,
            self.tasks,
            tokens,
            self._layout(),
            self.camera,
            self.views,
            self.batch_size,
            self.window_batches,
            next(iter(self.cameras)),
        )
        return ResumableVqaLoader(
            dataset,
            share_of_batch(self.batch_size, world_size),
            epoch_batches=max(1, sum(map(len, mixture.training)) // self.batch_size),
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=world_size,
            num_workers=self.num_workers,
            prefetch=self.prefetch,
            device=gpu_of(self.trainer),
            data=fingerprint(mixture, self.tasks, tokens, self.camera, self.views, self.window_batches),
        )

    def val_dataloader(self) -> FiniteVqaLoader | list[FiniteVqaLoader]:
        """Return the loader of held-out images; none if nothing is held out."""
        mixture = self.open_mixture()
        if not sum(map(len, mixture.held_out)):
            return []
        dataset, places = validation_dataset(
            mixture,
            self.tasks,
            self._require_answerer().require_tokens(),
            self._layout(),
            self.camera,
            self.validation_samples,
            next(iter(self.cameras)),
        )
        rank, world_size = place_of(self.trainer)
        batch_size = self.validation_batch_size or max(1, self.batch_size // world_size)
        own = equal_share(len(places), rank, world_size)
        return FiniteVqaLoader(dataset, own, batch_size, self.num_workers, gpu_of(self.trainer))

    def test_dataloader(self) -> FiniteVqaLoader | list[FiniteVqaLoader]:
        """Return the held-out images."""
        return self.val_dataloader()

    def predict_dataloader(self) -> FiniteVqaLoader | list[FiniteVqaLoader]:
        """Return the held-out images."""
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: VqaBatch, device: torch.device, dataloader_idx: int) -> VqaBatch:
        """Copy a batch that the loader has not copied already."""
        return batch.to(device, non_blocking=True)

    def _layout(self) -> TextLayout:
        answerer = self._require_answerer()
        return TextLayout(
            answerer.prompt.vocabulary, answerer.vlm.language.new_tokens, self.max_length, self.one_length
        )

    def _require_answerer(self) -> Answerer:
        """Return the model whose tokens the questions are written in; `VLMModule` sets it.

        Raises:
            ConfigError: If there is none.
        """
        if self.answerer is None:
            raise ConfigError(
                "The data module does not know the model whose tokens it writes",
                where="LabelledImageDataModule.answerer",
                remedy="train it with VLMModule, or set it to an Answerer",
            )
        return self.answerer
