"""Where the pictures of a camera come from: any frame of one data set -> pixels in their place in a batch."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from spear_lightning.robot_data.episode_index import EpisodeIndex
from spear_lightning.robot_data.images import CameraSpec, fit_image_into


class Pictures(Protocol):
    """The pictures of one camera of one data set, at the size the model sees."""

    def read_into(self, frame: int, episode: int, out_3HW: Tensor) -> bool:
        """Write the picture of a frame into uint8 (3, height, width), channels-last.

        Returns:
            Whether the frame has a picture; if not, the pixels are left as they are.

        Raises:
            BrokenImage: If it cannot be decoded.
            DataError: If its file cannot be read.
        """

    def fetch(self, frames: np.ndarray, episodes: np.ndarray) -> None:
        """Prepare for reading the pictures of some frames, int64 (n,), next."""


class EncodedPictures:
    """Pictures decoded and resized from the data set's own shards.

    Args:
        index: The data set.
        source: Its camera.
        camera: Size and fit.
        scaled_decode: Whether JPEGs are decoded at a fraction of their size where that is enough.
    """

    def __init__(self, index: EpisodeIndex, source: str, camera: CameraSpec, scaled_decode: bool = False) -> None:
        self._index, self._source, self._camera = index, source, camera
        self._decoded_for = camera if scaled_decode else None

    def fetch(self, frames: np.ndarray, episodes: np.ndarray) -> None:
        """Fetch pictures that are in a bucket together (see `Pictures`)."""
        self._index.fetch(self._source, frames, episodes)

    def read_into(self, frame: int, episode: int, out_3HW: Tensor) -> bool:
        """Decode and resize a frame's picture (see `Pictures`)."""
        if not self._index.has_image(self._source, frame, episode):
            return False
        picture_HW3 = self._index.read_image(self._source, frame, episode, self._decoded_for)
        fit_image_into(picture_HW3, self._camera, out_3HW)
        return True
