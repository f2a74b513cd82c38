"""The frames of one data set that a run trains on, or holds out for validation."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.robot_data.chunks import ChunkSpec, frames_ahead
from spear_lightning.robot_data.episode_index import EpisodeIndex


class SampleSource:
    """Some episodes of an indexed data set: S frames that may start a chunk, numbered 0 .. S-1.

    Memory: 16 bytes per episode, whatever the number of frames.

    Args:
        index: The data set.
        episodes: int64, ascending, which of its episodes.
        chunks: What a chunk is: a frame whose first target lies past the end of its episode starts none.
    """

    def __init__(self, index: EpisodeIndex, episodes: np.ndarray, chunks: ChunkSpec) -> None:
        self.index = index
        self.episodes = episodes
        self._first = index.episode_sample_starts[episodes]
        # Samples ascend, so those too close to the end of an episode are its last ones.
        latest = index.episode_starts[episodes + 1] - 1 - frames_ahead(index.rate_hz, chunks)
        counts = np.searchsorted(index.samples, latest, side="right") - self._first
        self._cumulative = np.concatenate([[0], np.cumsum(np.maximum(counts, 0))])

    def __len__(self) -> int:
        """Return the number of frames that may start a chunk."""
        return int(self._cumulative[-1])

    def fingerprint(self) -> str:
        """Return a short hash of which frames these are and how they are read, wherever the data lies on disk."""
        told = [self.index.dataset, self.index.description.get("conventions")]
        digest = hashlib.sha256(json.dumps(told).encode())
        for part in (self.episodes, self._first, self._cumulative, self.index.episode_starts[self.episodes]):
            digest.update(np.ascontiguousarray(part, np.int64).tobytes())
        return digest.hexdigest()[:16]

    def frames(self, samples: np.ndarray) -> np.ndarray:
        """Return the frames, int64, of samples numbered 0 .. len-1."""
        place = np.searchsorted(self._cumulative, samples, side="right") - 1
        return np.asarray(self.index.samples[self._first[place] + samples - self._cumulative[place]])


def split_episodes(
    index: EpisodeIndex, holdout: float, keep_without_instruction: bool, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Divide the episodes of a data set into those to train on and those held out.

    Args:
        index: The data set.
        holdout: Share of the episodes to hold out, in [0, 1); at least one if positive and there are two.
        keep_without_instruction: Whether episodes without an instruction are used.
        seed: Which episodes are held out.

    Returns:
        Episode numbers (training, held out), ascending.

    Raises:
        ConfigError: If the share is not in [0, 1).
        DataError: If nothing is left to train on.
    """
    if not 0 <= holdout < 1:
        raise ConfigError("The share of held-out episodes is out of range", where="data.holdout", found=holdout)
    with_samples = np.diff(index.episode_sample_starts) > 0
    if not keep_without_instruction:
        with_samples &= np.array([bool(text) for text in index.instructions])[np.asarray(index.instruction_ids)]
    episodes = np.flatnonzero(with_samples)
    count = round(holdout * len(episodes))
    if holdout > 0 and len(episodes) > 1:
        count = min(max(count, 1), len(episodes) - 1)
    if len(episodes) == 0:
        raise DataError(
            "No episode of the data set can be used",
            where=index.folder,
            found=f"{index.num_episodes} episodes, none with an instruction and a frame",
            remedy="set data.keep_without_instruction to true to train without language",
        )
    digest = hashlib.sha256(f"{index.dataset}:{seed}".encode()).digest()
    order = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(episodes)
    return np.sort(order[count:]), np.sort(order[:count])
