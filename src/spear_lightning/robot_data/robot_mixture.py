"""A weighted mixture of robot data sets under one root: opened, divided into training and held-out, measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from spear_lightning.errors import DataError
from spear_lightning.robot_data.chunks import ChunkSpec, frames_ahead
from spear_lightning.robot_data.frame_cache import CacheKind, FrameCache
from spear_lightning.robot_data.frame_cache_build import ensure_frame_caches
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.robot_data.index_build import ensure_index
from spear_lightning.robot_data.index_store import default_index_root
from spear_lightning.robot_data.mixture import SampleStream, Weighting, mixture_shares
from spear_lightning.robot_data.registry import entry_of, read_registry
from spear_lightning.robot_data.sample_source import SampleSource, split_episodes
from spear_lightning.robot_data.statistics import (
    MixtureStatistics,
    mixture_statistics,
    read_statistics,
    write_statistics,
)


class RobotMixture:
    """Data sets with weights; builds missing indexes.

    Args:
        root: Folder or bucket (gs://, s3://, ...) that holds NAME/VERSION folders of RLDS data sets.
        weights: Registry id -> weight.
        chunks: What a chunk of actions is.
        weighting: "per_frame" (weight times frames) or "share" (weight alone).
        holdout: Share of each data set's episodes held out for validation.
        keep_without_instruction: Whether episodes without language are used.
        seed: Of the shuffling and of the choice of held-out episodes.
        index_folder: Where indexes are kept; default: `default_index_root()`.
        shares: Registry id -> share of the samples, whatever its weight; the others divide the rest.
        registry: File of registry entries beside those that ship (see `read_registry`).

    Attributes:
        training: Per data set, the frames trained on.
        held_out: Per data set, the frames held out.
        shares: float64, share of each data set in the mixture.

    Raises:
        ConfigError: If a data set is unknown, a weight is not positive, or the shares do not work out.
        DataError: If a data set is missing, broken, or nothing of it can be used.
    """

    def __init__(
        self,
        root: str | Path,
        weights: Mapping[str, float],
        chunks: ChunkSpec,
        weighting: Weighting = "per_frame",
        holdout: float = 0.02,
        keep_without_instruction: bool = False,
        seed: int = 0,
        index_folder: str | Path | None = None,
        shares: Mapping[str, float] | None = None,
        registry: str | Path | None = None,
    ) -> None:
        self.chunks = chunks
        self.seed = seed
        self._index_root = Path(index_folder) if index_folder else default_index_root()
        # All ids are checked before the first index is built.
        known = read_registry(registry)
        entries = [entry_of(dataset, known) for dataset in weights]
        indexes = [ensure_index(root, entry, index_root=self._index_root) for entry in entries]
        self.training: list[SampleSource] = []
        self.held_out: list[SampleSource] = []
        for entry, index in zip(entries, indexes, strict=True):
            # A data set that has no instructions at all is used without.
            wordless = keep_without_instruction or not entry.instruction
            kept, held = split_episodes(index, holdout, wordless, seed)
            self.training.append(SampleSource(index, kept, chunks))
            if len(self.training[-1]) == 0:
                longest = np.diff(index.episode_starts)[kept].max()
                raise DataError(
                    "No episode of the data set is long enough for a chunk",
                    where=index.folder,
                    found=f"{len(kept)} episodes to train on, the longest of {longest} frames",
                    expected=f"a frame to start from, and {frames_ahead(index.rate_hz, chunks)} after it",
                    remedy=f"leave {entry.id} out of data.mixture, or change data.chunks",
                )
            self.held_out.append(SampleSource(index, held, chunks))
        sizes = {dataset: len(source) for dataset, source in zip(weights, self.training, strict=True)}
        self.shares = mixture_shares(weights, sizes, weighting, shares)

    @property
    def num_samples(self) -> int:
        """Training frames that may start a chunk, over all data sets."""
        return sum(len(source) for source in self.training)

    def stream(self) -> SampleStream:
        """Return the endless stream of training samples."""
        return SampleStream([len(source) for source in self.training], self.shares, self.seed)

    def frame_caches(self, cameras: Mapping[str, CameraSpec], kind: CacheKind) -> list[dict[str, FrameCache]]:
        """Return each data set's pictures at the size the model sees; made on first use, beside the indexes.

        Args:
            cameras: Camera name -> size and fit.
            kind: How pictures are kept.
        """
        return ensure_frame_caches(self._index_root, [source.index for source in self.training], cameras, kind)

    def fingerprint(self) -> str:
        """Return a short hash of what is trained on, held out, and how it is mixed."""
        parts = [source.fingerprint() for source in (*self.training, *self.held_out)]
        return hashlib.sha256(json.dumps([parts, self.shares.tolist(), self.seed]).encode()).hexdigest()[:16]

    def statistics(self) -> MixtureStatistics:
        """Return the mixture's quantiles: computed once, then read from a file beside the indexes."""
        # The names of indexes change with the files that they were made of.
        indexes = [source.index.folder.name for source in self.training]
        told = json.dumps([asdict(self.chunks), self.fingerprint(), indexes])
        digest = hashlib.sha256(told.encode()).hexdigest()[:12]
        path = self._index_root / f"statistics-{digest}.json"
        if path.is_file():
            return read_statistics(path)
        statistics = mixture_statistics(self.training, self.shares, self.chunks)
        write_statistics(path, statistics)
        return statistics
