"""Which labelled images are trained on, which are held out, and how several data sets of them are mixed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from spear_lightning.errors import ConfigError
from spear_lightning.labeling.records import ImageLabel
from spear_lightning.labeling.store import LabelStore
from spear_lightning.robot_data.mixture import SampleStream, Weighting, mixture_shares
from spear_lightning.vqa.task import clean_name

WITH_MASKS = 256
"""Groups of labels with masks that a process keeps decoded."""

CHUNK = 256
"""Places of a stream that are looked up at a time."""


class LabelledImages:
    """Some images of a label store.

    Args:
        store: The labels.
        indices: Which of them.
    """

    def __init__(self, store: LabelStore, indices: np.ndarray) -> None:
        self.store, self.indices = store, indices

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    def read(self, index: int) -> tuple[ImageLabel, np.ndarray]:
        """Return a label and its image (see `LabelStore.read`)."""
        return self.store.read(int(self.indices[index]))

    def label(self, index: int) -> ImageLabel:
        """Return a label."""
        return self.store[int(self.indices[index])]

    @cached_property
    def nameable(self) -> np.ndarray:
        """How many objects of each image have a name that occurs once, int64 (n,)."""
        counts = np.fromiter(map(_nameable, self.store.object_names()), np.int64, len(self.store))
        return counts[self.indices]

    def fingerprint(self) -> str:
        """Return a short hash of which labels these are."""
        return hashlib.sha256(self.store.fingerprint().encode() + self.indices.tobytes()).hexdigest()[:16]


def _nameable(names: list[str]) -> int:
    times = Counter(map(clean_name, names))
    return sum(count == 1 and bool(name) for name, count in times.items())


def split_labels(store: LabelStore, holdout: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Divide the images of a store into those trained on and those held out, each by a hash of its id.

    An image stays where it is when others are added to the store. Frames of one video look alike: hold such data
    out by folders of their own.

    Args:
        store: The labels.
        holdout: Share that is held out, in [0, 1); about as many images are.
        seed: Of the choice.

    Raises:
        ConfigError: If nothing would be left to train on.
    """
    values = np.fromiter((_hash(seed, name) for name in store.image_ids()), np.float64, len(store))
    held = values < holdout
    if not 0 <= holdout < 1 or held.all():
        raise ConfigError(
            "No labelled images are left to train on",
            where="data.holdout",
            found=f"{holdout} of {len(store)} images",
            expected="a share in [0, 1)",
        )
    return LabelledImages(store, np.flatnonzero(~held)), LabelledImages(store, np.flatnonzero(held))


def _hash(seed: int, image_id: str) -> float:
    """Return a number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


class LabelMixture:
    """Label stores with weights.

    Args:
        folders: Folder of a label store -> weight.
        weighting: "per_frame" (weight times images) or "share" (weight alone).
        holdout: Share of each store's images held out for validation.
        seed: Of the shuffling and of the choice of held-out images.
        masks: Whether labels come with the objects' masks, which most questions do not need.

    Attributes:
        training: Per store, the images trained on.
        held_out: Per store, the images held out.
        shares: float64, share of each store in the mixture.

    Raises:
        ConfigError: If a weight is not positive.
        DataError: If a store is missing or broken.
    """

    def __init__(
        self,
        folders: Mapping[str, float],
        weighting: Weighting = "per_frame",
        holdout: float = 0.02,
        seed: int = 0,
        masks: bool = False,
    ) -> None:
        self.seed = seed
        # A group of labels with masks takes megabytes, in every process that reads.
        cached = {"cached_groups": WITH_MASKS} if masks else {}
        parts = [split_labels(LabelStore(Path(folder), masks, **cached), holdout, seed) for folder in folders]
        self.training = [kept for kept, _ in parts]
        self.held_out = [held for _, held in parts]
        sizes = {folder: len(kept) for folder, kept in zip(folders, self.training, strict=True)}
        self.shares = mixture_shares(folders, sizes, weighting)

    def stream(self) -> SampleStream:
        """Return the endless stream of training images."""
        return SampleStream([len(part) for part in self.training], self.shares, self.seed)

    def labels(self, count: int) -> Iterator[ImageLabel]:
        """Yield labels of the first `count` images of the training stream: a fair sample of the mixture."""
        total = min(count, sum(map(len, self.training)))
        return islice(self._labels(), total)

    def _labels(self) -> Iterator[ImageLabel]:
        stream, start = self.stream(), 0
        while True:
            datasets, images = stream[np.arange(start, start + CHUNK)]
            for dataset, image in zip(datasets.tolist(), images.tolist(), strict=True):
                yield self.training[dataset].label(image)
            start += CHUNK

    def fingerprint(self) -> str:
        """Return a short hash of what is trained on, held out, and how it is mixed."""
        parts = [part.fingerprint() for part in (*self.training, *self.held_out)]
        return hashlib.sha256(json.dumps([parts, self.shares.tolist(), self.seed]).encode()).hexdigest()[:16]


class AvailableObjects:
    """Places in a stream of images -> how many of their objects can be asked about.

    Args:
        sources: Images of each data set.
        stream: Place -> (data set, image).
    """

    def __init__(self, sources: list[LabelledImages], stream: SampleStream) -> None:
        self._counts = [source.nameable for source in sources]
        self._stream = stream

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Return int64 (n,) of places (n,)."""
        datasets, images = self._stream[places]
        found = np.zeros(len(places), np.int64)
        for number, counts in enumerate(self._counts):
            chosen = datasets == number
            found[chosen] = counts[images[chosen]]
        return found
