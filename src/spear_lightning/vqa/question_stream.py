"""Which tasks the sample at each place of the endless stream has, and batches of samples of like length.

Padding wastes little if the samples of a batch are about equally long. How long a sample is follows mostly from
the tasks it is to have, which are drawn without looking at any image; so within a window of some batches the
places are sorted by planned length, cut into batches, and the batches shuffled. All is a pure function of (seed,
place): the same for any number of processes and workers, and exactly resumable.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from spear_lightning.errors import ConfigError
from spear_lightning.vqa.mixture import TaskMixture

CACHED = 4
"""Windows whose plans are kept; workers read a few batches ahead."""


class Window(NamedTuple):
    """The plans of some consecutive places.

    Attributes:
        plans: (W, max_pairs) numbers of tasks, by `order`ed place.
        order: (W,) for each place of the window, the place in the sample stream that comes there.
    """

    plans: np.ndarray
    order: np.ndarray


class QuestionStream:
    """Place -> (place in the stream of images, planned tasks).

    Args:
        mixture: Draws the plans.
        global_batch_size: Samples of a step over all processes.
        seed: Of the plans and the order.
        window_batches: Batches whose samples are sorted by length together; 1 sorts nothing.
        lengths: (tasks,) tokens of one question and answer of each task (`measure_lengths`); default: all alike.
        available: Places in the stream of images (n,) -> (n,) how many objects can be asked about; default: many.

    Raises:
        ConfigError: If a size is not positive.
    """

    def __init__(
        self,
        mixture: TaskMixture,
        global_batch_size: int,
        seed: int,
        window_batches: int = 32,
        lengths: np.ndarray | None = None,
        available: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        if min(global_batch_size, window_batches) < 1:
            raise ConfigError(
                "Batches and windows hold at least one sample",
                where="data.batch_size, data.window_batches",
                found=(global_batch_size, window_batches),
            )
        self._mixture, self._seed = mixture, seed
        self._batch, self._batches = global_batch_size, window_batches
        lengths = np.ones(len(mixture.tasks)) if lengths is None else np.asarray(lengths, np.float64)
        # The last one is that of number -1: no task.
        self._lengths = np.append(lengths, 0.0)
        self._available = available
        self._cache: OrderedDict[int, Window] = OrderedDict()

    def __getitem__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return places (n,) in the stream of images, and plans (n, max_pairs), of places (n,) >= 0."""
        size = self._batch * self._batches
        places = np.asarray(places, np.int64)
        numbers = places // size
        sources, plans = np.empty_like(places), None
        for number in np.unique(numbers):
            window = self._window(int(number))
            chosen = numbers == number
            inside = window.order[places[chosen] - number * size]
            sources[chosen] = number * size + inside
            if plans is None:
                plans = np.empty((len(places), window.plans.shape[1]), np.int64)
            plans[chosen] = window.plans[inside]
        return sources, np.zeros((0, 1), np.int64) if plans is None else plans

    def _window(self, number: int) -> Window:
        if number in self._cache:
            return self._cache[number]
        rng = np.random.default_rng([self._seed, 1, number])
        size = self._batch * self._batches
        plans = self._mixture.plan(size, rng)
        if self._available is not None:
            plans = self._mixture.fitted(plans, self._available(number * size + np.arange(size)))
        order = np.arange(len(plans))
        if self._batches > 1:
            # Equally long ones in random order; then batches of like ones, in random order.
            shuffled = rng.permutation(len(plans))
            length = self._lengths[plans[shuffled]].sum(-1)
            batches = shuffled[np.argsort(length, kind="stable")].reshape(self._batches, self._batch)
            # Within a batch too: each process takes a part of it.
            batches = rng.permuted(batches, axis=1)
            order = batches[rng.permutation(self._batches)].ravel()
        self._cache[number] = Window(plans, order)
        if len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return self._cache[number]
