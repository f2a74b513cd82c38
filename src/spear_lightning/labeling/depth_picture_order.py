"""Pictures with depth in the order in which a network is trained on them."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Dataset

from spear_lightning.batches import GeometryBatch
from spear_lightning.labeling.depth_pictures import DepthPictures
from spear_lightning.robot_data.permutation import permute_each


class ShuffledPictures(Dataset[GeometryBatch]):
    """The first pictures of a store, in another order in every epoch; its items are whole batches.

    Args:
        pictures: The store.
        count: How many of its pictures are trained on: the first ones, so that no scene is on both sides.
        seed: Of the order.
    """

    def __init__(self, pictures: DepthPictures, count: int, seed: int) -> None:
        self.pictures, self.count, self.seed = pictures, count, seed

    def __getitem__(self, places: list[int]) -> GeometryBatch:
        """Return the pictures at places of the endless stream."""
        epochs, index = np.divmod(np.asarray(places, np.int64), self.count)
        unique, which = np.unique(epochs, return_inverse=True)
        keys = [self.seed * 1_000_003 + int(epoch) for epoch in unique]
        return self.pictures.read(permute_each(index, self.count, keys, which), places)

    def __getitems__(self, places: list[int]) -> GeometryBatch:
        """Do the same: torch's loader asks so for batches."""
        return self[places]
