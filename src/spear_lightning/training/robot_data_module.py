"""LightningDataModule of robot mixtures: indexes on first use, trains on an endless shuffled stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning as L
import torch

from spear_lightning.batches import RobotBatch
from spear_lightning.policy import PolicyInterface
from spear_lightning.robot_data.chunks import ChunkSpec
from spear_lightning.robot_data.dataset import EvenSamples, FindsSamples, RobotDataset
from spear_lightning.robot_data.frame_cache import CacheKind, FrameCache
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.robot_data.loader import FiniteLoader, ResumableLoader
from spear_lightning.robot_data.mixture import Weighting
from spear_lightning.robot_data.robot_mixture import RobotMixture
from spear_lightning.robot_data.sample_source import SampleSource
from spear_lightning.robot_data.statistics import MixtureStatistics
from spear_lightning.training.data_module_checks import (
    equal_share,
    gpu_of,
    place_of,
    require_at_least,
    share_of_batch,
)


class RobotDataModule(L.LightningDataModule):
    """Batches of robot episodes from a weighted mixture of RLDS data sets (spec section 9).

    Data sets that have no index yet are indexed first. An epoch is one pass over as many samples as the mixture
    has frames; the stream itself is endless and resumes at any step.

    Args:
        root: Folder or bucket (gs://, s3://) that holds the data sets, RLDS as NAME/VERSION, LeRobot as NAME; the
            one place that says where data is.
        mixture: Registry id -> weight, e.g. `{bridge: 1.0}`.
        cameras: Camera name -> width, height, fit, in the order the model sees them. A camera that a sample
            lacks is masked.
        chunks: Horizon, rate and mode of action chunks.
        batch_size: Samples per step of all processes together.
        weighting: `per_frame`: a data set's share is its weight times its frames; `share`: its weight alone.
        holdout: Share of each data set's episodes kept out of training for validation.
        validation_samples: Held-out samples at most, spread evenly.
        validation_batch_size: Samples per validation batch and process; default: as in training.
        keep_without_instruction: Whether episodes without language are trained on.
        seed: Of the shuffling and of the choice of held-out episodes.
        num_workers: Worker processes per trainer process; 0 reads in the trainer.
        prefetch: Batches each worker prepares ahead.
        index_folder: Where indexes are kept; default: $SPEAR_CACHE_DIR/indexes, or
            ~/.cache/spear-lightning/indexes.
        num_threads: Threads of the trainer's process that read ahead, instead of workers (`num_workers` 0): they
            start at once and need little memory. 0 reads when the model asks.
        frame_cache: Keeps every picture at the size the model sees, made once before training, beside the indexes:
            `exact` as it is (3 bytes a pixel, the same to the bit), `jpeg` encoded once more (quality 95: about a
            tenth of the size; pixels change by 1 to 2 of 255 levels). Both also for validation.
        scaled_decode: Decodes JPEGs at 1/2, 1/4 or 1/8 of their size where the model sees no more than that.
            Faster; pixels change by about 1 of 255 levels, also against those that a policy makes of live frames.
        shares: Registry id -> share of the samples, whatever its weight; the others divide the rest, e.g.
            `{droid: 0.35}`.
        registry: YAML file of your own registry entries, and of changes to those that ship.
    """

    def __init__(
        self,
        root: str,
        mixture: dict[str, float],
        cameras: dict[str, CameraSpec],
        chunks: ChunkSpec = ChunkSpec(),  # noqa: B008 - frozen
        batch_size: int = 32,
        weighting: Weighting = "per_frame",
        holdout: float = 0.02,
        validation_samples: int = 512,
        validation_batch_size: int | None = None,
        keep_without_instruction: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        prefetch: int = 2,
        index_folder: str | None = None,
        num_threads: int = 0,
        frame_cache: CacheKind | None = None,
        scaled_decode: bool = False,
        shares: dict[str, float] | None = None,
        registry: str | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size, validation_samples=validation_samples, prefetch=prefetch)
        require_at_least(1, validation_batch_size=validation_batch_size)
        require_at_least(0, num_workers=num_workers, num_threads=num_threads)
        self.root = root
        self.weights = mixture
        self.cameras = cameras
        self.chunks = chunks
        self.batch_size = batch_size
        self.weighting: Weighting = weighting
        self.holdout = holdout
        self.validation_samples = validation_samples
        self.validation_batch_size = validation_batch_size
        self.keep_without_instruction = keep_without_instruction
        self.seed = seed
        self.num_workers = num_workers
        self.prefetch = prefetch
        self.index_folder = index_folder
        self.num_threads = num_threads
        self.frame_cache = frame_cache
        self.scaled_decode = scaled_decode
        self.shares = shares
        self.registry = registry
        self._mixture: RobotMixture | None = None

    @property
    def interface(self) -> PolicyInterface:
        """What a policy trained on this data sees and emits."""
        return PolicyInterface(self.cameras, self.chunks.horizon, self.chunks.rate_hz, self.chunks.mode)

    @property
    def statistics(self) -> MixtureStatistics:
        """Quantiles of the mixture; computed on first use, then cached beside the indexes."""
        return self.open_mixture().statistics()

    def open_mixture(self) -> RobotMixture:
        """Open the data sets; builds missing indexes."""
        if self._mixture is None:
            self._mixture = RobotMixture(
                self.root,
                self.weights,
                self.chunks,
                self.weighting,
                self.holdout,
                self.keep_without_instruction,
                self.seed,
                self.index_folder,
                self.shares,
                self.registry,
            )
        return self._mixture

    def prepare_data(self) -> None:
        """Index, measure and make the frame cache, on one process per node."""
        _ = self.statistics
        self._cached()

    def setup(self, stage: str) -> None:
        """Open the data sets on every process."""
        self.open_mixture()

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of the endless training stream."""
        mixture = self.open_mixture()
        world_size = self.trainer.world_size if self.trainer else 1
        return ResumableLoader(
            self._dataset(mixture.training, mixture.stream()),
            share_of_batch(self.batch_size, world_size),
            epoch_batches=max(1, mixture.num_samples // self.batch_size),
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=world_size,
            num_workers=self.num_workers,
            prefetch=self.prefetch,
            device=gpu_of(self.trainer),
            data=mixture.fingerprint(),
            num_threads=self.num_threads,
        )

    def _dataset(self, sources: Sequence[SampleSource], finder: FindsSamples) -> RobotDataset:
        return RobotDataset(sources, finder, self.cameras, self.chunks, self.scaled_decode, self._cached())

    def _cached(self) -> Sequence[Mapping[str, FrameCache]] | None:
        if self.frame_cache is None:
            return None
        return self.open_mixture().frame_caches(self.cameras, self.frame_cache)

    def transfer_batch_to_device(self, batch: RobotBatch, device: torch.device, dataloader_idx: int) -> RobotBatch:
        """Copy a batch that the loader has not copied already."""
        return batch.to(device, non_blocking=True)

    def val_dataloader(self) -> FiniteLoader | list[FiniteLoader]:
        """Return the loader of held-out samples; none if nothing is held out."""
        mixture = self.open_mixture()
        sizes = [len(source) for source in mixture.held_out]
        if sum(sizes) == 0:
            return []
        samples = EvenSamples(sizes, self.validation_samples)
        dataset = self._dataset(mixture.held_out, samples)
        rank, world_size = place_of(self.trainer)
        places = equal_share(len(samples), rank, world_size)
        batch_size = self.validation_batch_size or max(1, self.batch_size // world_size)
        return FiniteLoader(dataset, places, batch_size, self.num_workers, gpu_of(self.trainer), self.num_threads)

    def test_dataloader(self) -> FiniteLoader | list[FiniteLoader]:
        """Return the held-out samples."""
        return self.val_dataloader()

    def predict_dataloader(self) -> FiniteLoader | list[FiniteLoader]:
        """Return the held-out samples."""
        return self.val_dataloader()
